// Stacks [B, S, C, H, W]: Up of every scale's codes, phi on them and its transpose, and phi's own gradients from maps u
// and g = dstep:
//   dweight[d, c, i, j] = ratio sum over maps and pixels of g[d, y, x] u[c, y + i - 1, x + j - 1],  dbias[d] = ratio
//   sum g
// A block sums those of 32 x 32 channels and one row of phi over a fixed share of the maps, which it passes in tiles of
// 4 x 16 pixels; a thread has two by two channels and nine taps. A second launch adds the shares in order. Fused, 18 C
// operations a number of u: VAR's ten scales of 32 channels at 16 x 16, 32 images, 1.5 G, 77 us on A100 (19.5 TFLOP/s),
// 23 us on H100 (67 TFLOP/s); stacks pass through the cache. Paper arithmetic, never run on a GPU.
#include "cuda/multiscale_gradient.cuh"

TOKENFLOW_BEGIN

static PhiRows phi_rows(const Loop& loop) {
  PhiRows rows = {loop.scales.count};
  for (int s = 0; s < loop.scales.count; ++s) rows.row[s] = static_cast<int>(loop.grids[3 * s + 2]);
  return rows;
}

struct Upsample {
  const float* code_rows;  // [B, L, C]
  float* stack;            // [B, S, C, H, W]
  int first;               // scale of blocks (.., 0)
};

// A slice of one scale's map.
static __global__ void __launch_bounds__(kThreads) upsample_kernel(Loop loop, Upsample call) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  const int s = call.first + static_cast<int>(blockIdx.y);
  int64_t at = slice.image * loop.length;
  for (int before = 0; before < s; ++before) at += loop.scales.cells(before);
  const Axes bicubic = loop.bicubic(s);
  load_rows(cut, slice, call.code_rows + at * loop.channels, bicubic.in.cells(), space.planes[0]);
  __syncthreads();
  widen(bicubic, space.planes[0], slice.planes, space.planes[1]);
  __syncthreads();
  float* map = call.stack + (slice.image * (loop.scales.count - 1) + s) * loop.map();
  for_step(bicubic, cut, slice, space.planes[1], [&](int64_t i, int, float step) { map[i] = step; });
}

void upsample(Call& call, const Loop& loop, int64_t images, const float* code_rows, float* stack) {
  const int scales = loop.scales.count, together = loop.space ? 1 : scales;
  for (int s = 0; s < scales; s += together)
    launch(call, upsample_kernel, dim3(static_cast<unsigned>(images * loop.slices), static_cast<unsigned>(together)),
           dim3(kThreads), loop.space ? 16 : loop.floats * sizeof(float), loop, Upsample{code_rows, stack, s});
}

struct StoreStep {
  float* steps;
  __device__ void operator()(int64_t i, float step) const { steps[i] = step; }
};

void refine_stack(Call& call, const Loop& loop, int64_t images, const float* up, const unsigned* skipped,
                  float* steps) {
  const Refinement phi = {up,         loop.channels, loop.size,      loop.kernels, loop.bias,
                          loop.ratio, skipped,       phi_rows(loop), false};
  refine(call, images, phi, StoreStep{steps});
}

void refine_transposed(Call& call, const Loop& loop, int64_t images, const float* grad_steps, bool shared,
                       float* grad_up) {
  const Refinement phi = {grad_steps, loop.channels, loop.size,      loop.turned, nullptr,
                          loop.ratio, nullptr,       phi_rows(loop), shared};
  refine(call, images, phi, StoreStep{grad_up});
}

// phi's own gradients, of some images: blocks (share, tile of 32 x 32 channels, row of phi) sum over their maps.
constexpr int kPair = 16, kTileRows = 4, kTileColumns = 16;  // a block's channels are twice kPair, its pixels 4 x 16

struct KernelGradient {
  const float *maps, *grads;  // u and dstep, [B, S, C, H, W]; or dstep [B, C, H, W] where `shared`
  bool shared;
  const unsigned* skipped;  // [B, S]: maps without a step, or null
  int64_t batch, channels;
  Grid size;
  PhiRows rows;
  int shares;
  bool more;       // onto what is there
  float* partial;  // [shares, P, 9 C C + C]: as weight and bias lie
};

