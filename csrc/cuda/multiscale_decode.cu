// multiscale_decode: f = sum_s phi_s(Up codes_s) from ids of whole scales; and the inputs of a next-scale model by the
// rule "accumulate": Down_{s+1} f_s for the running maps f_s. Either output may be absent. Dropped scales add nothing.
//   backward: G = df; from the last scale to the first G += Down_{s+1}^T dinputs_{s+1}, dstep_s = G
// Forward, the CPU's bits: codes divided by their norms, Up along columns, then rows, sums from the first scale on.
//   two launches    bands and codes [B, L, C]; then a block for each slice of an image, which keeps its running map in
//                   shared memory through all scales
//   with phi four   Up of all scales and phi of all scales between them, once for each share of the images whose stacks
//                   stay in cache (multiscale_gradient.cuh)
// Backward: bands; stacks of G where inputs have a gradient; with phi its own gradients and its transpose; Up^T of all
// scales line by line; sums by code (sums.cuh). Without phi two or three launches before the sums, however many scales.
// Bytes: L (8 + 12 C + 8 T) + 4 C H W an image.
//   32 images of 40 channels at 16 x 16, nine scales (L = 817, 36 M operations): 14 MB, 7 us on A100 (2.0 TB/s), 4 us
//   on H100 (3.35 TB/s); phi has 18 C operations a number and scale, none fused, so at half the peak: VAR's ten scales
//   of 32 channels, 32 images, 1.5 G: 155 us on A100 (19.5 TFLOP/s), 45 us on H100 (67 TFLOP/s); its backward 390 and
//   115 us
// Paper arithmetic, never run on a GPU.
#include "cuda/multiscale_gradient.cuh"

TOKENFLOW_BEGIN

struct Decode {
  const float* code_rows;  // [B, L, C]
  const float* steps;      // [B, S, C, H, W], or null: they are made here
  const unsigned* flags;   // [B, S]: 1 for scales without ids
  int all_scales;          // of the model; S are those of the prefix
  float *map, *inputs;     // [B, C, H, W], [B, R, C], or null
  int64_t input_rows;      // R
};

// A slice of an image, through all its scales.
static __global__ void __launch_bounds__(kThreads) decode_kernel(Loop loop, Decode call) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  float *sum = space.planes[0], *codes = space.planes[1], *across = space.planes[2];
  const int scales = loop.scales.count, numbers = slice.planes * cut.size.cells();
  const int64_t first = (slice.image * cut.channels + slice.first) * cut.size.cells();
  for (int i = threadIdx.x; i < numbers; i += kThreads) sum[i] = 0;
  int64_t at = slice.image * loop.length, input = slice.image * call.input_rows;
  for (int s = 0; s < scales; ++s) {
    const Axes bicubic = loop.bicubic(s);
    const bool skipped = call.flags[slice.image * scales + s] != 0;
    if (!skipped && call.steps) {
      const float* step = call.steps + first + (slice.image * (scales - 1) + s) * loop.map();
      for (int i = threadIdx.x; i < numbers; i += kThreads) sum[i] += step[i];
    } else if (!skipped) {
      __syncthreads();
      load_rows(cut, slice, call.code_rows + at * cut.channels, bicubic.in.cells(), codes);
      __syncthreads();
      widen(bicubic, codes, slice.planes, across);
      __syncthreads();
      for_step(bicubic, cut, slice, across, [&](int64_t, int to, float step) { sum[to] += step; });
    }
    at += bicubic.in.cells();
    if (!call.inputs || s + 1 == call.all_scales) continue;
    __syncthreads();
    const Axes area = loop.area(s + 1);
    pool(area, cut, slice, sum, codes, call.inputs + input * cut.channels, nullptr);
    input += area.out.cells();
  }
  if (!call.map) return;
  __syncthreads();
  for (int i = threadIdx.x; i < numbers; i += kThreads) call.map[first + i] = sum[i];
}

