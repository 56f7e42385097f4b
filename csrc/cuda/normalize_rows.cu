// normalize_rows: y = x / max(|x|, 1e-12), the canonical normalisation, and its closed-form backward
// dx = (g - (g.y) y) / |x|, in the order of operations of cpu/normalize_rows.cpp.
// Layout: rows [N, C]; eight lanes have a row (rows.cuh). One launch each. Bytes a row: 2 C numbers forward and 3 C
// backward, as the second reading comes from the first-level cache; 3 C and 7 C operations. N = 65536, C = 32 in
// float32: 16.8 and 25.2 MB, at least 8.4 and 12.6 us on an A100, 5.0 and 7.5 us on an H100, the time of the copy.
// Paper arithmetic, never run on a GPU.
#include "common/ops.h"
#include "cuda/rows.cuh"

TOKENFLOW_BEGIN

struct Normalized {
  const void* x;
  const void* grad_y;  // none: forward
  void* out;           // y, or grad_x
  Type type;
  int64_t rows, channels;
};

static __global__ void __launch_bounds__(kTeamThreads) normalize_kernel(Normalized job) {
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * kTeamRows + team_of_block();
  const int64_t row = wanted < job.rows ? wanted : job.rows - 1, at = row * job.channels;
  const auto x = [&](int64_t d) { return number(job.x, job.type, at + d); };
  const auto g = [&](int64_t d) { return number(job.grad_y, job.type, at + d); };
  const float norm = team_norm(job.channels, x);
  float along = 0;
  if (job.grad_y) {
    along = team_dot(job.channels, [&](int64_t d) { return g(d) * x(d); });
    along = norm > 1e-12f ? along / norm / norm : 0;
  }
  if (row != wanted) return;
  for (int64_t d = lane_of_team(); d < job.channels; d += kTeam) {
    const float value = job.grad_y ? (g(d) - along * x(d)) / norm : x(d) / norm;
    set_number(job.out, job.type, at + d, value);
  }
}

static void normalize(Call& call, const View& x, const void* grad_y, const View& out) {
  if (call.counting) return;
  launch(call, normalize_kernel, blocks_for(x.shape[0], kTeamRows), dim3(kTeamThreads), 0,
         Normalized{x.data, grad_y, out.data, x.type, x.shape[0], x.shape[1]});
}

Error normalize_rows(Call& call, View x, View y) noexcept {
  x = as_rows(x);
  if (!dense_on(x, 2) || !floating(x) || x.type == kFloat64)
    return "normalize_rows: x: wanted contiguous float32, float16 or bfloat16 [..., C] on CUDA";
  if (!holds_on(y, x.type, x.shape[0] * x.shape[1])) return "normalize_rows: y: wanted the shape and type of x";
  normalize(call, x, nullptr, y);
  return nullptr;
}

Error normalize_rows_backward(Call& call, View x, View grad_y, View grad_x) noexcept {
  x = as_rows(x);
  if (!dense_on(x, 2) || !floating(x) || x.type == kFloat64)
    return "normalize_rows_backward: x: wanted contiguous float32, float16 or bfloat16 [..., C] on CUDA";
  if (!holds_on(grad_y, x.type, x.shape[0] * x.shape[1]) || !holds_on(grad_x, x.type, x.shape[0] * x.shape[1]))
    return "normalize_rows_backward: wanted gradients of the shape and type of x";
  normalize(call, x, grad_y.data, grad_x);
  return nullptr;
}

TOKENFLOW_END
