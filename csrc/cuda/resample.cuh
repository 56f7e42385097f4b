// Separable resampling of planes by the threads of one block, in the order of cpu/resample.h, so that every backend has
// the same bits:
//   Up    columns first (widen), then rows (blend):   across[r, x] = sum_k codes[r, x'_k] a_k,   map[y, x] = sum_k
//         across[r_k, x] b_k
//   Down  rows first (narrow), then columns (blend)
//   a blend is ((b_0 s_0 + b_1 s_1) + b_2 s_2) + ...: taps in order, every product and every sum rounded
// Layout: planes [c, h, w], whole rows side by side, so that neighbouring threads read neighbouring numbers of features
// [B, C, H, W]; what is read across planes has them plane_stride() apart, on different banks. Bands are made once a
// call. Per number of the larger map: 4 products a pass.
#pragma once
#include "common/resample.h"
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

struct Grid {
  int h, w;
  TOKENFLOW_DEVICE int cells() const { return h * w; }
};

// The bands of both axes of one resampling from `in` to `out`: rows [out.h], columns [out.w], in device memory.
struct Axes {
  Grid in, out;
  const Band<float>*rows, *columns;
};

// Planes of n numbers that threads read across: 4 banks apart.
TOKENFLOW_DEVICE static inline int plane_stride(int n) { return (n + 31) / 32 * 32 + 4; }

// sum_k weight_k from[(first + k) stride].
static __device__ inline float blend(const Band<float>& band, const float* from, int stride) {
  from += band.first * stride;
  float sum = band.weight[0] * from[0];
  if (band.count > 1) sum += band.weight[1] * from[stride];
  if (band.count > 2) sum += band.weight[2] * from[2 * stride];
  if (band.count > 3) sum += band.weight[3] * from[3 * stride];
  for (int k = 4; k < band.count; ++k) sum += band.weight[3] * from[k * stride];
  return sum;
}

// visit(x, row, step): the thread's share of a table of `width` columns is rows row, row + step, ... of column x.
// Neighbouring threads have neighbouring columns.
template <class Visit>
static __device__ inline void for_columns(int width, Visit visit) {
  const int threads = static_cast<int>(blockDim.x), side = width < threads ? width : threads, step = threads / side;
  const int row = static_cast<int>(threadIdx.x) / side;
  for (int x = static_cast<int>(threadIdx.x) % side; x < width && row < step; x += side) visit(x, row, step);
}

// across [planes, in.h, out.w] from codes, planes [in.h, in.w] that lie plane_stride(in.h in.w) apart.
static __device__ inline void widen(const Axes& bicubic, const float* codes, int planes, float* across) {
  const int height = bicubic.in.h, width = bicubic.in.w, stride = plane_stride(bicubic.in.cells());
  for_columns(bicubic.out.w, [&](int x, int row, int step) {
    const Band<float> band = bicubic.columns[x];
    for (; row < planes * height; row += step) {
      const int plane = row / height, r = row - plane * height;
      across[row * bicubic.out.w + x] = blend(band, codes + plane * stride + r * width, 1);
    }
  });
}

// narrow [out.h, in.w], planes that lie plane_stride(out.h in.w) apart, from map [planes, in.h, in.w].
static __device__ inline void narrow(const Axes& area, const float* map, int planes, float* out) {
  const int height = area.out.h, width = area.in.w, stride = plane_stride(height * width);
  for_columns(width, [&](int x, int row, int step) {
    for (; row < planes * height; row += step) {
      const int plane = row / height, i = row - plane * height;
      out[plane * stride + i * width + x] = blend(area.rows[i], map + plane * area.in.cells() + x, width);
    }
  });
}

// The bands of Down that hold sample y of an axis, which lie in the order of their samples.
struct Run {
  int first, last;
};
static __device__ inline Run bands_at(int n_in, int n_out, int y) {
  return {static_cast<int>(static_cast<int64_t>(y) * n_out / n_in),
          static_cast<int>((static_cast<int64_t>(y + 1) * n_out + n_in - 1) / n_in) - 1};
}

// Of Up: every band that holds sample j lies in this run, which may be empty; weight_at says what it holds.
static __device__ inline Run bicubic_bands_at(int n_in, int n_out, int j) {
  const int64_t from = static_cast<int64_t>(n_out) * (2 * j - 3) - n_in, to = from + int64_t{8} * n_out,
                step = 2 * n_in;
  const int64_t first = from > 0 ? (from + step - 1) / step : 0, last = to > 0 ? (to + step - 1) / step - 1 : -1;
  return {static_cast<int>(first), static_cast<int>(last < n_out ? last : n_out - 1)};
}

static __device__ inline float weight_at(const Band<float>& band, int sample) {
  const int k = sample - band.first;
  return k >= 0 && k < band.count ? band.weight[k < 4 ? k : 3] : 0;
}

TOKENFLOW_END