Error multiscale_decode(Call& call, View indices, View codebook, Tables tables, View grids, int64_t height,
                        int64_t width, View weight, View bias, double ratio, View map, View inputs, View code_rows,
                        View code_norms) noexcept {
  if (!dense_on(indices, 2) || indices.type != kInt64 || !dense_on(codebook, 2) || height < 1 || width < 1)
    return "multiscale_decode: wanted contiguous int64 indices [B, L] and codebook [K, C]";
  Loop loop, all;
  int64_t input_rows;
  if (const Error error = make_prefix_loop(call, indices, codebook, codebook.shape[1], tables, grids, height, width,
                                           weight, bias, ratio, false, inputs.type != kNone, &loop, &all, &input_rows))
    return error;
  if (!holds_codes(loop, code_rows, code_norms) ||
      (map.type != kNone && !holds_on(map, kFloat32, loop.batch * loop.map())) ||
      (inputs.type != kNone && (!dense_on(inputs, 3) || inputs.shape[1] != input_rows ||
                                !holds_on(inputs, kFloat32, loop.batch * input_rows * loop.channels))))
    return "multiscale_decode: wanted outputs that fit the maps";
  const int scales = loop.scales.count;
  const bool phi = loop.weight && scales > 0;
  const int64_t images = phi ? stacked_images(loop) : loop.batch, stack = images * scales * loop.map();
  unsigned* flags = take<unsigned>(call, loop.batch * scales);
  float* up = phi ? take<float>(call, stack) : nullptr;
  float* steps = phi ? take<float>(call, stack) : nullptr;
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
  prepare(call, all, loop.batch * parts_of(loop.scales, scales), gather);
  for (int64_t b = 0; b < loop.batch; b += images) {
    const int64_t n = loop.batch - b < images ? loop.batch - b : images;
    const float* codes = data<float>(code_rows) + b * loop.length * loop.channels;
    if (phi) {
      upsample(call, loop, n, codes, up);
      refine_stack(call, loop, n, up, flags + b * scales, steps);
    }
    const Decode made = {codes,
                         steps,
                         flags + b * scales,
                         static_cast<int>(grids.shape[0]),
                         map.data ? data<float>(map) + b * loop.map() : nullptr,
                         inputs.data ? data<float>(inputs) + b * input_rows * loop.channels : nullptr,
                         input_rows};
    launch_images(call, loop, n, decode_kernel, loop, made);
  }
  return nullptr;
}

struct DecodeGradient {
  const float *grad_map, *grad_inputs;  // [B, C, H, W], [B, R, C], or null
  int64_t input_rows;
  int all_scales;
  float* stack;  // [B, S, C, H, W]
};

// A slice of dstep_s = df + sum over j >= s of Down_{j+1}^T dinputs_{j+1}, of an image.
static __global__ void __launch_bounds__(kThreads) decode_gradient_kernel(Loop loop, DecodeGradient call) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  const int scales = loop.scales.count, numbers = slice.planes * cut.size.cells();
  const int64_t first = (slice.image * cut.channels + slice.first) * cut.size.cells();
  float* total = space.planes[0];
  for (int i = threadIdx.x; i < numbers; i += kThreads) total[i] = call.grad_map ? call.grad_map[first + i] : 0;
  int64_t input = (slice.image + 1) * call.input_rows;
  for (int s = scales - 1; s >= 0; --s) {
    if (s + 1 < call.all_scales) {
      input -= loop.scales.cells(s + 1);
      add_pool_transposed(loop.grid(s + 1), cut, slice, space, call.grad_inputs + input * cut.channels, nullptr);
    }
    float* to = call.stack + first + (slice.image * (scales - 1) + s) * loop.map();
    for (int i = threadIdx.x; i < numbers; i += kThreads) to[i] = total[i];
  }
}

