// One register of T on the instruction set that this file is compiled for: GCC's vector types and the things they lack:
// a fused multiply-add, rounding, and sums of products of 8-bit integers.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/canonical.h"

TOKENFLOW_BEGIN

// The width of a vector register, and how many there are.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kRegisterBytes = 16, kRegisters = 32;
#else
constexpr int kRegisterBytes = 16, kRegisters = 16;
#endif

template <class T>
struct Register;

template <>
struct Register<float> {
  typedef float V __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t I __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t Index;
  static constexpr int kLanes = kRegisterBytes / 4;
};

template <>
struct Register<double> {
  typedef double V __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t I __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t Index;
  static constexpr int kLanes = kRegisterBytes / 8;
};

template <class T>
static inline typename Register<T>::V load_register(const T* p) {
  typename Register<T>::V v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// x - 0 is x, which the compiler knows; x + 0 is not, for -0.
template <class T>
static inline typename Register<T>::V broadcast(T x) {
  return x - typename Register<T>::V{};
}

static inline Register<float>::V fused(Register<float>::V a, Register<float>::V b, Register<float>::V c) {
#if defined(__AVX512F__)
  return (Register<float>::V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Register<float>::V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Register<float>::V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// The lower of each lane; where `a` is not a number, `b`.
template <class V>
static inline V lower(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (sizeof(a[0]) == 8) return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// One bit a lane: where v is at most x.
template <class V, class T>
static inline uint32_t lanes_at_most(V v, T x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 4) return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_LE_OQ);
  if constexpr (sizeof(x) == 8) return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(x), _CMP_LE_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(x) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(x), _CMP_LE_OQ));
  if constexpr (sizeof(x) == 8) return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(x), _CMP_LE_OQ));
#else
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(v) / sizeof(x); ++i) bits |= static_cast<uint32_t>(v[i] <= x) << i;
  return bits;
#endif
}

// The lowest lane of v, which holds no NaN.
template <class V>
static inline auto lowest_lane(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) return _mm512_reduce_min_ps((__m512)v);
  if constexpr (sizeof(v[0]) == 8) return _mm512_reduce_min_pd((__m512d)v);
#else
  auto low = v[0];
  for (unsigned i = 1; i < sizeof(v) / sizeof(low); ++i) low = v[i] < low ? v[i] : low;
  return low;
#endif
}

static inline Register<double>::V fused(Register<double>::V a, Register<double>::V b, Register<double>::V c) {
#if defined(__AVX512F__)
  return (Register<double>::V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Register<double>::V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Register<double>::V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  for (int i = 0; i < 2; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
}

#if defined(__AVX512F__) || defined(__AVX2__)
#define TOKENFLOW_INT8

// To the nearest integer, halves to even.
static inline Register<float>::V nearest(Register<float>::V v) {
#if defined(__AVX512F__)
  return (Register<float>::V)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  return (Register<float>::V)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// Sums of products of 8-bit integers, unsigned of a row by signed of a code: a lane sums as many channels an
// instruction as it has bytes. Sums wrap around: whatever leaves the lane on the way, the last one is exact if it fits.
//   AVX-512  4 products in 32 bits, an instruction of VNNI
//   AVX2     2 products in 16 bits. Their own sum saturates: rows of 0..128, codes of -127..127 keep it below 2^15
#if defined(__AVX512F__)
#define TOKENFLOW_DOT_TARGET target("avx512vnni")
typedef int32_t Sum;
constexpr Sum kMostOfSum = INT32_MAX;
constexpr int kRowLevels = 127, kCodeLevels = 127;
#else
#define TOKENFLOW_DOT_TARGET target("avx2")
typedef int16_t Sum;
constexpr Sum kMostOfSum = INT16_MAX;
constexpr int kRowLevels = 64, kCodeLevels = 127;
#endif
constexpr int kSums = kRegisterBytes / sizeof(Sum);  // lanes of a register
typedef Sum Sums __attribute__((vector_size(kRegisterBytes)));

static inline Sums load_sums(const Sum* p) {
  Sums v;
  memcpy(&v, p, sizeof(v));
  return v;
}

static inline Sums add(Sums a, Sums b) {
#if defined(__AVX512F__)
  return (Sums)_mm512_add_epi32((__m512i)a, (__m512i)b);
#else
  return (Sums)_mm256_add_epi16((__m256i)a, (__m256i)b);
#endif
}

static inline Sums lower(Sums a, Sums b) {
#if defined(__AVX512F__)
  return (Sums)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
  return (Sums)_mm256_min_epi16((__m256i)a, (__m256i)b);
#endif
}

static inline uint32_t lanes_at_most(Sums v, Sum x) {
#if defined(__AVX512F__)
  return _mm512_cmple_epi32_mask((__m512i)v, _mm512_set1_epi32(x));
#else
  const __m256i above = _mm256_cmpgt_epi16((__m256i)v, _mm256_set1_epi16(x));
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1));
  return ~_mm_movemask_epi8(bytes) & 0xffff;
#endif
}

static inline Sum lowest_lane(Sums v) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epi32((__m512i)v);
#else
  Sum low = v[0];
  for (int i = 1; i < kSums; ++i) low = v[i] < low ? v[i] : low;
  return low;
#endif
}

// sum + products of the bytes of `row`, the same in every lane, and of `codes`.
static inline __attribute__((TOKENFLOW_DOT_TARGET)) Sums dot(Sums sum, int32_t row, Sums codes) {
#if defined(__AVX512F__)
  return (Sums)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(row), (__m512i)codes);
#else
  return (Sums)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16(_mm256_set1_epi32(row), (__m256i)codes));
#endif
}

#endif

TOKENFLOW_END
