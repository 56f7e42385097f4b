// CUDA C++ as plain C++17: what kernels that include cuda/gpu.h may say. One fiber is one CUDA thread, one block runs
// after another, all on the OS thread that launches; a second launch waits for the first. "Device memory" is the
// host's. Kernels that ptx.py translated from nvcc's PTX, where a program has them, run in place of the compiled ones.
//
// To run a kernel: compile it, the emulator's files, and a main of your own that calls the op as any function,
//   g++ -std=c++17 -O2 -ffp-contract=off -DTOKENFLOW_EMULATED -DTOKENFLOW_ISA=cuda -I csrc -I tests/emulator
//       -x c++ csrc/cuda/x.cu tests/emulator/{engine,fiber,memory,mma,names,ptx,trace,warp}.cpp my_main.cpp
// and look at call.failure, the error of the launch as a sentence. With
//   -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
// memory is checked to the byte (malloc every tensor in its exact size). Races are found by ThreadSanitizer, which must
// not see the emulator itself: compile its files with -O2 -DCUDA_EMULATOR_TSAN, the rest with -O1 -g -fsanitize=thread.
// -mfma, where the processor has it, makes fmaf fast and changes no bit.
//
// `config()`, or CUDA_EMULATOR_SCHEDULE=forward|reverse|threads|warps, CUDA_EMULATOR_SEED=1, CUDA_EMULATOR_ARCH=80 in
// the environment, says who runs first and what a launch may ask for. The same seed replays the same run.
//
// What it notices by itself (call.failure): threads of a block at different __syncthreads, a deadlock (it prints where
// every thread waits), warp operations whose mask and lanes do not agree, cp.async that is misaligned or never waited
// for, limits of the architecture. What it makes visible as wrong numbers: shared memory read before it is written
// (poison), cp.async read before the wait (poison, or lands only then), lanes read outside the mask (poison). What it
// does not model: uninitialised registers, clocks, caches, weak memory beyond ThreadSanitizer's happens-before,
// __launch_bounds__.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define CUDA_EMULATOR_VECTORS(T, name)                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_EMULATOR_VECTORS(float, float)
CUDA_EMULATOR_VECTORS(int, int)
CUDA_EMULATOR_VECTORS(unsigned, uint)

namespace cuda_emulator {

enum Schedule { kForward, kReverse, kRandomThreads, kRandomWarps };

// How tensor cores add, see mma.cpp: as those of an A100, of an H100, of a V100; or worse than any.
enum TensorCores { kAmpere, kHopper, kVolta, kFloored, kCeiled, kWorstUp, kWorstDown };

struct Config {
  Schedule schedule = kForward;  // of threads; blocks follow it
  uint64_t seed = 1;
  int architecture = 80;  // whose limits a launch meets
  bool log = false;       // keep what is launched
  TensorCores tensor_cores = kAmpere;
};
Config& config();

struct Launch {
  const char* kernel;  // its name, template arguments included
  dim3 grid, block;
  size_t dynamic_shared, static_shared;
  bool from_ptx;
};
std::vector<Launch> take_launches();  // those since the last call, while config().log was set

// Of each kernel from PTX: how many of its instructions some thread ran, and where those begin that none did.
struct Coverage {
  std::string kernel;
  int ran, all;
  std::vector<const char*> missed;
};
std::vector<Coverage> coverage();

// What trace.cpp counted, by kernel: requests of warps, and what they take.
struct Traffic {
  uint64_t requests, sectors, least_sectors, shared_requests, wavefronts, least_wavefronts;
};
std::map<std::string, Traffic> take_traffic();

struct Thread {
  uint3 thread, block;
};
extern Thread* current;
extern dim3 block_size, grid_size;

enum Vote { kPlain, kCount, kAnd, kOr };
enum WarpOp { kShuffle, kUp, kDown, kXor, kBallot, kAny, kAll, kSync, kMatch, kAddAll, kMinAll, kMaxAll, kMma };

[[noreturn]] void fail(const char* format, ...);  // ends the launch
int sync_block(Vote vote, bool predicate, const char* site);
uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int lane, int width, const char* site);
// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 of this lane's registers: d = a b + d, all 32 lanes together.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const char* site);
void fence();
void before_atomic();  // another thread may come first
void* static_shared(const void* tag, size_t size, size_t alignment);
void* dynamic_shared();

// A copy from issue to wait.
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
bool issue_copy(void* to, const void* from, int bytes);  // whether it lands at the wait and is poison until then
void commit_copies();
const Copy* next_landing(int groups_left);  // that has to be there now; or none

