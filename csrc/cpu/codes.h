// Rows grouped by code: the deterministic way to sum over the rows of a code, without one-hot and without atomics.
// A stable counting sort, O(N + K); the sums of a code then follow row order whatever the thread count.
#pragma once
#include "common/canonical.h"

TOKENFLOW_BEGIN

// For every group g: order[g] lists the rows n by indices[n, g], starts[g, k] .. starts[g, k + 1] are those of code k.
// indices [N, G]; order [G, N]; starts [G, K + 1]. Ids outside the table are left out; returns how many there were.
static int64_t sort_by_code(const int64_t* indices, int64_t rows, int64_t groups, int64_t codes, int64_t* order,
                            int64_t* starts) {
  int64_t outside = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t* start = starts + g * (codes + 1);
    memset(start, 0, (codes + 1) * sizeof(int64_t));
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t k = indices[n * groups + g];
      if (k < 0 || k >= codes)
        ++outside;
      else
        ++start[k];
    }
    for (int64_t k = 1; k <= codes; ++k) start[k] += start[k - 1];
    for (int64_t n = rows - 1; n >= 0; --n) {
      const int64_t k = indices[n * groups + g];
      if (k >= 0 && k < codes) order[g * rows + --start[k]] = n;
    }
  }
  return outside;
}

// out[C] = sum over j in [from, to) of rows[order[j]] (rows lie `stride` apart), in that order, accumulated in double.
template <class T>
static void sum_members(const T* rows, int64_t stride, const int64_t* order, int64_t from, int64_t to, int64_t channels,
                        T* out) {
  constexpr int64_t kSpan = 64;
  for (int64_t first = 0; first < channels; first += kSpan) {
    const int64_t width = channels - first < kSpan ? channels - first : kSpan;
    double sum[kSpan] = {};
    for (int64_t j = from; j < to; ++j) {
      const T* row = rows + order[j] * stride + first;
      for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
    }
    for (int64_t d = 0; d < width; ++d) out[first + d] = static_cast<T>(sum[d]);
  }
}

TOKENFLOW_END
