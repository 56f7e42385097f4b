// normalize_rows: y = x / max(|x|, 1e-12), the canonical normalisation, and its closed-form backward
// dx = (g - (g.y) y) / |x|. Reads C and writes C numbers a row; a row that has to be converted is read twice.
#include "common/ops.h"
#include "cpu/rows.h"

TOKENFLOW_BEGIN

constexpr int64_t kSpan = 256;  // channels of eight rows that are converted at a time

constexpr int64_t kFetched =
    256;  // channels of rows that are fetched ahead; eight such rows are a quarter of the cache

// Up to eight rows of v [N, C], from row `first` on, read as T: where they lie, or converted a piece at a time.
template <class T>
struct Rows {
  const View& v;
  const int64_t first, count, channels;
  const bool direct;
  const int64_t piece;
  T span[kRows][kSpan];

  Rows(const View& rows, int64_t from)
      : v(rows),
        first(from),
        count(rows.shape[0] - from < kRows ? rows.shape[0] - from : kRows),
        channels(rows.shape[1]),
        direct(rows.type == type_of<T>()),
        piece(direct ? channels : kSpan) {}

  int64_t width(int64_t c) const { return channels - c < piece ? channels - c : piece; }

  // Row r's channels from c on, width(c) of them.
  const T* row(int64_t r, int64_t c) {
    const int64_t at = (first + r) * channels + c;
    if (direct) return static_cast<const T*>(v.data) + at;
    load(v, at, width(c), span[r]);
    return span[r];
  }

  // The eight rows after these: eight chains read them side by side, which no prefetcher follows.
  void fetch_next() const {
    if (direct && channels <= kFetched && (first + 2 * kRows) <= v.shape[0])
      fetch(static_cast<const T*>(v.data) + (first + kRows) * channels, kRows * channels);
  }

  void norms(T* out) {
    memset(out, 0, kRows * sizeof(T));
    for (int64_t c = 0; c < channels; c += piece) {
      const T* rows[kRows];
      for (int64_t r = 0; r < kRows; ++r) rows[r] = row(r < count ? r : 0, c);
      add_squares(rows, width(c), out);
    }
    to_norms(out);
  }
};

template <class T>
static void forward(const View& x, const View& y, int threads) {
  const int64_t channels = x.shape[1], blocks = (x.shape[0] + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    Rows<T> block(x, b * kRows);
    T norms[kRows];
    block.fetch_next();
    block.norms(norms);
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t at = (b * kRows + r) * channels;
      if (block.direct) {
        divide(static_cast<const T*>(x.data) + at, channels, norms[r], static_cast<T*>(y.data) + at);
        continue;
      }
      for (int64_t c = 0; c < channels; c += block.piece) {
        divide(block.row(r, c), block.width(c), norms[r], block.span[r]);
        store(y, at + c, block.width(c), block.span[r]);
      }
    }
  }
}

template <class T>
static void backward(const View& x, const View& grad_y, const View& grad_x, int threads) {
  const int64_t channels = x.shape[1], blocks = (x.shape[0] + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < blocks; ++b) {
    Rows<T> block(x, b * kRows), grads(grad_y, b * kRows);
    T norms[kRows];
    block.fetch_next();
    block.norms(norms);
    for (int64_t r = 0; r < block.count; ++r) {
      T along = 0;
      if (norms[r] > static_cast<T>(1e-12))
        for (int64_t c = 0; c < channels; c += block.piece)
          along += dot(grads.row(r, c), block.row(r, c), block.width(c));
      along = along / norms[r] / norms[r];
      for (int64_t c = 0; c < channels; c += block.piece) {
        const int64_t width = block.width(c), at = (b * kRows + r) * channels + c;
        const T *g = grads.row(r, c), *row = block.row(r, c);
        T* out = block.direct ? static_cast<T*>(grad_x.data) + at : grads.span[r];
        for (int64_t d = 0; d < width; ++d) out[d] = (g[d] - along * row[d]) / norms[r];
        if (!block.direct) store(grad_x, at, width, out);
      }
    }
  }
}

// A second thread pays from kAloneBytes on.
static int threads_for(const Call& call, const View& x) {
  return x.shape[0] * x.shape[1] * static_cast<int64_t>(sizeof(float)) < kAloneBytes ? 1 : call.threads;
}

Error normalize_rows(Call& call, View x, View y) noexcept {
  x = as_rows(x);
  if (!dense(x, 2) || !floating(x)) return "normalize_rows: x: wanted contiguous floats [..., C]";
  if (!holds(y, x.type, x.shape[0] * x.shape[1])) return "normalize_rows: y: wanted the shape and type of x";
  if (call.counting) return nullptr;
  if (x.type == kFloat64)
    forward<double>(x, y, threads_for(call, x));
  else
    forward<float>(x, y, threads_for(call, x));
  return nullptr;
}

Error normalize_rows_backward(Call& call, View x, View grad_y, View grad_x) noexcept {
  x = as_rows(x), grad_y = as_rows(grad_y);
  if (!dense(x, 2) || !floating(x)) return "normalize_rows_backward: x: wanted contiguous floats [..., C]";
  if (!dense(grad_y, 2) || !holds(grad_y, x.type, x.shape[0] * x.shape[1]) ||
      !holds(grad_x, x.type, x.shape[0] * x.shape[1]))
    return "normalize_rows_backward: wanted gradients of the shape and type of x";
  if (call.counting) return nullptr;
  if (x.type == kFloat64)
    backward<double>(x, grad_y, grad_x, threads_for(call, x));
  else
    backward<float>(x, grad_y, grad_x, threads_for(call, x));
  return nullptr;
}

TOKENFLOW_END