// The arguments as the GPU gets them: one after another, each at a multiple of its alignment.
template <class... P>
struct Parameters {
  alignas(16) unsigned char bytes[((sizeof(P) + alignof(P)) + ... + 1)];
  explicit Parameters(const P&... each) {
    size_t at = 0;
    ((at = (at + alignof(P) - 1) / alignof(P) * alignof(P), memcpy(bytes + at, &each, sizeof(P)), at += sizeof(P)), ...);
  }
};

// Runs the grid: `thread` on the arguments or, translated from PTX, on the parameters. The error, or nullptr.
const char* run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void (*thread)(const void*),
                const void* arguments, const void* parameters);

template <class... P>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, P... args) {
  static_assert((std::is_trivially_copyable<P>::value && ...), "kernel arguments are copied as bytes");
  struct Arguments {
    void (*kernel)(P...);
    std::tuple<P...> values;
  };
  const Arguments arguments = {kernel, std::tuple<P...>(args...)};
  const auto thread = [](const void* given) {
    const Arguments* const a = static_cast<const Arguments*>(given);
    std::apply(a->kernel, a->values);
  };
  const Parameters<P...> parameters(args...);
  return run(reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, thread, &arguments, parameters.bytes);
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(From) <= sizeof(To) || sizeof(To) <= 8, "");
  To to = {};
  memcpy(&to, &from, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  return to;
}

// Relaxed, as on the GPU, and atomic to ThreadSanitizer.
template <class T, class F>
inline T modify(T* address, F next) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  before_atomic();
  Bits* const bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, bits_as<Bits>(next(bits_as<T>(old))), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return bits_as<T>(old);
}

// Loads and stores of a copy stand in the kernel's own code, so that sanitizers check them there: it writes when it is
// issued and when it is waited for, for it may land at any time between.
template <class Piece>
inline void start_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Piece) || reinterpret_cast<uintptr_t>(from) % sizeof(Piece))
    fail("cp_async%d: an address is no multiple of %d", static_cast<int>(sizeof(Piece)),
         static_cast<int>(sizeof(Piece)));
  const bool late = issue_copy(to, from, sizeof(Piece));
  Piece piece = *static_cast<const Piece*>(from);
  if (late) memset(&piece, -1, sizeof piece);
  *static_cast<Piece*>(to) = piece;
}

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::current->thread)
#define blockIdx (::cuda_emulator::current->block)
#define blockDim (::cuda_emulator::block_size)
#define gridDim (::cuda_emulator::grid_size)
constexpr int warpSize = 32;

#define SHARED(T, name, dims) SHARED_ALIGNED(alignof(T), T, name, dims)
#define SHARED_ALIGNED(bytes, T, name, dims)                    \
  using name##_shared_type = T dims;                            \
  static char name##_shared_tag;                                \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::cuda_emulator::static_shared(&name##_shared_tag, sizeof(name##_shared_type), bytes))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::cuda_emulator::dynamic_shared())

#define CUDA_EMULATOR_TEXT_(x) #x
#define CUDA_EMULATOR_TEXT(x) CUDA_EMULATOR_TEXT_(x)
#define CUDA_EMULATOR_SITE __FILE__ ":" CUDA_EMULATOR_TEXT(__LINE__) " (#" CUDA_EMULATOR_TEXT(__COUNTER__) ")"

#define __syncthreads() ((void)::cuda_emulator::sync_block(::cuda_emulator::kPlain, false, CUDA_EMULATOR_SITE))
#define __syncthreads_count(p) ::cuda_emulator::sync_block(::cuda_emulator::kCount, !!(p), CUDA_EMULATOR_SITE)
#define __syncthreads_and(p) ::cuda_emulator::sync_block(::cuda_emulator::kAnd, !!(p), CUDA_EMULATOR_SITE)
#define __syncthreads_or(p) ::cuda_emulator::sync_block(::cuda_emulator::kOr, !!(p), CUDA_EMULATOR_SITE)

namespace cuda_emulator {

template <class T>
inline T shuffle(WarpOp op, const char* site, unsigned mask, T value, int lane, int width = 32) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  return bits_as<T>(warp_op(op, mask, bits_as<uint64_t>(value), lane, width, site));
}

inline uint64_t across(WarpOp op, const char* site, unsigned mask, uint64_t value = 0) {
  return warp_op(op, mask, value, 0, 32, site);
}

inline unsigned mask_or_all(unsigned mask = 0xffffffffu) { return mask; }

}  // namespace cuda_emulator

