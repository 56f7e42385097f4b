// What the multi-scale kernels share: the call's constants, what is made once a call, and how blocks cut the maps.
//   Maps [B, C, H, W] are cut into slices of up to 8 channels of one image, one block each: resampling knows no other
//   channels, so a slice goes from codes to the next scale's rows without meeting another block. Narrow slices where
//   there are few images, so that blocks outnumber multiprocessors; 8 channels fill the 32-byte sectors of rows [..,
//   C].
// Once a call, one launch: bands of all scales, norms of codes that are to be unit, phi as a convolution.
// Scales travel by value, as kernel parameters: nothing is copied from the host.
#pragma once
#include "common/multiscale_ops.h"
#include "cuda/conv3x3.cuh"

TOKENFLOW_BEGIN

constexpr int kThreads = 256;
constexpr int64_t kSharedFloats = 44 << 8;  // 48 KB hold this, beside what kernels declare

// Numbers that a block's space begins with: ids of a grid, or weights of both axes.
TOKENFLOW_DEVICE static inline int head_of(const Grid& size) {
  return size.cells() > size.h + size.w ? size.cells() : size.h + size.w;
}

struct Sizes {
  int count, h[kMaxScales], w[kMaxScales];
  TOKENFLOW_DEVICE int cells(int s) const { return h[s] * w[s]; }
};

// The rows that are added and subtracted: codes [K, C], divided by norms [K, T] where they are to be unit.
struct Codes {
  const float *codebook, *norms;
  int64_t count, channels;
  Tables tables;
};

struct Loop {
  int64_t batch, channels, length;  // B, C, L
  Grid size;                        // H, W
  Sizes scales;
  const int64_t* grids;  // [S, 3] in host memory
  Codes codes;
  const float *weight, *bias;  // phi: [P, C out, C in, 3, 3] and [P, C], or null
  int64_t phi_rows;            // P
  float ratio;
  Band<float>* bands;       // [S, 2 (H + W)]: area rows, area columns, bicubic rows, bicubic columns
  float *kernels, *turned;  // phi and its transpose, [P, 9, C, D]; the latter for backward only
  unsigned* bad;            // [B, L] zeros, where wanted
  int width;                // channels in a slice
  int slices;               // of an image
  float* space;             // of the blocks where it does not fit into shared memory, else null
  int64_t floats;           // in the space of a block

  TOKENFLOW_DEVICE Grid grid(int64_t s) const { return {scales.h[s], scales.w[s]}; }
  TOKENFLOW_DEVICE int64_t map() const { return channels * size.cells(); }
  TOKENFLOW_DEVICE const Band<float>* bands_of(int64_t s) const { return bands + 2 * s * (size.h + size.w); }
  TOKENFLOW_DEVICE Axes area(int64_t s) const { return {size, grid(s), bands_of(s), bands_of(s) + size.h}; }
  TOKENFLOW_DEVICE Axes bicubic(int64_t s) const {
    const Band<float>* rows = bands_of(s) + size.h + size.w;
    return {grid(s), size, rows, rows + size.h};
  }
  Refinement refinement(int64_t s, const float* map, const unsigned* skipped) const {
    const int64_t p = grids[3 * s + 2];
    return {map, channels, size, kernels + p * kernel_numbers(channels), bias + p * channels, ratio, skipped};
  }
};

template <class T>
static T* data(const View& view) {
  return static_cast<T*>(view.data);
}

static inline bool is_map(const View& v) { return dense_on(v, 4) && floating(v) && v.type != kFloat64; }

