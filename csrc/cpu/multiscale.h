// What the multi-scale ops share: the call's constants, codes from ids, and what one scale adds to the map,
//   step_s = phi_s(Up q_s),  phi_s(u) = (1 - ratio) u + ratio (conv3x3(u) + bias),
// with its transpose. Maps are channels last, [H W, C], and made row by row. Images are independent; sums over images
// are taken over fixed chunks, so that they do not depend on the thread count, and scratch belongs to a thread.
#pragma once
#include <omp.h>

#include "common/multiscale_ops.h"
#include "cpu/conv3x3.h"

TOKENFLOW_BEGIN

template <class T>
struct Loop {
  int64_t batch, channels, scales, length;  // B, C, S, L = sum of h w over the scales of the prefix
  Grid size;                                // H, W
  const int64_t* grids;                     // [S, 3]: h, w, row of phi
  Tables tables;
  const T* codebook;       // [K, C], raw
  int64_t codes;           // K
  const T *weight, *bias;  // phi: [P, C out, C in, 3, 3] and [P, C], or null
  int64_t phi_rows;        // P
  T ratio;
  T *kernels, *turned;  // phi and its transpose as convolutions, [P, 9, C, D]; the latter for backward only
  T* start;             // [P, D]: bias
  Band<T>* bands;       // [S, 2 (H + W)]: area rows, area columns, bicubic rows, bicubic columns

  Grid grid(int64_t s) const { return {grids[3 * s], grids[3 * s + 1]}; }
  int64_t width() const { return size.w * channels; }  // numbers in a row of the map
  int64_t map() const { return size.h * width(); }
  int64_t kernel() const { return 9 * channels * padded(channels); }
  int64_t phi_numbers() const { return phi_rows * channels * (9 * channels + 1); }
  int64_t phi_row(int64_t s) const { return grids[3 * s + 2]; }
  int64_t step_products() const { return map() * (8 + (weight ? 9 * channels : 0)); }
  Axes<T> area(int64_t s) const {
    Band<T>* rows = bands + 2 * s * (size.h + size.w);
    return {size, grid(s), rows, rows + size.h};
  }
  Axes<T> bicubic(int64_t s) const {
    Band<T>* rows = bands + (2 * s + 1) * (size.h + size.w);
    return {grid(s), size, rows, rows + size.h};
  }
};

template <class T>
static T* data(const View& view) {
  return static_cast<T*>(view.data);
}

// The call's constants, checked, and room for its bands and kernels. `codes` is the codebook [K, C] or its gradient;
// `length` is what the ids of a prefix cover, loop->scales the whole scales in it.
template <class T>
static Error make_loop(Call& call, int64_t batch, int64_t length, const View& codes, int64_t channels,
                       const Tables& tables, const View& grids, Grid size, const View& weight, const View& bias,
                       double ratio, bool transposed, Loop<T>* loop) {
  int64_t covered = 0, scales = 0;
  if (!covers(tables, channels)) return "multiscale: tables: wanted widths that sum to the channels";
  if (!dense(grids, 2) || grids.type != kInt64 || grids.shape[1] != 3)
    return "multiscale: grids: wanted contiguous int64 [S, 3]";
  const int64_t* grid = data<int64_t>(grids);
  for (int64_t s = 0; s < grids.shape[0]; ++s) {
    const int64_t* g = grid + 3 * s;
    if (g[0] < 1 || g[1] < 1 || g[0] > size.h || g[1] > size.w)
      return "multiscale: grids: wanted grids that fit the map";
    if (weight.type != kNone && (g[2] < 0 || g[2] >= weight.shape[0])) return "multiscale: grids: wanted rows of phi";
    if (covered < length) covered += g[0] * g[1], ++scales;
  }
  if (covered != length) return "multiscale: indices: wanted whole scales";
  if (codes.type != kNone && (!dense(codes, 2) || codes.shape[1] != channels || codes.shape[0] < 1))
    return "multiscale: codebook: wanted contiguous [K, C]";
  if (codes.type != kNone && codes.type != type_of<T>())
    return "multiscale: codebook: wanted the type that is computed in";
  const int64_t rows = weight.type == kNone ? 0 : weight.shape[0];
  if (weight.type != kNone &&
      (weight.type != type_of<T>() || !dense(weight, 5) || weight.shape[1] != channels || weight.shape[2] != channels ||
       weight.shape[3] != 3 || weight.shape[4] != 3 || !holds(bias, type_of<T>(), rows * channels)))
    return "multiscale: phi: wanted contiguous [P, C, C, 3, 3] and [P, C] of the type that is computed in";
  *loop = {batch,
           channels,
           scales,
           length,
           size,
           grid,
           tables,
           data<T>(codes),
           codes.shape[0],
           data<T>(weight),
           data<T>(bias),
           rows,
           static_cast<T>(ratio)};
  loop->kernels = take<T>(call, rows * loop->kernel());
  loop->turned = transposed ? take<T>(call, rows * loop->kernel()) : nullptr;
  loop->start = take<T>(call, rows * padded(channels));
  loop->bands = take<Band<T>>(call, grids.shape[0] * 2 * (size.h + size.w));
  return nullptr;
}

