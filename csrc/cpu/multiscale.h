// What the multi-scale ops share: the call's constants, codes from ids, and what one scale adds to the map,
//   step_s = phi_s(Up q_s),  phi_s(u) = (1 - ratio) u + ratio (conv3x3(u) + bias),
// with its transpose. Maps are channels last, [H W, C]; images are independent and fall into fixed chunks, each with
// its own scratch, so that sums do not depend on the thread count.
#pragma once
#include "common/multiscale_ops.h"
#include "cpu/codes.h"
#include "cpu/conv3x3.h"

TOKENFLOW_BEGIN

template <class T>
struct Loop {
  int64_t batch, channels, scales, length;  // B, C, S, L = sum of h w over the scales of the prefix
  Grid size;                                // H, W
  const int64_t* grids;                     // [S, 3]: h, w, row of phi
  Tables tables;
  const T* codebook;        // [K, C], raw
  int64_t codes;            // K
  const T* phi;             // [P, 9, in, out], or null
  const T* phi_transposed;  // [P, 9, out, in], backward only
  const T* bias;            // [P, C]
  T ratio;

  Grid grid(int64_t s) const { return {grids[3 * s], grids[3 * s + 1]}; }
  int64_t map() const { return size.cells() * channels; }
  int64_t kernel() const { return 9 * channels * channels; }
  int64_t phi_row(int64_t s) const { return grids[3 * s + 2]; }
};

template <class T>
static T* data(const View& view) {
  return static_cast<T*>(view.data);
}

// The call's constants, checked. `codes` is the codebook [K, C] or its gradient; `length` is what the ids of a prefix
// cover, loop->scales the whole scales in it.
template <class T>
static Error make_loop(int64_t batch, int64_t length, const View& codes, int64_t channels, const Tables& tables,
                       const View& grids, Grid size, const View& phi, const View& phi_transposed, const View& bias,
                       double ratio, Loop<T>* loop) {
  int64_t width = 0, covered = 0, scales = 0;
  for (int t = 0; t < tables.count; ++t) width += tables.width[t];
  if (width != channels) return "multiscale: tables: wanted widths that sum to the channels";
  if (!dense(grids, 2) || grids.type != kInt64 || grids.shape[1] != 3)
    return "multiscale: grids: wanted contiguous int64 [S, 3]";
  const int64_t* grid = data<int64_t>(grids);
  for (int64_t s = 0; s < grids.shape[0]; ++s) {
    const int64_t* g = grid + 3 * s;
    if (g[0] < 1 || g[1] < 1 || g[0] > size.h || g[1] > size.w)
      return "multiscale: grids: wanted grids that fit the map";
    if (phi.type != kNone && (g[2] < 0 || g[2] >= phi.shape[0])) return "multiscale: grids: wanted rows of phi";
    if (covered < length) covered += g[0] * g[1], ++scales;
  }
  if (covered != length) return "multiscale: indices: wanted whole scales";
  if (codes.type != kNone && (!dense(codes, 2) || codes.shape[1] != channels || codes.shape[0] < 1))
    return "multiscale: codebook: wanted contiguous [K, C]";
  if (codes.type != kNone && codes.type != type_of<T>())
    return "multiscale: codebook: wanted the type that is computed in";
  if (phi.type != kNone &&
      (phi.type != type_of<T>() || !dense(phi, 4) || phi.shape[1] != 9 || phi.shape[2] != channels ||
       phi.shape[3] != channels || !holds(bias, type_of<T>(), phi.shape[0] * channels)))
    return "multiscale: phi: wanted contiguous [P, 9, C, C] and [P, C] of the type that is computed in";
  if (phi_transposed.type != kNone && !holds(phi_transposed, type_of<T>(), phi.shape[0] * 9 * channels * channels))
    return "multiscale: phi_transposed: wanted [P, 9, C, C] of the type that is computed in";
  *loop = {batch,
           channels,
           scales,
           length,
           size,
           grid,
           tables,
           data<T>(codes),
           codes.shape[0],
           data<T>(phi),
           data<T>(phi_transposed),
           data<T>(bias),
           static_cast<T>(ratio)};
  return nullptr;
}