#define __shfl_sync(...) ::cuda_emulator::shuffle(::cuda_emulator::kShuffle, CUDA_EMULATOR_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) ::cuda_emulator::shuffle(::cuda_emulator::kUp, CUDA_EMULATOR_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::cuda_emulator::shuffle(::cuda_emulator::kDown, CUDA_EMULATOR_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::cuda_emulator::shuffle(::cuda_emulator::kXor, CUDA_EMULATOR_SITE, __VA_ARGS__)
#define CUDA_EMULATOR_ACROSS(op, ...) ::cuda_emulator::across(::cuda_emulator::op, CUDA_EMULATOR_SITE, __VA_ARGS__)
#define __ballot_sync(mask, p) static_cast<unsigned>(CUDA_EMULATOR_ACROSS(kBallot, mask, !!(p)))
#define __any_sync(mask, p) static_cast<int>(CUDA_EMULATOR_ACROSS(kAny, mask, !!(p)))
#define __all_sync(mask, p) static_cast<int>(CUDA_EMULATOR_ACROSS(kAll, mask, !!(p)))
#define __match_any_sync(mask, v) \
  static_cast<unsigned>(CUDA_EMULATOR_ACROSS(kMatch, mask, ::cuda_emulator::bits_as<uint64_t>(v)))
#define __reduce_add_sync(mask, v) static_cast<unsigned>(CUDA_EMULATOR_ACROSS(kAddAll, mask, static_cast<unsigned>(v)))
#define __reduce_min_sync(mask, v) static_cast<unsigned>(CUDA_EMULATOR_ACROSS(kMinAll, mask, static_cast<unsigned>(v)))
#define __reduce_max_sync(mask, v) static_cast<unsigned>(CUDA_EMULATOR_ACROSS(kMaxAll, mask, static_cast<unsigned>(v)))
#define __syncwarp(...) \
  ((void)::cuda_emulator::across(::cuda_emulator::kSync, CUDA_EMULATOR_SITE, ::cuda_emulator::mask_or_all(__VA_ARGS__)))

inline void __threadfence() { cuda_emulator::fence(); }
inline void __threadfence_block() { cuda_emulator::fence(); }

#define CUDA_EMULATOR_ATOMIC(name, T, expression)                                             \
  inline T name(T* address, T value) {                                                        \
    return cuda_emulator::modify(address, [=](T old) { return static_cast<T>(expression); }); \
  }
#define CUDA_EMULATOR_INTEGER_ATOMICS(T)                                                        \
  CUDA_EMULATOR_ATOMIC(atomicAdd, T, old + value)                                               \
  CUDA_EMULATOR_ATOMIC(atomicMin, T, value < old ? value : old)                                 \
  CUDA_EMULATOR_ATOMIC(atomicMax, T, old < value ? value : old)                                 \
  CUDA_EMULATOR_ATOMIC(atomicOr, T, old | value)                                                \
  CUDA_EMULATOR_ATOMIC(atomicAnd, T, old& value)                                                \
  CUDA_EMULATOR_ATOMIC(atomicExch, T, ((void)old, value))                                       \
  inline T atomicCAS(T* address, T compare, T value) {                                          \
    return cuda_emulator::modify(address, [=](T old) { return old == compare ? value : old; }); \
  }
CUDA_EMULATOR_INTEGER_ATOMICS(int)
CUDA_EMULATOR_INTEGER_ATOMICS(unsigned)
CUDA_EMULATOR_INTEGER_ATOMICS(unsigned long long)
CUDA_EMULATOR_ATOMIC(atomicAdd, float, old + value)
CUDA_EMULATOR_ATOMIC(atomicAdd, double, old + value)
CUDA_EMULATOR_ATOMIC(atomicExch, float, ((void)old, value))

#define CUDA_EMULATOR_MIN_MAX(T)                   \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_EMULATOR_MIN_MAX(int)
CUDA_EMULATOR_MIN_MAX(unsigned)
CUDA_EMULATOR_MIN_MAX(long)
CUDA_EMULATOR_MIN_MAX(unsigned long)
CUDA_EMULATOR_MIN_MAX(long long)
CUDA_EMULATOR_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline unsigned __float_as_uint(float v) { return cuda_emulator::bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_emulator::bits_as<int>(v); }
inline float __uint_as_float(unsigned v) { return cuda_emulator::bits_as<float>(v); }
inline float __int_as_float(int v) { return cuda_emulator::bits_as<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_emulator::bits_as<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_emulator::bits_as<double>(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }

#define mma_bf16(d, a, b) ::cuda_emulator::mma_m16n8k16(d, a, b, CUDA_EMULATOR_SITE)

inline void cp_async16(void* to, const void* from) { cuda_emulator::start_copy<uint4>(to, from); }
inline void cp_async4(void* to, const void* from) { cuda_emulator::start_copy<unsigned>(to, from); }
inline void cp_async_commit() { cuda_emulator::commit_copies(); }
template <int n>
inline void cp_async_wait() {
  while (const cuda_emulator::Copy* copy = cuda_emulator::next_landing(n)) {
    if (copy->bytes == 16)
      *static_cast<uint4*>(copy->to) = *static_cast<const uint4*>(copy->from);
    else
      *static_cast<unsigned*>(copy->to) = *static_cast<const unsigned*>(copy->from);
  }
}
