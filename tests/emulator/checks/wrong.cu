// One mistake a kernel. tests/test_emulator.py says in which mode each must be noticed, and by what message.
#include "checks.h"

TOKENFLOW_BEGIN

// Barriers.

CHECK_KERNEL(barrier_missing_after_write) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = tile[255 - threadIdx.x];
}

CHECK_KERNEL(barrier_missing_before_overwrite) {
  SHARED(float, tile, [256]);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    sum += tile[255 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

CHECK_KERNEL(barrier_in_two_branches) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

CHECK_KERNEL(barrier_that_some_skip) {
  float value = in[threadIdx.x];
  if (threadIdx.x < 40)
    __syncthreads();
  else
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

CHECK_KERNEL(warp_barrier_missing) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

CHECK_KERNEL(warp_barrier_for_a_block) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}

CHECK_KERNEL(shuffle_for_a_warp_barrier) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + 0 * other;
}

// Warp operations.

CHECK_KERNEL(shuffle_that_some_skip) {
  if (threadIdx.x & 1) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

CHECK_KERNEL(shuffle_after_an_exit) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

CHECK_KERNEL(shuffle_in_two_branches) {
  if (threadIdx.x & 1)
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

CHECK_KERNEL(mask_without_own_lane) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1); }

CHECK_KERNEL(masks_that_disagree) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], 1);
}

CHECK_KERNEL(tensor_cores_that_some_skip) {
  const unsigned a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x % 32 != 9) mma_bf16(d, a, b);
  out[threadIdx.x] = d[0];
}

CHECK_KERNEL(mask_of_absent_lanes) {  // a block of 40
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

CHECK_KERNEL(shuffle_from_outside_the_mask) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 16);
}

// Memory.

CHECK_KERNEL(shared_never_written) {
  SHARED(float, tile, [256]);
  if (threadIdx.x < 255) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x] + 1;
}

CHECK_KERNEL(shared_kept_from_the_last_block) {
  SHARED(float, seen, [256]);
  if (blockIdx.x == 0) seen[threadIdx.x] = 7;
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 255) out[threadIdx.x] = seen[threadIdx.x];
}

CHECK_KERNEL(shared_past_the_end) {
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = 1;
  float* const from = tile;
  __syncthreads();
  out[threadIdx.x] = from[threadIdx.x + 1] * 0 + 1;
}