// The call's constants, checked, and room for what is made once. `codes` is the codebook [K, C] or none; `length` is
// what the ids of a prefix cover, loop->scales the whole scales in it. Blocks work in `planes`
// maps a channel.
static Error make_loop(Call& call, int64_t batch, int64_t length, const View& codes, int64_t channels,
                       const Tables& tables, const View& grids, int64_t height, int64_t width, const View& weight,
                       const View& bias, double ratio, bool transposed, int planes, Loop* loop) {
  if (!covers(tables, channels)) return "multiscale: tables: wanted widths that sum to the channels";
  if (!dense(grids, 2) || grids.type != kInt64 || grids.shape[1] != 3 || grids.shape[0] > kMaxScales)
    return "multiscale: grids: wanted contiguous int64 [S, 3], at most 128 scales on CUDA";
  if (height * width > int64_t{1} << 24 || batch * channels > int64_t{1} << 24)
    return "multiscale: features: wanted maps of at most 2^24 pixels and B C of at most 2^24 on CUDA";
  *loop = {batch, channels, length, {static_cast<int>(height), static_cast<int>(width)}, {}, data<int64_t>(grids)};
  int64_t covered = 0;
  for (int64_t s = 0; s < grids.shape[0]; ++s) {
    const int64_t* g = loop->grids + 3 * s;
    if (g[0] < 1 || g[1] < 1 || g[0] > height || g[1] > width)
      return "multiscale: grids: wanted grids that fit the map";
    if (weight.type != kNone && (g[2] < 0 || g[2] >= weight.shape[0])) return "multiscale: grids: wanted rows of phi";
    if (covered >= length) continue;
    loop->scales.h[loop->scales.count] = static_cast<int>(g[0]);
    loop->scales.w[loop->scales.count++] = static_cast<int>(g[1]);
    covered += g[0] * g[1];
  }
  if (covered != length) return "multiscale: indices: wanted whole scales";
  if (codes.type != kNone &&
      (!dense_on(codes, 2) || codes.type != kFloat32 || codes.shape[1] != channels || codes.shape[0] < 1))
    return "multiscale: codebook: wanted contiguous float32 [K, C]";
  const int64_t rows = weight.type == kNone ? 0 : weight.shape[0];
  if (weight.type != kNone &&
      (!dense_on(weight, 5) || weight.type != kFloat32 || weight.shape[1] != channels || weight.shape[2] != channels ||
       weight.shape[3] != 3 || weight.shape[4] != 3 || !holds_on(bias, kFloat32, rows * channels)))
    return "multiscale: phi: wanted contiguous float32 [P, C, C, 3, 3] and [P, C]";
  const bool unit = codes.type != kNone && tables.unit_codes;
  float* norms = unit ? take<float>(call, codes.shape[0] * tables.count) : nullptr;
  loop->codes = {data<float>(codes), norms, codes.type == kNone ? 0 : codes.shape[0], channels, tables};
  loop->weight = data<float>(weight);
  loop->bias = data<float>(bias);
  loop->phi_rows = rows;
  loop->ratio = static_cast<float>(ratio);
  loop->kernels = take<float>(call, rows * kernel_numbers(channels));
  loop->turned = transposed ? take<float>(call, rows * kernel_numbers(channels)) : nullptr;
  loop->bands = take<Band<float>>(call, loop->scales.count * 2 * (height + width));
  const int64_t head = head_of(loop->size), plane = planes * plane_stride(loop->size.cells());
  const int64_t blocks = 2 * multiprocessors(call);  // at least, if there can be so many
  for (loop->width = 8; loop->width > 1; loop->width /= 2) {
    const int64_t slices = (channels + loop->width - 1) / loop->width;
    if (batch * slices >= blocks && head + loop->width * plane <= kSharedFloats) break;
  }
  loop->slices = static_cast<int>((channels + loop->width - 1) / loop->width);
  loop->floats = (head + loop->width * plane + 63) / 64 * 64;
  const bool fits = loop->floats <= kSharedFloats;
  loop->space = fits ? nullptr : take<float>(call, batch * loop->slices * loop->floats);
  return nullptr;
}

static __device__ inline int table_of(const Tables& tables, int64_t channel) {
  int t = 0;
  for (int64_t end = tables.width[0]; channel >= end; end += tables.width[t]) ++t;
  return t;
}

// The i-th of: bands, norms, numbers of phi's kernels, zeros.
static __device__ inline void prepare_item(const Loop& loop, int64_t i) {
  const int64_t sides = loop.size.h + loop.size.w, bands = loop.scales.count * 2 * sides;
  if (i < bands) {
    const int s = static_cast<int>(i / (2 * sides));
    const int64_t at = i % sides, row = at < loop.size.h;
    const int64_t in = row ? loop.size.h : loop.size.w, out = row ? loop.scales.h[s] : loop.scales.w[s];
    const int64_t n = row ? at : at - loop.size.h;
    if (i / sides % 2 == 1)
      loop.bands[i] = bicubic_band<float>(out, in, n);
    else if (n < out)
      loop.bands[i] = area_band<float>(in, out, n);
    return;
  }
  i -= bands;
  const Codes& codes = loop.codes;
  const int64_t norms = codes.norms ? codes.count * codes.tables.count : 0;
  if (i < norms) {
    const int t = static_cast<int>(i % codes.tables.count);
    const float* code = codes.codebook + i / codes.tables.count * codes.channels;
    for (int before = 0; before < t; ++before) code += codes.tables.width[before];
    float square = 0;
    for (int64_t d = 0; d < codes.tables.width[t]; ++d) square = fmaf(code[d], code[d], square);
    const float norm = sqrtf(square);
    const_cast<float*>(codes.norms)[i] = norm > 1e-12f ? norm : 1e-12f;
    return;
  }
  i -= norms;
  const int64_t numbers = kernel_numbers(loop.channels), all = loop.phi_rows * numbers;
  if (i < all) {
    const float* weight = loop.weight + i / numbers * 9 * loop.channels * loop.channels;
    loop.kernels[i] = kernel_number(weight, loop.channels, false, i % numbers);
    if (loop.turned) loop.turned[i] = kernel_number(weight, loop.channels, true, i % numbers);
    return;
  }
  i -= all;
  if (loop.bad && i < loop.batch * loop.length) loop.bad[i] = 0;
}

