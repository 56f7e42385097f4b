// The closed-form backward of multiscale_quantize. Scales do not chain, because the residual is detached. With G the
// gradient of `quantized`, N_s the numbers of scale s and J the Jacobian of the normalisation (none for raw rows):
//   codes        dx = sum_s Down_s^T J (Up_s^T G + 2 commitment (y - q) / (S N_s))
//                dq_k = sum 2 codebook (q - y) / (S N_s)
//   accumulated  dx = G + sum_s 2 commitment (x - f_s) / (S N),  dstep_s = sum_{j >= s} 2 codebook (f_j - x) / (S N),
//                and dstep_s goes through phi_s and Up_s^T to the codes and to phi
// `quantized` sends nothing to codebooks or phi. Rows and pixels with NaN are left out.
// Codes: three launches and the sums by code (sums.cuh), however many scales:
//   bands, and images that hold NaN; rows [B, L, C], line by line, with all channels, which J joins; slices of dx, with
//   all scales. J and Down^T part the second from the third: one block for both would have a table of an image, 64
//   blocks for 32 images of TokenFlow, where lines make 2336 and slices 320
// Accumulated: four launches and the sums, with phi those of its own:
//   the maps f_s again from the kept codes, with the forward's bits, as a stack of steps; one launch turns it into dx
//   and the stack of dstep_s, number by number; then Up^T, line by line. Stacks are made for as many images at a time
//   as stay in cache (multiscale_gradient.cuh)
// Bytes on codes: 24 C L + 8 C H W an image, the sums aside.
//   32 images of 40 channels at 16 x 16, nine scales (L = 817, 71 M operations): 28 MB, 14 us on A100 (2.0 TB/s), 8 us
//   on H100 (3.35 TB/s); VAR's accumulated loss, ten scales of 32 channels, 32 images: phi three times 1.5 G
//   operations, two thirds of them not fused, 390 us on A100 (19.5 TFLOP/s), 115 us on H100 (67 TFLOP/s)
// Paper arithmetic, never run on a GPU.
#include "cuda/multiscale_gradient.cuh"

TOKENFLOW_BEGIN

// Images with rows that are not finite (which are NaN), and the pixels that those reach. A block an image; the bands
// are made in the same launch, so this makes its own.
struct MarkBad {
  const float* rows;       // [B, L, C]
  unsigned* bad;           // [B]: 1 where there are any, and then
  unsigned char* touched;  // [B, H, W]: 1 where they reach

  __device__ void operator()(const Loop& loop) const {
    const float* row = rows + blockIdx.x * loop.length * loop.channels;
    bool found = false;
    for (int64_t r = threadIdx.x; r < loop.length; r += kThreads) found |= is_bad(loop, row, r);
    found = __syncthreads_or(found);
    if (threadIdx.x == 0) bad[blockIdx.x] = found;
    for (int pixel = threadIdx.x; found && pixel < loop.size.cells(); pixel += kThreads) {
      const int y = pixel / loop.size.w, x = pixel - y * loop.size.w;
      bool here = false;
      int64_t at = 0;
      for (int s = 0; s < loop.scales.count; at += loop.scales.cells(s), ++s) {
        const Band<float> down = bicubic_band<float>(loop.scales.h[s], loop.size.h, y);
        const Band<float> across = bicubic_band<float>(loop.scales.w[s], loop.size.w, x);
        for (int i = down.first; i < down.first + down.count; ++i)
          for (int j = across.first; j < across.first + across.count; ++j)
            here |= is_bad(loop, row, at + i * loop.scales.w[s] + j);
      }
      touched[static_cast<int64_t>(blockIdx.x) * loop.size.cells() + pixel] = here;
    }
  }
  static __device__ bool is_bad(const Loop& loop, const float* row, int64_t r) {
    const float number = row[r * loop.channels];
    return number != number;
  }
};