CHECK_KERNEL(dynamic_past_the_end) {  // 255 floats
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

CHECK_KERNEL(dynamic_without_any) {
  DYNAMIC_SHARED(float, tile);
  if (threadIdx.x == 0) tile[0] = 1;
}

CHECK_KERNEL(global_past_the_end) {  // two blocks of 256
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

CHECK_KERNEL(vector_of_an_array_of_floats) {  // which lies at multiples of 4
  SHARED(float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 64) {
    const float4 four = *reinterpret_cast<const float4*>(&tile[4 * threadIdx.x]);
    out[threadIdx.x] = four.x;
  }
}

CHECK_KERNEL(vector_off_by_one) {
  if (threadIdx.x < 63) out[threadIdx.x] = reinterpret_cast<const float4*>(in + 1)[threadIdx.x].x;
}

CHECK_KERNEL(shift_too_far) {
  const int by = 33 + static_cast<int>(threadIdx.x);
  out[threadIdx.x] = static_cast<float>(1 << by);
}

CHECK_KERNEL(integer_overflow) {
  const int big = 0x7fffffff - 10 + static_cast<int>(threadIdx.x);
  out[threadIdx.x] = static_cast<float>(big);
}

// cp.async.

CHECK_KERNEL(copy_waited_for_after_the_barrier) {
  SHARED_ALIGNED(16, float, tile, [256]);
  if (threadIdx.x < 64) cp_async16(&tile[4 * threadIdx.x], in + 4 * threadIdx.x);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  out[threadIdx.x] = tile[255 - threadIdx.x];
}

CHECK_KERNEL(copy_wait_too_weak) {
  SHARED_ALIGNED(16, float, tile, [256]);
  cp_async4(&tile[threadIdx.x], in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = tile[255 - threadIdx.x];
  cp_async_wait<0>();
}

CHECK_KERNEL(copy_read_before_the_wait) {
  SHARED_ALIGNED(16, float, tile, [256]);
  cp_async4(&tile[threadIdx.x], in + threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = tile[threadIdx.x];
  cp_async_wait<0>();
}

CHECK_KERNEL(copy_without_a_barrier) {
  SHARED_ALIGNED(16, float, tile, [256]);
  cp_async4(&tile[threadIdx.x], in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = tile[255 - threadIdx.x];
}

CHECK_KERNEL(copy_over_what_others_read) {
  SHARED_ALIGNED(16, float, tile, [256]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[255 - threadIdx.x];
  cp_async4(&tile[threadIdx.x], in);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
}

CHECK_KERNEL(copy_never_waited_for) {
  SHARED_ALIGNED(16, float, tile, [256]);
  cp_async4(&tile[threadIdx.x], in + threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = 1;
}

CHECK_KERNEL(copy_never_committed) {
  SHARED_ALIGNED(16, float, tile, [256]);
  cp_async4(&tile[threadIdx.x], in + threadIdx.x);
  cp_async_wait<0>();
  out[threadIdx.x] = 1;
}

CHECK_KERNEL(copy_to_an_array_of_floats) {
  SHARED(float, tile, [256]);
  if (threadIdx.x < 64) cp_async16(&tile[4 * threadIdx.x], in + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[255 - threadIdx.x];
}

CHECK_KERNEL(copy_to_global_memory) {
  cp_async4(out + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
}

// Races that no order of threads shows.

CHECK_KERNEL(counter_in_global_memory) {
  counter[0] += 1;
  out[threadIdx.x] = 1;
}

CHECK_KERNEL(counter_in_shared_memory) {
  SHARED(unsigned, count, [1]);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  count[0] += 1;
  out[threadIdx.x] = 1;
}

CHECK_KERNEL(counter_of_blocks) {  // eight
  if (threadIdx.x == 0) counter[0] += 1;
  if (blockIdx.x == 0) out[threadIdx.x] = 1;
}

CHECK_KERNEL(plain_beside_atomic) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    counter[0] = 5;
  } else if (threadIdx.x == 0) {
    atomicAdd(counter, 1u);
  }
}

CHECK_KERNEL(last_block_without_fence) {  // eight
  SHARED(unsigned, last, [1]);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 1;
    last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last[0] == 0 || threadIdx.x) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b];
  out[8] = sum;
}

// Launches that no GPU of compute capability 8.0 takes.

#define CHECK_ONES(name) \
  CHECK_KERNEL(name) { out[threadIdx.x % 256] = 1; }
CHECK_ONES(block_of_2048)
CHECK_ONES(block_depth_of_65)
CHECK_ONES(grid_height_of_65536)
CHECK_ONES(shared_of_164_kilobytes)

CHECK_KERNEL(shared_of_52_kilobytes) {
  SHARED(float, tile, [13 << 10]);
  tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[threadIdx.x];
}

TOKENFLOW_END

namespace tokenflow_ext {

using namespace cuda;

const Check kWrong[] = {
    CHECK(barrier_missing_after_write, 1, 256, 0, 255 - i),
    CHECK(barrier_missing_before_overwrite, 1, 256, 0, 2 * (255 - i) + 1),
    CHECK(barrier_in_two_branches, 1, 64, 0, i < 64),
    CHECK(barrier_that_some_skip, 1, 64, 0,
          i < 40   ? i
          : i < 64 ? i ^ 1
                   : 0),
    CHECK(warp_barrier_missing, 1, 256, 0, i ^ 1),
    CHECK(warp_barrier_for_a_block, 1, 256, 0, i ^ 32),
    CHECK(shuffle_for_a_warp_barrier, 1, 256, 0, i ^ 1),
    CHECK(shuffle_that_some_skip, 1, 64, 0, i % 2 && i < 64 ? i - 1 : 0),
    CHECK(shuffle_after_an_exit, 1, 32, 0, i != 5 && i < 32 ? i ^ 1 : 0),
    CHECK(shuffle_in_two_branches, 1, 64, 0, i < 64 ? i ^ 1 : 0),
    CHECK(mask_without_own_lane, 1, 64, 0, i < 64 ? i ^ 1 : 0),
    CHECK(masks_that_disagree, 1, 64, 0, i < 64 ? i ^ 1 : 0),
    CHECK(tensor_cores_that_some_skip, 1, 64, 0, 0),
    CHECK(mask_of_absent_lanes, 1, 40, 0, i < 40 ? i ^ 1 : 0),
    CHECK(shuffle_from_outside_the_mask, 1, 32, 0, i < 16 ? i + 16 : 0),
    CHECK(shared_never_written, 1, 256, 0, 2),
    CHECK(shared_kept_from_the_last_block, 2, 256, 0, i == 255 ? 7 : 0),
    CHECK(shared_past_the_end, 1, 256, 0, 1),
    CHECK(dynamic_past_the_end, 1, 256, 255 * 4, 1),
    CHECK(dynamic_without_any, 1, 32, 0, i == 0),
    CHECK(global_past_the_end, 2, 256, 0, 1),
    CHECK(vector_of_an_array_of_floats, 1, 256, 0, i < 64 ? 4 * i : 0),
    CHECK(vector_off_by_one, 1, 256, 0, i < 63 ? 4 * i + 1 : 0),
    CHECK(shift_too_far, 1, 256, 0, 0),
    CHECK(integer_overflow, 1, 256, 0, 0),
    CHECK(copy_waited_for_after_the_barrier, 1, 256, 0, 255 - i),
    CHECK(copy_wait_too_weak, 1, 256, 0, 255 - i),
    CHECK(copy_read_before_the_wait, 1, 256, 0, i),
    CHECK(copy_without_a_barrier, 1, 256, 0, 255 - i),
    CHECK(copy_over_what_others_read, 1, 256, 0, 255 - i),
    CHECK(copy_never_waited_for, 1, 256, 0, 1),
    CHECK(copy_never_committed, 1, 256, 0, 1),
    CHECK(copy_to_an_array_of_floats, 1, 256, 0, 255 - i),
    CHECK(copy_to_global_memory, 1, 256, 0, i),
    CHECK(counter_in_global_memory, 1, 256, 0, 1),
    CHECK(counter_in_shared_memory, 1, 256, 0, 1),
    CHECK(counter_of_blocks, 8, 32, 0, i < 32),
    CHECK(plain_beside_atomic, 8, 32, 0, 0),
    CHECK(last_block_without_fence, 8, 32, 0,
          i < 8    ? 1
          : i == 8 ? 8
                   : 0),
    CHECK(block_of_2048, 1, 2048, 0, 1),
    CHECK(block_depth_of_65, 1, dim3(1, 1, 65), 0, 1),
    CHECK(grid_height_of_65536, dim3(1, 65536), 1, 0, i == 0),
    CHECK(shared_of_164_kilobytes, 1, 256, 164 << 10, 1),
    CHECK(shared_of_52_kilobytes, 1, 256, 0, 1),
};
const int kWrongCount = sizeof kWrong / sizeof *kWrong;

}  // namespace tokenflow_ext
