// mma_probe: d[n] = a[n] b[n] + c[n] by one mma_bf16 (gpu.h) a warp, registers as the caller lays them out. The tests
// put matrices into registers by the formulas of the PTX ISA, so that an operand which lies elsewhere on a GPU, or in
// this project's emulator, shows without a search around it. Nothing else calls it.
#include "cuda/gpu.h"
#include "cuda/mma_probe.h"

TOKENFLOW_BEGIN

constexpr int kProbeWarps = 4;

struct Probe {
  const unsigned *a, *b;  // [N, 32, 4], [N, 32, 2]: two bfloat16 each
  const float* c;         // [N, 32, 4]
  float* d;               // likewise
  int64_t count;
};

static __global__ void __launch_bounds__(kProbeWarps * 32) probe_kernel(Probe job) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kProbeWarps + threadIdx.x / 32;
  if (n >= job.count) return;
  const int64_t at = n * 32 + threadIdx.x % 32;
  unsigned a[4], b[2];
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = job.a[at * 4 + i], d[i] = job.c[at * 4 + i];
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = job.b[at * 2 + i];
  mma_bf16(d, a, b);
#pragma unroll
  for (int i = 0; i < 4; ++i) job.d[at * 4 + i] = d[i];
}

Error mma_probe(Call& call, View a, View b, View c, View d) noexcept {
  if (!dense_on(a, 3) || a.type != kBFloat16 || a.shape[1] != 32 || a.shape[2] != 8)
    return "mma_probe: a: wanted bfloat16 [N, 32, 8]";
  const int64_t count = a.shape[0];
  if (!dense_on(b, 3) || !holds_on(b, kBFloat16, count * 128) || !holds_on(c, kFloat32, count * 128) ||
      !holds_on(d, kFloat32, count * 128))
    return "mma_probe: wanted b of bfloat16 [N, 32, 4], c and d of float32 [N, 32, 4]";
  if ((reinterpret_cast<uintptr_t>(a.data) | reinterpret_cast<uintptr_t>(b.data)) % 4)
    return "mma_probe: wanted a and b at multiples of 4 bytes";
  if (call.counting) return nullptr;
  const Probe job = {static_cast<const unsigned*>(a.data), static_cast<const unsigned*>(b.data),
                     static_cast<const float*>(c.data), static_cast<float*>(d.data), count};
  launch(call, probe_kernel, dim3(static_cast<unsigned>((count + kProbeWarps - 1) / kProbeWarps)),
         dim3(kProbeWarps * 32), 0, job);
  return nullptr;
}

TOKENFLOW_END
