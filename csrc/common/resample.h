// Resampling weights, written once: area (adaptive average) down, bicubic (a = -0.75, align_corners False, border
// clamped) up. Output i of n_out reads a band of consecutive samples of n_in. Every weight is computed in double in a
// fixed order and rounded once, so that each backend and tokenflow_ext/reference/resample.py have the same bits.
// n_in = n_out gives the identity: one tap of weight 1.
#pragma once
#include <stdint.h>

#include "common/isa.h"

TOKENFLOW_BEGIN

enum Rule { kArea, kBicubic };

template <class T>
struct Band {
  int64_t first;
  int64_t count;
  bool even;  // every tap has weight[0]
  T weight[4];
  T at(int64_t k) const { return weight[even ? 0 : k]; }
};

static inline double cubic_near(double d) { return ((-0.75 + 2.0) * d - (-0.75 + 3.0)) * d * d + 1.0; }
static inline double cubic_far(double d) { return ((-0.75 * d - 5.0 * -0.75) * d + 8.0 * -0.75) * d - 4.0 * -0.75; }

template <class T>
static inline Band<T> area_band(int64_t n_in, int64_t n_out, int64_t i) {
  const int64_t first = i * n_in / n_out, last = ((i + 1) * n_in + n_out - 1) / n_out;
  return {first, last - first, true, {static_cast<T>(1.0 / static_cast<double>(last - first))}};
}

// Position ((2 i + 1) n_in - n_out) / (2 n_out), as quotient and remainder; taps clamped onto one sample add up.
template <class T>
static inline Band<T> bicubic_band(int64_t n_in, int64_t n_out, int64_t i) {
  const int64_t position = (2 * i + 1) * n_in - n_out, step = 2 * n_out;
  const int64_t base = position >= 0 ? position / step : -((-position + step - 1) / step);
  const double t = static_cast<double>(position - base * step) / static_cast<double>(step);
  const double tap[4] = {cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t), cubic_far(2.0 - t)};
  double sum[4] = {0, 0, 0, 0};
  const int64_t lowest = base - 1 < 0 ? 0 : base - 1 < n_in ? base - 1 : n_in - 1;
  for (int64_t k = 0; k < 4; ++k) {
    const int64_t sample = base - 1 + k < 0 ? 0 : base - 1 + k < n_in ? base - 1 + k : n_in - 1;
    sum[sample - lowest] += tap[k];
  }
  Band<T> band = {lowest, 4, false, {}};
  while (band.count > 1 && sum[band.count - 1] == 0) --band.count;
  int64_t skip = 0;
  while (skip + 1 < band.count && sum[skip] == 0) ++skip;
  band.first += skip;
  band.count -= skip;
  for (int64_t k = 0; k < band.count; ++k) band.weight[k] = static_cast<T>(sum[skip + k]);
  return band;
}

template <class T>
static inline Band<T> band_of(Rule rule, int64_t n_in, int64_t n_out, int64_t i) {
  return rule == kArea ? area_band<T>(n_in, n_out, i) : bicubic_band<T>(n_in, n_out, i);
}

TOKENFLOW_END
