// Separable resampling of channels-last maps [h, w, C] and its transpose, one map row at a time. Bands are computed
// once a call. A pass blends whole rows, or pixels of C channels: contiguous numbers, so that it vectorises whatever
// the axis; the pass that makes the map larger runs last, and what lies between the passes stays in the first-level
// cache. Products and sums are separate roundings in tap order on every instruction set.
#pragma once
#include <string.h>

#include "common/resample.h"

TOKENFLOW_BEGIN

struct Grid {
  int64_t h, w;
  int64_t cells() const { return h * w; }
};

// The bands of both axes of one resampling from `in` to `out`: rows [out.h], columns [out.w].
template <class T>
struct Axes {
  Grid in, out;
  Band<T>*rows, *columns;
};

template <class T>
static void fill_bands(Rule rule, const Axes<T>& axes) {
  for (int64_t i = 0; i < axes.out.h; ++i) axes.rows[i] = band_of<T>(rule, axes.in.h, axes.out.h, i);
  for (int64_t i = 0; i < axes.out.w; ++i) axes.columns[i] = band_of<T>(rule, axes.in.w, axes.out.w, i);
}

// to [n] = sum_k weight_k from[first + k] for samples [n] that lie `stride` apart.
template <class T>
static inline void blend(const Band<T>& band, const T* __restrict from, int64_t stride, int64_t n, T* __restrict to) {
  const T *a = from + band.first * stride, *b = a + stride, *c = b + stride, *d = c + stride;
  const T wa = band.weight[0], wb = band.weight[1], wc = band.weight[2], wd = band.weight[3];
  if (band.count == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = wa * a[i];
  else if (band.count == 2)
    for (int64_t i = 0; i < n; ++i) to[i] = wa * a[i] + wb * b[i];
  else if (band.count == 3)
    for (int64_t i = 0; i < n; ++i) to[i] = (wa * a[i] + wb * b[i]) + wc * c[i];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = ((wa * a[i] + wb * b[i]) + wc * c[i]) + wd * d[i];
  for (int64_t k = 4; k < band.count; ++k)
    for (int64_t i = 0; i < n; ++i) to[i] += wd * a[k * stride + i];
}

// The transpose: from[first + k] += weight_k to.
template <class T>
static inline void spread(const Band<T>& band, const T* __restrict to, int64_t stride, int64_t n, T* __restrict from) {
  for (int64_t k = 0; k < band.count; ++k) {
    T* sample = from + (band.first + k) * stride;
    const T weight = band.at(k);
    for (int64_t i = 0; i < n; ++i) sample[i] += weight * to[i];
  }
}

// One row of pixels: `from` [in.w, C] to [out.w, C].
template <class T>
static void blend_pixels(const Axes<T>& axes, const T* from, int64_t channels, T* to) {
  for (int64_t x = 0; x < axes.out.w; ++x) blend(axes.columns[x], from, channels, channels, to + x * channels);
}

// grad_from [in.w, C] = the transpose applied to grad_to [out.w, C].
template <class T>
static void spread_pixels(const Axes<T>& axes, const T* grad_to, int64_t channels, T* grad_from) {
  memset(grad_from, 0, axes.in.w * channels * sizeof(T));
  for (int64_t x = 0; x < axes.out.w; ++x)
    spread(axes.columns[x], grad_to + x * channels, channels, channels, grad_from);
}

// Row i of Down: to [out.w, C] from a map [in.h, in.w, C]; spare [in.w, C].
template <class T>
static void pool_row(const Axes<T>& area, const T* map, int64_t channels, int64_t i, T* to, T* spare) {
  const int64_t width = area.in.w * channels;
  blend(area.rows[i], map, width, width, spare);
  blend_pixels(area, spare, channels, to);
}

// grad_map [in.h, in.w, C] += Down^T grad_rows [out.h, out.w, C]; spare [in.w, C].
template <class T>
static void add_pool_transposed(const Axes<T>& area, const T* grad_rows, int64_t channels, T* grad_map, T* spare) {
  const int64_t width = area.in.w * channels;
  for (int64_t i = 0; i < area.out.h; ++i) {
    spread_pixels(area, grad_rows + i * area.out.w * channels, channels, spare);
    spread(area.rows[i], spare, width, width, grad_map);
  }
}

// The first pass of Up for map rows [first, last): across [in.h, out.w, C] from codes [in.h, in.w, C], where they read
// it. Row y of Up is then blend(rows[y], across).
template <class T>
static void widen(const Axes<T>& bicubic, const T* codes, int64_t channels, int64_t first, int64_t last, T* across) {
  int64_t from = bicubic.in.h, to = 0;  // neither end of the bands is monotone: a row that falls on a sample reads one
  for (int64_t y = first; y < last; ++y) {
    const Band<T>& band = bicubic.rows[y];
    from = band.first < from ? band.first : from;
    to = band.first + band.count > to ? band.first + band.count : to;
  }
  for (int64_t r = from; r < to; ++r)
    blend_pixels(bicubic, codes + r * bicubic.in.w * channels, channels, across + r * bicubic.out.w * channels);
}

// grad_codes [in.h, in.w, C] = Up^T grad_map [out.h, out.w, C]; across [in.h, out.w, C] is spare.
template <class T>
static void up_transposed(const Axes<T>& bicubic, const T* grad_map, int64_t channels, T* grad_codes, T* across) {
  const int64_t width = bicubic.out.w * channels;
  memset(across, 0, bicubic.in.h * width * sizeof(T));
  for (int64_t y = 0; y < bicubic.out.h; ++y) spread(bicubic.rows[y], grad_map + y * width, width, width, across);
  for (int64_t r = 0; r < bicubic.in.h; ++r)
    spread_pixels(bicubic, across + r * width, channels, grad_codes + r * bicubic.in.w * channels);
}

TOKENFLOW_END
