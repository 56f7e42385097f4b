// quantize_backward: the closed form. y = row as searched, q = its code, loss as in quantize.cpp:
//   dL/dy = dL/dquantized + grad_loss * 2 commitment (y - q) / (N G C)     (straight-through: d quantized / dy = 1)
//   dL/dq_k = sum over rows of code k of grad_loss * 2 codebook_weight (q - y) / (N G C)
// and both go through the normalisation where there was one. Source: tokenflow.md 1.2, checked against autograd.
// Moved per row: x, the code row and dL/dquantized in, dx out; for the codebook also C numbers and a key written and
// read.
#include "common/ops.h"
#include "cpu/sums.h"

TOKENFLOW_BEGIN

// dx of every row; for the codebook gaps [N, G, C] = to_code (q - y) and keys [N, G] = the row's code, -1 where the row
// is left out, or null. spare [J, 2, 8, C]: y and dx of eight rows, for each of J threads.
template <class T>
static void rows_backward(const View& x, const View& code_rows, const View& indices, const View& grad_quantized,
                          const Tables& tables, T to_row, T to_code, T* spare, T* gaps, int64_t* keys,
                          const View& grad_x, int threads) {
  const int64_t rows = x.shape[0] * x.shape[1], channels = x.shape[2], blocks = (rows + kRows - 1) / kRows;
  const int64_t* ids = static_cast<const int64_t*>(indices.data);
  const bool direct = grad_x.type == type_of<T>();  // then dx is computed where it belongs
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* y = spare + omp_get_thread_num() * 2 * kRows * channels;
    T norms[kRows * kMaxTables];
    T* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = y + r * channels;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kRows, count = rows - first < kRows ? rows - first : kRows, numbers = count * channels;
      const T* q = static_cast<const T*>(code_rows.data) + first * channels;
      load(x, first * channels, numbers, y);
      const bool all_good = all_finite(y, numbers) && all_finite(q, numbers);
      bool good[kRows];
      // A code that is not finite (a row that was not, or a codebook without a number) sends and gets no gradient.
      for (int64_t r = 0; r < count; ++r)
        good[r] = all_good || (all_finite(row[r], channels) && all_finite(q + r * channels, channels));
      if (tables.unit) make_unit_rows(tables, row, count, norms);
      if (grad_x.data) {
        T* g = direct ? static_cast<T*>(grad_x.data) + first * channels : y + kRows * channels;
        if (grad_quantized.data)
          load(grad_quantized, first * channels, numbers, g);
        else
          memset(g, 0, numbers * sizeof(T));
        for (int64_t i = 0; i < numbers; ++i) g[i] += to_row * (y[i] - q[i]);
        for (int64_t r = 0; r < count; ++r) {
          if (!good[r]) memset(g + r * channels, 0, channels * sizeof(T));
          if (tables.unit && good[r]) gradient_through_unit(tables, row[r], norms + r * tables.count, g + r * channels);
        }
        if (!direct) store(grad_x, first * channels, numbers, g);
      }
      if (!gaps) continue;
      T* gap = gaps + first * channels;
      for (int64_t i = 0; i < numbers; ++i) gap[i] = to_code * (q[i] - y[i]);
      for (int64_t r = 0; r < count; ++r) keys[first + r] = good[r] ? ids[first + r] : -1;
    }
  }
}

// The gradient of every code, summed over its rows in row order.
template <class T>
static void codes_backward(const View& code_rows, const View& code_norms, const Tables& tables, const View& gaps,
                           const int64_t* keys, const SumSpace& space, const View& grad_codebook) {
  const int64_t groups = gaps.shape[1], codes = grad_codebook.shape[1], channels = gaps.shape[2];
  const T* q = static_cast<const T*>(code_rows.data);
  const T* norms = static_cast<const T*>(code_norms.data);
  sum_by_code<T>(
      keys, gaps, codes, false, space, [](int64_t& last, int64_t n) { last = n + 1; },
      [&](int64_t g, int64_t first, int64_t used, const double* sums, const int64_t* last) {
        T* out = static_cast<T*>(grad_codebook.data) + (g * codes + first) * channels;
        store_sums<T>(grad_codebook, (g * codes + first) * channels, used * channels, sums);
        if (!tables.unit_codes) return;
        for (int64_t k = 0; k < used; ++k) {
          if (last[k] == 0) continue;
          // Every row of a code carries the same code and norms: any of them gives the Jacobian.
          const int64_t row = (last[k] - 1) * groups + g;
          gradient_through_unit(tables, q + row * channels, norms + row * tables.count, out + k * channels);
        }
      },
      [&](int64_t g, int64_t first, int64_t used) {
        memset(static_cast<T*>(grad_codebook.data) + (g * codes + first) * channels, 0, used * channels * sizeof(T));
      });
}

