// The nearest-code search behind every op: rows against a window of codes of one group, in one of three ways.
//   few rows       codes are packed panel by panel on the fly and scored at once; threads share the codes
//   full precision codes are packed once, scan.h passes over them
//   certified      codes are packed once and again in 8 bits, certified.h passes over them and scores what it cannot
//   rule out
// All give the lowest canonical (score, id), the same bits. Who owns what: `workspace` is a piece of the call's
// scratch, bytes_of_search() long.
#pragma once
#include "cpu/certified.h"

TOKENFLOW_BEGIN

template <class T>
struct Index {
  const T* codebook;  // [codes, C]
  Packed<T> packed;   // panels null: few rows
  const Tables* tables;
  bool certify;
  char* scratch;  // [threads, scratch_bytes]
  int64_t scratch_bytes;
  mutable int64_t tried, gave_up;  // rows that the certified scan was asked for, and that it could not narrow down
#ifdef TOKENFLOW_INT8
  Codes8 codes8;
  Bound bound;
#endif
};

// Bytes of workspace for `rows` rows in one call, all scales together.
template <class T>
int64_t bytes_of_search(int64_t rows, int64_t codes, int64_t channels, int threads);

// The codes [codes, C], ready to be searched by `rows` rows in all.
template <class T>
Index<T> make_index(const T* codebook, int64_t codes, int64_t channels, const Tables& tables, int64_t rows,
                    const View& workspace, int threads);

// best [rows <= 64] of staged rows [rows, C]. Opens a parallel region only where threads > 1; callers that are inside
// one, with a block of rows each, pass 1.
template <class T>
void search(const Index<T>& index, const T* staged, int64_t rows, Best<T>* best, int threads);

// block(first, count, threads) for blocks of at most 64 rows. Every thread gets some, in whole tiles; where not even
// that is to be had, or the codes are still to be packed, the rows have all threads together, if they `can_share` them.
template <class T, class F>
static void for_row_blocks(const Index<T>& index, int64_t rows, int threads, bool can_share, F block) {
  int64_t size = (rows / (2 * threads) + 7) / 8 * 8;
  size = size < 8 ? 8 : size < kRowBlock ? size : kRowBlock;
  const bool shared = can_share && threads > 1 && (!index.packed.panels || rows <= (threads - 1) * size);
  if (shared || threads == 1) size = kRowBlock;
  for_each((rows + size - 1) / size, shared ? 1 : threads,
           [&](int64_t i) { block(i * size, rows - i * size < size ? rows - i * size : size, shared ? threads : 1); });
}

TOKENFLOW_END
