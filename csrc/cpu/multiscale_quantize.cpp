// multiscale_quantize: residual quantization over a list of grids, the whole loop in one call.
//   r = x;  each scale: rows = Down r,  ids = nearest codes,  step = phi_s(Up codes),  f += step,  r -= step
//   loss = loss_weight * mean over scales of mean((code - y)^2), or of mean((f - x)^2) where `accumulated`
// Layout: r and f stay channels last, [B, H W, C]; the codebook is packed once for all scales. A scale is two sweeps:
// search over the rows of all images with gather and the error of the code in its tail, then image by image (or, where
// there are fewer images than threads, part by part) the step into f and out of r and the next scale's rows.
// Since r = x - f, the error of the accumulated map is |r|^2. What backward reads is written only where it is wanted.
// Bytes moved per row: 3 C of codes and rows, plus 16 C H W / (h w) for the two resamplings.
// Source: tokenflow.md 1.5 (codes), VAR's loss (accumulated).
#include "cpu/multiscale_step.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

// All scales search one index, which is packed however few rows a scale has.
template <class T>
static int64_t rows_to_search(const Loop<T>& loop) {
  const int64_t rows = loop.batch * loop.length;
  return rows > kRowBlock ? rows : kRowBlock + 1;
}

template <class T>
struct Forward {
  Loop<T> loop;
  bool accumulated;
  int threads;
  T *residual, *sum;                 // [B, H W, C]
  T *searched, *staged;              // [B max(h w), C]: y, and its staged copy, which makes room for the code
  T* spare;                          // 3 pieces a thread
  T *rows, *code_rows, *code_norms;  // [B, L, C], [B, L, C], [B, L, T], or null
  int64_t* indices;                  // [B, L]
  double* partial;                   // [B max(h w, H)]: errors of rows, or of map rows
};

// Some rows of one image's Down r: searched, staged and kept; a row that is not finite becomes NaN. Counts those.
template <class T>
static int64_t pool(const Forward<T>& call, int64_t s, int64_t offset, Part part) {
  const Loop<T>& loop = call.loop;
  const Axes<T> area = loop.area(s);
  const int64_t width = area.out.w, channels = loop.channels;
  int64_t bad = 0;
  for (int64_t i = part.first; i < part.last; ++i) {
    const int64_t at = (part.image * area.out.h + i) * width;
    T* row = call.searched + at * channels;
    pool_row(area, call.residual + part.image * loop.map(), channels, i, row, own(loop, call.spare, 3));
    T* kept = call.rows ? call.rows + (part.image * loop.length + offset + i * width) * channels : nullptr;
    if (kept) memcpy(kept, row, width * channels * sizeof(T));
    for (int64_t j = 0; j < width; ++j, row += channels) {
      if (stage(loop.tables, row, call.staged + (at + j) * channels)) continue;
      fill_nan(row, channels);
      if (kept) fill_nan(kept + j * channels, channels);
      ++bad;
    }
  }
  return bad;
}

// Row n of scale s has its id: the code, its norms and its error |code - y|^2. A NaN row gets id 0, NaN and no error.
template <class T>
static void finish_row(const Forward<T>& call, int64_t s, int64_t offset, int64_t n, int64_t id) {
  const Loop<T>& loop = call.loop;
  const int64_t cells = loop.grid(s).cells(), channels = loop.channels;
  const int64_t at = n / cells * loop.length + offset + n % cells;
  const T* y = call.searched + n * channels;
  T* code = call.code_rows ? call.code_rows + at * channels : call.staged + n * channels;
  T* norms = call.code_norms ? call.code_norms + at * loop.tables.count : nullptr;
  const bool good = y[0] == y[0];
  call.indices[at] = good ? id : 0;
  gather(loop, good ? id : -1, code, norms);
  if (call.accumulated) return;
  T square = 0;
  for (int64_t d = 0; good && d < channels; ++d) square += (code[d] - y[d]) * (code[d] - y[d]);
  call.partial[n] = code[0] == code[0] ? square : 0;
}

constexpr int64_t kWorthSearch = 1 << 20;  // products of a search that take longer than waking a thread

// ids of the staged rows of one scale, in one parallel region where that pays: threads share blocks of rows, or the
// codes where there are too few rows.
template <class T>
static void search_scale(const Forward<T>& call, const Index<T>& index, int64_t s, int64_t offset) {
  const Loop<T>& loop = call.loop;
  const int64_t rows = loop.batch * loop.grid(s).cells();
  const int threads = rows * loop.codes * loop.channels < kWorthSearch ? 1 : call.threads;
  for_row_blocks(index, rows, threads, true, [&](int64_t first, int64_t count, int inside) {
    Best<T> best[kRowBlock];
    search(index, call.staged + first * loop.channels, count, best, inside);
    for (int64_t r = 0; r < count; ++r) finish_row(call, s, offset, first + r, best[r].id);
  });
}

// sum of |x|^2 over pixels [n, C], those with NaN left out.
template <class T>
static double squares(const T* x, int64_t n, int64_t channels) {
  double sum = 0;
  for (const T* end = x + n * channels; x < end; x += channels) {
    if (!all_finite(x, channels)) continue;
    T square = 0;
    for (int64_t d = 0; d < channels; ++d) square += x[d] * x[d];
    sum += square;
  }
  return sum;
}

