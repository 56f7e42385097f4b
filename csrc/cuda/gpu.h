// All that kernels know of CUDA, and the only header of it that they include. nvcc gives the GPU; any C++17 compiler
// with -DTOKENFLOW_EMULATED gives tests/emulator, where one fiber is one CUDA thread. Everything else is spelled as
// CUDA spells it: __syncthreads(), __shfl_xor_sync(...), atomicMin(...). Each barrier, wait, fence and atomic stands on
// a line of its own: the tests remove them one at a time, and must notice.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/canonical.h"
#include "common/isa.h"
#include "common/view.h"

#if defined(TOKENFLOW_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

// Arrays of a block: SHARED(float, tile, [2][64]). As aligned as their element, or as told.
#define SHARED(T, name, dims) __shared__ T name dims
#define SHARED_ALIGNED(bytes, T, name, dims) \
  __shared__ __align__(bytes)                \
  T name dims
// The launch's dynamic shared memory, 16-byte aligned.
#define DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)
#endif

TOKENFLOW_BEGIN

using u64 = unsigned long long;

#if !defined(TOKENFLOW_EMULATED)

// Copies that go on while the thread does. The data is there after the wait, for other threads after a barrier too.
static __device__ __forceinline__ void cp_async16(void* to, const void* from) {  // both multiples of 16
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
static __device__ __forceinline__ void cp_async4(void* to, const void* from) {  // both multiples of 4
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>  // all but the last n groups that were committed
static __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// d += a b on the tensor cores, by all lanes of a warp: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. A
// [16][16], B [16][8], D [16][8], with g = lane / 4, t = lane % 4, two bfloat16 a register, the first in the low half:
//   a[i]  row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next
//   b[i]  column g, rows 2 t + 8 i and the next
//   d[i]  row g + 8 (i / 2), column 2 t + i % 2
static __device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// More than 48 KB of dynamic shared memory are asked for once a kernel and device.
static inline cudaError_t allow_shared(const void* kernel, int device, size_t bytes) {
  struct Allowed {
    const void* kernel;
    int device;
    size_t bytes;
  };
  static std::mutex mutex;
  static Allowed known[64];
  const std::lock_guard<std::mutex> lock(mutex);
  int i = 0;
  while (i < 63 && known[i].kernel && (known[i].kernel != kernel || known[i].device != device)) ++i;
  if (known[i].kernel == kernel && known[i].device == device && known[i].bytes >= bytes) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) known[i] = {kernel, device, bytes};
  return error;
}

template <class... P>
static inline cudaError_t launch_on_current(const Call& call, void (*kernel)(P...), dim3 grid, dim3 block,
                                            size_t dynamic_shared, P... args) {
  if (dynamic_shared > 48 << 10) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), call.device, dynamic_shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(call.stream)>>>(args...);
  return cudaGetLastError();
}

#endif

// kernel<<<grid, block, dynamic_shared>>>(args...) on the call's device and stream; nothing after a failure, nothing
// for an empty grid. The first error stays in call.failure.
template <class... P, class... A>
static inline void launch(Call& call, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, A... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel arguments: wanted at most 4096 bytes");
  if (call.failure || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(TOKENFLOW_EMULATED)
  call.failure = cuda_emulator::launch(kernel, grid, block, dynamic_shared, static_cast<P>(args)...);
#else
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != call.device) error = cudaSetDevice(call.device);
  if (error == cudaSuccess)
    error = launch_on_current<P...>(call, kernel, grid, block, dynamic_shared, static_cast<P>(args)...);
  if (before != call.device) cudaSetDevice(before);
  if (error != cudaSuccess) call.failure = cudaGetErrorName(error);
#endif
}

// Of the call's device; those of an H100 where the driver does not say. Four in emulation, so that small problems fill
// it: they meet the ways of few blocks and of many.
static inline int multiprocessors(const Call& call) {
#if defined(TOKENFLOW_EMULATED)
  (void)call;
  return 4;
#else
  constexpr int kUsual = 132;
  static std::atomic<int> known[64];
  const bool keep = call.device >= 0 && call.device < 64;
  int count = keep ? known[call.device].load(std::memory_order_relaxed) : 0;
  if (count == 0 && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, call.device) == cudaSuccess && keep)
    known[call.device].store(count, std::memory_order_relaxed);
  return count > 0 ? count : kUsual;
#endif
}

// A contiguous tensor that kernels of this build can read.
static inline bool on_device(const View& v) {
#if defined(TOKENFLOW_EMULATED)
  return v.type != kNone && v.contiguous && v.device == -1;
#else
  return v.type != kNone && v.contiguous && v.device >= 0;
#endif
}

static inline bool dense_on(const View& v, int rank) { return on_device(v) && v.rank == rank; }

// At least `numbers` of this type.
static inline bool holds_on(const View& v, Type type, int64_t numbers) {
  int64_t size = 1;
  for (int i = 0; i < v.rank; ++i) size *= v.shape[i];
  return on_device(v) && v.type == type && size >= numbers;
}

// data[i] of a float type narrower than float64, as float32; the type is the same for the whole launch.
static __device__ __forceinline__ float number(const void* data, Type type, int64_t i) {
  if (type == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == kBFloat16) return from_bfloat16(bits);
#if defined(TOKENFLOW_EMULATED)
  Half half;
  memcpy(&half, &bits, 2);
  return static_cast<float>(half);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

// Rounds to nearest even.
static __device__ __forceinline__ void set_number(void* data, Type type, int64_t i, float value) {
  if (type == kFloat32) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  uint16_t bits;
  if (type == kBFloat16) {
    bits = to_bfloat16(value);
  } else {
#if defined(TOKENFLOW_EMULATED)
    const Half half = static_cast<Half>(value);
    memcpy(&bits, &half, 2);
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  }
  static_cast<uint16_t*>(data)[i] = bits;
}

// A score and an id below 2^31 as one number that atomicMin orders: lower scores first, both zeros alike, NaN behind
// +inf; then lower ids. The last bit keeps the sign of a zero.
constexpr u64 kNoKey = ~0ull;

static __device__ __forceinline__ u64 key_of(float score, unsigned id) {
  const unsigned bits = score == score ? __float_as_uint(score + 0.0f) : 0x7fc00000u;
  const unsigned rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<u64>(rising) << 32 | id << 1 | (bits == 0 && __float_as_uint(score) != 0);
}

static __device__ __forceinline__ unsigned id_of(u64 key) { return static_cast<unsigned>(key) >> 1; }

static __device__ __forceinline__ float score_of(u64 key) {
  const unsigned rising = static_cast<unsigned>(key >> 32);
  if (rising == 0x80000000u && key & 1) return -0.0f;
  return __uint_as_float(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

TOKENFLOW_END
