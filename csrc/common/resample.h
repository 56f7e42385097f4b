// Resampling weights, written once: area (adaptive average) down, bicubic (a = -0.75, align_corners False, border
// clamped) up. Output i of n_out reads a band of consecutive samples of n_in. Every weight is computed in double in a
// fixed order and rounded once, so that each backend and tokenflow_ext/reference/resample.py have the same bits.
// n_in = n_out gives the identity: one tap of weight 1.
#pragma once
#include <stdint.h>

#include "common/isa.h"

TOKENFLOW_BEGIN

enum Rule { kArea, kBicubic };

// Taps first .. first + count - 1 of an axis. An area window may be wider than four, its weights are all the same.
template <class T>
struct Band {
  T weight[4];
  int32_t first, count;
  TOKENFLOW_DEVICE T at(int64_t k) const { return weight[k < 4 ? k : 3]; }
};

TOKENFLOW_DEVICE static inline double cubic_near(double d) { return ((-0.75 + 2.0) * d - (-0.75 + 3.0)) * d * d + 1.0; }
TOKENFLOW_DEVICE static inline double cubic_far(double d) {
  return ((-0.75 * d - 5.0 * -0.75) * d + 8.0 * -0.75) * d - 4.0 * -0.75;
}

template <class T>
TOKENFLOW_DEVICE static inline T area_weight(int64_t n_in, int64_t n_out, int64_t i) {
  return static_cast<T>(1.0 / static_cast<double>(((i + 1) * n_in + n_out - 1) / n_out - i * n_in / n_out));
}

template <class T>
TOKENFLOW_DEVICE static inline Band<T> area_band(int64_t n_in, int64_t n_out, int64_t i) {
  const int64_t first = i * n_in / n_out, count = ((i + 1) * n_in + n_out - 1) / n_out - first;
  const T weight = area_weight<T>(n_in, n_out, i);
  return {{weight, weight, weight, weight}, static_cast<int32_t>(first), static_cast<int32_t>(count)};
}

// Position ((2 i + 1) n_in - n_out) / (2 n_out), as quotient and remainder; taps clamped onto one sample add up, zeros
// at both ends are left out. No array is indexed by a variable: a GPU then keeps them in registers.
template <class T>
TOKENFLOW_DEVICE static inline Band<T> bicubic_band(int64_t n_in, int64_t n_out, int64_t i) {
  const int64_t position = (2 * i + 1) * n_in - n_out, step = 2 * n_out;
  const int64_t base = position >= 0 ? position / step : -((-position + step - 1) / step);
  const double t = static_cast<double>(position - base * step) / static_cast<double>(step);
  const double tap[4] = {cubic_far(t + 1.0), cubic_near(t), cubic_near(1.0 - t), cubic_far(2.0 - t)};
  double sum[4] = {0, 0, 0, 0};
  const int64_t lowest = base - 1 < 0 ? 0 : base - 1 < n_in ? base - 1 : n_in - 1;
  TOKENFLOW_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int64_t sample = base - 1 + k < 0 ? 0 : base - 1 + k < n_in ? base - 1 + k : n_in - 1;
    TOKENFLOW_UNROLL
    for (int j = 0; j < 4; ++j)
      if (sample - lowest == j) sum[j] += tap[k];
  }
  int32_t first = 0, count = sum[3] != 0 ? 4 : sum[2] != 0 ? 3 : sum[1] != 0 ? 2 : 1;
  TOKENFLOW_UNROLL
  for (int k = 0; k < 3; ++k)
    if (sum[0] == 0 && count > 1) {
      TOKENFLOW_UNROLL
      for (int j = 0; j < 3; ++j) sum[j] = sum[j + 1];
      sum[3] = 0;
      ++first, --count;
    }
  Band<T> band = {{}, static_cast<int32_t>(lowest) + first, count};
  TOKENFLOW_UNROLL
  for (int k = 0; k < 4; ++k) band.weight[k] = static_cast<T>(sum[k]);
  return band;
}

template <class T>
TOKENFLOW_DEVICE static inline Band<T> band_of(Rule rule, int64_t n_in, int64_t n_out, int64_t i) {
  return rule == kArea ? area_band<T>(n_in, n_out, i) : bicubic_band<T>(n_in, n_out, i);
}

TOKENFLOW_END
