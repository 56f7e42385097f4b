// Correct kernels, one a feature: no mode and no schedule may say a word about them.
#include "checks.h"

TOKENFLOW_BEGIN

CHECK_KERNEL(sum_by_shuffles) {
  SHARED(float, sums, [8]);
  float sum = in[threadIdx.x];
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < 8; ++w) total += sums[w];
  out[threadIdx.x] = total;
}

CHECK_KERNEL(scan_by_shuffles) {
  float sum = in[threadIdx.x % 32];
  for (int step = 1; step < 32; step *= 2) {
    const float other = __shfl_up_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 >= static_cast<unsigned>(step)) sum += other;
  }
  out[threadIdx.x] = __shfl_sync(0xffffffffu, sum, 3, 8);
}

CHECK_KERNEL(tiles_reused) {
  SHARED(float, tile, [256]);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    sum += tile[255 - threadIdx.x];
    __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Blocks that use no shared memory do not come between those that do.
CHECK_KERNEL(blocks_that_leave_at_once) {
  if (blockIdx.x % 3 != 0) return;
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (blockIdx.x == 30) out[threadIdx.x] = tile[255 - threadIdx.x];
}

// Every row of A is 1, 2, 1, 2, ..; B is 1: sums of 24, once more for every warp.
CHECK_KERNEL(tensor_cores) {
  const unsigned a[4] = {0x40003f80u, 0x40003f80u, 0x40003f80u, 0x40003f80u}, b[2] = {0x3f803f80u, 0x3f803f80u};
  float d[4] = {0, 1, 2, 3};
  for (unsigned round = 0; round <= threadIdx.x / 32; ++round) mma_bf16(d, a, b);
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

CHECK_KERNEL(votes_of_a_block) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int all = __syncthreads_and(threadIdx.x < 256);
  const int any = __syncthreads_or(threadIdx.x == 77);
  out[threadIdx.x] = count + 1000 * all + 2000 * any;
}

CHECK_KERNEL(votes_of_a_warp) {
  const unsigned lane = threadIdx.x % 32, full = 0xffffffffu;
  int right = __ballot_sync(full, lane < 5) == 31u;
  right += __any_sync(full, lane == 9) == 1;
  right += __all_sync(full, lane < 31) == 0;
  right += __match_any_sync(full, lane / 4) == 0xfu << (lane / 4 * 4);
  right += __reduce_add_sync(full, lane) == 496;
  right += __reduce_min_sync(full, lane + 7) == 7;
  right += __reduce_max_sync(full, lane) == 31;
  out[threadIdx.x] = right;
}

CHECK_KERNEL(warp_barriers) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  for (int step = 1; step < 32; step *= 2) {
    __syncwarp();
    const float other = tile[threadIdx.x ^ step];
    __syncwarp();
    tile[threadIdx.x] += other;
  }
  out[threadIdx.x] = tile[threadIdx.x];
}

CHECK_KERNEL(halves_of_a_warp) {
  SHARED(float, tile, [256]);
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0xffffu : 0xffff0000u;
  tile[threadIdx.x] = in[threadIdx.x];
  if (lane < 16) {
    __syncwarp(mask);
    out[threadIdx.x] = tile[threadIdx.x ^ 8] + __shfl_xor_sync(mask, 1.0f, 1);
  } else {
    for (int i = 0; i < 3; ++i) tile[threadIdx.x] = __shfl_xor_sync(mask, tile[threadIdx.x], 1);
    out[threadIdx.x] = tile[threadIdx.x];
  }
}

CHECK_KERNEL(warp_of_eight) {  // a block of 40
  const unsigned mask = threadIdx.x < 32 ? 0xffffffffu : 0xffu;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 7);
}

CHECK_KERNEL(barrier_after_some_left) {
  SHARED(float, tile, [256]);
  if (threadIdx.x >= 100) return;
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[99 - threadIdx.x];
}

CHECK_KERNEL(three_dimensions) {  // 2 x 2 x 2 blocks of 2 x 4 x 4
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * 32 + thread] = 100 * block + thread;
}

CHECK_KERNEL(copies_double_buffered) {
  SHARED_ALIGNED(16, float, tiles, [2][64]);
  float sum = 0;
  if (threadIdx.x < 16) cp_async16(&tiles[0][4 * threadIdx.x], in + 4 * threadIdx.x);
  cp_async_commit();
  for (int t = 0; t < 4; ++t) {
    if (t < 3 && threadIdx.x < 16)
      cp_async16(&tiles[(t + 1) % 2][4 * threadIdx.x], in + 64 * (t + 1) + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    sum += tiles[t % 2][63 - threadIdx.x % 64];
    __syncthreads();
  }
  cp_async_wait<0>();
  out[threadIdx.x] = sum;
}

CHECK_KERNEL(vectors_in_dynamic_memory) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float4 four = reinterpret_cast<const float4*>(tile)[threadIdx.x / 4];
  out[threadIdx.x] = four.x + four.w;
}

CHECK_KERNEL(most_dynamic_memory) {  // of compute capability 8.0
  DYNAMIC_SHARED(char, bytes);
  if (threadIdx.x == 0) bytes[(163 << 10) - 1] = 5;
  __syncthreads();
  out[threadIdx.x] = bytes[(163 << 10) - 1];
}

