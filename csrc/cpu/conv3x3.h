// 3x3 convolution with zero padding as an implicit matrix product, and its weight gradient.
//   out[y, x] = start + sum over taps (i, j) and channels c of map[y + i - 1, x + j - 1, c] kernel[i, j, c]
// Maps are channels last and padded, [H, W + 2, C], with a zero pixel at both ends of every row, so that a tap row is
// one run of 3 C numbers; rows beyond the map are skipped. Kernels lie as [9, C in, D out] with D padded to 16 for
// whole registers. A tile holds two registers of output channels for 8 (AVX-512) or 4 pixels; with 32 channels the 36
// KB of kernel pass once per tile. The gradient of the input is the same convolution with the kernel turned around.
// Products and sums are separate roundings, taps and channels in order, on every instruction set.
#pragma once
#include "cpu/resample.h"
#include "cpu/simd.h"

TOKENFLOW_BEGIN

constexpr int64_t kPadding = 16;                     // output channels of a kernel come in multiples of this
constexpr int kTile = kRegisterBytes == 64 ? 8 : 4;  // pixels (or channels) that share a loaded register

static inline int64_t padded(int64_t channels) { return (channels + kPadding - 1) / kPadding * kPadding; }

// kernel [9, C in, D] from weight [C out, C in, 3, 3]; `turned`: that of the transpose, [9, C out, D], taps backwards.
template <class T>
static void pack_kernel(const T* weight, int64_t channels, bool turned, T* kernel) {
  memset(kernel, 0, 9 * channels * padded(channels) * sizeof(T));
  for (int64_t out = 0; out < channels; ++out)
    for (int64_t in = 0; in < channels; ++in, weight += 9) {
      T* first = kernel + (turned ? out * padded(channels) + in : in * padded(channels) + out);
      for (int64_t tap = 0; tap < 9; ++tap) first[(turned ? 8 - tap : tap) * channels * padded(channels)] = weight[tap];
    }
}

template <class T>
static inline void store_some(const typename Register<T>::V& v, int64_t count, T* out) {
  memcpy(out, &v, (count < Register<T>::kLanes ? count : Register<T>::kLanes) * sizeof(T));
}

// out [P, width <= R registers] for P pixels in a row, `out` pixels lie `channels` apart. map points at tap (0, 0) of
// the first pixel, tap rows lie `row` apart; kernel at [tap rows * 3 C, D].
template <class T, int P, int R>
static __attribute__((noinline)) void conv_tile(const T* map, int64_t row, int64_t tap_rows, int64_t channels,
                                                const T* kernel, const T* start, int64_t width, T* out) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes;
  const int64_t step = padded(channels);
  V sum[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) sum[p][r] = start ? load_register(start + r * kLanes) : V{};
  for (int64_t i = 0; i < tap_rows; ++i, map += row)
    for (int64_t j = 0; j < 3 * channels; ++j, kernel += step) {
      V w[R];
      for (int r = 0; r < R; ++r) w[r] = load_register(kernel + r * kLanes);
      for (int p = 0; p < P; ++p) {
        const V x = broadcast(map[p * channels + j]);
        for (int r = 0; r < R; ++r) sum[p][r] += x * w[r];
      }
    }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R && r * kLanes < width; ++r)
      store_some<T>(sum[p][r], width - r * kLanes, out + p * channels + r * kLanes);
}

template <class T, int R>
static void conv_block(const T* map, int64_t row, int64_t tap_rows, int64_t pixels, int64_t channels, const T* kernel,
                       const T* start, int64_t width, T* out) {
  int64_t x = 0;
  for (; x + kTile <= pixels; x += kTile)
    conv_tile<T, kTile, R>(map + x * channels, row, tap_rows, channels, kernel, start, width, out + x * channels);
  for (; x < pixels; ++x)
    conv_tile<T, 1, R>(map + x * channels, row, tap_rows, channels, kernel, start, width, out + x * channels);
}

// Row y of the convolution, out [W, C], of a padded map [H, W + 2, C]; kernel [9, C, D], start [D] or null.
template <class T>
static void conv3x3_row(const T* map, Grid grid, int64_t channels, int64_t y, const T* kernel, const T* start, T* out) {
  constexpr int kLanes = Register<T>::kLanes;
  const int64_t row = (grid.w + 2) * channels, first = y > 0 ? 0 : 1, last = y + 1 < grid.h ? 3 : 2;
  map += (y + first - 1) * row;
  kernel += first * 3 * channels * padded(channels);
  for (int64_t d = 0; d < channels; d += 2 * kLanes) {
    const T* from = start ? start + d : nullptr;
    const auto block = padded(channels) - d >= 2 * kLanes ? conv_block<T, 2> : conv_block<T, 1>;
    block(map, row, last - first, grid.w, channels, kernel + d, from, channels - d, out + d);
  }
}

// sum over pixels (y, x) of grad[y, x, d] map[y, x + tap, c .. c + R registers), for D channels d, times scale, onto
// out [D, C]. `map` and `grad` point at the first pixel that counts; rows of pixels lie (W + 2) C and W C apart.
template <class T, int D, int R>
static __attribute__((noinline)) void conv_weight_tile(const T* map, const T* grad, int64_t rows, Grid grid,
                                                       int64_t channels, T scale, int64_t width, T* out) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes;
  V sum[D][R] = {};
  for (int64_t y = 0; y < rows; ++y, map += 2 * channels)
    for (int64_t x = 0; x < grid.w; ++x, map += channels, grad += channels) {
      V m[R];
      for (int r = 0; r < R; ++r) m[r] = load_register(map + r * kLanes);
      for (int d = 0; d < D; ++d) {
        const V g = broadcast(grad[d]);
        for (int r = 0; r < R; ++r) sum[d][r] += g * m[r];
      }
    }
  for (int d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r)
      for (int l = 0; l < kLanes && r * kLanes + l < width; ++l)
        out[d * channels + r * kLanes + l] += scale * sum[d][r][l];
}

// grad_kernel [9, C out, C in] += scale sum over pixels of grad_out x map, for one tap; map padded [H, W + 2, C] and
// readable 16 numbers beyond its end, grad_out [H, W, C].
template <class T>
static void conv3x3_grad_tap(const T* map, const T* grad_out, Grid grid, int64_t channels, int64_t tap, T scale,
                             T* grad_kernel) {
  constexpr int kLanes = Register<T>::kLanes;
  const int64_t shift = tap / 3 - 1, first = shift < 0 ? 1 : 0, rows = grid.h - (shift ? 1 : 0);
  map += ((first + shift) * (grid.w + 2) + tap % 3) * channels;
  grad_out += first * grid.w * channels;
  for (int64_t c = 0; c < channels; c += 2 * kLanes) {
    const bool two = channels - c > kLanes;
    T* out = grad_kernel + tap * channels * channels + c;
    int64_t d = 0;
    const auto many = two ? conv_weight_tile<T, kTile, 2> : conv_weight_tile<T, kTile, 1>;
    const auto one = two ? conv_weight_tile<T, 1, 2> : conv_weight_tile<T, 1, 1>;
    for (; d + kTile <= channels; d += kTile)
      many(map + c, grad_out + d, rows, grid, channels, scale, channels - c, out + d * channels);
    for (; d < channels; ++d) one(map + c, grad_out + d, rows, grid, channels, scale, channels - c, out + d * channels);
  }
}

TOKENFLOW_END
