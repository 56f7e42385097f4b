// code_statistics: counts[g, k] = rows of code k, sums[g, k] = their sum; non-finite rows are left out and counted.
// ema_update: the exponential moving average of both, and the codebook that follows from it.
// Reads C + 1 numbers a row and 3 (C + 1) a code, writes 2 (C + 1) a code. Source: van den Oord et al. 1711.00937, A.1.
#include "common/ops.h"
#include "cpu/codes.h"

TOKENFLOW_BEGIN

template <class T>
static void statistics(const View& x, const int64_t* order, const int64_t* starts, const View& counts, const View& sums,
                       int64_t* status, int threads) {
  constexpr int64_t kSpan = 64;
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], codes = counts.shape[1];
  int64_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) reduction(+ : bad)
  for (int64_t i = 0; i < groups * codes; ++i) {
    const int64_t g = i / codes;
    const int64_t* start = starts + g * (codes + 1) + i % codes;
    const int64_t* members = order + g * rows;
    int64_t skipped = 0;
    for (int64_t j = start[0]; j < start[1]; ++j) {
      bool good = true;
      for (int64_t first = 0; first < channels; first += kSpan) {
        T row[kSpan];
        const int64_t width = channels - first < kSpan ? channels - first : kSpan;
        load(x, (members[j] * groups + g) * channels + first, width, row);
        good &= all_finite(row, width);
      }
      skipped += !good;
    }
    bad += skipped;
    static_cast<T*>(counts.data)[i] = static_cast<T>(start[1] - start[0] - skipped);
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t width = channels - first < kSpan ? channels - first : kSpan;
      double sum[kSpan] = {};
      T row[kSpan];
      for (int64_t j = start[0]; j < start[1]; ++j) {
        const int64_t at = (members[j] * groups + g) * channels;
        bool good = true;
        if (skipped) {
          for (int64_t c = 0; c < channels; c += kSpan) {
            const int64_t rest = channels - c < kSpan ? channels - c : kSpan;
            load(x, at + c, rest, row);
            good &= all_finite(row, rest);
          }
        }
        if (!good) continue;
        load(x, at + first, width, row);
        for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
      }
      for (int64_t d = 0; d < width; ++d) row[d] = static_cast<T>(sum[d]);
      store(sums, i * channels + first, width, row);
    }
  }
  status[1] = bad;
}

Error code_statistics(View x, View indices, View order, View starts, View counts, View sums, View status,
                      int threads) noexcept {
  if (!dense(x, 3) || !dense(indices, 2) || !dense(counts, 2) || !floating(x) || indices.type != kInt64)
    return "code_statistics: wanted contiguous floats x [N, G, C], int64 indices [N, G], counts [G, K]";
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = counts.shape[1];
  if (indices.shape[0] != rows || indices.shape[1] != groups || counts.shape[0] != groups || counts.type > kFloat64 ||
      !holds(sums, counts.type, groups * codes * x.shape[2]) || !holds(order, kInt64, rows * groups) ||
      !holds(starts, kInt64, groups * (codes + 1)) || !holds(status, kInt64, 2))
    return "code_statistics: wanted outputs and workspace that fit the rows";
  int64_t* sorted = static_cast<int64_t*>(order.data);
  int64_t* begin = static_cast<int64_t*>(starts.data);
  int64_t* state = static_cast<int64_t*>(status.data);
  state[0] = sort_by_code(static_cast<const int64_t*>(indices.data), x.shape[0], x.shape[1], counts.shape[1], sorted, begin);
  if (counts.type == kFloat64)
    statistics<double>(x, sorted, begin, counts, sums, state, threads);
  else
    statistics<float>(x, sorted, begin, counts, sums, state, threads);
  return nullptr;
}

template <class T>
static void update(const View& codebook, const View& ema_counts, const View& ema_sums, const View& counts,
                   const View& sums, const Tables& tables, double decay, double eps, bool normalize_mean, int threads) {
  const int64_t groups = codebook.shape[0], codes = codebook.shape[1], channels = codebook.shape[2];
  const T keep = static_cast<T>(decay), take = static_cast<T>(1.0 - decay);
  for (int64_t g = 0; g < groups; ++g) {
    T* average = static_cast<T*>(ema_counts.data) + g * codes;
    const T* count = static_cast<const T*>(counts.data) + g * codes;
    double total = 0;
    for (int64_t k = 0; k < codes; ++k) total += average[k] = keep * average[k] + take * count[k];
#pragma omp parallel for num_threads(threads) schedule(static) if (codes * channels > 16384)
    for (int64_t k = 0; k < codes; ++k) {
      const int64_t at = (g * codes + k) * channels;
      T* average_sum = static_cast<T*>(ema_sums.data) + at;
      T* code = static_cast<T*>(codebook.data) + at;
      const T* sum = static_cast<const T*>(sums.data) + at;
      const T* part = sum;
      int64_t d = 0;
      for (int t = 0; t < tables.count; ++t) {
        // The mean's length cancels: unit(sum / count) = unit(sum).
        const T norm = normalize_mean ? floored_norm(part, tables.width[t]) : 1;
        for (const int64_t end = d + tables.width[t]; d < end; ++d)
          average_sum[d] = keep * average_sum[d] + take * (sum[d] / norm);
        part += tables.width[t];
      }
      if (!(count[k] > 0)) continue;
      const T smoothed = static_cast<T>((average[k] + eps) / (total + codes * eps) * total);
      for (d = 0; d < channels; ++d) code[d] = average_sum[d] / smoothed;
      if (tables.unit) make_unit<T>(tables, code, nullptr);
    }
  }
}

Error ema_update(View codebook, View ema_counts, View ema_sums, View counts, View sums, Tables tables, double decay,
                 double eps, bool normalize_mean, int threads) noexcept {
  if (!dense(codebook, 3) || codebook.type < kFloat32 || codebook.type > kFloat64 || !covers(tables, codebook.shape[2]))
    return "ema_update_: codebook: wanted contiguous float32 or float64 [G, K, C]";
  const int64_t count = codebook.shape[0] * codebook.shape[1], numbers = count * codebook.shape[2];
  if (!holds(ema_counts, codebook.type, count) || !holds(counts, codebook.type, count) ||
      !holds(ema_sums, codebook.type, numbers) || !holds(sums, codebook.type, numbers))
    return "ema_update_: wanted counts [G, K] and sums [G, K, C] of the codebook's type";
  if (codebook.type == kFloat64)
    update<double>(codebook, ema_counts, ema_sums, counts, sums, tables, decay, eps, normalize_mean, threads);
  else
    update<float>(codebook, ema_counts, ema_sums, counts, sums, tables, decay, eps, normalize_mean, threads);
  return nullptr;
}

TOKENFLOW_END