CHECK_KERNEL(atomics) {  // four blocks
  SHARED(unsigned, count, [1]);
  SHARED(float, sum, [1]);
  SHARED(u64, best, [1]);
  if (threadIdx.x == 0) count[0] = 0, sum[0] = 0, best[0] = kNoKey;
  __syncthreads();
  atomicAdd(count, 1u);
  atomicAdd(sum, in[threadIdx.x]);
  atomicMin(best, key_of(-in[threadIdx.x / 2], threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&out[0], 1.0f);
    atomicAdd(counter, count[0]);
  }
  if (blockIdx.x != 3 || threadIdx.x == 0) return;
  out[threadIdx.x] = count[0] + sum[0] + id_of(best[0]) + score_of(best[0]);
}

CHECK_KERNEL(last_block_with_fence) {  // eight
  SHARED(unsigned, last, [1]);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 1;
    __threadfence();
    last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] == 0 || threadIdx.x) return;
  __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b];
  out[8] = sum;
}

// Every bit pattern of both 16-bit types comes back as it was; NaN as some NaN.
CHECK_KERNEL(numbers_of_16_bits) {
  float right = 0;
  for (unsigned pattern = threadIdx.x; pattern < 65536; pattern += 256) {
    for (const Type type : {kFloat16, kBFloat16}) {
      const uint16_t from[2] = {static_cast<uint16_t>(pattern)};
      uint16_t to[2] = {};
      const float value = number(from, type, 0);
      set_number(to, type, 0, value);
      right += value == value ? to[0] == from[0] : number(to, type, 0) != number(to, type, 0);
    }
  }
  out[threadIdx.x] = right;
}

// Halfway between two neighbours goes to the even one.
CHECK_KERNEL(numbers_rounded) {
  uint16_t half[2], brain[2];
  const float steps = 2 * static_cast<float>(threadIdx.x) + 1;  // an odd number of half steps above one
  set_number(half, kFloat16, 0, 1 + steps / 2048);
  set_number(brain, kBFloat16, 1, 1 + (threadIdx.x % 64 * 2 + 1) / 256.0f);
  out[threadIdx.x] = number(half, kFloat16, 0) == 1 + (threadIdx.x + threadIdx.x % 2) / 1024.0f &&
                     number(brain, kBFloat16, 1) == 1 + (threadIdx.x % 64 + threadIdx.x % 2) / 128.0f;
}

CHECK_KERNEL(keys_in_order) {
  const float rising[] = {-INFINITY, -3e38f, -1.5f, -1e-42f, 0.0f, 1e-42f, 2.0f, 3e38f, INFINITY, NAN};
  const unsigned last = 0x7fffffffu;
  float right = key_of(NAN, last) < kNoKey;
  right += key_of(0.0f, 4) < key_of(-0.0f, 5) && key_of(-0.0f, 4) < key_of(0.0f, 5);
  right += 1 / score_of(key_of(-0.0f, 4)) == -INFINITY && 1 / score_of(key_of(0.0f, 4)) == INFINITY;
  for (int i = 0; i < 10; ++i) {
    const u64 key = key_of(rising[i], 7 + i);
    const float score = score_of(key);
    right += (score == rising[i] || i == 9) && id_of(key) == 7u + i && key < key_of(rising[i], 8 + i);
    right += i == 0 || key_of(rising[i - 1], last) < key_of(rising[i], 0);
  }
  out[threadIdx.x] = right;
}

TOKENFLOW_END

namespace tokenflow_ext {

using namespace cuda;

static float scanned(int i) {
  const int lane = i % 32 / 8 * 8 + 3;
  return static_cast<float>(lane * (lane + 1) / 2);
}

const Check kRight[] = {
    CHECK(sum_by_shuffles, 1, 256, 0, 255 * 128),
    CHECK(scan_by_shuffles, 1, 256, 0, scanned(i)),
    CHECK(tiles_reused, 1, 256, 0, 3 * (255 - i) + 3),
    CHECK(blocks_that_leave_at_once, 40, 256, 0, 255 - i),
    CHECK(tensor_cores, 1, 256, 0, 96 * (i / 32 + 1) + 6),
    CHECK(votes_of_a_block, 1, 256, 0, 86 + 1000 + 2000),
    CHECK(votes_of_a_warp, 1, 256, 0, 7),
    CHECK(warp_barriers, 1, 256, 0, i / 32 * 32 * 32 + 496),
    CHECK(halves_of_a_warp, 1, 256, 0, i % 32 < 16 ? (i ^ 8) + 1 : i ^ 1),
    CHECK(warp_of_eight, 1, 40, 0, i < 40 ? i ^ 7 : 0),
    CHECK(barrier_after_some_left, 1, 256, 0, i < 100 ? 99 - i : 0),
    CHECK(three_dimensions, dim3(2, 2, 2), dim3(2, 4, 4), 0, i / 32 * 100 + i % 32),
    CHECK(copies_double_buffered, 1, 256, 0, 4 * (63 - i % 64) + 64 * 6),
    CHECK(vectors_in_dynamic_memory, 1, 256, 1024, i / 4 * 4 * 2 + 3),
    CHECK(most_dynamic_memory, 1, 256, 163 << 10, 5),
    CHECK(atomics, 4, 256, 0, i ? 256 + 255 * 128 + 254 - 127 : 4),
    CHECK(last_block_with_fence, 8, 32, 0,
          i < 8    ? 1
          : i == 8 ? 8
                   : 0),
    CHECK(numbers_of_16_bits, 1, 256, 0, 512),
    CHECK(numbers_rounded, 1, 256, 0, 1),
    CHECK(keys_in_order, 1, 256, 0, 3 + 10 + 10),
};
const int kRightCount = sizeof kRight / sizeof *kRight;

}  // namespace tokenflow_ext