// Some map rows of one image: the step of scale s into f and out of r.
template <class T>
static void advance(const Forward<T>& call, int64_t s, int64_t offset, Part part) {
  const Loop<T>& loop = call.loop;
  const int64_t cells = loop.grid(s).cells(), width = loop.width();
  T* spare = own(loop, call.spare, 3);
  T* row = spare + 2 * piece(loop);
  const Step<T> step(loop, s, spare);
  step.begin(call.code_rows ? call.code_rows + (part.image * loop.length + offset) * loop.channels
                            : call.staged + part.image * cells * loop.channels,
             part.first, part.last);
  for (int64_t y = part.first; y < part.last; ++y) {
    step.row(y, row);
    const int64_t at = part.image * loop.size.h + y;
    T* residual = call.residual + at * width;
    add(row, width, call.sum + at * width);
    subtract(row, width, residual);
    if (call.accumulated) call.partial[at] = squares(residual, loop.size.w, loop.channels);
  }
}

// Returns how many rows are not finite.
template <class T>
static int64_t forward(const Forward<T>& call, double loss_weight, const View& features, const View& workspace,
                       const View& quantized, const View& loss) {
  const Loop<T>& loop = call.loop;
  const int64_t batch = loop.batch, channels = loop.channels, pixels = loop.size.cells();
  const Index<T> index =
      make_index(loop.codebook, loop.codes, channels, loop.tables, rows_to_search(loop), workspace, call.threads);
  prepare(loop, loop.scales);
  for_parts(batch, 1, 2 * loop.map(), call.threads, [&](Part part) {
    load_map(features, part.image, channels, pixels, call.residual + part.image * loop.map());
    memset(call.sum + part.image * loop.map(), 0, loop.map() * sizeof(T));
  });
  int64_t offset = 0, bad = 0;
  double total = 0;
  for (int64_t s = 0; s < loop.scales; ++s) {
    const Grid grid = loop.grid(s);
    for_parts(batch, grid.h, 2 * loop.map(), call.threads, [&](Part part) {
      const int64_t here = pool(call, s, offset, part);
#pragma omp atomic
      bad += here;
    });
    search_scale(call, index, s, offset);
    for_parts(batch, loop.size.h, loop.step_products(), call.threads,
              [&](Part part) { advance(call, s, offset, part); });
    const int64_t rows = batch * (call.accumulated ? loop.size.h : grid.cells());
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += call.partial[i];
    const int64_t numbers = batch * channels * (call.accumulated ? pixels : grid.cells());
    if (numbers) total += sum / static_cast<double>(numbers);
    offset += grid.cells();
  }
  for_parts(batch, 1, 2 * loop.map(), call.threads,
            [&](Part part) { store_map(quantized, part.image, channels, pixels, call.sum + part.image * loop.map()); });
  data<T>(loss)[0] = static_cast<T>(loss_weight * total / static_cast<double>(loop.scales));
  return bad;
}

template <class T>
static Error run(Call& op, const View& features, const View& codebook, const Tables& tables, const View& grids,
                 const View& weight, const View& bias, double ratio, bool accumulated, double loss_weight,
                 const View& quantized, const View& indices, const View& loss, const View& rows, const View& code_rows,
                 const View& code_norms) {
  Forward<T> call = {};
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(op, features.shape[0], indices.shape[1], codebook, features.shape[1], tables, grids,
                                    size, weight, bias, ratio, false, &call.loop))
    return error;
  const Loop<T>& loop = call.loop;
  const int64_t images = loop.batch * loop.map(), numbers = loop.batch * loop.length * loop.channels;
  if (!holds(quantized, features.type, images) || !holds(loss, type_of<T>(), 1) ||
      (rows.type != kNone && !holds(rows, type_of<T>(), numbers)) ||
      (code_rows.type != kNone && !holds_codes(loop, code_rows, code_norms)))
    return "multiscale_quantize: wanted outputs that fit the maps";
  int64_t largest = 0;
  for (int64_t s = 0; s < loop.scales; ++s) largest = loop.grid(s).cells() > largest ? loop.grid(s).cells() : largest;
  call.accumulated = accumulated;
  call.threads = op.threads;
  call.residual = take<T>(op, images);
  call.sum = take<T>(op, images);
  call.searched = take<T>(op, loop.batch * largest * loop.channels);
  call.staged = take<T>(op, loop.batch * largest * loop.channels);
  call.spare = take_pieces(op, loop, 3);
  call.partial = take<double>(op, loop.batch * (largest > size.h ? largest : size.h));
  const int64_t bytes = bytes_of_search<T>(rows_to_search(loop), loop.codes, loop.channels, op.threads);
  const View workspace = {take<char>(op, bytes), kUInt8, 1, -1, true, {bytes}};
  if (op.counting) return nullptr;
  call.rows = data<T>(rows);
  call.code_rows = data<T>(code_rows);
  call.code_norms = data<T>(code_norms);
  call.indices = data<int64_t>(indices);
  op.rows_not_finite = forward(call, loss_weight, features, workspace, quantized, loss);
  return nullptr;
}

Error multiscale_quantize(Call& call, View features, View codebook, Tables tables, View grids, View weight, View bias,
                          double ratio, bool accumulated, double loss_weight, View quantized, View indices, View loss,
                          View rows, View code_rows, View code_norms) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_quantize: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  if (!dense(codebook, 2)) return "multiscale_quantize: codebook: wanted contiguous [K, C]";
  const auto of_type = codebook.type == kFloat64 ? run<double> : run<float>;
  return of_type(call, features, codebook, tables, grids, weight, bias, ratio, accumulated, loss_weight, quantized,
                 indices, loss, rows, code_rows, code_norms);
}

TOKENFLOW_END
