// code_statistics: counts[g, k] = rows of code k, sums[g, k] = their sum; non-finite rows are left out and counted.
// ema_update: the exponential moving average of both, and the codebook that follows from it.
// Reads C + 1 numbers a row and 3 (C + 1) a code, writes 2 (C + 1) a code. Source: van den Oord et al. 1711.00937, A.1.
#include "common/ops.h"
#include "cpu/sums.h"

TOKENFLOW_BEGIN

constexpr int64_t kShares = 64;  // of the codes, whose counts are summed apart: the sum does not depend on the threads

template <class T>
static Left statistics(const int64_t* ids, const View& x, const View& counts, const View& sums, const SumSpace& space) {
  const int64_t codes = counts.shape[1], channels = x.shape[2];
  T* count = static_cast<T*>(counts.data);
  return sum_by_code<T>(
      ids, x, codes, true, space, [](int64_t& rows, int64_t) { ++rows; },
      [&](int64_t g, int64_t first, int64_t used, const double* added, const int64_t* rows) {
        for (int64_t k = 0; k < used; ++k) count[g * codes + first + k] = static_cast<T>(rows[k]);
        store_sums<T>(sums, (g * codes + first) * channels, used * channels, added);
      },
      [&](int64_t g, int64_t first, int64_t used) {
        memset(count + g * codes + first, 0, used * sizeof(T));
        memset(static_cast<T*>(sums.data) + (g * codes + first) * channels, 0, used * channels * sizeof(T));
      });
}

Error code_statistics(View x, View indices, View members, View starts, View space_sums, View counts, View sums,
                      View status) noexcept {
  if (!dense(x, 3) || !dense(indices, 2) || !dense(counts, 2) || !floating(x) || indices.type != kInt64)
    return "code_statistics: wanted contiguous floats x [N, G, C], int64 indices [N, G], counts [G, K]";
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = counts.shape[1];
  SumSpace space;
  if (indices.shape[0] != rows || indices.shape[1] != groups || counts.shape[0] != groups || counts.type > kFloat64 ||
      !holds(sums, counts.type, groups * codes * x.shape[2]) || !holds(status, kInt64, 2) ||
      !sum_space(members, starts, space_sums, rows, groups, codes, x.shape[2], &space))
    return "code_statistics: wanted outputs and workspace that fit the rows";
  const int64_t* ids = static_cast<const int64_t*>(indices.data);
  const Left left = counts.type == kFloat64 ? statistics<double>(ids, x, counts, sums, space)
                                            : statistics<float>(ids, x, counts, sums, space);
  static_cast<int64_t*>(status.data)[0] = left.outside;
  static_cast<int64_t*>(status.data)[1] = left.bad;
  return nullptr;
}

// partial [G, 64]: the share of each 64th of the codes in sum_k ema_counts_k, added in order.
template <class T>
static void update(const View& codebook, const View& ema_counts, const View& ema_sums, const View& counts,
                   const View& sums, const View& partial, const Tables& tables, double decay, double eps,
                   bool normalize_mean, int threads) {
  const int64_t groups = codebook.shape[0], codes = codebook.shape[1], channels = codebook.shape[2];
  const int64_t blocks = (codes + kRows - 1) / kRows;
  const T keep = static_cast<T>(decay), take = static_cast<T>(1.0 - decay);
  double* totals = static_cast<double*>(partial.data);
  if (groups * codes * channels * static_cast<int64_t>(sizeof(T)) < kAloneBytes) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    double total = 0;
    int64_t total_of = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < groups * kShares; ++i) {
      const int64_t g = i / kShares, j = i % kShares;
      T* average = static_cast<T*>(ema_counts.data) + g * codes;
      const T* count = static_cast<const T*>(counts.data) + g * codes;
      double share = 0;
      for (int64_t k = codes * j / kShares; k < codes * (j + 1) / kShares; ++k)
        share += average[k] = keep * average[k] + take * count[k];
      totals[i] = share;
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < groups * blocks; ++b) {
      const int64_t g = b / blocks, first = b % blocks * kRows, used = codes - first < kRows ? codes - first : kRows;
      const int64_t at = g * codes + first, numbers = used * channels;
      T* average_sum = static_cast<T*>(ema_sums.data) + at * channels;
      const T* sum = static_cast<const T*>(sums.data) + at * channels;
      if (normalize_mean) {
        // The mean's length cancels: unit(sum / count) = unit(sum).
        for (int64_t k = 0; k < used; ++k)
          for (int64_t t = 0, d = k * channels; t < tables.count; d += tables.width[t++]) {
            const T norm = floored_norm(sum + d, tables.width[t]);
            for (int64_t i = d; i < d + tables.width[t]; ++i)
              average_sum[i] = keep * average_sum[i] + take * (sum[i] / norm);
          }
      } else {
        for (int64_t i = 0; i < numbers; ++i) average_sum[i] = keep * average_sum[i] + take * sum[i];
      }
      if (g != total_of) {
        total = 0, total_of = g;
        for (int64_t j = 0; j < kShares; ++j) total += totals[g * kShares + j];
      }
      T* moved[kRows];
      int64_t moves = 0;
      for (int64_t k = 0; k < used; ++k) {
        if (!(static_cast<const T*>(counts.data)[at + k] > 0)) continue;
        const double average = static_cast<const T*>(ema_counts.data)[at + k];
        T* code = moved[moves++] = static_cast<T*>(codebook.data) + (at + k) * channels;
        const T smoothed = static_cast<T>((average + eps) / (total + codes * eps) * total);
        divide(average_sum + k * channels, channels, smoothed, code);
      }
      if (tables.unit && moves) make_unit_rows<T>(tables, moved, moves, nullptr);
    }
  }
}

Error ema_update(View codebook, View ema_counts, View ema_sums, View counts, View sums, View partial, Tables tables,
                 double decay, double eps, bool normalize_mean, int threads) noexcept {
  if (!dense(codebook, 3) || codebook.type < kFloat32 || codebook.type > kFloat64 || !covers(tables, codebook.shape[2]))
    return "ema_update_: codebook: wanted contiguous float32 or float64 [G, K, C]";
  const int64_t count = codebook.shape[0] * codebook.shape[1], numbers = count * codebook.shape[2];
  if (!holds(ema_counts, codebook.type, count) || !holds(counts, codebook.type, count) ||
      !holds(ema_sums, codebook.type, numbers) || !holds(sums, codebook.type, numbers) ||
      !holds(partial, kFloat64, codebook.shape[0] * kShares))
    return "ema_update_: wanted counts [G, K], sums [G, K, C] of the codebook's type and partial [G, 64]";
  if (codebook.type == kFloat64)
    update<double>(codebook, ema_counts, ema_sums, counts, sums, partial, tables, decay, eps, normalize_mean, threads);
  else
    update<float>(codebook, ema_counts, ema_sums, counts, sums, partial, tables, decay, eps, normalize_mean, threads);
  return nullptr;
}

TOKENFLOW_END