// Fills the bands of the first scales and the kernels.
template <class T>
static void prepare(const Loop<T>& loop, int64_t scales) {
  for (int64_t s = 0; s < scales; ++s) {
    fill_bands(kArea, loop.area(s));
    fill_bands(kBicubic, loop.bicubic(s));
  }
  for (int64_t p = 0; p < loop.phi_rows; ++p) {
    const T* weight = loop.weight + p * 9 * loop.channels * loop.channels;
    pack_kernel(weight, loop.channels, false, loop.kernels + p * loop.kernel());
    if (loop.turned) pack_kernel(weight, loop.channels, true, loop.turned + p * loop.kernel());
    T* start = loop.start + p * padded(loop.channels);
    memset(start, 0, padded(loop.channels) * sizeof(T));
    memcpy(start, loop.bias + p * loop.channels, loop.channels * sizeof(T));
  }
}

// Rows of a next-scale model's inputs: those of scales 2 .. min(p + 1, S).
template <class T>
static int64_t input_rows(const Loop<T>& loop, int64_t all_scales) {
  int64_t rows = 0;
  for (int64_t s = 1; s < loop.scales + 1 && s < all_scales; ++s) rows += loop.grid(s).cells();
  return rows;
}

// Numbers in one piece of scratch: a padded map, a row more, and what whole registers read beyond them.
template <class T>
static int64_t piece(const Loop<T>& loop) {
  return (loop.size.h + 1) * (loop.size.w + 2) * loop.channels + 64;
}

// Scratch of so many pieces for each thread, and the caller's own.
template <class T>
static T* take_pieces(Call& call, const Loop<T>& loop, int64_t pieces) {
  return take<T>(call, call.threads * pieces * piece(loop));
}

template <class T>
static T* own(const Loop<T>& loop, T* spare, int64_t pieces) {
  return spare + omp_get_thread_num() * pieces * piece(loop);
}

// The codes that were gathered for the ids, and their norms.
template <class T>
static bool holds_codes(const Loop<T>& loop, const View& code_rows, const View& code_norms) {
  const int64_t rows = loop.batch * loop.length;
  return holds(code_rows, type_of<T>(), rows * loop.channels) &&
         holds(code_norms, type_of<T>(), rows * loop.tables.count);
}

// Rows [first, last) of an image: what one thread does at a time.
struct Part {
  int64_t image, first, last;
};

constexpr int64_t kWorthThreads = 1 << 18;  // products that take longer than waking a thread

// Calls visit(part) for all `rows` rows of every image, on several threads where `products` an image pay for them.
// Images are cut only where threads would be idle, so nothing that visit writes may depend on the cut.
template <class Visit>
static void for_parts(int64_t batch, int64_t rows, int64_t products, int threads, Visit visit) {
  if (batch * products < kWorthThreads) threads = 1;
  const int64_t parts = batch % threads == 0 ? 1 : threads < rows ? threads : rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < batch * parts; ++i) {
    const int64_t p = i % parts;
    visit(Part{i / parts, p * rows / parts, (p + 1) * rows / parts});
  }
}

constexpr int64_t kRun = 32;  // pixels of a plane that are turned at once, so that the map's lines stay near

// map [H W, C] from planes [C, H W] of image b of a view [B, C, H, W] of any float type.
template <class T>
static void load_map(const View& planes, int64_t b, int64_t channels, int64_t pixels, T* map) {
  T run[kRun];
  for (int64_t p = 0; p < pixels; p += kRun) {
    const int64_t n = pixels - p < kRun ? pixels - p : kRun;
    for (int64_t c = 0; c < channels; ++c) {
      load(planes, (b * channels + c) * pixels + p, n, run);
      for (int64_t i = 0; i < n; ++i) map[(p + i) * channels + c] = run[i];
    }
  }
}

template <class T>
static void store_map(const View& planes, int64_t b, int64_t channels, int64_t pixels, const T* map) {
  T run[kRun];
  for (int64_t p = 0; p < pixels; p += kRun) {
    const int64_t n = pixels - p < kRun ? pixels - p : kRun;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < n; ++i) run[i] = map[(p + i) * channels + c];
      store(planes, (b * channels + c) * pixels + p, n, run);
    }
  }
}

template <class T>
static inline void add(const T* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <class T>
static inline void subtract(const T* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] -= from[i];
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

// The codes of all ids of a prefix, [B, L, C], and their norms [B, L, T]. Returns how many ids lie outside the table.
template <class T>
static int64_t gather_prefix(const Loop<T>& loop, const int64_t* indices, T* code_rows, T* code_norms, int threads) {
  int64_t outside = 0;
  for_parts(loop.batch, 1, 8 * loop.length * loop.channels, threads, [&](Part part) {
    int64_t at = part.image * loop.length, here = 0;
    for (int64_t s = 0; s < loop.scales; ++s) {
      const int64_t cells = loop.grid(s).cells();
      here +=
          gather_scale(loop, indices + at, cells, code_rows + at * loop.channels, code_norms + at * loop.tables.count);
      at += cells;
    }
#pragma omp atomic
    outside += here;
  });
  return outside;
}

TOKENFLOW_END