// Rows of a next-scale model's inputs: those of scales 2 .. min(p + 1, S).
template <class T>
static int64_t input_rows(const Loop<T>& loop, int64_t all_scales) {
  int64_t rows = 0;
  for (int64_t s = 1; s < loop.scales + 1 && s < all_scales; ++s) rows += loop.grid(s).cells();
  return rows;
}

// Scratch [J, maps, H W, C] for at least one chunk.
template <class T>
static bool holds_spare(const Loop<T>& loop, const View& spare, int64_t maps) {
  return dense(spare, 4) && spare.shape[0] >= 1 && spare.shape[1] >= maps &&
         holds(spare, type_of<T>(), spare.shape[0] * spare.shape[1] * loop.map());
}

// The codes that were gathered for the ids, and their norms.
template <class T>
static bool holds_codes(const Loop<T>& loop, const View& code_rows, const View& code_norms) {
  const int64_t rows = loop.batch * loop.length;
  return holds(code_rows, type_of<T>(), rows * loop.channels) &&
         holds(code_norms, type_of<T>(), rows * loop.tables.count);
}

// What sum_by_code and sum_chunks write to; `numbers` of phi a chunk.
template <class T>
static bool holds_gradients(const Loop<T>& loop, const View& gaps, const View& order, const View& starts,
                            const View& grad_codebook, const View& partial_phi, const View& grad_phi, int64_t chunks,
                            int64_t numbers) {
  const int64_t rows = loop.batch * loop.length;
  return holds(gaps, type_of<T>(), rows * loop.channels) && holds(order, kInt64, rows) &&
         (grad_codebook.type == kNone || holds(starts, kInt64, grad_codebook.shape[0] + 1)) &&
         (numbers == 0 || holds(partial_phi, type_of<T>(), chunks * numbers)) &&
         (grad_phi.type == kNone || holds(grad_phi, type_of<T>(), numbers));
}

// Images [first, last) of chunk j of `chunks`.
struct Chunk {
  int64_t first, last;
};
static inline Chunk chunk_of(int64_t batch, int64_t chunks, int64_t j) {
  return {j * batch / chunks, (j + 1) * batch / chunks};
}

// map [H W, C] from planes [C, H W] of image b of a view [B, C, H, W] of any float type; `plane` [H W] is spare.
template <class T>
static void load_map(const View& planes, int64_t b, int64_t channels, int64_t pixels, T* map, T* plane) {
  for (int64_t c = 0; c < channels; ++c) {
    load(planes, (b * channels + c) * pixels, pixels, plane);
    for (int64_t p = 0; p < pixels; ++p) map[p * channels + c] = plane[p];
  }
}

template <class T>
static void store_map(const View& planes, int64_t b, int64_t channels, int64_t pixels, const T* map, T* plane) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) plane[p] = map[p * channels + c];
    store(planes, (b * channels + c) * pixels, pixels, plane);
  }
}

static inline bool dropped(const int64_t* ids, int64_t cells) {
  for (int64_t i = 0; i < cells; ++i)
    if (ids[i] != -1) return false;
  return true;
}

template <class T>
static inline void fill_nan(T* row, int64_t channels) {
  for (int64_t d = 0; d < channels; ++d) row[d] = static_cast<T>(__builtin_nan(""));
}

// row [C] = code `id`, unit where codes are; norms [T], where wanted. NaN and false for an id outside the table.
template <class T>
static inline bool gather(const Loop<T>& loop, int64_t id, T* row, T* norms) {
  if (id < 0 || id >= loop.codes) {
    fill_nan(row, loop.channels);
    if (norms) fill_nan(norms, loop.tables.count);
    return false;
  }
  memcpy(row, loop.codebook + id * loop.channels, loop.channels * sizeof(T));
  if (loop.tables.unit_codes) make_unit(loop.tables, row, norms);
  return true;
}

// Rows of one scale of one image; a dropped scale leaves zeros. Returns how many ids lie outside the table.
template <class T>
static int64_t gather_scale(const Loop<T>& loop, const int64_t* ids, int64_t cells, T* rows, T* norms) {
  const int tables = loop.tables.count;
  if (dropped(ids, cells)) {
    memset(rows, 0, cells * loop.channels * sizeof(T));
    if (norms) memset(norms, 0, cells * tables * sizeof(T));
    return 0;
  }
  int64_t outside = 0;
  for (int64_t r = 0; r < cells; ++r)
    outside += !gather(loop, ids[r], rows + r * loop.channels, norms ? norms + r * tables : nullptr);
  return outside;
}

