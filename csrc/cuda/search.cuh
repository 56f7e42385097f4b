// The nearest-code search behind every op (search.cu): keys[n, g] = the lowest (canonical score, id) of row x[n, g]
// over the codes of group g, for another kernel to read. Twice a call and once for each batch of rows:
//   const Searched codes = take_codes(call, codebook, tables, lo, hi, rows);  // counts, and takes scratch
//   u64* keys = take<u64>(call, rows * groups);
//   if (call.counting) return nullptr;
//   pack_codes(call, codes, keys, rows * groups);                             // also fills keys with kNoKey
//   search_rows(call, codes, {x, type, rows, row stride}, keys);
// The search lowers keys and never fills them: kernels that run between two searches fill those of the next one.
// Who owns what: keys, rows and codes are the caller's and are only read after the launch that makes them.
#pragma once
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

// What the certified search keeps beside (certified.cuh), bfloat16 by 16 bytes; null where it does not run.
struct Certified {
  uint4 *codes, *rows;           // [G][panels of 128][steps of 16 channels][8][32]
  float4 *segments, *row_sizes;  // [G][segments of 64] and [G][panels][128]: norm, what rounding took, start or mark
  float* minima;                 // [G][batch][2][panels in fours]
  unsigned* failed;              // [G][panels] of rows: whether a row had too many segments left
  int64_t batch;                 // rows that have minima at once, a multiple of 128
};

// Codes [G, K, C] as the search reads them: per group panels of 128, per panel [C padded to eights][128] channels and
// [128] starting scores; codes that do not exist start from +inf. Ids count from the window's first code.
struct Searched {
  const float* codebook;  // first code of the window in group 0
  int64_t codes;          // in the window
  int64_t between;        // numbers from one group to the next
  int64_t groups, channels;
  Tables tables;
  float* panels;
  float* row_panels;  // rows that are too wide for a block's memory, staged beforehand; null where none can be
  int64_t max_rows;   // of one search
  Certified certified;
};

// Rows x[n, g], `stride` numbers from one n to the next, C from one g to the next.
struct SearchedRows {
  const void* data;
  Type type;  // float32, float16 or bfloat16
  int64_t count, stride;
};

// `codebook` is [G, K, C] or [K, C] of float32, checked by the caller; ids lo .. hi - 1 are searched, at most
// `max_rows` rows at once. Certified where the call asks for it and the rows are not too wide (656 channels).
Searched take_codes(Call& call, const View& codebook, const Tables& tables, int64_t lo, int64_t hi, int64_t max_rows);

// One launch, two where certified. Also fills keys[0, count) with kNoKey, which every score beats.
void pack_codes(Call& call, const Searched& codes, u64* keys, int64_t count);

// One launch (two where C > 152 or so: rows too wide for a block's memory are staged first); five where certified, two
// more for every further batch of rows. keys[n G + g] becomes the
// lowest of it and of the scores above the floor `above`[n G + g], where one is given: the next best after that key. A
// row that is not finite leaves its key as it was.
void search_rows(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const u64* above = nullptr);

// What a consumer reads: the id in its window, or -1 where the row has NaN or inf and takes the lowest id, NaN and no
// part in sums.
static __device__ __forceinline__ int64_t found_id(u64 key) {
  return key == kNoKey ? -1 : static_cast<int64_t>(id_of(key));
}

TOKENFLOW_END