struct Nothing {
  __device__ void operator()(const Loop&) const {}
};

// What `First` does in the first blocks; then thread i makes the i-th of what prepare_item makes.
template <class First>
static __global__ void __launch_bounds__(kThreads) prepare_kernel(Loop loop, unsigned blocks, First first) {
  if (blockIdx.x < blocks)
    first(loop);
  else
    prepare_item(loop, static_cast<int64_t>(blockIdx.x - blocks) * kThreads + threadIdx.x);
}

template <class First = Nothing>
static void prepare(Call& call, const Loop& loop, int64_t blocks = 0, First first = {}) {
  const int64_t items = loop.scales.count * 2 * (loop.size.h + loop.size.w) +
                        (loop.codes.norms ? loop.codes.count * loop.codes.tables.count : 0) +
                        loop.phi_rows * kernel_numbers(loop.channels) + (loop.bad ? loop.batch * loop.length : 0);
  const int64_t all = blocks + (items + kThreads - 1) / kThreads;
  launch(call, prepare_kernel<First>, dim3(static_cast<unsigned>(all)), dim3(kThreads), 0, loop,
         static_cast<unsigned>(blocks), first);
}

// How a kernel cuts maps [B, C, H, W]: loop's numbers without the rest.
struct Cut {
  int64_t channels;
  Grid size;
  int width, slices;
  float* space;
  int64_t floats;
};

TOKENFLOW_DEVICE static inline Cut cut_of(const Loop& loop) {
  return {loop.channels, loop.size, loop.width, loop.slices, loop.space, loop.floats};
}

// A block for every slice.
template <class... P, class... A>
static void launch_slices(Call& call, const Loop& loop, void (*kernel)(P...), A... arguments) {
  launch(call, kernel, dim3(static_cast<unsigned>(loop.batch * loop.slices)), dim3(kThreads),
         loop.space ? 16 : loop.floats * sizeof(float), arguments...);
}

// What this block works on: `planes` channels of an image from `first` on, the index-th slice of it.
struct Slice {
  int64_t image, first;
  int index, planes;
};

static __device__ inline Slice slice_of(const Cut& cut) {
  const int block = static_cast<int>(blockIdx.x), index = block % cut.slices;
  Slice slice = {block / cut.slices, static_cast<int64_t>(index) * cut.width, index, cut.width};
  if (cut.channels - slice.first < cut.width) slice.planes = static_cast<int>(cut.channels - slice.first);
  return slice;
}

// A block's space, in shared memory where it fits: numbers for the cells of a grid, and planes [width, plane_stride(H
// W)].
struct Space {
  int* ids;
  float* planes[3];  // as many as make_loop was asked for
};

static __device__ inline Space space_of(const Cut& cut, float* shared) {
  float* all = cut.space ? cut.space + blockIdx.x * cut.floats : shared;
  float* planes = all + head_of(cut.size);
  const int stride = cut.width * plane_stride(cut.size.cells());
  return {reinterpret_cast<int*>(all), {planes, planes + stride, planes + 2 * stride}};
}

// visit(cell, plane) for the cells of a grid and the planes of a slice; neighbouring threads have neighbouring planes.
template <class Visit>
static __device__ inline void for_cells(const Cut& cut, const Slice& slice, int cells, Visit visit) {
  const int plane = static_cast<int>(threadIdx.x) % cut.width;
  for (int cell = static_cast<int>(threadIdx.x) / cut.width; cell < cells && plane < slice.planes;
       cell += kThreads / cut.width)
    visit(cell, plane);
}

// planes [c, H, W] = the slice of a map [B, C, H, W].
static __device__ inline void load_planes(const Cut& cut, const Slice& slice, const void* map, Type type,
                                          float* planes) {
  const int pixels = cut.size.cells();
  const int64_t first = (slice.image * cut.channels + slice.first) * pixels;
  for (int i = threadIdx.x; i < slice.planes * pixels; i += kThreads) planes[i] = number(map, type, first + i);
}

// planes [c, h w] plane_stride(h w) apart = the slice's channels of the codes of ids [h w]; NaN for ids below zero.
static __device__ inline void gather(const Codes& codes, const Cut& cut, const Slice& slice, const int* ids, int cells,
                                     float* planes) {
  const int64_t tables = codes.tables.count, d = slice.first + static_cast<int>(threadIdx.x) % cut.width;
  const int t = d < cut.channels ? table_of(codes.tables, d) : 0, stride = plane_stride(cells);
  for_cells(cut, slice, cells, [&](int cell, int plane) {
    const int64_t id = ids[cell];
    float number = NAN;
    if (id >= 0) {
      number = codes.codebook[id * codes.channels + d];
      if (codes.norms) number /= codes.norms[id * tables + t];
    }
    planes[plane * stride + cell] = number;
  });
}

