// multiscale_chain: the inputs of a next-scale model by TokenFlow's rule, which grows one map from grid to grid.
//   state_1 = codes_1,  input_s = bicubic(state_{s-1} -> grid s),  state_s = input_s + codes_s  (nothing if dropped)
// `refine` = s >= 2 returns state_s in place of input_s; 0 refines nothing. Source: tokenflow.md 4.1.
//   backward: from the last scale to the first, dstate_s = Up^T dstate_{s+1} + dinput_s, dcodes_s = dstate_s, without
//   dinput_s where it is not refined
// Two launches: bands and codes [B, L, C]; then a block for each slice of an image, whose state stays in shared memory
// from grid to grid. Backward three, bands, slices, normalisations of codes, and the sums by code (sums.cuh).
// Forward, the CPU's bits; every sum has a fixed order.
// Bytes: L (8 + 12 C + 8 T) + 4 C R an image.
//   32 images of 40 channels, nine scales up to 16 x 16 (L = 817, R = 816, 15 M operations): 17 MB, 9 us on A100 (2.0
//   TB/s), 5 us on H100 (3.35 TB/s). Paper arithmetic, never run on a GPU.
#include "cuda/multiscale_gradient.cuh"

TOKENFLOW_BEGIN

// From the grid of scale s - 1 to that of scale s: its bands, and for backward the bands that hold a sample.
struct Growth {
  Band<float>* bands;  // [S, H + W]: rows, then columns
  Run* runs;           // likewise, or null

  __device__ Axes axes(const Loop& loop, int s) const {
    const Band<float>* rows = bands + s * (loop.size.h + loop.size.w);
    return {loop.grid(s - 1), loop.grid(s), rows, rows + loop.size.h};
  }
  // Number i of either.
  __device__ void prepare(const Loop& loop, int64_t i) const {
    const int64_t sides = loop.size.h + loop.size.w;
    const int s = static_cast<int>(i / sides), at = static_cast<int>(i % sides);
    if (s < 1 || s >= loop.scales.count) return;
    const bool row = at < loop.size.h;
    const int in = row ? loop.scales.h[s - 1] : loop.scales.w[s - 1], out = row ? loop.scales.h[s] : loop.scales.w[s];
    const int n = row ? at : at - loop.size.h;
    if (n < out) bands[i] = bicubic_band<float>(in, out, n);
    if (runs && n < in) runs[i] = bicubic_bands_at(in, out, n);
  }
};

template <class First>
static __global__ void __launch_bounds__(kThreads, 4)
    growth_kernel(Loop loop, Growth growth, unsigned blocks, First first) {
  if (blockIdx.x < blocks)
    first(loop);
  else
    growth.prepare(loop, static_cast<int64_t>(blockIdx.x - blocks) * kThreads + threadIdx.x);
}

template <class First = Nothing>
static void prepare_growth(Call& call, const Loop& loop, const Growth& growth, int64_t blocks = 0, First first = {}) {
  const int64_t items = static_cast<int64_t>(loop.scales.count) * (loop.size.h + loop.size.w);
  const int64_t all = blocks + (items + kThreads - 1) / kThreads;
  launch(call, growth_kernel<First>, dim3(static_cast<unsigned>(all)), dim3(kThreads), 0, loop, growth,
         static_cast<unsigned>(blocks), first);
}

struct Chain {
  Growth growth;
  int scales;  // that have ids; those of the loop may be one more
  int refine;
  int64_t input_rows;
  const float* code_rows;    // [B, L, C]
  float* inputs;             // [B, R, C]
  const float* grad_inputs;  // likewise
  float* gaps;               // [B, L, C]
};

