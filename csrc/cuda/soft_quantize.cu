// soft_quantize's backward; equations in cpu/soft_quantize.cpp, passes in softmax.cuh.
// With a_nk = g_n . v_k as the second product: pack rows, keys, upstream gradients and values, the rows' best logits,
// sweep<rows>, then log Z_n and offset_n = -<a>_n, and for each gradient spread and the sum of its ranges where blocks
// share a tile: nine to eleven launches.
// Per pair 5 C + 3 Dv multiply-adds and 3 exps. N = 4096, K = 16384, C = Dv = 256 (IBQ): 137 GFMA, at least 14 ms on an
// A100, 4.1 ms on an H100. Bytes: all tensors once, (C + Dv + 2) (N + K) numbers of scratch, and at most 512 tiles of
// 64 C partial sums: some 150 MB, 75 us on an A100. Paper arithmetic, never run on a GPU.
// Source: IBQ, 2412.02692; CODA, 2503.17760.
#include "common/ops.h"
#include "cuda/softmax_spread.cuh"

TOKENFLOW_BEGIN

static __global__ void __launch_bounds__(kTileThreads) totals_kernel(Softmax job, int ranges) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  const int64_t g = quotient(i, job.rows.count), n = i - g * job.rows.count;
  if (g >= job.groups) return;
  const Sum sum(job, job.rows, ranges, g, n);
  job.log_total[g * job.rows.padded() + n] = sum.log_total();
  job.offset[g * job.rows.padded() + n] = -sum.mean();
}

Error soft_quantize_backward(Call& call, View x, View keys, View values, View ids, View grad, View grad_x,
                             View grad_keys) noexcept {
  if (!dense_on(x, 3) || !dense_on(keys, 3) || !dense_on(values, 3) || x.type != kFloat32 || keys.type != kFloat32 ||
      values.type != kFloat32)
    return "soft_quantize: wanted contiguous float32 x [N, G, C], keys [G, K, C] and values [G, K, Dv] on CUDA";
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2];
  const int64_t codes = keys.shape[1], width = values.shape[2];
  if (keys.shape[2] != channels || keys.shape[0] != groups || codes < 1 || channels < 1 || width < 1 ||
      values.shape[0] != groups || values.shape[1] != codes)
    return "soft_quantize: keys: wanted the groups and the width of x, and as many codes as values, at least one";
  if (!dense_on(ids, 2) || ids.type != kInt64 || ids.shape[0] != rows || ids.shape[1] != groups ||
      !holds_on(grad, kFloat32, rows * groups * width))
    return "soft_quantize: wanted int64 ids [N, G] and a gradient [N, G, Dv]";
  const bool to_rows = grad_x.type != kNone, to_codes = grad_keys.type != kNone;
  if ((to_rows && !holds_on(grad_x, kFloat32, rows * groups * channels)) ||
      (to_codes && !holds_on(grad_keys, kFloat32, groups * codes * channels)))
    return "soft_quantize: wanted gradients of the shapes and type of x and keys";
  if (rows * groups > kMostRows || groups * codes > kMostRows)
    return "soft_quantize: wanted at most 2^31 rows and codes on CUDA";
  const Softmax s = take_softmax(call, rows, codes, groups, channels, width, to_rows, to_codes);
  if (call.counting) return nullptr;
  pack_side(call, s, true, false, x.data, channels);
  pack_side(call, s, false, false, keys.data, channels);
  pack_side(call, s, true, true, grad.data, width);
  pack_side(call, s, false, true, values.data, width);
  tops(call, s, keys, ids, nullptr);
  sweep<true, kProducts>(call, s);
  launch(call, totals_kernel, blocks_for(rows * groups, kTileThreads), dim3(kTileThreads), 0, s,
         ranges_of(s, true).count);
  spread<true, kProducts>(call, s, grad_x);
  spread<false, kProducts>(call, s, grad_keys);
  return nullptr;
}

TOKENFLOW_END