Error multiscale_decode_backward(Call& call, View indices, View code_rows, View code_norms, View grad_map,
                                 View grad_inputs, Tables tables, View grids, int64_t height, int64_t width,
                                 View weight, View bias, double ratio, View grad_codebook, View grad_weight,
                                 View grad_bias) noexcept {
  if (!dense_on(indices, 2) || indices.type != kInt64 || !dense_on(code_rows, 3) || !dense_on(grad_codebook, 2))
    return "multiscale_decode_backward: wanted contiguous indices [B, L], code_rows [B, L, C], grad_codebook [K, C]";
  Loop loop, all;
  int64_t input_rows;
  const bool from_inputs = grad_inputs.type != kNone;
  if (const Error error = make_prefix_loop(call, indices, grad_codebook, code_rows.shape[2], tables, grids, height,
                                           width, weight, bias, ratio, true, from_inputs, &loop, &all, &input_rows))
    return error;
  if (!holds_codes(loop, code_rows, code_norms) || !holds_phi(loop, grad_weight, grad_bias) ||
      (!from_inputs && !holds_on(grad_map, kFloat32, loop.batch * loop.map())) ||
      (grad_map.type != kNone && !holds_on(grad_map, kFloat32, loop.batch * loop.map())) ||
      (from_inputs && (!dense_on(grad_inputs, 3) || grad_inputs.shape[1] != input_rows ||
                       !holds_on(grad_inputs, kFloat32, loop.batch * input_rows * loop.channels))))
    return "multiscale_decode_backward: wanted gradients that fit the maps";
  const int scales = loop.scales.count;
  const bool phi = loop.weight && scales > 0;
  const int64_t images = phi || from_inputs ? stacked_images(loop) : loop.batch, stack = images * scales * loop.map();
  unsigned* flags = take<unsigned>(call, loop.batch * scales);
  float* gaps = take<float>(call, loop.batch * loop.length * loop.channels);
  float* steps = from_inputs ? take<float>(call, stack) : nullptr;
  float* up = phi ? take<float>(call, stack) : nullptr;
  const PhiSum phi_sum = take_phi_sum(call, loop, grad_weight);
  UpTransposed lines = take_up_transposed(call, loop, images);
  const CodeSum sum = take_code_sum(call, loop, grad_codebook);
  if (call.counting) return nullptr;
  prepare(call, all, phi ? loop.batch * scales : 0, MarkDropped{data<int64_t>(indices), loop.length, scales, flags});
  for (int64_t b = 0; b < loop.batch; b += images) {
    const int64_t n = loop.batch - b < images ? loop.batch - b : images;
    const int64_t rows = b * loop.length;
    const float* map = grad_map.data ? data<float>(grad_map) + b * loop.map() : nullptr;
    const float* codes = data<float>(code_rows) + rows * loop.channels;
    if (steps) {
      const float* from = data<float>(grad_inputs) + b * input_rows * loop.channels;
      launch_images(call, loop, n, decode_gradient_kernel, loop,
                    DecodeGradient{map, from, input_rows, static_cast<int>(grids.shape[0]), steps});
    }
    const float* grads = steps ? steps : map;
    if (phi && phi_sum.shares) {
      upsample(call, loop, n, codes, up);
      phi_sum.add(call, loop, n, up, grads, !steps, flags + b * scales, b > 0);
    }
    if (phi) refine_transposed(call, loop, n, grads, !steps, up);
    lines.maps = phi ? up : grads;
    lines.stacked = phi || steps;
    sum.keys_from(&lines, data<int64_t>(indices), rows);
    lines.code_rows = codes;
    lines.code_norms = data<float>(code_norms) + rows * tables.count;
    lines.gaps = gaps + rows * loop.channels;
    up_transposed(call, loop, n, lines);
  }
  if (phi_sum.shares) phi_sum.finish(call, loop, loop.batch * scales > 0, grad_weight, grad_bias);
  sum.run(call, loop, gaps, grad_codebook);
  return nullptr;
}

TOKENFLOW_END
