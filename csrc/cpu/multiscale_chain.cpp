// multiscale_chain: the inputs of a next-scale model by TokenFlow's rule, which grows one map from grid to grid.
//   state_1 = codes_1,  input_s = bicubic(state_{s-1} -> grid s),  state_s = input_s + codes_s  (nothing if dropped)
// `refine` = s >= 2 returns state_s in place of input_s; 0 refines nothing. Image by image. Source: tokenflow.md 4.1.
#include "cpu/multiscale_gradient.h"

TOKENFLOW_BEGIN

// The largest grid of the call: the chain has no map of its own.
static Grid largest(const View& grids) {
  Grid size = {1, 1};
  for (int64_t s = 0; grids.rank == 2 && s < grids.shape[0]; ++s) {
    const int64_t* grid = data<int64_t>(grids) + s * grids.shape[1];
    size = {grid[0] > size.h ? grid[0] : size.h, grid[1] > size.w ? grid[1] : size.w};
  }
  return size;
}

// From the grid of scale s - 1 to that of scale s.
template <class T>
static Axes<T> growth(const Loop<T>& loop, int64_t s) {
  const Axes<T> place = loop.bicubic(s);
  return {loop.grid(s - 1), loop.grid(s), place.rows, place.columns};
}

template <class T>
static Error forward(Call& op, const View& indices, const View& codebook, const Tables& tables, const View& grids,
                     int64_t refine, const View& inputs, const View& code_rows, const View& code_norms) {
  Loop<T> loop;
  const View none = {nullptr, kNone};
  if (const Error error = make_loop(op, indices.shape[0], indices.shape[1], codebook, codebook.shape[1], tables, grids,
                                    largest(grids), none, none, 0, false, &loop))
    return error;
  const int64_t channels = loop.channels;
  if (!holds_codes(loop, code_rows, code_norms) || inputs.shape[1] != input_rows(loop, grids.shape[0]) ||
      !holds(inputs, type_of<T>(), loop.batch * inputs.shape[1] * channels))
    return "multiscale_chain: wanted outputs that fit the grids";
  T* spare = take_pieces(op, loop, 3);
  if (op.counting) return nullptr;
  for (int64_t s = 1; s < grids.shape[0]; ++s) fill_bands(kBicubic, growth(loop, s));
  op.ids_outside = gather_prefix(loop, data<int64_t>(indices), data<T>(code_rows), data<T>(code_norms), op.threads);
  for_parts(loop.batch, 1, loop.scales * loop.step_products(), op.threads, [&](Part part) {
    T* state = own(loop, spare, 3);
    T *grown = state + piece(loop), *across = grown + piece(loop);
    int64_t at = part.image * loop.length;
    T* input = data<T>(inputs) + part.image * inputs.shape[1] * channels;
    memset(grown, 0, loop.grid(0).cells() * channels * sizeof(T));
    for (int64_t s = 0; s < loop.scales + 1 && s < grids.shape[0]; ++s) {
      const int64_t cells = loop.grid(s).cells(), numbers = cells * channels;
      if (s > 0) {
        const Axes<T> grow = growth(loop, s);
        const int64_t width = grow.out.w * channels;
        widen(grow, state, channels, 0, grow.out.h, across);
        for (int64_t y = 0; y < grow.out.h; ++y) blend(grow.rows[y], across, width, width, grown + y * width);
      }
      memcpy(state, grown, numbers * sizeof(T));
      if (s < loop.scales) add(data<T>(code_rows) + at * channels, numbers, state);
      at += cells;
      if (s == 0) continue;
      memcpy(input, s + 1 == refine ? state : grown, numbers * sizeof(T));
      input += numbers;
    }
  });
  return nullptr;
}

Error multiscale_chain(Call& call, View indices, View codebook, Tables tables, View grids, int64_t refine, View inputs,
                       View code_rows, View code_norms) noexcept {
  if (!dense(indices, 2) || indices.type != kInt64 || !dense(codebook, 2) || !dense(inputs, 3) || !dense(grids, 2))
    return "multiscale_chain: wanted contiguous int64 indices [B, L], codebook [K, C], inputs [B, R, C], grids [S, 3]";
  const auto of_type = codebook.type == kFloat64 ? forward<double> : forward<float>;
  return of_type(call, indices, codebook, tables, grids, refine, inputs, code_rows, code_norms);
}

template <class T>
static Error backward(Call& op, const View& indices, const View& code_rows, const View& code_norms,
                      const View& grad_inputs, const Tables& tables, const View& grids, int64_t refine,
                      const View& grad_codebook) {
  Loop<T> loop;
  const View none = {nullptr, kNone};
  if (const Error error = make_loop(op, indices.shape[0], indices.shape[1], grad_codebook, code_rows.shape[2], tables,
                                    grids, largest(grids), none, none, 0, false, &loop))
    return error;
  const int64_t channels = loop.channels;
  if (!holds_codes(loop, code_rows, code_norms) || grad_inputs.shape[1] != input_rows(loop, grids.shape[0]) ||
      !holds(grad_inputs, type_of<T>(), loop.batch * grad_inputs.shape[1] * channels))
    return "multiscale_chain_backward: wanted gradients that fit the grids";
  const CodeSum<T> sum = take_code_sum(op, loop);
  T* spare = take_pieces(op, loop, 3);
  if (op.counting) return nullptr;
  for (int64_t s = 1; s < grids.shape[0]; ++s) fill_bands(kBicubic, growth(loop, s));
  for_parts(loop.batch, 1, loop.scales * loop.step_products(), op.threads, [&](Part part) {
    T* state = own(loop, spare, 3);
    T *grown = state + piece(loop), *across = grown + piece(loop);
    int64_t at = (part.image + 1) * loop.length;
    const T* input = data<T>(grad_inputs) + (part.image + 1) * grad_inputs.shape[1] * channels;
    const int64_t last = loop.scales < grids.shape[0] ? loop.scales : grids.shape[0] - 1;
    memset(state, 0, loop.map() * sizeof(T));
    for (int64_t s = last; s >= 0; --s) {
      // `state` is the gradient of state s; that of input s is the same sum, the codes' too.
      const int64_t cells = loop.grid(s).cells(), numbers = cells * channels;
      if (s > 0) input -= numbers;
      if (s > 0 && s + 1 == refine) add(input, numbers, state);
      if (s < loop.scales) {
        at -= cells;
        memcpy(sum.gaps + at * channels, state, numbers * sizeof(T));
      }
      if (s == 0) continue;
      if (s + 1 != refine) add(input, numbers, state);
      memcpy(grown, state, numbers * sizeof(T));
      up_transposed(growth(loop, s), grown, channels, state, across);
    }
  });
  sum.run(loop, data<int64_t>(indices), data<T>(code_rows), data<T>(code_norms), data<T>(grad_codebook));
  return nullptr;
}

Error multiscale_chain_backward(Call& call, View indices, View code_rows, View code_norms, View grad_inputs,
                                Tables tables, View grids, int64_t refine, View grad_codebook) noexcept {
  if (!dense(indices, 2) || indices.type != kInt64 || !dense(code_rows, 3) || !dense(grad_inputs, 3) ||
      !dense(grad_codebook, 2) || !dense(grids, 2))
    return "multiscale_chain_backward: wanted contiguous indices, code_rows, grad_inputs, grad_codebook and grids";
  const auto of_type = code_rows.type == kFloat64 ? backward<double> : backward<float>;
  return of_type(call, indices, code_rows, code_norms, grad_inputs, tables, grids, refine, grad_codebook);
}

TOKENFLOW_END
