// The certified search of search_rows: codes and rows rounded to bfloat16 meet on the tensor cores, and what an error
// bound cannot rule out is scored again, canonically. The keys are those of the float32 search, bit for bit;
// docs/certified_search.md has the proof. Launches of one search: rows staged in float32 (search_pack.cu), rounded
// (certified_pack.cu); the scan and what it leaves (certified.cu) for every batch of rows; the float32 search
// (search.cu) of the tiles in which a row had too many segments left.
// Who owns what: everything here is scratch of one call. Codes are written by pack_codes, the rest by every search.
#pragma once
#include "cuda/search.cuh"
#include "cuda/search_panels.cuh"

TOKENFLOW_BEGIN

constexpr int kSegment = 64;  // codes that have one minimum

static inline int steps_of(int64_t channels) { return static_cast<int>((channels + 15) / 16); }

// Whether a block's memory holds such rows.
bool certifiable(int64_t channels);

struct Rounding {
  const float* panels;  // [G][panels] of search_panels.cuh, rows or codes
  int64_t count;        // of them in a group
  int channels;
  bool as_rows;
  uint4* halves;     // [G][panels][steps of 16 channels][8][32], as Certified says
  float4* sizes;     // of every row, or of every segment
  unsigned* failed;  // [G][panels], which become 0; or none
};

// One launch.
void round_to_halves(Call& call, const Rounding& job, int64_t groups);

// The float32 search of the tiles of 128 rows that are marked in `failed`. One launch.
void search_failed(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const unsigned* failed);

Certified take_certified(Call& call, int64_t groups, int64_t codes, int64_t channels, int64_t max_rows);

// search_rows by these ways.
void search_certified(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys);

// x as bfloat16, to nearest even; what is too small for exact products becomes 0.
static __device__ __forceinline__ unsigned half_of(float x) { return fabsf(x) < 0x1p-60f ? 0u : to_bfloat16(x); }

// The bound on what the scan's score exceeds the canonical one by, of one row z and the codes of a segment:
//   code |c| + gap |c - bf16(c)| + start h + rest
// with the segment's largest of each; every float32 rounding on the way is to its side.
enum BoundTerm { kBoundRow, kBoundGap, kBoundChain, kBoundSums, kBoundStart, kBoundTerms };
#if !defined(TOKENFLOW_BOUND)
#define TOKENFLOW_BOUND(term, value) (value)
#endif

constexpr float kMostNorm = 1e15f, kMostStart = 1e30f;  // beyond them nothing is ruled out

struct RowBound {
  float code, gap, start, rest;
};

// Of a row of this norm, which is `away` from its rounding.
static __device__ __forceinline__ RowBound bound_of(float norm, float away, int channels) {
  const float n = static_cast<float>(channels), up = 1 + 0x1p-20f, rounded = norm + away;
  const float chain = TOKENFLOW_BOUND(kBoundChain, (n + 1) * 0x1p-24f);
  const float sums = TOKENFLOW_BOUND(kBoundSums, (n + 16) * 0x1p-20f);
  if (!(norm <= kMostNorm)) return {INFINITY, 0, 0, 0};
  return {up * (TOKENFLOW_BOUND(kBoundRow, away) + sums * rounded + chain * norm),
          up * TOKENFLOW_BOUND(kBoundGap, rounded * (1 + sums)), up * TOKENFLOW_BOUND(kBoundStart, sums + chain),
          (2 * n + 16) * 0x1p-126f};
}

// What a minimum of the segment must exceed to be ruled out by a score: `!(minimum > ceiling)` keeps it, NaN too.
static __device__ __forceinline__ float ceiling_of(const RowBound& row, float4 segment, float score) {
  const float error = row.code * segment.x + row.gap * segment.y + row.start * segment.z + row.rest;
  return score + (error + 0x1p-22f * (fabsf(score) + error));
}

TOKENFLOW_END