// A slice of dx: Down^T of the rows' gradients of every scale.
static __global__ void __launch_bounds__(kThreads)
    features_gradient_kernel(Loop loop, const float* grad_rows, void* grad_features, Type type) {
  DYNAMIC_SHARED(float, shared);
  const Cut cut = cut_of(loop);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  const int numbers = slice.planes * cut.size.cells();
  const int64_t first = (slice.image * cut.channels + slice.first) * cut.size.cells();
  for (int i = threadIdx.x; i < numbers; i += kThreads) space.planes[0][i] = 0;
  int64_t at = slice.image * loop.length;
  for (int s = 0; s < loop.scales.count; at += loop.scales.cells(s), ++s)
    add_pool_transposed(loop.grid(s), cut, slice, space, grad_rows + at * cut.channels, nullptr);
  for (int i = threadIdx.x; i < numbers; i += kThreads) set_number(grad_features, type, first + i, space.planes[0][i]);
}

// Loss on accumulated maps, of some images.
struct MapsGradient {
  const void *features, *grad_quantized;  // [B, C, H, W], the latter or none
  Type type, grad_type;
  int64_t first, count;  // numbers of these images
  const float* grad_loss;
  float to_row, to_code;
  float* steps;         // [n, S, C, H, W]: step_s becomes dstep_s
  void* grad_features;  // like features, or none
};

// One number of the map: f_s - x are the negated residuals, first to last; then their sums, last to first.
static __global__ void __launch_bounds__(kThreads) maps_gradient_kernel(Loop loop, MapsGradient call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, map = loop.map();
  if (i >= call.count) return;
  const int scales = loop.scales.count;
  float* steps = call.steps + i + i / map * (scales - 1) * map;
  float rest = number(call.features, call.type, call.first + i);
  for (int s = 0; s < scales; ++s) {
    rest -= steps[s * map];
    steps[s * map] = rest;
  }
  const float loss = call.grad_loss ? *call.grad_loss : 0, to_row = call.to_row * loss, to_code = call.to_code * loss;
  const bool passed = call.grad_quantized && fabsf(rest) <= FLT_MAX;
  float grad = passed ? number(call.grad_quantized, call.grad_type, call.first + i) : 0, grad_step = 0;
  for (int s = scales - 1; s >= 0; --s) {
    rest = steps[s * map];
    if (fabsf(rest) <= FLT_MAX) {
      grad += to_row * rest;
      grad_step -= to_code * rest;
    }
    steps[s * map] = grad_step;
  }
  if (call.grad_features) set_number(call.grad_features, call.type, call.first + i, grad);
}

