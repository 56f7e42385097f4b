// The closed-form backward of multiscale_quantize. Scales do not chain, because the residual is detached. With G the
// gradient of `quantized`, N_s the numbers of scale s and J the Jacobian of the normalisation (none for raw rows):
//   codes        dx = sum_s Down_s^T J (Up_s^T G + 2 commitment (y - q) / (S N_s)),  dq_k = sum 2 codebook (q - y) / (S
//   N_s) accumulated  dx = G + sum_s 2 commitment (x - f_s) / (S N),  dstep_s = sum_{j >= s} 2 codebook (f_j - x) / (S
//   N),
//                and dstep_s goes through phi_s and Up_s^T to the codes and to phi
// `quantized` sends nothing to codebooks or phi. Rows and pixels with NaN are left out. Codes are summed in row order.
#include "cpu/multiscale.h"

TOKENFLOW_BEGIN

template <class T>
struct Backward {
  Loop<T> loop;
  const T *rows, *code_rows, *code_norms;  // [B, L, C], [B, L, C], [B, L, T]
  View features, grad_quantized, grad_features;
  double loss_scale;  // 2 grad_loss / S
  double commitment, codebook;
  T* gaps;  // [B, L, C]: gradients of the gathered codes
};

// touched [H W] is NaN where a row with NaN reaches the map of image b. False where no row does. spare [3, H W].
template <class T>
static bool mark_touched(const Backward<T>& call, int64_t b, T* touched, T* spare) {
  const Loop<T>& loop = call.loop;
  const int64_t pixels = loop.size.cells();
  T *marks = spare + pixels, *reached = marks + pixels;
  bool any = false;
  const T* row = call.rows + b * loop.length * loop.channels;
  memset(touched, 0, pixels * sizeof(T));
  for (int64_t s = 0; s < loop.scales; ++s) {
    // One channel that is NaN where the row is, 0 elsewhere, upsampled like the codes.
    bool here = false;
    for (int64_t r = 0; r < loop.grid(s).cells(); ++r, row += loop.channels) {
      marks[r] = row[0] == row[0] ? 0 : row[0];
      here |= row[0] != row[0];
    }
    if (!here) continue;
    any = true;
    resample(kBicubic, marks, loop.grid(s), loop.size, 1, reached, spare);
    for (int64_t p = 0; p < pixels; ++p) touched[p] += reached[p];
  }
  return any;
}

// Image b, loss on codes. spare [7, H W, C].
template <class T>
static void image_on_codes(const Backward<T>& call, int64_t b, T* spare) {
  const Loop<T>& loop = call.loop;
  const int64_t channels = loop.channels, pixels = loop.size.cells();
  T *grad = spare, *total = grad + loop.map(), *grad_rows = total + loop.map(), *grad_map = grad_rows + loop.map();
  T* rest = grad_map + loop.map();
  memset(total, 0, loop.map() * sizeof(T));
  const bool passed = call.grad_quantized.data != nullptr;
  if (passed) {
    load_map(call.grad_quantized, b, channels, pixels, grad, rest);
    T* touched = grad_map;
    if (mark_touched(call, b, touched, rest))
      for (int64_t p = 0; p < pixels; ++p)
        if (touched[p] != touched[p]) memset(grad + p * channels, 0, channels * sizeof(T));
  }
  int64_t at = b * loop.length;
  for (int64_t s = 0; s < loop.scales; ++s) {
    const int64_t cells = loop.grid(s).cells();
    const double scale = call.loss_scale / static_cast<double>(loop.batch * cells * channels);
    const T to_row = static_cast<T>(scale * call.commitment), to_code = static_cast<T>(scale * call.codebook);
    if (passed)
      resample_transposed(kBicubic, grad, loop.grid(s), loop.size, channels, grad_rows, rest);
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
    resample_transposed(kArea, grad_rows, loop.size, loop.grid(s), channels, grad_map, rest);
    for (int64_t i = 0; i < loop.map(); ++i) total[i] += grad_map[i];
    at += cells;
  }
  if (call.grad_features.data) store_map(call.grad_features, b, channels, pixels, total, rest);
}

