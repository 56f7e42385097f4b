// Rows made unit, and gradients through that, eight rows at a time. The canonical norm is one chain of fused
// multiply-adds a row, four cycles a link; eight chains side by side keep the multiplier busy and change no bit.
// Registers are GCC vectors of eight numbers, so that sums over channels are the same bits on every instruction set.
#pragma once
#include "common/canonical.h"

TOKENFLOW_BEGIN

constexpr int kRows = 8;                    // that are made unit together
constexpr int64_t kAloneBytes = 256 << 10;  // what one core moves before a second one has woken up

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

template <class T>
struct Eight {
  typedef Double8 V;
};
template <>
struct Eight<float> {
  typedef Float8 V;
};

template <class T>
static inline typename Eight<T>::V load_eight(const T* from) {
  typename Eight<T>::V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class V>
static inline void store_eight(void* to, V v) {
  memcpy(to, &v, sizeof(v));
}

// a . b in eight partial sums.
template <class T>
static inline T dot(const T* a, const T* b, int64_t n) {
  typename Eight<T>::V lanes = {};
  T rest = 0;
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) lanes += load_eight(a + d) * load_eight(b + d);
  for (; d < n; ++d) rest += a[d] * b[d];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])) + rest;
}

// Asks for n numbers before they are needed.
template <class T>
static inline void fetch(const T* x, int64_t n) {
  for (int64_t d = 0; d < n; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + d);
}

// y [n] = x [n] / by; y may be x.
template <class T>
static inline void divide(const T* x, int64_t n, T by, T* y) {
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) store_eight(y + d, load_eight(x + d) / by);
  for (; d < n; ++d) y[d] = x[d] / by;
}

// squares [8] += |x_r|^2 of eight rows [n], each a chain in order.
template <class T>
static inline void add_squares(const T* const* x, int64_t n, T* squares) {
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5], *x6 = x[6], *x7 = x[7];
  T sum[kRows];
  memcpy(sum, squares, sizeof(sum));
  for (int64_t d = 0; d < n; ++d) {
    sum[0] = fused(x0[d], x0[d], sum[0]);
    sum[1] = fused(x1[d], x1[d], sum[1]);
    sum[2] = fused(x2[d], x2[d], sum[2]);
    sum[3] = fused(x3[d], x3[d], sum[3]);
    sum[4] = fused(x4[d], x4[d], sum[4]);
    sum[5] = fused(x5[d], x5[d], sum[5]);
    sum[6] = fused(x6[d], x6[d], sum[6]);
    sum[7] = fused(x7[d], x7[d], sum[7]);
  }
  memcpy(squares, sum, sizeof(sum));
}

// squares [8] become max(sqrt, 1e-12).
template <class T>
static inline void to_norms(T* squares) {
  for (int r = 0; r < kRows; ++r) {
    const T norm = root(squares[r]);
    squares[r] = norm > static_cast<T>(1e-12) ? norm : static_cast<T>(1e-12);
  }
}

// `count` <= 8 rows x[r] [C] become unit per table, in place; norms [count, T], where wanted, get max(|x_t|, 1e-12).
template <class T>
static inline void make_unit_rows(const Tables& tables, T* const* x, int64_t count, T* norms) {
  T* part[kRows];
  for (int r = 0; r < kRows; ++r) part[r] = x[r < count ? r : 0];
  for (int t = 0; t < tables.count; ++t) {
    T norm[kRows] = {};
    add_squares<T>(part, tables.width[t], norm);
    to_norms(norm);
    for (int64_t r = 0; r < count; ++r) {
      divide(part[r], tables.width[t], norm[r], part[r]);
      if (norms) norms[r * tables.count + t] = norm[r];
    }
    for (int r = 0; r < kRows; ++r) part[r] += tables.width[t];
  }
}

// The part of a gradient g [C] that passes y = x / max(|x|, eps), in place: (g - (g.y) y) / |x|, or g / eps at the
// floor.
template <class T>
static inline void gradient_through_unit(const Tables& tables, const T* y, const T* norms, T* g) {
  for (int t = 0; t < tables.count; ++t) {
    const int64_t n = tables.width[t];
    const T norm = norms[t], along = norm > static_cast<T>(1e-12) ? dot(g, y, n) : 0;
    int64_t d = 0;
    for (; d + 8 <= n; d += 8) store_eight(g + d, (load_eight(g + d) - along * load_eight(y + d)) / norm);
    for (; d < n; ++d) g[d] = (g[d] - along * y[d]) / norm;
    y += n;
    g += n;
  }
}

TOKENFLOW_END
