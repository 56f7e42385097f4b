// 3x3 convolution with zero padding on channels-last maps [h, w, C], and its two transposes. The weight lies as
// [9, C, C] with the channel that is written last, so that the inner loop is one contiguous row of it.
#pragma once
#include <stdint.h>

#include "cpu/resample.h"

TOKENFLOW_BEGIN

// Calls visit(pixel, neighbour, tap) for each of the nine taps that falls on the map, taps in row-major order.
template <class Visit>
static inline void for_taps(Grid grid, int64_t p, int64_t q, Visit visit) {
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t y = p + tap / 3 - 1, x = q + tap % 3 - 1;
    if (y >= 0 && y < grid.h && x >= 0 && x < grid.w) visit(y * grid.w + x, tap);
  }
}

// out[p] = bias + sum_tap x[p + tap] weight[tap];  weight [9, in, out].
template <class T>
static void conv3x3(const T* __restrict x, Grid grid, int64_t channels, const T* __restrict weight,
                    const T* __restrict bias, T* __restrict out) {
  for (int64_t p = 0; p < grid.cells(); ++p) {
    T* row = out + p * channels;
    for (int64_t d = 0; d < channels; ++d) row[d] = bias[d];
    for_taps(grid, p / grid.w, p % grid.w, [&](int64_t from, int64_t tap) {
      for (int64_t c = 0; c < channels; ++c) {
        const T value = x[from * channels + c];
        const T* w = weight + (tap * channels + c) * channels;
        for (int64_t d = 0; d < channels; ++d) row[d] += value * w[d];
      }
    });
  }
}

// grad_x[p + tap] += scale grad_out[p] weight[tap]^T;  transposed [9, out, in].
template <class T>
static void conv3x3_grad_input(const T* __restrict grad_out, Grid grid, int64_t channels,
                               const T* __restrict transposed, T scale, T* __restrict grad_x) {
  for (int64_t p = 0; p < grid.cells(); ++p)
    for_taps(grid, p / grid.w, p % grid.w, [&](int64_t to, int64_t tap) {
      T* row = grad_x + to * channels;
      for (int64_t d = 0; d < channels; ++d) {
        const T value = scale * grad_out[p * channels + d];
        const T* w = transposed + (tap * channels + d) * channels;
        for (int64_t c = 0; c < channels; ++c) row[c] += value * w[c];
      }
    });
}

// grad_transposed[tap] += scale grad_out[p] x[p + tap]^T, grad_bias += scale grad_out[p];  grad_transposed [9, out,
// in].
template <class T>
static void conv3x3_grad_weight(const T* __restrict x, const T* __restrict grad_out, Grid grid, int64_t channels,
                                T scale, T* __restrict grad_transposed, T* __restrict grad_bias) {
  for (int64_t p = 0; p < grid.cells(); ++p) {
    const T* g = grad_out + p * channels;
    for (int64_t d = 0; d < channels; ++d) grad_bias[d] += scale * g[d];
    for_taps(grid, p / grid.w, p % grid.w, [&](int64_t from, int64_t tap) {
      for (int64_t d = 0; d < channels; ++d) {
        const T value = scale * g[d];
        T* w = grad_transposed + (tap * channels + d) * channels;
        for (int64_t c = 0; c < channels; ++c) w[c] += value * x[from * channels + c];
      }
    });
  }
}

TOKENFLOW_END
