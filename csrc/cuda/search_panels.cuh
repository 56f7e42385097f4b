// Panels: codes as the search reads them (search.cuh), and rows too wide to stay in a block's memory, in the same way.
// Layout: [G][panels][padded C + 1][width]: the channels, then a line of starting scores. Code 8 i + j of a panel of
// 128 lies at 4 i + j for j < 4, at 64 + 4 i + j - 4 else: a thread's eight codes are neighbours, and its two loads of
// four meet those of neighbouring threads on all 32 banks. Rows lie in their order.
#pragma once
#include "cuda/tile.cuh"

TOKENFLOW_BEGIN

constexpr int kPanel = 128;               // codes
constexpr int64_t kMaxShared = 99 << 10;  // bytes that a block may have on every architecture

TOKENFLOW_DEVICE static inline int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Channels in a panel or a tile; those behind the last add -0 * +0 = -0, which changes no score.
TOKENFLOW_DEVICE static inline int padded(int64_t channels) { return static_cast<int>((channels + 7) / 8 * 8); }

// The place of code i of a panel in [128].
TOKENFLOW_DEVICE static inline int place_of(int i) { return i % 8 / 4 * (kPanel / 2) + i / 8 * 4 + i % 4; }

// Codes or rows [G, count, C], `stride` numbers from one to the next and `between` from one group to the next.
struct Items {
  const void* data;
  Type type;
  int64_t count, stride, between, channels;
};

struct Packing {
  Items items;
  Tables tables;
  int width;     // items in a panel: [padded C + 1][width] numbers
  bool as_rows;  // in their order, negated; zeros and NaN as the last line where there is no finite item. Else codes
  float* panels;
  u64* keys;  // filled with kNoKey
  int64_t key_count;
};

static __device__ __forceinline__ void load_four(const float* from, float* to) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

// score += rows x codes over eight channels of a tile of rows and of a panel; the first eight begin with the codes'
// starting scores. A thread's rows and codes are fours that lie half a tile and half a panel apart.
template <bool kFirst, int kRows, int kTall, int kWide>
static __device__ __forceinline__ void multiply(const float* rows, const float* codes, const float* starts,
                                                float (&score)[kTall][kWide]) {
  float start[kWide];
#pragma unroll
  for (int k = 0; kFirst && k < kWide; k += 4) load_four(starts + k / 4 * (kPanel / 2), start + k);
#pragma unroll
  for (int d = 0; d < 8; ++d) {
    float x[kTall], c[kWide];
#pragma unroll
    for (int r = 0; r < kTall; r += 4) load_four(rows + d * tile_stride(kRows) + r / 4 * (kRows / 2), x + r);
#pragma unroll
    for (int k = 0; k < kWide; k += 4) load_four(codes + d * kPanel + k / 4 * (kPanel / 2), c + k);
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
#pragma unroll
      for (int k = 0; k < kWide; ++k) score[r][k] = fmaf(x[r], c[k], kFirst && d == 0 ? start[k] : score[r][k]);
    }
  }
}

// How many panels a block meets: so many blocks share those of a tile that the waves of blocks, two on a
// multiprocessor, are few and full. Making its rows costs a block about two panels.
int64_t share_of(const Call& call, int64_t tiles, int64_t panels);

// One launch.
void pack(Call& call, const Packing& job, int64_t groups);

TOKENFLOW_END
