// Sums of double over a block's threads and over blocks, in a fixed order.
#pragma once
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

constexpr int kSummands = 256;  // threads of a block that adds

// The sum over the block's threads, by halves; thread 0 has it.
static __device__ inline double sum_of_block(double mine) {
  SHARED(double, parts, [kSummands]);
  parts[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kSummands / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

// mean = weight * (sums[0] + ... + sums[count - 1]) / numbers, one block.
static __global__ void __launch_bounds__(kSummands)
    mean_kernel(const double* sums, int64_t count, double weight, double numbers, float* mean) {
  double mine = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kSummands) mine += sums[i];
  const double sum = sum_of_block(mine);
  if (threadIdx.x == 0) *mean = static_cast<float>(numbers > 0 ? weight * sum / numbers : 0);
}

TOKENFLOW_END