static __global__ void __launch_bounds__(kPair* kPair) kernel_gradient_kernel(KernelGradient phi) {
  constexpr int kGrads = kTileRows * kTileColumns + 1, kMaps = (kTileRows + 2) * (kTileColumns + 2) + 1;
  SHARED(float, grads, [2 * kPair][kGrads]);
  SHARED(float, maps, [2 * kPair][kMaps]);
  const int64_t channels = phi.channels, tiles = (channels + 2 * kPair - 1) / (2 * kPair);
  const int64_t first_out = blockIdx.y / tiles * 2 * kPair, first_in = blockIdx.y % tiles * 2 * kPair;
  const int out = threadIdx.x % kPair, in = threadIdx.x / kPair;
  int scales = 0;
  for (int s = 0; s < phi.rows.scales; ++s) scales += phi.rows.row[s] == static_cast<int>(blockIdx.z);
  const int64_t count = phi.batch * scales;
  float sum[2][2][9] = {}, bias[2] = {};
  for (int64_t n = blockIdx.x * count / phi.shares; n < (blockIdx.x + 1) * count / phi.shares; ++n) {
    int s = 0;
    for (int nth = static_cast<int>(n % scales); phi.rows.row[s] != static_cast<int>(blockIdx.z) || nth-- > 0;) ++s;
    const int64_t map = n / scales * phi.rows.scales + s, pixels = phi.size.cells();
    if (phi.skipped && phi.skipped[map]) continue;
    const float* u = phi.maps + map * channels * pixels;
    const float* g = phi.grads + (phi.shared ? n / scales : map) * channels * pixels;
    for (int top = 0; top < phi.size.h; top += kTileRows)
      for (int left = 0; left < phi.size.w; left += kTileColumns) {
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * kPair * (kGrads - 1); i += kPair * kPair) {
          const int c = i / (kGrads - 1), y = top + i / kTileColumns % kTileRows, x = left + i % kTileColumns;
          const bool inside = first_out + c < channels && y < phi.size.h && x < phi.size.w;
          grads[c][i % (kGrads - 1)] = inside ? g[(first_out + c) * pixels + y * phi.size.w + x] : 0;
        }
        for (int i = threadIdx.x; i < 2 * kPair * (kMaps - 1); i += kPair * kPair) {
          const int c = i / (kMaps - 1), at = i % (kMaps - 1);
          const int y = top - 1 + at / (kTileColumns + 2), x = left - 1 + at % (kTileColumns + 2);
          const bool inside = first_in + c < channels && y >= 0 && y < phi.size.h && x >= 0 && x < phi.size.w;
          const float number = inside ? u[(first_in + c) * pixels + y * phi.size.w + x] : 0;
          maps[c][at] = number == number ? number : 0;
        }
        __syncthreads();
        for (int y = 0; y < kTileRows; ++y) {
#pragma unroll 4
          for (int x = 0; x < kTileColumns; ++x) {
            const float* from[2] = {maps[in] + y * (kTileColumns + 2) + x,
                                    maps[in + kPair] + y * (kTileColumns + 2) + x};
            for (int a = 0; a < 2; ++a) {
              const float grad = grads[out + a * kPair][y * kTileColumns + x];
              bias[a] += grad;
              for (int b = 0; b < 2; ++b)
                for (int tap = 0; tap < 9; ++tap)
                  sum[a][b][tap] = fmaf(grad, from[b][tap / 3 * (kTileColumns + 2) + tap % 3], sum[a][b][tap]);
            }
          }
        }
      }
  }
  float* const partial = phi.partial + (static_cast<int64_t>(blockIdx.x) * gridDim.z) * channels * (9 * channels + 1);
  for (int a = 0; a < 2; ++a) {
    const int64_t d = first_out + out + a * kPair;
    for (int b = 0; b < 2; ++b) {
      const int64_t c = first_in + in + b * kPair;
      if (d >= channels || c >= channels) continue;
      float* to = partial + ((blockIdx.z * channels + d) * channels + c) * 9;
      for (int tap = 0; tap < 9; ++tap) to[tap] = (phi.more ? to[tap] : 0) + sum[a][b][tap];
    }
    if (d >= channels || in > 0 || first_in > 0) continue;
    float* to = partial + gridDim.z * channels * channels * 9 + blockIdx.z * channels + d;
    *to = (phi.more ? *to : 0) + bias[a];
  }
}

// out[i] = ratio sum over the shares of partial [shares, n]: the weight's numbers, then the bias's.
static __global__ void __launch_bounds__(kPair* kPair)
    kernel_sum_kernel(const float* partial, int shares, int64_t weights, int64_t n, float ratio, float* weight,
                      float* bias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kPair * kPair) + threadIdx.x;
  if (i >= n) return;
  float sum = 0;
  for (int share = 0; share < shares; ++share) sum += partial[share * n + i];
  (i < weights ? weight[i] : bias[i - weights]) = ratio * sum;
}

// Two for each multiprocessor of an H100; the same everywhere, as the order of sums depends on it.
constexpr int64_t kManyBlocks = 264;

PhiSum take_phi_sum(Call& call, const Loop& loop, const View& grad_weight) {
  if (grad_weight.type == kNone) return {};
  const int64_t tiles = (loop.channels + 2 * kPair - 1) / (2 * kPair), blocks = tiles * tiles * loop.phi_rows;
  const int64_t wanted = (kManyBlocks + blocks - 1) / blocks, maps = loop.batch * loop.scales.count + 1;
  const int shares = static_cast<int>(wanted < maps ? wanted : maps);
  return {shares, take<float>(call, shares * loop.phi_rows * loop.channels * (9 * loop.channels + 1))};
}

void PhiSum::add(Call& call, const Loop& loop, int64_t images, const float* up, const float* grad_steps, bool shared,
                 const unsigned* skipped, bool more) const {
  const int64_t tiles = (loop.channels + 2 * kPair - 1) / (2 * kPair);
  const dim3 grid(shares, static_cast<unsigned>(tiles * tiles), static_cast<unsigned>(loop.phi_rows));
  const KernelGradient phi = {up,        grad_steps,     shared, skipped, images, loop.channels,
                              loop.size, phi_rows(loop), shares, more,    partial};
  launch(call, kernel_gradient_kernel, grid, dim3(kPair * kPair), 0, phi);
}

void PhiSum::finish(Call& call, const Loop& loop, bool any, const View& grad_weight, const View& grad_bias) const {
  const int64_t weights = loop.phi_rows * loop.channels * loop.channels * 9,
                n = weights + loop.phi_rows * loop.channels;
  launch(call, kernel_sum_kernel, dim3(static_cast<unsigned>((n + kPair * kPair - 1) / (kPair * kPair))),
         dim3(kPair * kPair), 0, partial, any ? shares : 0, weights, n, loop.ratio, data<float>(grad_weight),
         data<float>(grad_bias));
}

TOKENFLOW_END
