// The closed-form backward of multiscale_quantize. Scales do not chain, because the residual is detached. With G the
// gradient of `quantized`, N_s the numbers of scale s and J the Jacobian of the normalisation (none for raw rows):
//   codes        dx = sum_s Down_s^T J (Up_s^T G + 2 commitment (y - q) / (S N_s)),  dq_k = sum 2 codebook (q - y) / (S
//   N_s) accumulated  dx = G + sum_s 2 commitment (x - f_s) / (S N),  dstep_s = sum_{j >= s} 2 codebook (f_j - x) / (S
//   N),
//                and dstep_s goes through phi_s and Up_s^T to the codes and to phi
// `quantized` sends nothing to codebooks or phi. Rows and pixels with NaN are left out. Codes are summed in row order.
#include "cpu/multiscale_gradient.h"

TOKENFLOW_BEGIN

template <class T>
struct Backward {
  Loop<T> loop;
  const T *rows, *code_rows;  // [B, L, C] each
  View features, grad_quantized, grad_features;
  double loss_scale;  // 2 grad_loss / S
  double commitment, codebook;
  T* gaps;  // [B, L, C]: gradients of the gathered codes
};

// grad [H W, C] is cleared where a row with NaN reaches the map of image b. spare [3, H W].
template <class T>
static void clear_touched(const Backward<T>& call, int64_t b, T* grad, T* spare) {
  const Loop<T>& loop = call.loop;
  const int64_t pixels = loop.size.cells();
  T *marks = spare, *across = marks + pixels, *reached = across + pixels;
  const T* row = call.rows + b * loop.length * loop.channels;
  for (int64_t s = 0; s < loop.scales; ++s) {
    // One channel that is NaN where the row is, 0 elsewhere, upsampled like the codes.
    const Axes<T> bicubic = loop.bicubic(s);
    bool here = false;
    for (int64_t r = 0; r < bicubic.in.cells(); ++r, row += loop.channels) {
      marks[r] = row[0] == row[0] ? 0 : row[0];
      here |= row[0] != row[0];
    }
    if (!here) continue;
    widen(bicubic, marks, 1, 0, loop.size.h, across);
    for (int64_t y = 0; y < loop.size.h; ++y) {
      blend(bicubic.rows[y], across, loop.size.w, loop.size.w, reached);
      for (int64_t x = 0; x < loop.size.w; ++x)
        if (reached[x] != reached[x])
          memset(grad + (y * loop.size.w + x) * loop.channels, 0, loop.channels * sizeof(T));
    }
  }
}

// Image b, loss on codes. spare: 5 pieces.
template <class T>
static void image_on_codes(const Backward<T>& call, int64_t b, T* spare) {
  const Loop<T>& loop = call.loop;
  const int64_t channels = loop.channels, pixels = loop.size.cells();
  T *grad = spare, *total = grad + piece(loop), *grad_rows = total + piece(loop), *rest = grad_rows + piece(loop);
  memset(total, 0, loop.map() * sizeof(T));
  const bool passed = call.grad_quantized.data != nullptr;
  if (passed) {
    load_map(call.grad_quantized, b, channels, pixels, grad);
    clear_touched(call, b, grad, rest);
  }
  int64_t at = b * loop.length;
  for (int64_t s = 0; s < loop.scales; ++s) {
    const int64_t cells = loop.grid(s).cells();
    const double scale = call.loss_scale / static_cast<double>(loop.batch * cells * channels);
    const T to_row = static_cast<T>(scale * call.commitment), to_code = static_cast<T>(scale * call.codebook);
    if (passed)
      up_transposed(loop.bicubic(s), grad, channels, grad_rows, rest);
    else
      memset(grad_rows, 0, cells * channels * sizeof(T));
    for (int64_t r = 0; r < cells; ++r) {
      const T* code = call.code_rows + (at + r) * channels;
      T* g = grad_rows + r * channels;
      T* y = call.gaps + (at + r) * channels;
      if (!(code[0] == code[0])) {
        memset(g, 0, channels * sizeof(T));
        memset(y, 0, channels * sizeof(T));
        continue;
      }
      T norms[kMaxTables];
      memcpy(y, call.rows + (at + r) * channels, channels * sizeof(T));
      if (loop.tables.unit) make_unit(loop.tables, y, norms);
      for (int64_t d = 0; d < channels; ++d) g[d] += to_row * (y[d] - code[d]);
      if (loop.tables.unit) through_unit(loop.tables, y, norms, g);
      for (int64_t d = 0; d < channels; ++d) y[d] = to_code * (code[d] - y[d]);
    }
    add_pool_transposed(loop.area(s), grad_rows, channels, total, rest);
    at += cells;
  }
  if (call.grad_features.data) store_map(call.grad_features, b, channels, pixels, total);
}