template <class T>
static void backward(Call& call, const View& x, const View& code_rows, const View& code_norms, const View& indices,
                     const View& grad_quantized, const View& grad_loss, const Tables& tables, double commitment_weight,
                     double codebook_weight, const View& grad_x, const View& grad_codebook) {
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], numbers = rows * groups * channels;
  T* spare = take<T>(call, call.threads * 2 * kRows * channels);
  View gaps = {nullptr, type_of<T>(), 3, -1, true, {rows, groups, channels}};
  int64_t* keys = nullptr;
  SumSpace space = {};
  if (grad_codebook.type != kNone) {
    gaps.data = take<T>(call, numbers);
    keys = take<int64_t>(call, rows * groups);
    space = take_sums(call, rows, groups, grad_codebook.shape[1], channels);
  }
  if (call.counting) return;
  const double scale = grad_loss.data && numbers ? 2.0 * static_cast<const T*>(grad_loss.data)[0] / numbers : 0;
  rows_backward<T>(x, code_rows, indices, grad_quantized, tables, static_cast<T>(scale * commitment_weight),
                   static_cast<T>(scale * codebook_weight), spare, static_cast<T*>(gaps.data), keys, grad_x,
                   numbers * static_cast<int64_t>(sizeof(T)) < kAloneBytes ? 1 : call.threads);
  if (grad_codebook.data) codes_backward<T>(code_rows, code_norms, tables, gaps, keys, space, grad_codebook);
}

Error quantize_backward(Call& call, View x, View code_rows, View code_norms, View indices, View grad_quantized,
                        View grad_loss, Tables tables, double commitment_weight, double codebook_weight, View grad_x,
                        View grad_codebook) noexcept {
  x = by_group(x, grad_codebook.rank == 3, 1);
  grad_codebook = with_groups(grad_codebook);
  if (!dense(x, 3) || !floating(x) || !covers(tables, x.shape[2]))
    return "quantize_backward: wanted contiguous floats x [..., G, C]";
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], numbers = rows * groups * channels;
  const Type real = code_rows.type;
  if (!holds(code_rows, real, numbers) || !holds(indices, kInt64, rows * groups) ||
      (tables.unit_codes && !holds(code_norms, real, rows * groups * tables.count)) ||
      (grad_quantized.type != kNone && !holds(grad_quantized, x.type, numbers)) ||
      (grad_loss.type != kNone && !holds(grad_loss, real, 1)) ||
      (grad_x.type != kNone && !holds(grad_x, x.type, numbers)))
    return "quantize_backward: wanted gradients that fit the rows";
  if (grad_codebook.type != kNone &&
      (!dense(grad_codebook, 3) || grad_codebook.shape[0] != groups || grad_codebook.shape[1] < 1 ||
       !holds(grad_codebook, real, groups * grad_codebook.shape[1] * channels)))
    return "quantize_backward: grad_codebook: wanted [G, K, C]";
  if (real == kFloat64)
    backward<double>(call, x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables, commitment_weight,
                     codebook_weight, grad_x, grad_codebook);
  else if (real == kFloat32)
    backward<float>(call, x, code_rows, code_norms, indices, grad_quantized, grad_loss, tables, commitment_weight,
                    codebook_weight, grad_x, grad_codebook);
  else
    return "quantize_backward: code_rows: wanted float32 or float64";
  return nullptr;
}

TOKENFLOW_END
