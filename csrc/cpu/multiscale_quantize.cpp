// multiscale_quantize: residual quantization over a list of grids, the whole loop in one call.
//   r = x;  each scale: rows = Down r,  ids = nearest codes,  step = phi_s(Up codes),  f += step,  r -= step
//   loss = loss_weight * mean over scales of mean((code - y)^2), or of mean((f - x)^2) where `accumulated`
// Layout: r and f stay channels last, [B, H W, C]; the codebook is packed once for all scales. Search runs over rows of
// all images at once, everything else image by image. Bytes moved per row: 3 C of codes and rows, plus 16 C H W / (h w)
// for the two resamplings. Source: tokenflow.md 1.5 (codes), VAR's loss (accumulated).
#include "cpu/multiscale.h"
#include "cpu/search.h"

TOKENFLOW_BEGIN

template <class T>
struct Call {
  Loop<T> loop;
  bool accumulated;
  int64_t chunks;
  int threads;
  T *residual, *sum;                 // [B, H W, C]
  T *staged, *spare;                 // [B max(h w), C], [J, 3, H W, C]
  T *rows, *code_rows, *code_norms;  // [B, L, C], [B, L, C], [B, L, T]
  int64_t* indices;                  // [B, L]
  double* partial;                   // [S, B]
  View features;
};

// rows = Down r for every image; a row that is not finite becomes NaN. Staged for the search. Counts those rows.
template <class T>
static int64_t pool(const Call<T>& call, int64_t s, int64_t offset) {
  const Loop<T>& loop = call.loop;
  const int64_t cells = loop.grid(s).cells(), channels = loop.channels;
  int64_t bad = 0;
#pragma omp parallel for num_threads(call.threads) schedule(static) reduction(+ : bad) if (call.chunks > 1)
  for (int64_t j = 0; j < call.chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, call.chunks, j);
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      T* rows = call.rows + (b * loop.length + offset) * channels;
      T* staged = call.staged + b * cells * channels;
      resample(kArea, call.residual + b * loop.map(), loop.size, loop.grid(s), channels, rows,
               call.spare + 3 * j * loop.map());
      memcpy(staged, rows, cells * channels * sizeof(T));
      for (int64_t r = 0; r < cells; ++r) {
        if (stage(loop.tables, staged + r * channels, staged + r * channels)) continue;
        fill_nan(rows + r * channels, channels);
        ++bad;
      }
    }
  }
  return bad;
}

// ids of the staged rows of one scale.
template <class T>
static void search_scale(const Call<T>& call, const Packed<T>& packed, int64_t s, int64_t offset) {
  const Loop<T>& loop = call.loop;
  const int64_t cells = loop.grid(s).cells(), rows = loop.batch * cells;
  int64_t block = (rows / call.threads + 3) / 4 * 4;
  block = block < 4 ? 4 : block < kRowBlock ? block : kRowBlock;
  const int64_t blocks = (rows + block - 1) / block;
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) if (blocks > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    Best<T> best[kRowBlock];
    const int64_t first = i * block, count = rows - first < block ? rows - first : block;
    search(call.staged + first * loop.channels, count, packed, best);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = (first + r) / cells, at = b * loop.length + offset + (first + r) % cells;
      const T first_channel = call.rows[at * loop.channels];
      call.indices[at] = first_channel == first_channel ? best[r].id : 0;
    }
  }
}

// sum over the rows of |code - y|^2, rows with NaN left out.
template <class T>
static double code_error(const Call<T>& call, const T* rows, const T* codes, int64_t cells, T* y) {
  const Loop<T>& loop = call.loop;
  double sum = 0;
  for (int64_t r = 0; r < cells; ++r) {
    const T* code = codes + r * loop.channels;
    if (!(code[0] == code[0])) continue;
    memcpy(y, rows + r * loop.channels, loop.channels * sizeof(T));
    if (loop.tables.unit) make_unit<T>(loop.tables, y, nullptr);
    T square = 0;
    for (int64_t d = 0; d < loop.channels; ++d) square += (code[d] - y[d]) * (code[d] - y[d]);
    sum += square;
  }
  return sum;
}

// sum over the pixels of |f - x|^2, pixels with NaN left out; x [H W, C] and plane are spare.
template <class T>
static double map_error(const Call<T>& call, int64_t b, T* x, T* plane) {
  const Loop<T>& loop = call.loop;
  const T* sum = call.sum + b * loop.map();
  load_map(call.features, b, loop.channels, loop.size.cells(), x, plane);
  double total = 0;
  for (int64_t p = 0; p < loop.size.cells(); ++p) {
    T* gap = x + p * loop.channels;
    for (int64_t d = 0; d < loop.channels; ++d) gap[d] = sum[p * loop.channels + d] - gap[d];
    if (!all_finite(gap, loop.channels)) continue;
    T square = 0;
    for (int64_t d = 0; d < loop.channels; ++d) square += gap[d] * gap[d];
    total += square;
  }
  return total;
}