// A slice of an image, through all its scales.
static __global__ void __launch_bounds__(kThreads) chain_kernel(Loop loop, Chain call) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  float *state = space.planes[0], *across = space.planes[1];
  int64_t at = slice.image * loop.length, input = slice.image * call.input_rows;
  for (int s = 0; s < loop.scales.count; ++s) {
    const int width = loop.scales.w[s], cells = loop.scales.cells(s), stride = plane_stride(cells);
    const Axes grow = call.growth.axes(loop, s > 0 ? s : 1);
    if (s > 0) {
      widen(grow, state, slice.planes, across);
      __syncthreads();
    }
    for_cells(cut, slice, cells, [&](int cell, int plane) {
      const int64_t d = slice.first + plane;
      const int y = cell / width;
      float grown = 0;
      if (s > 0) grown = blend(grow.rows[y], across + plane * grow.in.h * width + cell - y * width, width);
      const float now = s < call.scales ? grown + call.code_rows[(at + cell) * cut.channels + d] : grown;
      state[plane * stride + cell] = now;
      if (s > 0) call.inputs[(input + cell) * cut.channels + d] = s + 1 == call.refine ? now : grown;
    });
    __syncthreads();
    at += cells;
    if (s > 0) input += cells;
  }
}

static Grid largest(const View& grids) {
  Grid size = {1, 1};
  for (int64_t s = 0; dense(grids, 2) && grids.type == kInt64 && grids.shape[1] == 3 && s < grids.shape[0]; ++s) {
    const int64_t* grid = data<int64_t>(grids) + s * 3;
    size = {grid[0] > size.h ? static_cast<int>(grid[0]) : size.h,
            grid[1] > size.w ? static_cast<int>(grid[1]) : size.w};
  }
  return size;
}

Error multiscale_chain(Call& call, View indices, View codebook, Tables tables, View grids, int64_t refine, View inputs,
                       View code_rows, View code_norms) noexcept {
  if (!dense_on(indices, 2) || indices.type != kInt64 || !dense_on(codebook, 2) || !dense_on(inputs, 3))
    return "multiscale_chain: wanted contiguous int64 indices [B, L], codebook [K, C], inputs [B, R, C]";
  Loop loop, all;
  int64_t input_rows;
  const Grid size = largest(grids);
  const View none = {nullptr, kNone};
  if (const Error error = make_prefix_loop(call, indices, codebook, codebook.shape[1], tables, grids, size.h, size.w,
                                           none, none, 0, false, true, &loop, &all, &input_rows))
    return error;
  if (!holds_codes(loop, code_rows, code_norms) || inputs.shape[1] != input_rows ||
      !holds_on(inputs, kFloat32, loop.batch * input_rows * loop.channels))
    return "multiscale_chain: wanted outputs that fit the grids";
  const int scales = loop.scales.count;
  unsigned* flags = take<unsigned>(call, loop.batch * scales);
  if (call.counting) return nullptr;
  const GatherPrefix gather = {data<int64_t>(indices),
                               loop.length,
                               scales,
                               data<float>(codebook),
                               codebook.shape[0],
                               data<float>(code_rows),
                               data<float>(code_norms),
                               flags,
                               call.counts};
  const Growth growth = {all.bands, nullptr};
  prepare_growth(call, all, growth, loop.batch * parts_of(loop.scales, scales), gather);
  all.length = loop.length;
  if (scales > 0)
    launch_images(
        call, all, loop.batch, chain_kernel, all,
        Chain{growth, scales, static_cast<int>(refine), input_rows, data<float>(code_rows), data<float>(inputs)});
  return nullptr;
}

