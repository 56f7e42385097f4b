// Separable resampling of channels-last maps [h, w, C] and its transpose. Two passes over one axis each; the pass
// that makes the map larger runs last. Products and sums are separate roundings in tap order on every instruction set.
#pragma once
#include <string.h>

#include "common/resample.h"

TOKENFLOW_BEGIN

struct Grid {
  int64_t h, w;
  int64_t cells() const { return h * w; }
};

// to[o, i] = sum_k weight_k from[o, first + k] for from [outer, n_in, inner], to [outer, n_out, inner].
template <class T>
static void resample_axis(Rule rule, const T* __restrict from, int64_t outer, int64_t n_in, int64_t n_out,
                          int64_t inner, T* __restrict to) {
  for (int64_t i = 0; i < n_out; ++i) {
    const Band<T> band = band_of<T>(rule, n_in, n_out, i);
    for (int64_t o = 0; o < outer; ++o) {
      const T* in = from + (o * n_in + band.first) * inner;
      T* out = to + (o * n_out + i) * inner;
      const T first = band.at(0);
      for (int64_t d = 0; d < inner; ++d) out[d] = first * in[d];
      for (int64_t k = 1; k < band.count; ++k) {
        const T weight = band.at(k);
        for (int64_t d = 0; d < inner; ++d) out[d] += weight * in[k * inner + d];
      }
    }
  }
}

// The transpose: grad_from[o, first + k] += weight_k grad_to[o, i], grad_from cleared first.
template <class T>
static void resample_axis_transposed(Rule rule, const T* __restrict grad_to, int64_t outer, int64_t n_in, int64_t n_out,
                                     int64_t inner, T* __restrict grad_from) {
  memset(grad_from, 0, outer * n_in * inner * sizeof(T));
  for (int64_t i = 0; i < n_out; ++i) {
    const Band<T> band = band_of<T>(rule, n_in, n_out, i);
    for (int64_t o = 0; o < outer; ++o) {
      const T* out = grad_to + (o * n_out + i) * inner;
      T* in = grad_from + (o * n_in + band.first) * inner;
      for (int64_t k = 0; k < band.count; ++k) {
        const T weight = band.at(k);
        for (int64_t d = 0; d < inner; ++d) in[k * inner + d] += weight * out[d];
      }
    }
  }
}

// to [out.h, out.w, C] from `from` [in.h, in.w, C]; spare [max h, max w, C].
template <class T>
static void resample(Rule rule, const T* from, Grid in, Grid out, int64_t channels, T* to, T* spare) {
  if (rule == kArea) {
    resample_axis(rule, from, 1, in.h, out.h, in.w * channels, spare);
    resample_axis(rule, spare, out.h, in.w, out.w, channels, to);
  } else {
    resample_axis(rule, from, in.h, in.w, out.w, channels, spare);
    resample_axis(rule, spare, 1, in.h, out.h, out.w * channels, to);
  }
}

// grad_from [in.h, in.w, C] from grad_to [out.h, out.w, C]; spare [max h, max w, C].
template <class T>
static void resample_transposed(Rule rule, const T* grad_to, Grid in, Grid out, int64_t channels, T* grad_from,
                                T* spare) {
  if (rule == kArea) {
    resample_axis_transposed(rule, grad_to, out.h, in.w, out.w, channels, spare);
    resample_axis_transposed(rule, spare, 1, in.h, out.h, in.w * channels, grad_from);
  } else {
    resample_axis_transposed(rule, grad_to, 1, in.h, out.h, out.w * channels, spare);
    resample_axis_transposed(rule, spare, in.h, in.w, out.w, channels, grad_from);
  }
}

TOKENFLOW_END