// Image b, loss on accumulated maps. spare [5, H W, C] and map_gaps [S, H W, C] are scratch.
template <class T>
static void image_on_maps(const Backward<T>& call, int64_t b, T* spare, T* map_gaps, T* grad_phi, T* grad_bias) {
  const Loop<T>& loop = call.loop;
  const int64_t channels = loop.channels, pixels = loop.size.cells();
  const double scale = call.loss_scale / static_cast<double>(loop.batch * loop.map());
  const T to_row = static_cast<T>(scale * call.commitment), to_code = static_cast<T>(scale * call.codebook);
  T *x = spare, *sum = x + loop.map(), *step = sum + loop.map(), *rest = step + loop.map();
  load_map(call.features, b, channels, pixels, x, rest);
  memset(sum, 0, loop.map() * sizeof(T));
  int64_t at = b * loop.length;
  for (int64_t s = 0; s < loop.scales; ++s) {
    code_step(loop, s, call.code_rows + at * channels, step, rest);
    T* gap = map_gaps + s * loop.map();
    for (int64_t i = 0; i < loop.map(); ++i) {
      sum[i] += step[i];
      gap[i] = sum[i] - x[i];
    }
    for (int64_t p = 0; p < pixels; ++p)
      if (!all_finite(gap + p * channels, channels)) memset(gap + p * channels, 0, channels * sizeof(T));
    at += loop.grid(s).cells();
  }
  T* grad = x;  // x is spent
  if (call.grad_quantized.data)
    load_map(call.grad_quantized, b, channels, pixels, grad, rest);
  else
    memset(grad, 0, loop.map() * sizeof(T));
  for (int64_t i = 0; i < loop.map(); ++i)
    if (sum[i] != sum[i]) grad[i] = 0;
  T* grad_step = sum;  // and so is the sum
  memset(grad_step, 0, loop.map() * sizeof(T));
  for (int64_t s = loop.scales - 1; s >= 0; --s) {
    const T* gap = map_gaps + s * loop.map();
    const int64_t cells = loop.grid(s).cells();
    at -= cells;
    for (int64_t i = 0; i < loop.map(); ++i) {
      grad[i] -= to_row * gap[i];
      grad_step[i] += to_code * gap[i];
    }
    T* rows = call.gaps + at * channels;
    code_step_transposed(loop, s, call.code_rows + at * channels, grad_step, rows, grad_phi, grad_bias, rest);
    for (int64_t r = 0; r < cells; ++r) {
      const T* code = call.code_rows + (at + r) * channels;
      if (!(code[0] == code[0])) memset(rows + r * channels, 0, channels * sizeof(T));
    }
  }
  if (call.grad_features.data) store_map(call.grad_features, b, channels, pixels, grad, rest);
}

template <class T>
static Error run(const View& features, const View& indices, const View& rows, const View& code_rows,
                 const View& code_norms, const View& grad_quantized, const View& grad_loss, const Tables& tables,
                 const View& grids, const View& phi, const View& phi_transposed, const View& bias, double ratio,
                 bool accumulated, double commitment_weight, double codebook_weight, const View& spare,
                 const View& gaps, const View& partial_phi, const View& order, const View& starts,
                 const View& grad_features, const View& grad_codebook, const View& grad_phi, int threads) {
  Backward<T> call = {};
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(indices.shape[0], indices.shape[1], grad_codebook, features.shape[1], tables, grids,
                                    size, phi, phi_transposed, bias, ratio, &call.loop))
    return error;
  const Loop<T>& loop = call.loop;
  call.rows = data<T>(rows);
  call.code_rows = data<T>(code_rows);
  call.code_norms = data<T>(code_norms);
  call.features = features;
  call.grad_quantized = grad_quantized;
  call.grad_features = grad_features;
  call.commitment = commitment_weight;
  call.codebook = codebook_weight;
  call.gaps = data<T>(gaps);
  const int64_t chunks = spare.shape[0], kernels = phi.data ? phi.shape[0] * loop.kernel() : 0;
  const int64_t numbers = phi.data ? kernels + phi.shape[0] * loop.channels : 0;
  const Type real = type_of<T>();
  const int64_t images = loop.batch * loop.map();
  if (!holds_spare(loop, spare, accumulated ? 5 + loop.scales : 7) || !holds_codes(loop, code_rows, code_norms) ||
      !holds_gradients(loop, gaps, order, starts, grad_codebook, partial_phi, grad_phi, chunks, numbers) ||
      !holds(rows, real, loop.batch * loop.length * loop.channels) ||
      (grad_quantized.type != kNone &&
       (!floating(grad_quantized) || !holds(grad_quantized, grad_quantized.type, images))) ||
      (grad_loss.type != kNone && !holds(grad_loss, real, 1)) ||
      (grad_features.type != kNone && !holds(grad_features, features.type, images)))
    return "multiscale_quantize_backward: wanted gradients and workspace that fit the maps";
  call.loss_scale = grad_loss.data ? 2.0 * data<T>(grad_loss)[0] / static_cast<double>(loop.scales) : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (int64_t j = 0; j < chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, chunks, j);
    T* scratch = data<T>(spare) + j * spare.shape[1] * loop.map();
    T* phi_share = numbers ? data<T>(partial_phi) + j * numbers : nullptr;
    if (numbers) memset(phi_share, 0, numbers * sizeof(T));
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      if (accumulated)
        image_on_maps(call, b, scratch, scratch + 5 * loop.map(), phi_share, phi_share + kernels);
      else
        image_on_codes(call, b, scratch);
    }
  }
  if (grad_phi.data) sum_chunks(data<T>(partial_phi), chunks, numbers, data<T>(grad_phi));
  if (grad_codebook.data)
    sum_by_code(tables, data<int64_t>(indices), call.gaps, call.code_rows, call.code_norms, loop.batch * loop.length,
                order, starts, grad_codebook, threads);
  return nullptr;
}

Error multiscale_quantize_backward(View features, View indices, View rows, View code_rows, View code_norms,
                                   View grad_quantized, View grad_loss, Tables tables, View grids, View phi,
                                   View phi_transposed, View bias, double ratio, bool accumulated,
                                   double commitment_weight, double codebook_weight, View spare, View gaps,
                                   View partial_phi, View order, View starts, View grad_features, View grad_codebook,
                                   View grad_phi, int threads) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_quantize_backward: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  const auto of_type = rows.type == kFloat64 ? run<double> : run<float>;
  return of_type(features, indices, rows, code_rows, code_norms, grad_quantized, grad_loss, tables, grids, phi,
                 phi_transposed, bias, ratio, accumulated, commitment_weight, codebook_weight, spare, gaps, partial_phi,
                 order, starts, grad_features, grad_codebook, grad_phi, threads);
}

TOKENFLOW_END
