// quantize_backward: the closed form. y = row as searched, q = its code, loss as in quantize.cpp:
//   dL/dy = dL/dquantized + grad_loss * 2 commitment (y - q) / (N G C)     (straight-through: d quantized / dy = 1)
//   dL/dq_k = sum over rows of code k of grad_loss * 2 codebook_weight (q - y) / (N G C)
// and both go through the normalisation where there was one. Source: tokenflow.md 1.2, checked against autograd.
#include "common/ops.h"
#include "cpu/codes.h"

TOKENFLOW_BEGIN

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