// codes of one scale, their step into f and out of r, and the scale's share of the loss.
template <class T>
static void advance(const Call<T>& call, int64_t s, int64_t offset) {
  const Loop<T>& loop = call.loop;
  const int64_t cells = loop.grid(s).cells(), channels = loop.channels;
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.chunks > 1)
  for (int64_t j = 0; j < call.chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, call.chunks, j);
    T* step = call.spare + 3 * j * loop.map();
    T* spare = step + loop.map();
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      const int64_t at = b * loop.length + offset;
      const T* rows = call.rows + at * channels;
      T* codes = call.code_rows + at * channels;
      for (int64_t r = 0; r < cells; ++r) {
        gather(loop, call.indices[at + r], codes + r * channels, call.code_norms + (at + r) * loop.tables.count);
        if (!(rows[r * channels] == rows[r * channels])) fill_nan(codes + r * channels, channels);
      }
      if (!call.accumulated) call.partial[s * loop.batch + b] = code_error(call, rows, codes, cells, step);
      code_step(loop, s, codes, step, spare);
      T* sum = call.sum + b * loop.map();
      T* residual = call.residual + b * loop.map();
      for (int64_t i = 0; i < loop.map(); ++i) {
        sum[i] += step[i];
        residual[i] -= step[i];
      }
      if (call.accumulated) call.partial[s * loop.batch + b] = map_error(call, b, step, spare);
    }
  }
}

template <class T>
static void forward(const Call<T>& call, double loss_weight, const View& packed_view, const View& quantized,
                    const View& loss, const View& status) {
  const Loop<T>& loop = call.loop;
  const int64_t pixels = loop.size.cells();
  const Packed<T> packed =
      pack(loop.codebook, 0, loop.codes, loop.channels, loop.tables, data<T>(packed_view), call.threads);
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.chunks > 1)
  for (int64_t j = 0; j < call.chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, call.chunks, j);
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      load_map(call.features, b, loop.channels, pixels, call.residual + b * loop.map(),
               call.spare + 3 * j * loop.map());
      memset(call.sum + b * loop.map(), 0, loop.map() * sizeof(T));
    }
  }
  int64_t offset = 0, bad = 0;
  double total = 0;
  for (int64_t s = 0; s < loop.scales; ++s) {
    bad += pool(call, s, offset);
    search_scale(call, packed, s, offset);
    advance(call, s, offset);
    double sum = 0;
    for (int64_t b = 0; b < loop.batch; ++b) sum += call.partial[s * loop.batch + b];
    const int64_t rows = loop.batch * (call.accumulated ? pixels : loop.grid(s).cells());
    if (rows) total += sum / static_cast<double>(rows * loop.channels);
    offset += loop.grid(s).cells();
  }
#pragma omp parallel for num_threads(call.threads) schedule(static) if (call.chunks > 1)
  for (int64_t j = 0; j < call.chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, call.chunks, j);
    for (int64_t b = chunk.first; b < chunk.last; ++b)
      store_map(quantized, b, loop.channels, pixels, call.sum + b * loop.map(), call.spare + 3 * j * loop.map());
  }
  data<T>(loss)[0] = static_cast<T>(loss_weight * total / static_cast<double>(loop.scales));
  data<int64_t>(status)[0] = bad;
}

template <class T>
static Error run(const View& features, const View& codebook, const Tables& tables, const View& grids, const View& phi,
                 const View& bias, double ratio, bool accumulated, double loss_weight, const View& packed,
                 const View& maps, const View& staged, const View& spare, const View& partial, const View& quantized,
                 const View& indices, const View& loss, const View& rows, const View& code_rows, const View& code_norms,
                 const View& status, int threads) {
  Call<T> call = {};
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(features.shape[0], indices.shape[1], codebook, features.shape[1], tables, grids,
                                    size, phi, View{nullptr, kNone}, bias, ratio, &call.loop))
    return error;
  const Loop<T>& loop = call.loop;
  const Type real = type_of<T>();
  const int64_t images = loop.batch * loop.map(), numbers = loop.batch * loop.length * loop.channels;
  int64_t largest = 0;
  for (int64_t s = 0; s < loop.scales; ++s) largest = loop.grid(s).cells() > largest ? loop.grid(s).cells() : largest;
  if (!holds_spare(loop, spare, 3) || !holds_codes(loop, code_rows, code_norms) || !holds(rows, real, numbers) ||
      !holds(quantized, features.type, images) || !holds(loss, real, 1) || !holds(status, kInt64, 1) ||
      !holds(packed, real, panels_of(loop.codes) * kPanel * (loop.channels + 1)) || !holds(maps, real, 2 * images) ||
      !holds(staged, real, loop.batch * largest * loop.channels) || !holds(partial, kFloat64, loop.scales * loop.batch))
    return "multiscale_quantize: wanted outputs and workspace that fit the maps";
  call.accumulated = accumulated;
  call.chunks = spare.shape[0];
  call.threads = threads;
  call.residual = data<T>(maps);
  call.sum = call.residual + call.loop.batch * call.loop.map();
  call.staged = data<T>(staged);
  call.spare = data<T>(spare);
  call.rows = data<T>(rows);
  call.code_rows = data<T>(code_rows);
  call.code_norms = data<T>(code_norms);
  call.indices = data<int64_t>(indices);
  call.partial = data<double>(partial);
  call.features = features;
  forward(call, loss_weight, packed, quantized, loss, status);
  return nullptr;
}

Error multiscale_quantize(View features, View codebook, Tables tables, View grids, View phi, View bias, double ratio,
                          bool accumulated, double loss_weight, View packed, View maps, View staged, View spare,
                          View partial, View quantized, View indices, View loss, View rows, View code_rows,
                          View code_norms, View status, int threads) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_quantize: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  if (!dense(codebook, 2)) return "multiscale_quantize: codebook: wanted contiguous [K, C]";
  const auto of_type = codebook.type == kFloat64 ? run<double> : run<float>;
  return of_type(features, codebook, tables, grids, phi, bias, ratio, accumulated, loss_weight, packed, maps, staged,
                 spare, partial, quantized, indices, loss, rows, code_rows, code_norms, status, threads);
}

TOKENFLOW_END