// Image b, loss on accumulated maps, whose gaps f_s - x are the negated residuals. spare: 5 + S pieces.
template <class T>
static void image_on_maps(const Backward<T>& call, int64_t b, T* spare, T* grad_phi) {
  const Loop<T>& loop = call.loop;
  const int64_t channels = loop.channels, width = loop.width();
  const double scale = call.loss_scale / static_cast<double>(loop.batch * loop.map());
  const T to_row = static_cast<T>(scale * call.commitment), to_code = static_cast<T>(scale * call.codebook);
  T *grad = spare + 3 * piece(loop), *grad_step = grad + piece(loop), *residuals = grad_step + piece(loop);
  load_map(call.features, b, channels, loop.size.cells(), grad);
  int64_t at = b * loop.length;
  for (int64_t s = 0; s < loop.scales; ++s) {
    const Step<T> step(loop, s, spare);
    step.begin(call.code_rows + at * channels, 0, loop.size.h);
    const T* before = s > 0 ? residuals + (s - 1) * piece(loop) : grad;
    T* after = residuals + s * piece(loop);
    for (int64_t y = 0; y < loop.size.h; ++y) {
      step.row(y, after + y * width);
      for (int64_t i = y * width; i < (y + 1) * width; ++i) after[i] = before[i] - after[i];
    }
    at += loop.grid(s).cells();
  }
  if (call.grad_quantized.data)
    load_map(call.grad_quantized, b, channels, loop.size.cells(), grad);
  else
    memset(grad, 0, loop.map() * sizeof(T));
  const T* last = residuals + (loop.scales - 1) * piece(loop);
  for (int64_t i = 0; i < loop.map(); ++i)
    if (!finite(last[i])) grad[i] = 0;
  memset(grad_step, 0, loop.map() * sizeof(T));
  for (int64_t s = loop.scales - 1; s >= 0; --s) {
    const T* residual = residuals + s * piece(loop);
    const int64_t cells = loop.grid(s).cells();
    at -= cells;
    for (int64_t p = 0; p < loop.map(); p += channels) {
      if (!all_finite(residual + p, channels)) continue;
      for (int64_t i = p; i < p + channels; ++i) {
        grad[i] += to_row * residual[i];
        grad_step[i] -= to_code * residual[i];
      }
    }
    T* rows = call.gaps + at * channels;
    step_transposed(loop, s, call.code_rows + at * channels, grad_step, rows, grad_phi, spare);
    for (int64_t r = 0; r < cells; ++r) {
      const T* code = call.code_rows + (at + r) * channels;
      if (!(code[0] == code[0])) memset(rows + r * channels, 0, channels * sizeof(T));
    }
  }
  if (call.grad_features.data) store_map(call.grad_features, b, channels, loop.size.cells(), grad);
}

template <class T>
static Error run(Call& op, const View& features, const View& indices, const View& rows, const View& code_rows,
                 const View& code_norms, const View& grad_quantized, const View& grad_loss, const Tables& tables,
                 const View& grids, const View& weight, const View& bias, double ratio, bool accumulated,
                 double commitment_weight, double codebook_weight, const View& grad_features, const View& grad_codebook,
                 const View& grad_weight, const View& grad_bias) {
  Backward<T> call = {};
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(op, indices.shape[0], indices.shape[1], grad_codebook, features.shape[1], tables,
                                    grids, size, weight, bias, ratio, true, &call.loop))
    return error;
  const Loop<T>& loop = call.loop;
  const Type real = type_of<T>();
  const int64_t images = loop.batch * loop.map(), chunks = chunks_of(loop.batch), numbers = loop.phi_numbers();
  const int64_t pieces = accumulated ? 5 + loop.scales : 5;
  if (!holds_codes(loop, code_rows, code_norms) || !holds(rows, real, loop.batch * loop.length * loop.channels) ||
      (grad_quantized.type != kNone &&
       (!floating(grad_quantized) || !holds(grad_quantized, grad_quantized.type, images))) ||
      (grad_loss.type != kNone && !holds(grad_loss, real, 1)) || !holds_phi(loop, grad_weight, grad_bias) ||
      (grad_features.type != kNone && !holds(grad_features, features.type, images)))
    return "multiscale_quantize_backward: wanted gradients that fit the maps";
  const CodeSum<T> sum = take_code_sum(op, loop);
  T* spare = take_pieces(op, loop, pieces);
  T* partial = take<T>(op, chunks * numbers);
  if (op.counting) return nullptr;
  call.rows = data<T>(rows);
  call.code_rows = data<T>(code_rows);
  call.features = features;
  call.grad_quantized = grad_quantized;
  call.grad_features = grad_features;
  call.commitment = commitment_weight;
  call.codebook = codebook_weight;
  call.gaps = sum.gaps;
  call.loss_scale = grad_loss.data ? 2.0 * data<T>(grad_loss)[0] / static_cast<double>(loop.scales) : 0;
  prepare(loop, loop.scales);
  if (numbers) memset(partial, 0, chunks * numbers * sizeof(T));
#pragma omp parallel for num_threads(op.threads) schedule(static) if (chunks > 1)
  for (int64_t j = 0; j < chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, j);
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      if (accumulated)
        image_on_maps(call, b, own(loop, spare, pieces), partial + j * numbers);
      else
        image_on_codes(call, b, own(loop, spare, pieces));
    }
  }
  if (grad_weight.data) sum_chunks(loop, partial, grad_weight, grad_bias);
  if (grad_codebook.data)
    sum.run(loop, data<int64_t>(indices), call.code_rows, data<T>(code_norms), data<T>(grad_codebook));
  return nullptr;
}

Error multiscale_quantize_backward(Call& call, View features, View indices, View rows, View code_rows, View code_norms,
                                   View grad_quantized, View grad_loss, Tables tables, View grids, View weight,
                                   View bias, double ratio, bool accumulated, double commitment_weight,
                                   double codebook_weight, View grad_features, View grad_codebook, View grad_weight,
                                   View grad_bias) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_quantize_backward: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  const auto of_type = rows.type == kFloat64 ? run<double> : run<float>;
  return of_type(call, features, indices, rows, code_rows, code_norms, grad_quantized, grad_loss, tables, grids, weight,
                 bias, ratio, accumulated, commitment_weight, codebook_weight, grad_features, grad_codebook,
                 grad_weight, grad_bias);
}

TOKENFLOW_END
