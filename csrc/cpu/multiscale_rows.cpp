// multiscale_rows: rows_s = Down r_s, the pooled residual that each id was searched for, when the ids are given.
//   r_1 = x,  r_{s+1} = r_s - phi_s(Up codes_s)
// The codes are constants here, so that dx = sum_s Down_s^T drows_s. A row that is not finite is NaN and passes no
// gradient; a dropped scale has zero rows, changes nothing and passes none either.
#include "cpu/multiscale_step.h"

TOKENFLOW_BEGIN

template <class T>
static Error forward(Call& op, const View& features, const View& indices, const View& codebook, const Tables& tables,
                     const View& grids, const View& weight, const View& bias, double ratio, const View& rows_view,
                     const View& kept_view) {
  Loop<T> loop;
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(op, features.shape[0], indices.shape[1], codebook, features.shape[1], tables, grids,
                                    size, weight, bias, ratio, false, &loop))
    return error;
  const int64_t channels = loop.channels, width = loop.width(), numbers = loop.batch * loop.length;
  if (!holds(rows_view, type_of<T>(), numbers * channels) || !holds(kept_view, type_of<T>(), numbers))
    return "multiscale_rows: wanted outputs that fit the maps";
  T* spare = take_pieces(op, loop, 5);
  if (op.counting) return nullptr;
  prepare(loop, loop.scales);
  int64_t outside = 0;
  for_parts(loop.batch, 1, loop.scales * loop.step_products(), op.threads, [&](Part part) {
    T* rest = own(loop, spare, 5);
    T *row = rest + 2 * piece(loop), *residual = row + piece(loop), *codes = residual + piece(loop);
    load_map(features, part.image, channels, size.cells(), residual);
    int64_t at = part.image * loop.length, here = 0;
    for (int64_t s = 0; s < loop.scales; ++s) {
      const int64_t cells = loop.grid(s).cells();
      const int64_t* ids = data<int64_t>(indices) + at;
      T *rows = data<T>(rows_view) + at * channels, *kept = data<T>(kept_view) + at;
      at += cells;
      if (dropped(ids, cells)) {
        memset(rows, 0, cells * channels * sizeof(T));
        memset(kept, 0, cells * sizeof(T));
        continue;
      }
      const Axes<T> area = loop.area(s);
      for (int64_t i = 0; i < area.out.h; ++i)
        pool_row(area, residual, channels, i, rows + i * area.out.w * channels, row);
      here += gather_scale<T>(loop, ids, cells, codes, nullptr);
      for (int64_t r = 0; r < cells; ++r) {
        kept[r] = all_finite(rows + r * channels, channels);
        if (kept[r] != 0) continue;
        fill_nan(rows + r * channels, channels);
        fill_nan(codes + r * channels, channels);
      }
      const Step<T> step(loop, s, rest);
      step.begin(codes, 0, size.h);
      for (int64_t y = 0; y < size.h; ++y) {
        step.row(y, row);
        subtract(row, width, residual + y * width);
      }
    }
#pragma omp atomic
    outside += here;
  });
  op.ids_outside = outside;
  return nullptr;
}

Error multiscale_rows(Call& call, View features, View indices, View codebook, Tables tables, View grids, View weight,
                      View bias, double ratio, View rows, View kept) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_rows: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  if (!dense(codebook, 2)) return "multiscale_rows: codebook: wanted contiguous [K, C]";
  const auto of_type = codebook.type == kFloat64 ? forward<double> : forward<float>;
  return of_type(call, features, indices, codebook, tables, grids, weight, bias, ratio, rows, kept);
}

template <class T>
static Error backward(Call& op, const View& kept_view, const View& grad_rows, const View& grids,
                      const View& grad_features) {
  Loop<T> loop;
  const View none = {nullptr, kNone};
  const int64_t channels = grad_features.shape[1];
  const Tables tables = {1, false, false, false, {channels}, {1}};
  if (const Error error = make_loop(op, grad_features.shape[0], kept_view.shape[1], none, channels, tables, grids,
                                    {grad_features.shape[2], grad_features.shape[3]}, none, none, 0, false, &loop))
    return error;
  const int64_t numbers = loop.batch * loop.length;
  if (kept_view.shape[0] != loop.batch || !holds(kept_view, type_of<T>(), numbers) ||
      !holds(grad_rows, type_of<T>(), numbers * channels))
    return "multiscale_rows_backward: wanted gradients that fit the maps";
  T* spare = take_pieces(op, loop, 3);
  if (op.counting) return nullptr;
  prepare(loop, loop.scales);
  for_parts(loop.batch, 1, loop.scales * loop.step_products(), op.threads, [&](Part part) {
    T* rows = own(loop, spare, 3);
    T *row = rows + piece(loop), *total = row + piece(loop);
    memset(total, 0, loop.map() * sizeof(T));
    int64_t at = part.image * loop.length;
    for (int64_t s = 0; s < loop.scales; ++s) {
      const int64_t cells = loop.grid(s).cells();
      const T *kept = data<T>(kept_view) + at, *from = data<T>(grad_rows) + at * channels;
      for (int64_t i = 0; i < cells * channels; ++i) rows[i] = kept[i / channels] != 0 ? from[i] : 0;
      add_pool_transposed(loop.area(s), rows, channels, total, row);
      at += cells;
    }
    store_map(grad_features, part.image, channels, loop.size.cells(), total);
  });
  return nullptr;
}

Error multiscale_rows_backward(Call& call, View kept, View grad_rows, View grids, View grad_features) noexcept {
  if (!dense(kept, 2) || !dense(grad_rows, 3) || !dense(grad_features, 4) || !floating(grad_features))
    return "multiscale_rows_backward: wanted contiguous kept [B, L], grad_rows [B, L, C], grad_features [B, C, H, W]";
  const auto of_type = grad_rows.type == kFloat64 ? backward<double> : backward<float>;
  return of_type(call, kept, grad_rows, grids, grad_features);
}

TOKENFLOW_END
