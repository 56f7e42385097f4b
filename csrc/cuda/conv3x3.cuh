// phi on planes: step = (1 - ratio) u + ratio (conv3x3(u) + bias), zero padding, in the order of cpu/conv3x3.h:
//   out[d, y, x] = bias_d + sum over taps (i, j), then channels c, of u[c, y + i - 1, x + j - 1] kernel[i, j, c, d]
// with products and sums rounded one by one, tap rows beyond the map skipped, tap columns beyond it zeros.
// Layout: u [B, C, H, W]; kernel [9, C in, D], D = C out padded to 4. A thread has one pixel and four output channels;
// 32 neighbours in a warp share the kernel's four, the four warps of a block their pixels, both through the first-level
// cache (32 channels at 16 x 16: 32 KB of map, 36 KB of kernel).
// Per number of the map: 18 C operations (no fused ones: products are rounded as on processors without them).
// phi's transpose is phi with the kernel turned around and no bias.
#pragma once
#include "cuda/resample.cuh"

TOKENFLOW_BEGIN

constexpr int kMaxScales = 128;
constexpr int kQuads = 4;  // quads of output channels in a block, a warp each

TOKENFLOW_DEVICE static inline int64_t padded(int64_t channels) { return (channels + 3) / 4 * 4; }
TOKENFLOW_DEVICE static inline int64_t kernel_numbers(int64_t channels) { return 9 * channels * padded(channels); }

// Number i of a kernel [9, C in, D] from weight [C out, C in, 3, 3]; `turned`: of the transpose, [9, C out, D], taps
// backwards.
static __device__ inline float kernel_number(const float* weight, int64_t channels, bool turned, int64_t i) {
  const int64_t d = i % padded(channels), c = i / padded(channels) % channels, tap = i / padded(channels) / channels;
  if (d >= channels) return 0;
  return turned ? weight[(c * channels + d) * 9 + 8 - tap] : weight[(d * channels + c) * 9 + tap];
}

// Maps [B, S, C, H, W], an image's `scales` refined by these rows of phi.
struct PhiRows {
  int scales, row[kMaxScales];
};

struct Refinement {
  const float* map;  // u [B, C, H, W], or [B, S, C, H, W]
  int64_t channels;
  Grid size;
  const float *kernel, *bias;  // [9, C, D]; [C] or null: of the one row of phi, or of all
  float ratio;
  const unsigned* skipped;  // [B] or [B, S]: maps that take no step, or null
  PhiRows rows;             // none: one map an image
  bool shared;              // all scales of an image refine one map, u [B, C, H, W]
};

// use(i, step) for every number i of [B, C, H, W], or of [B, S, C, H, W].
template <class Use>
static __global__ void __launch_bounds__(32 * kQuads, 8) refine_kernel(Refinement phi, Use use) {
  const int pixels = phi.size.cells();
  const unsigned tiles = (pixels + 31) / 32;
  const int pixel = static_cast<int>(blockIdx.x % tiles * 32 + threadIdx.x % 32);
  const unsigned image = blockIdx.x / tiles, scales = phi.rows.scales ? phi.rows.scales : 1;
  const int64_t channels = phi.channels, row = phi.rows.row[image % scales];
  const int64_t d = 4 * (static_cast<int64_t>(blockIdx.y) * kQuads + threadIdx.x / 32);
  if (pixel >= pixels || d >= channels) return;
  const bool skipped = phi.skipped && phi.skipped[image];
  const int y = pixel / phi.size.w, x = pixel % phi.size.w;
  const float* map = phi.map + (phi.shared ? image / scales : image) * channels * pixels;
  float4 sum = {0, 0, 0, 0};
  if (phi.bias) {
    const float* bias = phi.bias + row * channels + d;
    sum.x = bias[0];
    if (d + 1 < channels) sum.y = bias[1];
    if (d + 2 < channels) sum.z = bias[2];
    if (d + 3 < channels) sum.w = bias[3];
  }
#pragma unroll 1
  for (int i = 0; i < 3 && !skipped; ++i) {
    if (y + i < 1 || y + i > phi.size.h) continue;
#pragma unroll 1
    for (int j = 0; j < 3; ++j) {
      const bool inside = x + j >= 1 && x + j <= phi.size.w;
      const float* from = map + (y + i - 1) * phi.size.w + (inside ? x + j - 1 : x);
      const float* kernel = phi.kernel + (row * 9 + 3 * i + j) * channels * padded(channels) + d;
#pragma unroll 4
      for (int64_t c = 0; c < channels; ++c, from += pixels, kernel += padded(channels)) {
        const float4 w = *reinterpret_cast<const float4*>(kernel);
        const float u = inside ? *from : 0;
        sum.x += u * w.x;
        sum.y += u * w.y;
        sum.z += u * w.z;
        sum.w += u * w.w;
      }
    }
  }
  const float keep = 1 - phi.ratio, out[4] = {sum.x, sum.y, sum.z, sum.w};
  for (int k = 0; k < 4; ++k) {
    if (d + k >= channels) continue;
    const int64_t at = (d + k) * pixels + pixel;
    use(image * channels * pixels + at, skipped ? 0 : keep * map[at] + phi.ratio * out[k]);
  }
}

template <class Use>
static void refine(Call& call, int64_t batch, const Refinement& phi, Use use) {
  const int64_t tiles = (phi.size.cells() + 31) / 32, quads = padded(phi.channels) / 4;
  const int64_t maps = phi.rows.scales ? batch * phi.rows.scales : batch;
  const dim3 grid(static_cast<unsigned>(maps * tiles), static_cast<unsigned>((quads + kQuads - 1) / kQuads));
  launch(call, refine_kernel<Use>, grid, dim3(32 * kQuads), 0, phi, use);
}

TOKENFLOW_END
