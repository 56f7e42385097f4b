// lookup: rows[n, g] = codebook[g, indices[n, g]], and the scatter-add backward.
// Reads 8 + C and writes C numbers a row; an id outside the table reads as a NaN row and is counted.
#include "common/ops.h"
#include "cpu/codes.h"

TOKENFLOW_BEGIN

static int64_t bytes_of(Type type) { return type == kFloat64 || type == kInt64 ? 8 : type == kFloat32 ? 4 : 2; }

Error lookup(View indices, View codebook, View rows, View status, int threads) noexcept {
  if (!dense(indices, 2) || !dense(codebook, 3) || indices.type != kInt64 || !floating(codebook))
    return "lookup: wanted contiguous int64 indices [N, G] and floats codebook [G, K, C]";
  if (indices.shape[1] != codebook.shape[0]) return "lookup: indices: wanted the groups of the codebook";
  if (!holds(rows, codebook.type, indices.shape[0] * indices.shape[1] * codebook.shape[2]) || !holds(status, kInt64, 1))
    return "lookup: rows: wanted [N, G, C] of the codebook's type";
  const int64_t groups = codebook.shape[0], codes = codebook.shape[1], channels = codebook.shape[2];
  const int64_t count = indices.shape[0] * groups, bytes = channels * bytes_of(codebook.type);
  const int64_t* ids = static_cast<const int64_t*>(indices.data);
  const char* from = static_cast<const char*>(codebook.data);
  char* to = static_cast<char*>(rows.data);
  int64_t outside = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : outside) if (count * bytes > 65536)
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] >= 0 && ids[i] < codes) {
      memcpy(to + i * bytes, from + (i % groups * codes + ids[i]) * bytes, bytes);
    } else {
      memset(to + i * bytes, 0xff, bytes);  // all ones is a NaN in every float type
      ++outside;
    }
  }
  static_cast<int64_t*>(status.data)[0] = outside;
  return nullptr;
}

// out[g, k] = sum over rows n of code k of rows[n, g], in row order; accumulated in double, 64 channels at a time.
template <class T>
static void sum_rows(const View& rows, const int64_t* order, const int64_t* starts, const View& out, int threads) {
  constexpr int64_t kSpan = 64;
  const int64_t count = rows.shape[0], groups = out.shape[0], codes = out.shape[1], channels = out.shape[2];
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t i = 0; i < groups * codes; ++i) {
    const int64_t g = i / codes, k = i % codes;
    const int64_t* start = starts + g * (codes + 1) + k;
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t width = channels - first < kSpan ? channels - first : kSpan;
      double sum[kSpan] = {};
      T row[kSpan];
      for (int64_t j = start[0]; j < start[1]; ++j) {
        load(rows, (order[g * count + j] * groups + g) * channels + first, width, row);
        for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
      }
      for (int64_t d = 0; d < width; ++d) row[d] = static_cast<T>(sum[d]);
      store(out, i * channels + first, width, row);
    }
  }
}

Error lookup_backward(View indices, View grad_rows, View order, View starts, View grad_codebook, int threads) noexcept {
  if (!dense(indices, 2) || !dense(grad_rows, 3) || !dense(grad_codebook, 3) || indices.type != kInt64 || !floating(grad_rows))
    return "lookup_backward: wanted contiguous int64 indices [N, G], floats grad_rows [N, G, C], grad_codebook [G, K, C]";
  const int64_t rows = indices.shape[0], groups = grad_codebook.shape[0];
  if (indices.shape[1] != groups || grad_rows.shape[0] != rows || grad_rows.shape[1] != groups ||
      grad_rows.shape[2] != grad_codebook.shape[2] || grad_codebook.type != grad_rows.type ||
      !holds(order, kInt64, rows * groups) || !holds(starts, kInt64, groups * (grad_codebook.shape[1] + 1)))
    return "lookup_backward: wanted gradients and workspace that fit the rows";
  int64_t* sorted = static_cast<int64_t*>(order.data);
  int64_t* begin = static_cast<int64_t*>(starts.data);
  sort_by_code(static_cast<const int64_t*>(indices.data), indices.shape[0], grad_codebook.shape[0],
               grad_codebook.shape[1], sorted, begin);
  if (grad_rows.type == kFloat64)
    sum_rows<double>(grad_rows, sorted, begin, grad_codebook, threads);
  else
    sum_rows<float>(grad_rows, sorted, begin, grad_codebook, threads);
  return nullptr;
}

TOKENFLOW_END