// The slice's channels of rows [h w, C] = Down of its planes [c, H, W]; spare of that size. Rows that are not finite
// are marked in bad [h w], if any. All threads of the block.
static __device__ inline void pool(const Axes& area, const Cut& cut, const Slice& slice, const float* map, float* spare,
                                   float* rows, unsigned* bad) {
  const int height = area.out.h, width = area.out.w, stride = plane_stride(height * area.in.w);
  narrow(area, map, slice.planes, spare);
  __syncthreads();
  for_cells(cut, slice, height * width, [&](int cell, int plane) {
    const int i = cell / width;
    const float number = blend(area.columns[cell - i * width], spare + plane * stride + i * area.in.w, 1);
    rows[cell * cut.channels + slice.first + plane] = number;
    if (bad && !(fabsf(number) <= FLT_MAX)) atomicAdd(bad + cell, 1u);
  });
}

// A step of the maps: total = sum + step, after = before - step, number by number. Either may be absent.
struct Move {
  const void* before;  // [B, C, H, W] of `type`
  Type type;
  float* after;      // may be `before`
  const float* sum;  // null: zeros
  void* total;       // of `total_type`; may be `sum`
  Type total_type;

  // Number i; returns what is left.
  __device__ float operator()(int64_t i, float step) const {
    if (total) set_number(total, total_type, i, (sum ? sum[i] : 0) + step);
    const float rest = number(before, type, i) - step;
    after[i] = rest;
    return rest;
  }
};

// use(i, at, step): number i of [B, C, H, W], the `at`-th of the slice's planes [c, H, W], from across [c, h, W].
template <class Use>
static __device__ inline void for_step(const Axes& bicubic, const Cut& cut, const Slice& slice, const float* across,
                                       Use use) {
  const Grid size = bicubic.out;
  const int stride = bicubic.in.h * size.w;
  const int64_t first = (slice.image * cut.channels + slice.first) * size.cells();
  for_columns(size.w, [&](int x, int row, int step) {
    for (; row < slice.planes * size.h; row += step) {
      const int plane = row / size.h, y = row - plane * size.h, at = row * size.w + x;
      use(first + at, at, blend(bicubic.rows[y], across + plane * stride + x, size.w));
    }
  });
}

// The slice's planes[0] of `space`, [c, H, W], += Down^T of its channels of rows [h w, C], along columns, then along
// rows, in the order of their cells; rows that are not kept [h w] are zeros. All threads of the block; planes[1] and
// [2] are spare.
static __device__ inline void add_pool_transposed(const Grid& grid, const Cut& cut, const Slice& slice,
                                                  const Space& space, const float* grad_rows, const float* kept) {
  const int h = grid.h, w = grid.w, height = cut.size.h, width = cut.size.w, stride = plane_stride(h * w);
  float *total = space.planes[0], *rows = space.planes[1], *across = space.planes[2];
  float *of_row = reinterpret_cast<float*>(space.ids), *of_column = of_row + h;
  for (int i = threadIdx.x; i < h; i += kThreads) of_row[i] = area_weight<float>(height, h, i);
  for (int i = threadIdx.x; i < w; i += kThreads) of_column[i] = area_weight<float>(width, w, i);
  for_cells(cut, slice, h * w, [&](int cell, int plane) {
    const float grad = grad_rows[cell * cut.channels + slice.first + plane];
    rows[plane * stride + cell] = !kept || kept[cell] != 0 ? grad : 0;
  });
  __syncthreads();
  for_columns(width, [&](int x, int row, int step) {
    const Run columns = bands_at(width, w, x);
    for (; row < slice.planes * h; row += step) {
      const int plane = row / h;
      const float* from = rows + plane * stride + (row - plane * h) * w;
      float sum = 0;
      for (int j = columns.first; j <= columns.last; ++j) sum += of_column[j] * from[j];
      across[row * width + x] = sum;
    }
  });
  __syncthreads();
  for_columns(width, [&](int x, int row, int step) {
    for (; row < slice.planes * height; row += step) {
      const int plane = row / height;
      const Run bands = bands_at(height, h, row - plane * height);
      float sum = total[row * width + x];
      for (int i = bands.first; i <= bands.last; ++i) sum += of_row[i] * across[(plane * h + i) * width + x];
      total[row * width + x] = sum;
    }
  });
  __syncthreads();
}

TOKENFLOW_END
