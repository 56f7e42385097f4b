// multiscale_rows: rows_s = Down r_s, the pooled residual that each id was searched for, when the ids are given.
//   r_1 = x,  r_{s+1} = r_s - phi_s(Up codes_s)
// The codes are constants here, so that dx = sum_s Down_s^T drows_s. A row that is not finite is NaN and passes no
// gradient; a dropped scale has zero rows, changes nothing and passes none either.
#include "cpu/multiscale.h"

TOKENFLOW_BEGIN

template <class T>
static Error forward(const View& features, const View& indices, const View& codebook, const Tables& tables,
                     const View& grids, const View& phi, const View& bias, double ratio, const View& spare,
                     const View& rows_view, const View& kept_view, const View& status, int threads) {
  Loop<T> loop;
  const Grid size = {features.shape[2], features.shape[3]};
  if (const Error error = make_loop(features.shape[0], indices.shape[1], codebook, features.shape[1], tables, grids,
                                    size, phi, View{nullptr, kNone}, bias, ratio, &loop))
    return error;
  const int64_t channels = loop.channels, chunks = spare.shape[0], numbers = loop.batch * loop.length;
  if (!holds_spare(loop, spare, 5) || !holds(rows_view, type_of<T>(), numbers * channels) ||
      !holds(kept_view, type_of<T>(), numbers) || !holds(status, kInt64, 1))
    return "multiscale_rows: wanted outputs and workspace that fit the maps";
  int64_t outside = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : outside) if (chunks > 1)
  for (int64_t j = 0; j < chunks; ++j) {
    const Chunk chunk = chunk_of(loop.batch, chunks, j);
    T* residual = data<T>(spare) + j * spare.shape[1] * loop.map();
    T *step = residual + loop.map(), *codes = step + loop.map(), *rest = codes + loop.map();
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      load_map(features, b, channels, size.cells(), residual, rest);
      int64_t at = b * loop.length;
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
        resample(kArea, residual, size, loop.grid(s), channels, rows, rest);
        outside += gather_scale<T>(loop, ids, cells, codes, nullptr);
        for (int64_t r = 0; r < cells; ++r) {
          kept[r] = all_finite(rows + r * channels, channels);
          if (kept[r] != 0) continue;
          fill_nan(rows + r * channels, channels);
          fill_nan(codes + r * channels, channels);
        }
        code_step(loop, s, codes, step, rest);
        for (int64_t i = 0; i < loop.map(); ++i) residual[i] -= step[i];
      }
    }
  }
  data<int64_t>(status)[0] = outside;
  return nullptr;
}

Error multiscale_rows(View features, View indices, View codebook, Tables tables, View grids, View phi, View bias,
                      double ratio, View spare, View rows, View kept, View status, int threads) noexcept {
  if (!dense(features, 4) || !floating(features) || !dense(indices, 2) || indices.type != kInt64 ||
      indices.shape[0] != features.shape[0])
    return "multiscale_rows: wanted contiguous features [B, C, H, W] and int64 indices [B, L]";
  if (!dense(codebook, 2)) return "multiscale_rows: codebook: wanted contiguous [K, C]";
  const auto of_type = codebook.type == kFloat64 ? forward<double> : forward<float>;
  return of_type(features, indices, codebook, tables, grids, phi, bias, ratio, spare, rows, kept, status, threads);
}

template <class T>
static void backward(const View& kept_view, const View& grad_rows, const View& grids, const View& spare,
                     const View& grad_features, int threads) {
  const int64_t batch = grad_features.shape[0], channels = grad_features.shape[1], chunks = spare.shape[0];
  const int64_t length = kept_view.shape[1];
  const Grid size = {grad_features.shape[2], grad_features.shape[3]};
  const int64_t map = size.cells() * channels;
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks > 1)
  for (int64_t j = 0; j < chunks; ++j) {
    const Chunk chunk = chunk_of(batch, chunks, j);
    T* total = data<T>(spare) + 4 * j * map;
    T *rows = total + map, *grad = rows + map, *rest = grad + map;
    for (int64_t b = chunk.first; b < chunk.last; ++b) {
      memset(total, 0, map * sizeof(T));
      const int64_t* grid = data<int64_t>(grids);
      for (int64_t offset = 0; offset < length; grid += 3) {
        const Grid cells = {grid[0], grid[1]};
        const T* kept = data<T>(kept_view) + b * length + offset;
        const T* from = data<T>(grad_rows) + (b * length + offset) * channels;
        for (int64_t i = 0; i < cells.cells() * channels; ++i) rows[i] = kept[i / channels] != 0 ? from[i] : 0;
        resample_transposed(kArea, rows, size, cells, channels, grad, rest);
        for (int64_t i = 0; i < map; ++i) total[i] += grad[i];
        offset += cells.cells();
      }
      store_map(grad_features, b, channels, size.cells(), total, rest);
    }
  }
}

Error multiscale_rows_backward(View kept, View grad_rows, View grids, View spare, View grad_features,
                               int threads) noexcept {
  if (!dense(kept, 2) || !dense(grad_rows, 3) || !dense(grad_features, 4) || !floating(grad_features) ||
      !dense(grids, 2) || grids.type != kInt64 || grids.shape[1] != 3)
    return "multiscale_rows_backward: wanted contiguous kept [B, L], grad_rows [B, L, C], grad_features [B, C, H, W]";
  const int64_t rows = kept.shape[0] * kept.shape[1], channels = grad_features.shape[1];
  const int64_t height = grad_features.shape[2], width = grad_features.shape[3];
  int64_t length = 0;
  for (int64_t s = 0; s < grids.shape[0]; ++s) {
    const int64_t* grid = data<int64_t>(grids) + 3 * s;
    if (grid[0] < 1 || grid[1] < 1 || grid[0] > height || grid[1] > width)
      return "multiscale_rows_backward: grids: wanted grids that fit the map";
    length += grid[0] * grid[1];
  }
  if (length != kept.shape[1] || kept.shape[0] != grad_features.shape[0] || !dense(spare, 4) || spare.shape[0] < 1 ||
      (grad_rows.type != kFloat32 && grad_rows.type != kFloat64) ||
      !holds(grad_rows, grad_rows.type, rows * channels) || !holds(kept, grad_rows.type, rows) ||
      !holds(spare, grad_rows.type, spare.shape[0] * 4 * height * width * channels))
    return "multiscale_rows_backward: wanted gradients and workspace that fit the maps";
  const auto of_type = grad_rows.type == kFloat64 ? backward<double> : backward<float>;
  of_type(kept, grad_rows, grids, spare, grad_features, threads);
  return nullptr;
}

TOKENFLOW_END