// step [H W, C] = phi_s(Up rows) for rows [h w, C]; spare [2, H W, C].
template <class T>
static void code_step(const Loop<T>& loop, int64_t s, const T* rows, T* step, T* spare) {
  if (!loop.phi) {
    resample(kBicubic, rows, loop.grid(s), loop.size, loop.channels, step, spare);
    return;
  }
  T* up = spare + loop.map();
  resample(kBicubic, rows, loop.grid(s), loop.size, loop.channels, up, spare);
  conv3x3(up, loop.size, loop.channels, loop.phi + loop.phi_row(s) * loop.kernel(),
          loop.bias + loop.phi_row(s) * loop.channels, step);
  const T keep = 1 - loop.ratio;
  for (int64_t i = 0; i < loop.map(); ++i) step[i] = keep * up[i] + loop.ratio * step[i];
}

// grad_rows [h w, C] from grad_step [H W, C], and phi's share into grad_phi [P, 9, out, in], grad_bias [P, C].
// Rows that are not numbers are left out. spare [2, H W, C].
template <class T>
static void code_step_transposed(const Loop<T>& loop, int64_t s, const T* rows, const T* grad_step, T* grad_rows,
                                 T* grad_phi, T* grad_bias, T* spare) {
  const T* grad_up = grad_step;
  if (loop.phi) {
    T* up = spare + loop.map();
    const int64_t p = loop.phi_row(s);
    resample(kBicubic, rows, loop.grid(s), loop.size, loop.channels, up, spare);
    for (int64_t i = 0; i < loop.map(); ++i) up[i] = up[i] == up[i] ? up[i] : 0;
    conv3x3_grad_weight(up, grad_step, loop.size, loop.channels, loop.ratio, grad_phi + p * loop.kernel(),
                        grad_bias + p * loop.channels);
    const T keep = 1 - loop.ratio;
    for (int64_t i = 0; i < loop.map(); ++i) up[i] = keep * grad_step[i];
    conv3x3_grad_input(grad_step, loop.size, loop.channels, loop.phi_transposed + p * loop.kernel(), loop.ratio, up);
    grad_up = up;
  }
  resample_transposed(kBicubic, grad_up, loop.grid(s), loop.size, loop.channels, grad_rows, spare);
}

// out [n] = sum over the chunks of partial [chunks, n], in order.
template <class T>
static void sum_chunks(const T* partial, int64_t chunks, int64_t n, T* out) {
  memset(out, 0, n * sizeof(T));
  for (int64_t j = 0; j < chunks; ++j)
    for (int64_t i = 0; i < n; ++i) out[i] += partial[j * n + i];
}

// grad_codebook [K, C] = rows' gradients [N, C] summed by code in row order, through the code's normalisation.
// rows [N, C] and norms [N, T] are the codes that the forward gathered; a NaN row is left out.
template <class T>
static void sum_by_code(const Tables& tables, const int64_t* ids, const T* grad_rows, const T* rows, const T* norms,
                        int64_t count, const View& order, const View& starts, const View& grad_codebook, int threads) {
  const int64_t codes = grad_codebook.shape[0], channels = grad_codebook.shape[1];
  int64_t* sorted = data<int64_t>(order);
  int64_t* start = data<int64_t>(starts);
  sort_by_code(ids, count, 1, codes, sorted, start);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t k = 0; k < codes; ++k) {
    T* out = data<T>(grad_codebook) + k * channels;
    sum_members(grad_rows, channels, sorted, start[k], start[k + 1], channels, out);
    for (int64_t j = start[k]; tables.unit_codes && j < start[k + 1]; ++j) {
      const T* row = rows + sorted[j] * channels;
      if (!(row[0] == row[0])) continue;
      through_unit(tables, row, norms + sorted[j] * tables.count, out);
      break;
    }
  }
}

TOKENFLOW_END
