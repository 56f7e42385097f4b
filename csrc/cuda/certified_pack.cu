// Rounding for the certified search (certified.cuh): panels of float32 become bfloat16 in the order in which the tensor
// cores take them, with norms and what rounding took, for the bound.
// Layout: of 16 items and 16 channels, lane 4 g + t of a warp has four registers. Rows: items g and g + 8 at channels 2
// t and 2 t + 1, then both at 2 t + 8 and 2 t + 9, A of mma_bf16 (gpu.h). Codes: item g at both, then item g + 8, twice
// B. So a fragment is one load of 16 bytes into neighbouring registers, without conflicts and without ldmatrix. Bytes:
// 4 G K C read, 2 G K C written (C in sixteens), likewise for rows. N = 16384, C = 32: 3 MB, 1.6 us on A100 (2.0 TB/s),
// 0.9 us on H100 (3.35 TB/s). Paper arithmetic, never run on a GPU.
#include "cuda/certified.cuh"

TOKENFLOW_BEGIN

constexpr int kPanelFours = kPanel * 16 * 2 / 16;  // of 16 bytes: a panel's bfloat16 of 16 channels

// A block has a panel, a thread one item of it.
static __global__ void __launch_bounds__(kPanel) round_kernel(Rounding job) {
  SHARED_ALIGNED(16, unsigned, words, [kPanel * 8]);
  SHARED(float4, sizes, [kPanel]);
  const int item = threadIdx.x, lines = padded(job.channels), steps = (job.channels + 15) / 16;
  const int64_t panels = pieces_of(job.count, kPanel), panel = blockIdx.x;
  const bool there = panel % panels * kPanel + item < job.count;
  const float* const from = job.panels + panel * (lines + 1) * kPanel + (job.as_rows ? item : place_of(item));
  uint4* const to = job.halves + panel * steps * kPanelFours;
  if (job.failed && item == 0) job.failed[panel] = 0;

  float square = 0, gap = 0;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      unsigned word = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = step * 16 + pair * 2 + i;
        const float x = d < job.channels ? from[static_cast<int64_t>(d) * kPanel] : 0;
        const unsigned half = half_of(x);
        const float rest = x - from_bfloat16(static_cast<uint16_t>(half));  // exact
        square = fmaf(x, x, square);
        gap = fmaf(rest, rest, gap);
        word |= half << 16 * i;
      }
      const int which = item % 16 / 8, where = job.as_rows ? which + pair / 4 * 2 : which * 2 + pair / 4;
      words[(item / 16 * 32 + item % 8 * 4 + pair % 4) * 4 + where] = word;
    }
    __syncthreads();
#pragma unroll
    for (int i = item; i < kPanelFours; i += kPanel)
      to[step * kPanelFours + i] = reinterpret_cast<const uint4*>(words)[i];
    __syncthreads();
  }

  // Raised by more than roundings and squares that underflow can have taken.
  const float n = static_cast<float>(job.channels), up = 1 + (n + 16) * 0x1p-23f, least = n * 1e-18f;
  const float norm = sqrtf(square) * up + least, away = sqrtf(gap) * up + least;
  const float last = from[static_cast<int64_t>(lines) * kPanel];
  if (job.as_rows) {
    job.sizes[panel * kPanel + item] = make_float4(norm, away, last, 0);
    return;
  }
  const bool good = norm <= kMostNorm && fabsf(last) <= kMostStart;
  sizes[item] = !there ? make_float4(0, 0, 0, 0)
                : good ? make_float4(norm, away, fabsf(last), 0)
                       : make_float4(INFINITY, 0, 0, 0);
  for (int half = kSegment / 2; half > 0; half /= 2) {
    __syncthreads();
    if (item % kSegment >= half) continue;
    const float4 a = sizes[item], b = sizes[item + half];
    sizes[item] = make_float4(fmaxf(a.x, b.x), fmaxf(a.y, b.y), fmaxf(a.z, b.z), 0);
  }
  if (item % kSegment == 0) job.sizes[panel * (kPanel / kSegment) + item / kSegment] = sizes[item];
}

void round_to_halves(Call& call, const Rounding& job, int64_t groups) {
  launch(call, round_kernel, dim3(static_cast<unsigned>(groups * pieces_of(job.count, kPanel))), dim3(kPanel), 0, job);
}

TOKENFLOW_END
