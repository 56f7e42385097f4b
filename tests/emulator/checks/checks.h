// Kernels that check the emulator: each is launched once on `out`, kNumbers zeros of exactly their size, `in`, in[i] =
// i, and a counter, 0, and should leave wanted(i) in out[i]. In wrong.cu each has one mistake, in right.cu none.
#pragma once
#include "cuda/gpu.h"

namespace tokenflow_ext {

constexpr int kNumbers = 256;

struct Buffers {
  float* out;
  const float* in;
  unsigned* counter;
};

struct Check {
  const char* name;
  void (*run)(Call& call, const Buffers& buffers);
  float (*wanted)(int i);
};

extern const Check kWrong[], kRight[];
extern const int kWrongCount, kRightCount;

}  // namespace tokenflow_ext

#define CHECK_KERNEL(name)                                                                   \
  static __global__ void name([[maybe_unused]] float* out, [[maybe_unused]] const float* in, \
                              [[maybe_unused]] unsigned* counter)
#define CHECK(kernel, grid, block, shared, wanted_i)                                      \
  {#kernel,                                                                               \
   [](Call& call, const Buffers& buffers) {                                               \
     launch(call, kernel, grid, block, shared, buffers.out, buffers.in, buffers.counter); \
   },                                                                                     \
   [](int i) -> float {                                                                   \
     (void)i;                                                                             \
     return wanted_i;                                                                     \
   }}