// A slice of an image, from the last scale to the first. The gradient of state s is that of its codes and of input s.
static __global__ void __launch_bounds__(kThreads) chain_backward_kernel(Loop loop, Chain call) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  float *state = space.planes[0], *across = space.planes[1];
  int64_t at = (slice.image + 1) * loop.length, input = (slice.image + 1) * call.input_rows;
  for (int s = loop.scales.count - 1; s >= 0; --s) {
    const int cells = loop.scales.cells(s), stride = plane_stride(cells);
    if (s < call.scales) at -= cells;
    if (s > 0) input -= cells;
    for_cells(cut, slice, cells, [&](int cell, int plane) {
      const int64_t d = slice.first + plane;
      const float from_input = s > 0 ? call.grad_inputs[(input + cell) * cut.channels + d] : 0;
      float* now = state + plane * stride + cell;
      const float grown = s + 1 < loop.scales.count ? *now : 0;
      const float all = grown + from_input;
      if (s < call.scales) call.gaps[(at + cell) * cut.channels + d] = s + 1 == call.refine ? all : grown;
      *now = all;
    });
    if (s == 0) break;
    __syncthreads();
    const Axes grow = call.growth.axes(loop, s);
    const Run *rows = call.growth.runs + s * (loop.size.h + loop.size.w), *columns = rows + loop.size.h;
    const int height = grow.in.h, width = grow.out.w, below = plane_stride(grow.in.cells());
    for_columns(width, [&](int x, int row, int step) {
      for (; row < slice.planes * height; row += step) {
        const int plane = row / height, i = row - plane * height;
        float sum = 0;
        for (int y = rows[i].first; y <= rows[i].last; ++y)
          sum = fmaf(weight_at(grow.rows[y], i), state[plane * stride + y * width + x], sum);
        across[row * width + x] = sum;
      }
    });
    __syncthreads();
    for_columns(grow.in.w, [&](int j, int row, int step) {
      for (; row < slice.planes * height; row += step) {
        const int plane = row / height, i = row - plane * height;
        float sum = 0;
        for (int x = columns[j].first; x <= columns[j].last; ++x)
          sum = fmaf(weight_at(grow.columns[x], j), across[row * width + x], sum);
        state[plane * below + i * grow.in.w + j] = sum;
      }
    });
    __syncthreads();
  }
}

Error multiscale_chain_backward(Call& call, View indices, View code_rows, View code_norms, View grad_inputs,
                                Tables tables, View grids, int64_t refine, View grad_codebook) noexcept {
  if (!dense_on(indices, 2) || indices.type != kInt64 || !dense_on(code_rows, 3) || !dense_on(grad_inputs, 3) ||
      !dense_on(grad_codebook, 2))
    return "multiscale_chain_backward: wanted contiguous indices, code_rows, grad_inputs and grad_codebook";
  Loop loop, all;
  int64_t input_rows;
  const Grid size = largest(grids);
  const View none = {nullptr, kNone};
  if (const Error error = make_prefix_loop(call, indices, grad_codebook, code_rows.shape[2], tables, grids, size.h,
                                           size.w, none, none, 0, false, true, &loop, &all, &input_rows))
    return error;
  if (!holds_codes(loop, code_rows, code_norms) || grad_inputs.shape[1] != input_rows ||
      !holds_on(grad_inputs, kFloat32, loop.batch * input_rows * loop.channels))
    return "multiscale_chain_backward: wanted gradients that fit the grids";
  const int64_t rows = loop.batch * loop.length;
  float* gaps = take<float>(call, rows * loop.channels);
  Run* runs = take<Run>(call, all.scales.count * (size.h + size.w));
  const CodeSum sum = take_code_sum(call, loop, grad_codebook);
  if (call.counting) return nullptr;
  const Growth growth = {all.bands, runs};
  prepare_growth(call, all, growth);
  all.length = loop.length;
  Chain made = {growth, loop.scales.count, static_cast<int>(refine), input_rows};
  made.grad_inputs = data<float>(grad_inputs);
  made.gaps = gaps;
  if (made.scales > 0) launch_images(call, all, loop.batch, chain_backward_kernel, all, made);
  UpTransposed finish = {};
  finish.maps = finish.gaps = gaps;
  finish.code_rows = data<float>(code_rows);
  finish.code_norms = data<float>(code_norms);
  sum.keys_from(&finish, data<int64_t>(indices), 0);
  finish_rows(call, loop, rows, finish);
  sum.run(call, loop, gaps, grad_codebook);
  return nullptr;
}

TOKENFLOW_END
