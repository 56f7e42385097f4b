// The canonical arithmetic, written once: every backend and every rescoring returns these bits.
//   |x|^2, x.c   fused multiply-add chains over d = 0 .. D-1
//   y            x / max(sqrt(|x|^2), 1e-12), by division, per table
//   score        starts from sum_t w_t 0.5 |c_t|^2 (l2) or +0 (dot, cosine), then adds -(w_t y_d) c_d, tables in order
//   best         the lowest score, on equal scores the lowest id; a score that is not a number never wins
#pragma once
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "common/isa.h"
#include "common/view.h"

TOKENFLOW_BEGIN

TOKENFLOW_DEVICE static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TOKENFLOW_DEVICE static inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
TOKENFLOW_DEVICE static inline float root(float a) { return __builtin_sqrtf(a); }
TOKENFLOW_DEVICE static inline double root(double a) { return __builtin_sqrt(a); }
TOKENFLOW_DEVICE static inline bool finite(float a) { return __builtin_fabsf(a) <= FLT_MAX; }
TOKENFLOW_DEVICE static inline bool finite(double a) { return __builtin_fabs(a) <= DBL_MAX; }

template <class T>
constexpr Type type_of() {
  return sizeof(T) == 4 ? kFloat32 : kFloat64;
}

TOKENFLOW_DEVICE static inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

TOKENFLOW_DEVICE static inline uint16_t to_bfloat16(float value) {  // round to nearest even, NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

#if defined(__aarch64__)
typedef __fp16 Half;  // g++ before 13 knows no _Float16 there
#else
typedef _Float16 Half;
#endif

// out[0, n) = v[offset, offset + n), exact upcast.
template <class T>
static inline void load(const View& v, int64_t offset, int64_t n, T* out) {
  if (v.type == type_of<T>()) {
    memcpy(out, static_cast<const T*>(v.data) + offset, n * sizeof(T));
  } else if (v.type == kFloat32) {
    const float* in = static_cast<const float*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  } else if (v.type == kFloat64) {
    const double* in = static_cast<const double*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  } else if (v.type == kFloat16) {
    const Half* in = static_cast<const Half*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<float>(in[i]));
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from_bfloat16(in[i]));
  }
}

// v[offset, offset + n) = in[0, n), rounded to the type of v.
template <class T>
static inline void store(const View& v, int64_t offset, int64_t n, const T* in) {
  if (v.type == type_of<T>()) {
    memcpy(static_cast<T*>(v.data) + offset, in, n * sizeof(T));
  } else if (v.type == kFloat32) {
    float* out = static_cast<float*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
  } else if (v.type == kFloat64) {
    double* out = static_cast<double*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(in[i]);
  } else if (v.type == kFloat16) {
    Half* out = static_cast<Half*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Half>(static_cast<float>(in[i]));
  } else {
    uint16_t* out = static_cast<uint16_t*>(v.data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(static_cast<float>(in[i]));
  }
}

template <class T>
TOKENFLOW_DEVICE static inline bool all_finite(const T* x, int64_t n) {
  int bad = 0;
  for (int64_t d = 0; d < n; ++d) bad |= !finite(x[d]);
  return bad == 0;
}

template <class T>
TOKENFLOW_DEVICE static inline T floored_norm(const T* x, int64_t n) {
  T sum = 0;
  for (int64_t d = 0; d < n; ++d) sum = fused(x[d], x[d], sum);
  const T norm = root(sum);
  return norm > static_cast<T>(1e-12) ? norm : static_cast<T>(1e-12);
}

// x becomes unit per table, in place; norms [T], where wanted, get max(|x_t|, 1e-12).
template <class T>
TOKENFLOW_DEVICE static inline void make_unit(const Tables& tables, T* x, T* norms) {
  for (int t = 0; t < tables.count; ++t) {
    const T norm = floored_norm(x, tables.width[t]);
    for (int64_t d = 0; d < tables.width[t]; ++d) x[d] /= norm;
    if (norms) norms[t] = norm;
    x += tables.width[t];
  }
}

// The part of a gradient g [C] that passes y = x / max(|x|, eps), in place: (g - (g.y) y) / |x|, or g / eps at the
// floor.
template <class T>
TOKENFLOW_DEVICE static inline void through_unit(const Tables& tables, const T* y, const T* norms, T* g) {
  for (int t = 0; t < tables.count; ++t) {
    const int64_t width = tables.width[t];
    T along = 0;
    if (norms[t] > static_cast<T>(1e-12))
      for (int64_t d = 0; d < width; ++d) along += g[d] * y[d];
    for (int64_t d = 0; d < width; ++d) g[d] = (g[d] - along * y[d]) / norms[t];
    y += width;
    g += width;
  }
}

TOKENFLOW_END