Error multiscale_quantize_backward(Call& call, View features, View indices, View rows, View code_rows, View code_norms,
                                   View grad_quantized, View grad_loss, Tables tables, View grids, View weight,
                                   View bias, double ratio, bool accumulated, double commitment_weight,
                                   double codebook_weight, View grad_features, View grad_codebook, View grad_weight,
                                   View grad_bias) noexcept {
  if (!is_map(features) || !dense_on(indices, 2) || indices.type != kInt64 || indices.shape[0] != features.shape[0])
    return "multiscale_quantize_backward: wanted contiguous features [B, C, H, W], float64 only on the CPU, and int64 "
           "indices [B, L]";
  Loop loop, all;
  int64_t input_rows;
  const int64_t channels = features.shape[1];
  if (const Error error =
          make_prefix_loop(call, indices, grad_codebook, channels, tables, grids, features.shape[2], features.shape[3],
                           weight, bias, ratio, true, false, &loop, &all, &input_rows))
    return error;
  const int64_t maps = loop.batch * loop.map(), length = loop.length;
  if (!holds_codes(loop, code_rows, code_norms) || !holds_on(rows, kFloat32, loop.batch * length * channels) ||
      (grad_quantized.type != kNone &&
       (!is_map(grad_quantized) || !holds_on(grad_quantized, grad_quantized.type, maps))) ||
      (grad_loss.type != kNone && !holds_on(grad_loss, kFloat32, 1)) || !holds_phi(loop, grad_weight, grad_bias) ||
      (grad_features.type != kNone && !holds_on(grad_features, features.type, maps)))
    return "multiscale_quantize_backward: wanted gradients that fit the maps";
  const bool wants_codes = grad_codebook.type != kNone, wants_features = grad_features.type != kNone;
  const bool phi = loop.weight != nullptr;
  const int scales = loop.scales.count;
  const int64_t images = accumulated ? stacked_images(loop) : loop.batch, stack = images * scales * loop.map();
  unsigned* bad = accumulated ? nullptr : take<unsigned>(call, loop.batch);
  unsigned char* touched = accumulated ? nullptr : take<unsigned char>(call, loop.batch * loop.size.cells());
  float* gaps = wants_codes ? take<float>(call, loop.batch * length * channels) : nullptr;
  float* grad_rows = accumulated ? nullptr : take<float>(call, loop.batch * length * channels);
  float* up = accumulated ? take<float>(call, stack) : nullptr;
  float* steps = accumulated && phi ? take<float>(call, stack) : up;
  const PhiSum phi_sum = take_phi_sum(call, loop, grad_weight);
  UpTransposed lines = take_up_transposed(call, loop, images);
  const CodeSum sum = take_code_sum(call, loop, grad_codebook);
  if (call.counting) return nullptr;
  const double scale = 2.0 / (static_cast<double>(scales) * static_cast<double>(loop.batch * channels));
  lines.grad_loss = data<float>(grad_loss);
  lines.to_row = static_cast<float>(scale * commitment_weight);
  lines.to_code = static_cast<float>(scale * codebook_weight);
  prepare(call, all, accumulated ? 0 : loop.batch, MarkBad{data<float>(rows), bad, touched});
  for (int64_t b = 0; b < loop.batch; b += images) {
    const int64_t n = loop.batch - b < images ? loop.batch - b : images, at = b * length;
    lines.code_rows = data<float>(code_rows) + at * channels;
    lines.code_norms = data<float>(code_norms) + at * tables.count;
    lines.gaps = gaps ? gaps + at * channels : nullptr;
    sum.keys_from(&lines, data<int64_t>(indices), at);
    if (accumulated) {
      upsample(call, loop, n, lines.code_rows, up);
      if (phi) refine_stack(call, loop, n, up, nullptr, steps);
      const float pixels = static_cast<float>(loop.size.cells());
      const MapsGradient made = {
          features.data,     grad_quantized.data,    features.type,         grad_quantized.type,    b * loop.map(),
          n * loop.map(),    data<float>(grad_loss), lines.to_row / pixels, lines.to_code / pixels, steps,
          grad_features.data};
      launch(call, maps_gradient_kernel, dim3(static_cast<unsigned>((made.count + kThreads - 1) / kThreads)),
             dim3(kThreads), 0, loop, made);
      if (phi_sum.shares) phi_sum.add(call, loop, n, up, steps, false, nullptr, b > 0);
      if (phi && wants_codes) refine_transposed(call, loop, n, steps, false, up);
      lines.maps = up;
      lines.stacked = true;
    } else {
      lines.maps = wants_features ? grad_quantized.data : nullptr;
      lines.type = grad_quantized.type;
      lines.bad = bad;
      lines.touched = touched;
      lines.rows = data<float>(rows);
      lines.grad_rows = wants_features ? grad_rows : nullptr;
    }
    if (wants_codes || !accumulated) up_transposed(call, loop, n, lines);
  }
  if (!accumulated && wants_features)
    launch_images(call, loop, loop.batch, features_gradient_kernel, loop, grad_rows, grad_features.data,
                  grad_features.type);
  if (phi_sum.shares) phi_sum.finish(call, loop, loop.batch > 0, grad_weight, grad_bias);
  if (wants_codes) sum.run(call, loop, gaps, grad_codebook);
  return nullptr;
}

TOKENFLOW_END
