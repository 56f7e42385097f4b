// peaks: what the arithmetic units of this processor do at best, the yardstick of benchmarks/.
//   rates[0]  float32 fused multiply-adds, FLOP/s: the same fused() and registers as the search
//   rates[1]  8-bit dot products, OP/s, those of the certified search; 0 where this instruction set has none
// Twelve independent chains in registers hide the latency of either unit; nothing is loaded or stored in the loop.
// Every thread counts its own loops over `seconds` of its own clock; the rates are the sums.
#include <time.h>

#include "common/ops.h"
#include "cpu/simd.h"

TOKENFLOW_BEGIN

constexpr int kChains = 12;
constexpr int64_t kLoops = 4096;  // between two looks at the clock

static inline double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Chains start apart, or the compiler would see that they are one.
static __attribute__((noinline)) float multiply_add(float x) {
  using V = Register<float>::V;
  V sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = broadcast(x * static_cast<float>(c));
  const V factor = broadcast(x);
  for (int64_t i = 0; i < kLoops; ++i)
    for (int c = 0; c < kChains; ++c) sum[c] = fused(factor, factor, sum[c]);
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  return sum[0][0];
}

#ifdef TOKENFLOW_INT8
static __attribute__((noinline, TOKENFLOW_DOT_TARGET)) int dot_bytes(int x) {
  Sums sum[kChains], factor = Sums{} + static_cast<Sum>(x);
  for (int c = 0; c < kChains; ++c) sum[c] = Sums{} + static_cast<Sum>(c);
  for (int64_t i = 0; i < kLoops; ++i) {
    __asm__ volatile("" : "+x"(factor));  // or the products would be made once
    for (int c = 0; c < kChains; ++c) {
      Sums codes = factor;
      if (sizeof(Sum) == 2) __asm__ volatile("" : "+x"(codes));  // nor may chains share them
      sum[c] = dot(sum[c], x, codes);
    }
  }
  for (int c = 1; c < kChains; ++c) sum[0] = add(sum[0], sum[c]);
  return sum[0][0];
}
static const double kDotBytes = kRegisterBytes;
static bool has_dot_bytes() { return sizeof(Sum) == 2 || __builtin_cpu_supports("avx512vnni"); }
#elif defined(__ARM_FEATURE_DOTPROD)
static __attribute__((noinline)) int dot_bytes(int x) {
  int32x4_t sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = vdupq_n_s32(c);
  const int8x16_t factor = vdupq_n_s8(static_cast<int8_t>(x));
  for (int64_t i = 0; i < kLoops; ++i)
    for (int c = 0; c < kChains; ++c) sum[c] = vdotq_s32(sum[c], factor, factor);
  for (int c = 1; c < kChains; ++c) sum[0] = vaddq_s32(sum[0], sum[c]);
  return vgetq_lane_s32(sum[0], 0);
}
static const double kDotBytes = 16;
static bool has_dot_bytes() { return true; }
#else
static int dot_bytes(int x) { return x; }
static const double kDotBytes = 0;
static bool has_dot_bytes() { return false; }
#endif

// Calls of `loop` a second, of all threads together.
template <class T>
static double calls_per_second(T (*loop)(T), double seconds, int threads) {
  double rate = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
  {
    volatile T one = 1, result = loop(one);  // the first call wakes the wide units
    const double start = now();
    double passed = 0;
    int64_t calls = 0;
    while (passed < seconds) {
      result = loop(one);
      ++calls;
      passed = now() - start;
    }
    (void)result;
    rate += static_cast<double>(calls) / passed;
  }
  return rate;
}

Error peaks(Call& call, View rates, double seconds) noexcept {
  if (!holds(rates, kFloat64, 2)) return "peaks: rates: wanted a float64 tensor [2]";
  if (!(seconds > 0 && seconds <= 10)) return "peaks: seconds: wanted a number in (0, 10]";
  if (call.counting) return nullptr;
  double* out = static_cast<double*>(rates.data);
  const double each = 2.0 * kChains * kLoops;
  out[0] = each * Register<float>::kLanes * calls_per_second(multiply_add, seconds, call.threads);
  out[1] = has_dot_bytes() ? each * kDotBytes * calls_per_second(dot_bytes, seconds, call.threads) : 0;
  return nullptr;
}

TOKENFLOW_END
