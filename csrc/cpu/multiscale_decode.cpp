// multiscale_decode: f = sum_s phi_s(Up codes_s) from ids of whole scales; and the inputs of a next-scale model by the
// rule "accumulate": Down_{s+1} f_s for the running maps f_s. Either output may be absent. Dropped scales add nothing.
//   backward: G = df; from the last scale to the first G += Down_{s+1}^T dinputs_{s+1}, dstep_s = G
// Codes are gathered first; then an image's map rows need no others, unless inputs are pooled from it in between. Kept
// for backward: the gathered codes [B, L, C].
#include "cpu/multiscale_gradient.h"

TOKENFLOW_BEGIN

// Some map rows of one image, after every scale; sum [H W, C]. Dropped scales add nothing.
template <class T>
struct Decoder {
  Loop<T> loop;
  const int64_t* indices;  // [B, L]
  const T* code_rows;      // [B, L, C]
  int64_t all_scales;
  T* inputs;  // [B, R, C] or null
  int64_t input_rows;

  void rows(const Part& part, T* sum, T* spare) const {
    const int64_t channels = loop.channels, width = loop.width();
    T *row = spare + 2 * piece(loop), *input = inputs + part.image * input_rows * channels;
    memset(sum + part.first * width, 0, (part.last - part.first) * width * sizeof(T));
    int64_t at = part.image * loop.length;
    for (int64_t s = 0; s < loop.scales; ++s) {
      const int64_t cells = loop.grid(s).cells();
      if (!dropped(indices + at, cells)) {
        const Step<T> step(loop, s, spare);
        step.begin(code_rows + at * channels, part.first, part.last);
        for (int64_t y = part.first; y < part.last; ++y) {
          step.row(y, row);
          add(row, width, sum + y * width);
        }
      }
      at += cells;
      if (!inputs || s + 1 == all_scales) continue;
      const Axes<T> area = loop.area(s + 1);
      for (int64_t i = 0; i < area.out.h; ++i, input += area.out.w * channels)
        pool_row(area, sum, channels, i, input, row);
    }
  }
};

template <class T>
static Error forward(Call& op, const View& indices, const View& codebook, const Tables& tables, const View& grids,
                     Grid size, const View& weight, const View& bias, double ratio, const View& map, const View& inputs,
                     const View& code_rows, const View& code_norms) {
  Decoder<T> call = {};
  Loop<T>& loop = call.loop;
  if (const Error error = make_loop(op, indices.shape[0], indices.shape[1], codebook, codebook.shape[1], tables, grids,
                                    size, weight, bias, ratio, false, &loop))
    return error;
  const int64_t channels = loop.channels, scales = grids.shape[0];
  if (!holds_codes(loop, code_rows, code_norms) ||
      (map.type != kNone && !holds(map, type_of<T>(), loop.batch * loop.map())) ||
      (inputs.type != kNone && (!dense(inputs, 3) || inputs.shape[1] != input_rows(loop, scales) ||
                                !holds(inputs, type_of<T>(), loop.batch * inputs.shape[1] * channels))))
    return "multiscale_decode: wanted outputs that fit the maps";
  T* maps = take<T>(op, loop.batch * loop.map());
  T* spare = take_pieces(op, loop, 3);
  if (op.counting) return nullptr;
  call.indices = data<int64_t>(indices);
  call.code_rows = data<T>(code_rows);
  call.all_scales = scales;
  call.inputs = data<T>(inputs);
  call.input_rows = inputs.data ? inputs.shape[1] : 0;
  prepare(loop, scales);
  op.ids_outside = gather_prefix(loop, call.indices, data<T>(code_rows), data<T>(code_norms), op.threads);
  const bool whole = inputs.data != nullptr;
  for_parts(loop.batch, whole ? 1 : loop.size.h, loop.scales * loop.step_products(), op.threads, [&](Part part) {
    if (whole) part.last = loop.size.h;
    call.rows(part, maps + part.image * loop.map(), own(loop, spare, 3));
  });
  if (map.data)
    for_parts(loop.batch, 1, loop.map(), op.threads,
              [&](Part part) { store_map(map, part.image, channels, size.cells(), maps + part.image * loop.map()); });
  return nullptr;
}

