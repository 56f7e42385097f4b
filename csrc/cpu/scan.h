// The scan in the type of the scores: 2 N K C operations, nothing of size N x K.
// A tile is 8 rows (6 where there are 16 registers) x 2 registers of codes: independent chains hide the latency of the
// fused multiply-add, and one broadcast channel feeds two of them. Inside a segment of codes only the minimum of each
// lane is kept, one instruction a register; which segment held the lowest is noted once a segment, and its codes are
// scored again at the end. Blocks of panels stay in the second-level cache while the tiles of 64 rows pass over them.
#pragma once
#include "cpu/panels.h"

TOKENFLOW_BEGIN

constexpr int64_t kBlockBytes = kRegisters >= 32 ? 384 << 10 : 192 << 10;
constexpr int kTileRows = kRegisters >= 32 ? 8 : 6;

// Panels in a segment: more of them cost fewer comparisons and more scoring at the end.
static inline int64_t segment_panels(int64_t panels) { return (panels * kPanel >= 8192 ? 128 : 64) / kPanel; }

// The lowest score of each row, and the first segment that holds it; -1 where none was below +inf.
template <class T>
struct Lowest {
  T score;
  int64_t segment;
};

// R rows against panels [from, to), `from` at the start of a segment. Never inlined: the sums stay in registers only
// where the caller does not compete for them (1.4x in multiscale_quantize).
template <class T, int R>
static __attribute__((noinline)) void scan_tile(const T* staged, const Packed<T>& packed, int64_t from, int64_t to,
                                                int64_t segment, Lowest<T>* lowest) {
  using V = typename Register<T>::V;
  using I = typename Register<T>::I;
  constexpr int kLanes = Register<T>::kLanes;
  constexpr int64_t kPairs = kPanel / (2 * kLanes);  // register pairs per panel
  const int64_t channels = packed.channels;
  V low[R];
  I at[R];
  for (int r = 0; r < R; ++r) low[r] = broadcast(static_cast<T>(__builtin_inf())), at[r] = I{} - 1;
  for (int64_t first = from; first < to; first += segment) {
    V here[R];
    for (int r = 0; r < R; ++r) here[r] = broadcast(static_cast<T>(__builtin_inf()));
    const int64_t last = first + segment < to ? first + segment : to;
    for (int64_t pair = first * kPairs; pair < last * kPairs; ++pair) {
      const T* codes = packed.panels + pair / kPairs * packed.stride() + pair % kPairs * 2 * kLanes;
      V score[R][2];
      const V s0 = load_register(codes + channels * kPanel), s1 = load_register(codes + channels * kPanel + kLanes);
      for (int r = 0; r < R; ++r) score[r][0] = s0, score[r][1] = s1;
      for (int64_t d = 0; d < channels; ++d) {
        const V c0 = load_register(codes + d * kPanel), c1 = load_register(codes + d * kPanel + kLanes);
        for (int r = 0; r < R; ++r) {
          const V x = broadcast(staged[r * channels + d]);
          score[r][0] = fused(x, c0, score[r][0]);
          score[r][1] = fused(x, c1, score[r][1]);
        }
      }
      for (int r = 0; r < R; ++r) here[r] = lower(score[r][1], lower(score[r][0], here[r]));
    }
    const I index = I{} + static_cast<typename Register<T>::Index>(first / segment);
    for (int r = 0; r < R; ++r) {
      const I improved = here[r] < low[r];
      low[r] = improved ? here[r] : low[r];
      at[r] = improved ? index : at[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    const T score = lowest_lane(low[r]);
    Lowest<T> here = {score, INT64_MAX};
    for (uint32_t lanes = lanes_at_most(low[r], score); lanes; lanes &= lanes - 1) {
      const int64_t index = at[r][__builtin_ctz(lanes)];
      here.segment = index < here.segment ? index : here.segment;
    }
    // Blocks come in order: on equal scores the earlier one stays.
    if (here.score < lowest[r].score) lowest[r] = here;
  }
}

// best [rows] of staged [rows <= 64, C] over panels [from, to) of the packed codes, `from` at the start of a segment.
template <class T>
static void scan(const T* staged, int64_t rows, const Packed<T>& packed, int64_t from, int64_t to, Best<T>* best) {
  const int64_t channels = packed.channels, segment = segment_panels(panels_of(packed.codes));
  int64_t block = kBlockBytes / static_cast<int64_t>(packed.stride() * sizeof(T)) / segment * segment;
  if (block < segment) block = segment;
  Lowest<T> lowest[kRowBlock];
  for (int64_t r = 0; r < rows; ++r) lowest[r] = {static_cast<T>(__builtin_inf()), -1};
  for (int64_t first = from; first < to; first += block) {
    const int64_t last = first + block < to ? first + block : to;
    for (int64_t r = 0, taken; r < rows; r += taken) {
      const int64_t left = rows - r;
      // Two rows are too few chains: the last 8 are two tiles of 4, not one of 6 and one of 2.
      if (left >= kTileRows && left != (kTileRows == 6 ? 8 : 0))
        scan_tile<T, kTileRows>(staged + r * channels, packed, first, last, segment, lowest + r), taken = kTileRows;
      else if (left >= 4)
        scan_tile<T, 4>(staged + r * channels, packed, first, last, segment, lowest + r), taken = 4;
      else if (left >= 2)
        scan_tile<T, 2>(staged + r * channels, packed, first, last, segment, lowest + r), taken = 2;
      else
        scan_tile<T, 1>(staged + r * channels, packed, first, last, segment, lowest + r), taken = 1;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    best[r] = {static_cast<T>(__builtin_inf()), -1};
    if (lowest[r].segment < 0) continue;
    const int64_t first = lowest[r].segment * segment, last = first + segment < to ? first + segment : to;
    best_in_panels(staged + r * channels, packed, first, last, 0, best + r);
  }
}

TOKENFLOW_END
