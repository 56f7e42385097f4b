// quantize: search, gather, straight-through value and loss in one pass over the rows, and its closed-form backward.
//   y = row as searched, q = its code;  loss = loss_weight * mean((q - y)^2) over all N G C numbers
//   dL/dy = dL/dquantized + grad_loss * 2 commitment (y - q) / (N G C)     (straight-through: d quantized / dy = 1)
//   dL/dq_k = sum over rows of code k of grad_loss * 2 codebook_weight (q - y) / (N G C)
// and both go through the normalisation where there was one. Source: tokenflow.md 1.2, checked against autograd.
// Moved per row: C numbers in, C and an id out; kept for backward: x, code rows, code norms, ids, nothing of size N x K.
#include "common/ops.h"
#include "cpu/codes.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

template <class T>
static void forward(const View& x, const View& codebook, const Tables& tables, double loss_weight, const View& searched,
                    const View& staged, const View& packed_view, const View& partial, const View& quantized, const View& indices,
                    const View& loss, const View& code_rows, const View& code_norms, const View& status, int threads) {
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], codes = codebook.shape[1];
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  T* searched_rows = static_cast<T*>(searched.data);
  T* stage_rows = static_cast<T*>(staged.data);
  T* rows_out = static_cast<T*>(code_rows.data);
  T* norms_out = static_cast<T*>(code_norms.data);
  int64_t* ids = static_cast<int64_t*>(indices.data);
  double* partials = static_cast<double*>(partial.data);
  int64_t bad = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const T* codes_of_group = static_cast<const T*>(codebook.data) + g * codes * channels;
    const Packed<T> packed =
        pack(codes_of_group, 0, codes, channels, tables, static_cast<T*>(packed_view.data), threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : bad) if (blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kRowBlock, count = rows - first < kRowBlock ? rows - first : kRowBlock;
      bool good[kRowBlock];
      Best<T> best[kRowBlock];
      T* block = stage_rows + first * channels;
      for (int64_t r = 0; r < count; ++r) {
        T* y = searched_rows + (first + r) * channels;
        load(x, ((first + r) * groups + g) * channels, channels, y);
        good[r] = stage<T>(tables, y, block + r * channels);
        bad += !good[r];
      }
      search(block, count, packed, best);
      double sum = 0;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (first + r) * groups + g;
        const int64_t id = good[r] ? best[r].id : 0;
        ids[at] = id;
        // The staged row is spent: its place takes the code.
        T* code = block + r * channels;
        memcpy(code, codes_of_group + id * channels, channels * sizeof(T));
        if (tables.unit_codes) make_unit<T>(tables, code, norms_out ? norms_out + at * tables.count : nullptr);
        if (!good[r])
          for (int64_t d = 0; d < channels; ++d) code[d] = static_cast<T>(__builtin_nan(""));
        store(quantized, at * channels, channels, code);
        if (rows_out) memcpy(rows_out + at * channels, code, channels * sizeof(T));
        if (!good[r]) continue;
        const T* y = searched_rows + (first + r) * channels;
        T square = 0;
        for (int64_t d = 0; d < channels; ++d) square += (code[d] - y[d]) * (code[d] - y[d]);
        sum += square;
      }
      partials[g * blocks + b] = sum;
    }
  }
  double sum = 0;
  for (int64_t i = 0; i < groups * blocks; ++i) sum += partials[i];
  const double numbers = static_cast<double>(rows * groups * channels);
  static_cast<T*>(loss.data)[0] = static_cast<T>(numbers > 0 ? loss_weight * sum / numbers : 0);
  static_cast<int64_t*>(status.data)[0] = bad;
}

Error quantize(View x, View codebook, Tables tables, double loss_weight, View searched, View staged, View packed, View partial,
               View quantized, View indices, View loss, View code_rows, View code_norms, View status,
               int threads) noexcept {
  if (!dense(x, 3) || !dense(codebook, 3) || !floating(x))
    return "quantize: wanted contiguous floats x [N, G, C] and codebook [G, K, C]";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || !covers(tables, x.shape[2]))
    return "quantize: codebook: wanted the groups and the width of x";
  if (codebook.shape[1] < 1) return "quantize: codebook: wanted at least one code";
  const int64_t rows = x.shape[0], numbers = rows * x.shape[1] * x.shape[2];
  if (!holds(quantized, x.type, numbers) || !holds(indices, kInt64, rows * x.shape[1]) || !holds(loss, codebook.type, 1) ||
      !holds(status, kInt64, 1) || !holds(searched, codebook.type, rows * x.shape[2]) ||
      !holds(staged, codebook.type, rows * x.shape[2]) || !holds(partial, kFloat64, x.shape[1] * ((rows + 63) / 64)) ||
      !holds(packed, codebook.type, (codebook.shape[1] + 31) / 32 * 32 * (x.shape[2] + 1)) ||
      (code_rows.type != kNone && !holds(code_rows, codebook.type, numbers)) ||
      (code_norms.type != kNone && !holds(code_norms, codebook.type, rows * x.shape[1] * tables.count)))
    return "quantize: wanted outputs and workspace that fit the rows";
  if (codebook.type == kFloat64)
    forward<double>(x, codebook, tables, loss_weight, searched, staged, packed, partial, quantized, indices, loss, code_rows,
                    code_norms, status, threads);
  else if (codebook.type == kFloat32)
    forward<float>(x, codebook, tables, loss_weight, searched, staged, packed, partial, quantized, indices, loss, code_rows,
                   code_norms, status, threads);
  else
    return "quantize: codebook: wanted float32 or float64";
  return nullptr;
}

