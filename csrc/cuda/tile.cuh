// Rows through shared memory: read as they lie, channel by channel; kept with rows side by side, so that a thread can
// have a row of its own, as chains of multiply-adds over channels need it.
#pragma once
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

constexpr int kTileThreads = 256;  // of a block that loads tiles

// Numbers between two channels of a tile of `rows`: eight channels of four rows lie on 32 different banks.
TOKENFLOW_DEVICE constexpr int tile_stride(int rows) { return rows + 4; }

// tile [padded][tile_stride(kRows)] = channels [0, channels) of rows [0, rows), zeros behind them; `padded` is a
// multiple of 8, `from` the place of the first number, `stride` that from one row to the next. A warp reads eight
// channels of four rows, whole sectors of 32 bytes of float32; four such pieces are on their way at a time.
template <int kRows>
static __device__ __forceinline__ void load_tile(const void* data, Type type, int64_t from, int64_t stride,
                                                 int64_t rows, int channels, int padded, float* tile) {
  constexpr int kWarps = kTileThreads / 32, kFours = kRows / 4, kAhead = 4;
  const int warp = threadIdx.x / 32, channel = threadIdx.x % 8, row = threadIdx.x % 32 / 8;
  const int pieces = padded / 8 * kFours;
  for (int first = warp; first < pieces; first += kWarps * kAhead) {
    float x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int piece = first + i * kWarps, r = piece % kFours * 4 + row, d = piece / kFours * 8 + channel;
      x[i] = 0;
      if (d < channels && r < rows) x[i] = number(data, type, from + r * stride + d);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int piece = first + i * kWarps, r = piece % kFours * 4 + row, d = piece / kFours * 8 + channel;
      if (piece < pieces) tile[d * tile_stride(kRows) + r] = x[i];
    }
  }
}

TOKENFLOW_END
