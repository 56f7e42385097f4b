// quantize: search, gather, straight-through value and loss in one pass over the rows.
//   y = row as searched, q = its code;  loss = loss_weight * mean((q - y)^2) over all N G C numbers
// Moved per row: C numbers in, C and an id out; kept for backward (quantize_backward.cpp): x, code rows, code norms,
// ids, nothing of size N x K. Source: tokenflow.md 1.2.
#include "common/ops.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

template <class T>
static void forward(Call& call, const View& x, const View& codebook, const Tables& tables, double loss_weight,
                    const View& quantized, const View& indices, const View& loss, const View& searched,
                    const View& code_rows, const View& code_norms) {
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], codes = codebook.shape[1];
  const int64_t eighths = (rows + 7) / 8;  // partial sums, whatever the blocks
  T* searched_rows = searched.type == kNone ? take<T>(call, rows * groups * channels) : static_cast<T*>(searched.data);
  T* stage_rows = take<T>(call, rows * channels);
  double* partials = take<double>(call, groups * eighths);
  const View workspace = take_rest(call, bytes_of_search<T>(rows, codes, channels, call.threads));
  if (call.counting) return;
  T* rows_out = static_cast<T*>(code_rows.data);
  T* norms_out = static_cast<T*>(code_norms.data);
  int64_t* ids = static_cast<int64_t*>(indices.data);
  for (int64_t g = 0; g < groups; ++g) {
    const T* codes_of_group = static_cast<const T*>(codebook.data) + g * codes * channels;
    const Index<T> index = make_index(codes_of_group, codes, channels, tables, rows, workspace, call.threads);
    for_row_blocks(index, rows, call.threads, true, [&](int64_t first, int64_t count, int inside) {
      bool good[kRowBlock];
      Best<T> best[kRowBlock];
      T* block = stage_rows + first * channels;
      for (int64_t r = 0; r < count; ++r) {
        T* y = searched_rows + ((first + r) * groups + g) * channels;
        load(x, ((first + r) * groups + g) * channels, channels, y);
        good[r] = stage<T>(tables, y, block + r * channels);
      }
      search(index, block, count, best, inside);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (first + r) * groups + g;
        double* sum = partials + g * eighths + (first + r) / 8;
        if (r % 8 == 0) *sum = 0;
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
        if (!good[r]) {
          tokenflow_ext::count(&call.rows_not_finite, 1);
          continue;
        }
        const T* y = searched_rows + at * channels;
        T square = 0;
        for (int64_t d = 0; d < channels; ++d) square += (code[d] - y[d]) * (code[d] - y[d]);
        *sum += square;
      }
    });
  }
  double sum = 0;
  for (int64_t i = 0; i < groups * eighths; ++i) sum += partials[i];
  const double numbers = static_cast<double>(rows * groups * channels);
  static_cast<T*>(loss.data)[0] = static_cast<T>(numbers > 0 ? loss_weight * sum / numbers : 0);
}

Error quantize(Call& call, View x, View codebook, Tables tables, double loss_weight, View quantized, View indices,
               View loss, View searched, View code_rows, View code_norms) noexcept {
  x = by_group(x, codebook.rank == 3, 1);
  codebook = with_groups(codebook);
  if (!dense(x, 3) || !dense(codebook, 3) || !floating(x))
    return "quantize: wanted contiguous floats x [..., G, C] and codebook [G, K, C]";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || !covers(tables, x.shape[2]))
    return "quantize: codebook: wanted the groups and the width of x";
  if (codebook.shape[1] < 1) return "quantize: codebook: wanted at least one code";
  const int64_t rows = x.shape[0], numbers = rows * x.shape[1] * x.shape[2];
  if (!holds(quantized, x.type, numbers) || !holds(indices, kInt64, rows * x.shape[1]) ||
      !holds(loss, codebook.type, 1) || (searched.type != kNone && !holds(searched, codebook.type, numbers)) ||
      (code_rows.type != kNone && !holds(code_rows, codebook.type, numbers)) ||
      (code_norms.type != kNone && !holds(code_norms, codebook.type, rows * x.shape[1] * tables.count)))
    return "quantize: wanted outputs that fit the rows";
  if (codebook.type == kFloat64)
    forward<double>(call, x, codebook, tables, loss_weight, quantized, indices, loss, searched, code_rows, code_norms);
  else if (codebook.type == kFloat32)
    forward<float>(call, x, codebook, tables, loss_weight, quantized, indices, loss, searched, code_rows, code_norms);
  else
    return "quantize: codebook: wanted float32 or float64";
  return nullptr;
}

TOKENFLOW_END