Error multiscale_decode(Call& call, View indices, View codebook, Tables tables, View grids, int64_t height,
                        int64_t width, View weight, View bias, double ratio, View map, View inputs, View code_rows,
                        View code_norms) noexcept {
  if (!dense(indices, 2) || indices.type != kInt64 || !dense(codebook, 2) || height < 1 || width < 1)
    return "multiscale_decode: wanted contiguous int64 indices [B, L] and codebook [K, C]";
  const auto of_type = codebook.type == kFloat64 ? forward<double> : forward<float>;
  return of_type(call, indices, codebook, tables, grids, {height, width}, weight, bias, ratio, map, inputs, code_rows,
                 code_norms);
}

template <class T>
static Error backward(Call& op, const View& indices, const View& code_rows, const View& code_norms,
                      const View& grad_map, const View& grad_inputs, const Tables& tables, const View& grids, Grid size,
                      const View& weight, const View& bias, double ratio, const View& grad_codebook,
                      const View& grad_weight, const View& grad_bias) {
  Loop<T> loop;
  if (const Error error = make_loop(op, indices.shape[0], indices.shape[1], grad_codebook, code_rows.shape[2], tables,
                                    grids, size, weight, bias, ratio, true, &loop))
    return error;
  const int64_t channels = loop.channels, chunks = chunks_of(loop.batch), numbers = loop.phi_numbers();
  if (!holds_codes(loop, code_rows, code_norms) || !holds_phi(loop, grad_weight, grad_bias) ||
      (grad_map.type != kNone && !holds(grad_map, type_of<T>(), loop.batch * loop.map())) ||
      (grad_inputs.type != kNone &&
       (!dense(grad_inputs, 3) || grad_inputs.shape[1] != input_rows(loop, grids.shape[0]) ||
        !holds(grad_inputs, type_of<T>(), loop.batch * grad_inputs.shape[1] * channels))))
    return "multiscale_decode_backward: wanted gradients that fit the maps";
  const CodeSum<T> sum = take_code_sum(op, loop);
  T* spare = take_pieces(op, loop, 4);
  T* partial = take<T>(op, chunks * numbers);
  if (op.counting) return nullptr;
  prepare(loop, grids.shape[0]);
  if (numbers) memset(partial, 0, chunks * numbers * sizeof(T));
#pragma omp parallel for num_threads(op.threads) schedule(static) if (chunks > 1)
  for (int64_t j = 0; j < chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, j);
    T *rest = own(loop, spare, 4), *grad = rest + 3 * piece(loop);
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      if (grad_map.data)
        load_map(grad_map, b, channels, size.cells(), grad);
      else
        memset(grad, 0, loop.map() * sizeof(T));
      int64_t at = (b + 1) * loop.length;
      const T* input = grad_inputs.data ? data<T>(grad_inputs) + (b + 1) * grad_inputs.shape[1] * channels : nullptr;
      for (int64_t s = loop.scales - 1; s >= 0; --s) {
        if (input && s + 1 < grids.shape[0]) {
          input -= loop.grid(s + 1).cells() * channels;
          add_pool_transposed(loop.area(s + 1), input, channels, grad, rest);
        }
        const int64_t cells = loop.grid(s).cells();
        at -= cells;
        T* rows = sum.gaps + at * channels;
        if (dropped(data<int64_t>(indices) + at, cells))
          memset(rows, 0, cells * channels * sizeof(T));
        else
          step_transposed(loop, s, data<T>(code_rows) + at * channels, grad, rows, partial + j * numbers, rest);
      }
    }
  }
  if (grad_weight.data) sum_chunks(loop, partial, grad_weight, grad_bias);
  sum.run(loop, data<int64_t>(indices), data<T>(code_rows), data<T>(code_norms), data<T>(grad_codebook));
  return nullptr;
}

Error multiscale_decode_backward(Call& call, View indices, View code_rows, View code_norms, View grad_map,
                                 View grad_inputs, Tables tables, View grids, int64_t height, int64_t width,
                                 View weight, View bias, double ratio, View grad_codebook, View grad_weight,
                                 View grad_bias) noexcept {
  if (!dense(indices, 2) || indices.type != kInt64 || !dense(code_rows, 3) || !dense(grad_codebook, 2))
    return "multiscale_decode_backward: wanted contiguous indices [B, L], code_rows [B, L, C], grad_codebook [K, C]";
  const auto of_type = code_rows.type == kFloat64 ? backward<double> : backward<float>;
  return of_type(call, indices, code_rows, code_norms, grad_map, grad_inputs, tables, grids, {height, width}, weight,
                 bias, ratio, grad_codebook, grad_weight, grad_bias);
}

TOKENFLOW_END
