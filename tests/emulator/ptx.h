// What kernels say that ptx.py translated from nvcc's PTX. A register is a variable: b16, b32, b64 an unsigned integer,
// f32 a float, f64 a double, pred a bool. Every address is checked to be a multiple of what is read there, as the GPU
// does; loads and stores stand in the kernel's own code, where sanitizers see them. A site is the source's line and the
// line in the PTX, which tells copies of one source line apart.
#pragma once
#include <cmath>

#include "common/canonical.h"
#include "engine.h"

namespace cuda_emulator {

using pred = bool;
using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = tokenflow_ext::cuda::Half;
using f32 = float;
using f64 = double;

struct Translations {
  template <int n>
  explicit Translations(const Translation (&each)[n]) {
    add(each, n);
  }
  void add(const Translation* first, int count);
};

// ThreadSanitizer would take the note for a race.
#if defined(__SANITIZE_THREAD__)
#define SEEN(block)
#else
#define SEEN(block) block = true;
#endif

// What is in a register before anything is: NaN, or a wrong number.
template <class T>
constexpr T unset() {
  return std::is_floating_point<T>::value ? static_cast<T>(NAN) : static_cast<T>(0xbadbadbadbadbadbull);
}

extern char* shared_memory;  // of the block that runs; addresses in it are offsets
[[noreturn]] void no_address(const char* site, const char* what, uint64_t address, int bytes);

#if defined(CUDA_EMULATOR_TRACE)
#define TRACE(...) trace(__VA_ARGS__)
#else
#define TRACE(...) ((void)0)
#endif
void trace(const char* site, bool in_shared, uint64_t address, int bytes);  // trace.cpp

template <class T, int n = 1>
inline T* generic(uint64_t address, const char* site) {
  if (__builtin_expect(address % (sizeof(T) * n) != 0, 0)) no_address(site, "misaligned", address, sizeof(T) * n);
  TRACE(site, address - reinterpret_cast<uint64_t>(shared_memory) < kArena, address, sizeof(T) * n);
  return reinterpret_cast<T*>(address);
}

template <class T, int n = 1>
inline T* global(uint64_t address, const char* site) {
  if (__builtin_expect(address - reinterpret_cast<uint64_t>(shared_memory) < kArena, 0))
    no_address(site, "shared, not global, memory", address, sizeof(T) * n);
  return generic<T, n>(address, site);
}

template <class T, int n = 1>
inline T* shared(uint32_t offset, const char* site) {
  if (__builtin_expect(offset % (sizeof(T) * n) != 0, 0)) no_address(site, "misaligned", offset, sizeof(T) * n);
  if (__builtin_expect(offset > kArena - sizeof(T) * n, 0))
    no_address(site, "outside of shared memory", offset, sizeof(T) * n);
  TRACE(site, true, reinterpret_cast<uint64_t>(shared_memory) + offset, sizeof(T) * n);
  return reinterpret_cast<T*>(shared_memory + offset);
}

template <class T>
inline T parameter(const char* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

inline uint32_t offset_of(const void* in_shared) {
  return static_cast<uint32_t>(static_cast<const char*>(in_shared) - shared_memory);
}

inline int lane_of_warp() { return self().lane; }

// Shifts take any distance.
template <class T>
inline T shifted_left(T value, uint32_t by) {
  return by < sizeof(T) * 8 ? static_cast<T>(value << by) : T(0);
}
template <class T>
inline T shifted_right(T value, uint32_t by) {
  if (by < sizeof(T) * 8) return static_cast<T>(value >> by);
  return value < 0 ? static_cast<T>(-1) : T(0);
}
[[noreturn]] void no_quotient(const char* site);
template <class T>
inline T quotient(T a, T b, const char* site) {
  if (b == 0) no_quotient(site);
  if (b < 0 && b + 1 == 0) return static_cast<T>(uint64_t{0} - a);  // also of the smallest number
  return a / b;
}
template <class T>
inline T remainder(T a, T b, const char* site) {
  if (b == 0) no_quotient(site);
  return b < 0 && b + 1 == 0 ? 0 : a % b;
}
template <class T>  // `length` bits of a, put into b at `start`
inline T with_field(T a, T b, uint32_t start, uint32_t length) {
  start &= 255, length &= 255;
  const T ones = length < sizeof(T) * 8 ? (T(1) << length) - 1 : ~T(0);
  return (b & ~shifted_left(ones, start)) | shifted_left(static_cast<T>(a & ones), start);
}
// Four of the eight bytes of b and a, or their signs.
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t chosen) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = chosen >> 4 * i & 15, byte = bytes >> 8 * (which & 7) & 255;
    made |= (which & 8 ? byte >> 7 ? 255u : 0u : byte) << 8 * i;
  }
  return made;
}
inline uint32_t reversed(uint32_t v) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (v >> i & 1) << (31 - i);
  return bits;
}

// Of two zeros the negative one is smaller; a number goes before NaN.
inline bool negative_zero(double v) { return v == 0 && std::signbit(v); }
template <class T>
inline T smaller(T a, T b) {
  if (a == b) return std::is_floating_point<T>::value && negative_zero(b) ? b : a;
  return a < b || b != b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  if (a == b) return std::is_floating_point<T>::value && negative_zero(a) ? b : a;
  return a > b || b != b ? a : b;
}

// a b + c, rounded down: the product is exact in double, the sum's error tells on which side of it the exact one lies.
inline float fma_down(float a, float b, float c) {
  const double product = double{a} * b, sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  const float near = static_cast<float>(sum);
  return near > sum || (near == sum && error < 0) ? std::nextafter(near, -INFINITY) : near;
}
inline float saturated(float v) { return v > 0 ? v < 1 ? v : 1.0f : 0.0f; }  // also NaN
// 2^v to the last bit or beside it, as no GPU's is; denormals are zero.
inline float power_of_two(float v) {
  const float power = static_cast<float>(std::exp2(static_cast<double>(std::fpclassify(v) == FP_SUBNORMAL ? 0 : v)));
  return std::fpclassify(power) == FP_SUBNORMAL ? 0 : power;
}

// Across the block and the warp.
inline void barrier(uint32_t which, const char* site) {
  if (which) fail("%s: barrier %u, wanted 0", site, which);
  sync_block(kPlain, false, site);
}
inline int vote_of_block(Vote vote, uint32_t which, bool mine, const char* site) {
  if (which) fail("%s: barrier %u, wanted 0", site, which);
  return sync_block(vote, mine, site);
}
// `bounds` holds what is not of the lane's number in a segment, and the last lane to read.
inline uint32_t shuffled(WarpOp op, uint32_t mask, uint32_t value, uint32_t lane, uint32_t bounds, const char* site) {
  if ((bounds & 31) != (op == kUp ? 0u : 31u)) fail("%s: shuffle within bounds 0x%x", site, bounds);
  return static_cast<uint32_t>(warp_op(op, mask, value, lane & 31, 32 - static_cast<int>(bounds >> 8 & 31), site));
}
inline uint32_t across_warp(WarpOp op, uint32_t mask, uint64_t value, const char* site) {
  return static_cast<uint32_t>(warp_op(op, mask, value, 0, 32, site));
}

}  // namespace cuda_emulator