// dx of every row, and the gradient of every code, summed over its rows in row order.
// spare [2, N, G, C]: the rows' share of the code gradient, and the row gradient before it is rounded to x's type.
template <class T>
static void backward(const View& x, const View& code_rows, const View& code_norms, const View& indices,
                     const View& grad_quantized, const View& grad_loss, const Tables& tables, double commitment_weight,
                     double codebook_weight, const View& spare, const View& order, const View& starts,
                     const View& grad_x, const View& grad_codebook, int threads) {
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2];
  const int64_t numbers = rows * groups * channels;
  const double scale = grad_loss.data && numbers ? 2.0 * static_cast<const T*>(grad_loss.data)[0] / numbers : 0;
  const T to_row = static_cast<T>(scale * commitment_weight), to_code = static_cast<T>(scale * codebook_weight);
  const T* q = static_cast<const T*>(code_rows.data);
  T* gaps = static_cast<T*>(spare.data);  // [N, G, C]: to_code (q - y), 0 where the row is left out
  const bool wants_codes = grad_codebook.data != nullptr;
#pragma omp parallel for num_threads(threads) schedule(static) if (numbers > 16384)
  for (int64_t i = 0; i < rows * groups; ++i) {
    T norms[kMaxTables];
    T* y = gaps + i * channels;
    const T* code = q + i * channels;
    load(x, i * channels, channels, y);
    // A code that is not finite (a row that was not, or a codebook without a number) sends and gets no gradient.
    const bool good = all_finite(y, channels) && all_finite(code, channels);
    if (tables.unit) make_unit(tables, y, norms);
    if (grad_x.data) {
      T* g = static_cast<T*>(spare.data) + (rows * groups + i) * channels;
      if (grad_quantized.data)
        load(grad_quantized, i * channels, channels, g);
      else
        memset(g, 0, channels * sizeof(T));
      for (int64_t d = 0; d < channels; ++d) g[d] = good ? g[d] + to_row * (y[d] - code[d]) : 0;
      if (tables.unit && good) through_unit(tables, y, norms, g);
      store(grad_x, i * channels, channels, g);
    }
    for (int64_t d = 0; d < channels; ++d) y[d] = good ? to_code * (code[d] - y[d]) : 0;
  }
  if (!wants_codes) return;
  const int64_t codes = grad_codebook.shape[1];
  int64_t* sorted = static_cast<int64_t*>(order.data);
  int64_t* begin = static_cast<int64_t*>(starts.data);
  sort_by_code(static_cast<const int64_t*>(indices.data), rows, groups, codes, sorted, begin);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t k = 0; k < groups * codes; ++k) {
    const int64_t g = k / codes;
    const int64_t* start = begin + g * (codes + 1) + k % codes;
    T* out = static_cast<T*>(grad_codebook.data) + k * channels;
    sum_members(gaps + g * channels, groups * channels, sorted + g * rows, start[0], start[1], channels, out);
    // Every good row of a code carries the same code and norms: any of them gives the Jacobian.
    for (int64_t j = start[0]; tables.unit_codes && j < start[1]; ++j) {
      const int64_t row = sorted[g * rows + j] * groups + g;
      if (!all_finite(q + row * channels, channels)) continue;
      through_unit(tables, q + row * channels, static_cast<const T*>(code_norms.data) + row * tables.count, out);
      break;
    }
  }
}

Error quantize_backward(View x, View code_rows, View code_norms, View indices, View grad_quantized, View grad_loss,
                        Tables tables, double commitment_weight, double codebook_weight, View spare, View order,
                        View starts, View grad_x, View grad_codebook, int threads) noexcept {
  if (!dense(x, 3) || !floating(x) || !covers(tables, x.shape[2]))
    return "quantize_backward: wanted contiguous floats x [N, G, C]";
  const int64_t rows = x.shape[0] * x.shape[1], numbers = rows * x.shape[2];
  const Type real = code_rows.type;
  const int64_t codes = grad_codebook.rank == 3 ? grad_codebook.shape[1] : 0;
  if (!holds(code_rows, real, numbers) || !holds(indices, kInt64, rows) || !holds(spare, real, 2 * numbers) ||
      !holds(order, kInt64, rows) || !holds(starts, kInt64, x.shape[1] * (codes + 1)) ||
      (tables.unit_codes && !holds(code_norms, real, rows * tables.count)) ||
      (grad_quantized.type != kNone && !holds(grad_quantized, x.type, numbers)) ||
      (grad_loss.type != kNone && !holds(grad_loss, real, 1)) || (grad_x.type != kNone && !holds(grad_x, x.type, numbers)) ||
      (grad_codebook.type != kNone && !holds(grad_codebook, real, x.shape[1] * codes * x.shape[2])))
    return "quantize_backward: wanted gradients and workspace that fit the rows";
  if (code_rows.type == kFloat64)
    backward<double>(x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables, commitment_weight,
                     codebook_weight, spare, order, starts, grad_x, grad_codebook, threads);
  else if (code_rows.type == kFloat32)
    backward<float>(x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables, commitment_weight,
                    codebook_weight, spare, order, starts, grad_x, grad_codebook, threads);
  else
    return "quantize_backward: code_rows: wanted float32 or float64";
  return nullptr;
}

TOKENFLOW_END
