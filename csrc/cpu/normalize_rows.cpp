// normalize_rows: y = x / max(|x|, 1e-12), the canonical normalisation, and its closed-form backward
// dx = (g - (g.y) y) / |x|. Reads C and writes C numbers a row.
#include "common/ops.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

constexpr int64_t kSpan = 1024;  // channels of a row kept on the stack; wider rows pass twice

template <class T>
static void forward(const View& x, const View& y, int threads) {
  const int64_t rows = x.shape[0], channels = x.shape[1];
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * channels > 16384)
  for (int64_t n = 0; n < rows; ++n) {
    T span[kSpan];
    T square = 0;
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t count = channels - first < kSpan ? channels - first : kSpan;
      load(x, n * channels + first, count, span);
      for (int64_t d = 0; d < count; ++d) square = fused(span[d], span[d], square);
    }
    const T norm = root(square) > static_cast<T>(1e-12) ? root(square) : static_cast<T>(1e-12);
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t count = channels - first < kSpan ? channels - first : kSpan;
      if (channels > kSpan) load(x, n * channels + first, count, span);
      for (int64_t d = 0; d < count; ++d) span[d] /= norm;
      store(y, n * channels + first, count, span);
    }
  }
}

template <class T>
static void backward(const View& x, const View& grad_y, const View& grad_x, int threads) {
  const int64_t rows = x.shape[0], channels = x.shape[1];
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * channels > 16384)
  for (int64_t n = 0; n < rows; ++n) {
    T row[kSpan], grad[kSpan];
    T square = 0, along = 0;
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t count = channels - first < kSpan ? channels - first : kSpan;
      load(x, n * channels + first, count, row);
      load(grad_y, n * channels + first, count, grad);
      for (int64_t d = 0; d < count; ++d) square = fused(row[d], row[d], square);
      for (int64_t d = 0; d < count; ++d) along += grad[d] * row[d];
    }
    const bool floored = !(root(square) > static_cast<T>(1e-12));
    const T norm = floored ? static_cast<T>(1e-12) : root(square);
    along = floored ? 0 : along / norm / norm;
    for (int64_t first = 0; first < channels; first += kSpan) {
      const int64_t count = channels - first < kSpan ? channels - first : kSpan;
      if (channels > kSpan) {
        load(x, n * channels + first, count, row);
        load(grad_y, n * channels + first, count, grad);
      }
      for (int64_t d = 0; d < count; ++d) grad[d] = (grad[d] - along * row[d]) / norm;
      store(grad_x, n * channels + first, count, grad);
    }
  }
}

Error normalize_rows(View x, View y, int threads) noexcept {
  if (!dense(x, 2) || !floating(x)) return "normalize_rows: x: wanted contiguous floats [N, C]";
  if (!holds(y, x.type, x.shape[0] * x.shape[1])) return "normalize_rows: y: wanted the shape and type of x";
  if (x.type == kFloat64)
    forward<double>(x, y, threads);
  else
    forward<float>(x, y, threads);
  return nullptr;
}

Error normalize_rows_backward(View x, View grad_y, View grad_x, int threads) noexcept {
  if (!dense(x, 2) || !floating(x)) return "normalize_rows_backward: x: wanted contiguous floats [N, C]";
  if (!holds(grad_y, x.type, x.shape[0] * x.shape[1]) || !holds(grad_x, x.type, x.shape[0] * x.shape[1]))
    return "normalize_rows_backward: wanted gradients of the shape and type of x";
  if (x.type == kFloat64)
    backward<double>(x, grad_y, grad_x, threads);
  else
    backward<float>(x, grad_y, grad_x, threads);
  return nullptr;
}

TOKENFLOW_END
