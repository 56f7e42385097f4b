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

// Counts alone. Rows are read only to see whether they are finite.
template <class T>
static Left hits(const int64_t* ids, const View& x, const View& counts, int64_t* total) {
  constexpr int64_t kSpan = 64;  // channels that are converted at a time
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], codes = counts.shape[1];
  const T* direct = x.type == type_of<T>() ? static_cast<const T*>(x.data) : nullptr;
  Left left = {0, 0};
  memset(total, 0, groups * codes * sizeof(int64_t));
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = n * groups + g, at = i * channels, id = ids[i];
      if (!inside(id, codes)) {
        ++left.outside;
        continue;
      }
      bool good = !direct || all_finite(direct + at, channels);
      for (int64_t c = 0; !direct && c < channels; c += kSpan) {
        T span[kSpan];
        const int64_t width = channels - c < kSpan ? channels - c : kSpan;
        load(x, at + c, width, span);
        good &= all_finite(span, width);
      }
      total[g * codes + id] += good;
      left.bad += !good;
    }
  for (int64_t k = 0; k < groups * codes; ++k) static_cast<T*>(counts.data)[k] = static_cast<T>(total[k]);
  return left;
}

template <class T>
static void run(Call& call, const View& x, const View& indices, const View& counts, const View& sums) {
  const int64_t *ids = static_cast<const int64_t*>(indices.data), codes = counts.shape[1];
  Left left;
  if (sums.type == kNone) {
    int64_t* total = take<int64_t>(call, x.shape[1] * codes);
    if (call.counting) return;
    left = hits<T>(ids, x, counts, total);
  } else {
    const SumSpace space = take_sums(call, x.shape[0], x.shape[1], codes, x.shape[2]);
    if (call.counting) return;
    left = statistics<T>(ids, x, counts, sums, space);
  }
  call.ids_outside = left.outside;
  call.rows_not_finite = left.bad;
}

Error code_statistics(Call& call, View x, View indices, View counts, View sums) noexcept {
  const bool grouped = counts.rank == 2;
  x = by_group(x, grouped, 1), indices = by_group(indices, grouped, 0), counts = as_rows(counts);
  if (!dense(x, 3) || !dense(indices, 2) || !dense(counts, 2) || !floating(x) || indices.type != kInt64)
    return "code_statistics: wanted contiguous floats x [..., G, C], int64 indices [..., G], counts [G, K]";
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = counts.shape[1];
  if (indices.shape[0] != rows || indices.shape[1] != groups || counts.shape[0] != groups || counts.type > kFloat64 ||
      codes < 1 || x.shape[2] < 1 || (sums.type != kNone && !holds(sums, counts.type, groups * codes * x.shape[2])))
    return "code_statistics: wanted outputs that fit the rows";
  if (counts.type == kFloat64)
    run<double>(call, x, indices, counts, sums);
  else
    run<float>(call, x, indices, counts, sums);
  return nullptr;
}

// totals [G, 64]: the share of each 64th of the codes in sum_k ema_counts_k, added in order.
template <class T>
static void update(const View& codebook, const View& ema_counts, const View& ema_sums, const View& counts,
                   const View& sums, double* totals, const Tables& tables, double decay, double eps,
                   bool normalize_mean, int threads) {
  const int64_t groups = codebook.shape[0], codes = codebook.shape[1], channels = codebook.shape[2];
  const int64_t blocks = (codes + kRows - 1) / kRows;
  const T keep = static_cast<T>(decay), take = static_cast<T>(1.0 - decay);
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

Error ema_update(Call& call, View codebook, View ema_counts, View ema_sums, View counts, View sums, Tables tables,
                 double decay, double eps, bool normalize_mean) noexcept {
  codebook = with_groups(codebook);
  if (!dense(codebook, 3) || codebook.type < kFloat32 || codebook.type > kFloat64 || !covers(tables, codebook.shape[2]))
    return "ema_update_: codebook: wanted contiguous float32 or float64 [G, K, C]";
  const int64_t count = codebook.shape[0] * codebook.shape[1], numbers = count * codebook.shape[2];
  if (!holds(ema_counts, codebook.type, count) || !holds(counts, codebook.type, count) ||
      !holds(ema_sums, codebook.type, numbers) || !holds(sums, codebook.type, numbers))
    return "ema_update_: wanted counts [G, K] and sums [G, K, C] of the codebook's type";
  double* totals = take<double>(call, codebook.shape[0] * kShares);
  if (call.counting) return nullptr;
  if (codebook.type == kFloat64)
    update<double>(codebook, ema_counts, ema_sums, counts, sums, totals, tables, decay, eps, normalize_mean,
                   call.threads);
  else
    update<float>(codebook, ema_counts, ema_sums, counts, sums, totals, tables, decay, eps, normalize_mean,
                  call.threads);
  return nullptr;
}

TOKENFLOW_END
