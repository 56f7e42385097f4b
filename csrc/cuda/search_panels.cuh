// Panels: codes as the search reads them (search.cuh), and rows too wide to stay in a block's memory, in the same way.
// Layout: [G][panels][padded C + 1][width]: the channels, then a line of starting scores. Code 8 i + j of a panel of
// 128 lies at 4 i + j for j < 4, at 64 + 4 i + j - 4 else: a thread's eight codes are neighbours, and its two loads of
// four meet those of neighbouring threads on all 32 banks. Rows lie in their order.
#pragma once
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

constexpr int kPanel = 128;  // codes

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
  bool as_rows;  // staged, in their order; the last line is 0, NaN where the row is not finite. Else codes
  float* panels;
  u64* keys;  // filled with kNoKey
  int64_t key_count;
};

// One launch.
void pack(Call& call, const Packing& job, int64_t groups);

TOKENFLOW_END
