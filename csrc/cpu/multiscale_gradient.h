// Sums of the multi-scale backwards: the gradient of phi over images, that of the codebook over rows. Images fall into
// fixed chunks and rows are added by code in row order (sums.h), so that neither depends on the thread count.
#pragma once
#include "cpu/multiscale_step.h"
#include "cpu/sums.h"

TOKENFLOW_BEGIN

// Images [first, last) of chunk j of `chunks`, a number that does not depend on the threads.
struct Chunk {
  int64_t first, last;
};
static inline int64_t chunks_of(int64_t batch) { return batch < 1 ? 1 : batch < 32 ? batch : 32; }
static inline Chunk chunk_of(int64_t batch, int64_t j) {
  const int64_t chunks = chunks_of(batch);
  return {j * batch / chunks, (j + 1) * batch / chunks};
}

template <class T>
static bool holds_phi(const Loop<T>& loop, const View& grad_weight, const View& grad_bias) {
  return grad_weight.type == kNone ||
         (holds(grad_weight, type_of<T>(), loop.phi_rows * 9 * loop.channels * loop.channels) &&
          holds(grad_bias, type_of<T>(), loop.phi_rows * loop.channels));
}

// grad_weight [P, out, in, 3, 3] and grad_bias [P, C] = sum over the chunks of partial [chunks], each [P, 9, out, in]
// and [P, C], in order.
template <class T>
static void sum_chunks(const Loop<T>& loop, T* partial, const View& grad_weight, const View& grad_bias) {
  const int64_t n = loop.phi_numbers(), square = loop.channels * loop.channels, weights = loop.phi_rows * 9 * square;
  for (int64_t j = 1; j < chunks_of(loop.batch); ++j) add(partial + j * n, n, partial);
  for (int64_t p = 0; p < loop.phi_rows; ++p)
    for (int64_t i = 0; i < square; ++i)
      for (int64_t tap = 0; tap < 9; ++tap)
        data<T>(grad_weight)[(p * square + i) * 9 + tap] = partial[(p * 9 + tap) * square + i];
  memcpy(grad_bias.data, partial + weights, loop.phi_rows * loop.channels * sizeof(T));
}

// grad_codebook [K, C] = gradients [B L, C] of gathered codes, summed by code in row order, through the code's
// normalisation. rows [B L, C] and norms [B L, T] are the codes that the forward gathered; a NaN row is left out.
template <class T>
struct CodeSum {
  T* gaps;  // [B L, C]: the gradients
  SumSpace space;

  void run(const Loop<T>& loop, const int64_t* ids, const T* rows, const T* norms, T* grad_codebook) const {
    const int64_t channels = loop.channels, count = loop.batch * loop.length;
    const View from = {gaps, type_of<T>(), 3, -1, true, {count, 1, channels}};
    const View out = {grad_codebook, type_of<T>(), 2, -1, true, {loop.codes, channels}};
    sum_by_code<T>(
        ids, from, loop.codes, false, space,
        [&](int64_t& known, int64_t n) {
          if (!known && rows[n * channels] == rows[n * channels]) known = n + 1;
        },
        [&](int64_t, int64_t first, int64_t used, const double* sums, const int64_t* known) {
          store_sums<T>(out, first * channels, used * channels, sums);
          for (int64_t k = 0; loop.tables.unit_codes && k < used; ++k) {
            if (!known[k]) continue;
            const int64_t n = known[k] - 1;
            through_unit(loop.tables, rows + n * channels, norms + n * loop.tables.count,
                         grad_codebook + (first + k) * channels);
          }
        },
        [&](int64_t, int64_t first, int64_t used) {
          memset(grad_codebook + first * channels, 0, used * channels * sizeof(T));
        });
  }
};

template <class T>
static CodeSum<T> take_code_sum(Call& call, const Loop<T>& loop) {
  const int64_t rows = loop.batch * loop.length;
  return {take<T>(call, rows * loop.channels), take_sums(call, rows, 1, loop.codes, loop.channels)};
}

TOKENFLOW_END
