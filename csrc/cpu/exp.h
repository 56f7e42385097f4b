// exp of a register, for softmax. e^x = 2^n e^r with n = round(x / ln 2) and r = x - n ln 2 in two fused steps, so that
// |r| <= 0.3467; e^r is a polynomial of degree 6 (11 in float64) with relative error 3.8e-9 (1.1e-17); 2^n is added to
// the exponent. 14 (19) operations. Largest relative error, over every float in [-87, 0]: 7.8e-8 or 1.3 units of
// roundoff; in float64, sampled: 1.5e-16. Same bits on every instruction set. From -87 (-708) down, and for NaN, the
// result is exactly 0; above 88 (709) it is undefined.
#pragma once
#include "cpu/simd.h"

TOKENFLOW_BEGIN

template <class T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float kLowest = -87.0f;  // 2^-126 is the smallest normal number
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr float kSeries[] = {0.001381459878757596f,
                                      0.008368716575205326f,
                                      0.04166838899254799f,
                                      0.1666652113199234f,
                                      0.4999999403953552f,
                                      1.0f,
                                      1.0f};
};

template <>
struct Exp<double> {
  static constexpr double kLowest = -708.0;
  static constexpr double kLog2e = 1.4426950408889634, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kSeries[] = {2.499913430284527e-08,
                                       2.7630255913553964e-07,
                                       2.755758928223191e-06,
                                       2.4801493072827094e-05,
                                       0.00019841269503376185,
                                       0.0013888888943659747,
                                       0.008333333333495894,
                                       0.04166666666653004,
                                       0.1666666666666641,
                                       0.5000000000000011,
                                       1.0,
                                       1.0};
};

template <class T>
static inline typename Register<T>::V exp_register(typename Register<T>::V x) {
  using V = typename Register<T>::V;
  using I = typename Register<T>::I;
  using E = Exp<T>;
  const V shifted = x * broadcast(E::kLog2e) + broadcast(E::kRound);
  const V n = shifted - broadcast(E::kRound);
  const V r = fused(n, broadcast(-E::kLn2Low), fused(n, broadcast(-E::kLn2High), x));
  V series = broadcast(E::kSeries[0]);
  for (unsigned i = 1; i < sizeof(E::kSeries) / sizeof(T); ++i) series = fused(series, r, broadcast(E::kSeries[i]));
  const V result = (V)((I)series + ((I)shifted << E::kMantissa));
  return x > broadcast(E::kLowest) ? result : V{};
}

// Whether any lane of a is above its lane of b; false for NaN.
template <class V>
static inline bool any_above(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
  else
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(a > b)) != 0;
#else
  uint64_t bits[sizeof(V) / 8], any = 0;
  const auto above = a > b;
  memcpy(bits, &above, sizeof(V));
  for (uint64_t word : bits) any |= word;
  return any != 0;
#endif
}

TOKENFLOW_END
