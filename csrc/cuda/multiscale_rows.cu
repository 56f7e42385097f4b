// multiscale_rows: rows_s = Down r_s, the pooled residual that each id was searched for, when the ids are given.
//   r_1 = x,  r_{s+1} = r_s - phi_s(Up codes_s);   dx = sum_s Down_s^T drows_s
//
// Forward: prepare_kernel, pool_kernel (Down x), then a launch a scale of step_kernel, a block a slice of channels: ids
// -> codes -> Up -> r -> the next scale's rows; with phi refine_kernel and pool_kernel follow it. S + 2 launches, with
// phi 3 S. A row that is not finite in any channel is NaN in all: the slice that finds it marks the row, and the next
// launch lets every slice know. Backward: one launch, a block a slice, all scales in turn, sums in the CPU's order.
// Order of operations and layout: multiscale_quantize.cu; all outputs have the CPU's bits.
//
// Bytes a scale: 8 C H W (r, in the second-level cache) and 8 C h w (rows, codes). TokenFlow-B, 9 scales, batch 16: 16
// MB in the cache, 8 MB to and from memory, 4 us on A100 (2.0 TB/s), 2.4 us on H100 (3.35 TB/s); 11 launches, 22 us at
// 2 us each, are the floor. Backward: 8 C bytes a row and 4 C H W: 2.8 MB. Paper arithmetic, never run on a GPU.
#include "cuda/multiscale.cuh"

TOKENFLOW_BEGIN

// The rows of one scale, of every image: L rows apart, from this scale's first row on.
struct Pooled {
  Axes area;      // none where area.out.h is 0
  float* rows;    // [B, L, C]
  unsigned* bad;  // [B, L]: not zero where a row is not finite
};

static __device__ inline void leave(const Pooled& next, const Cut& cut, const Slice& slice, int64_t length,
                                    const float* map, float* spare) {
  const int64_t at = slice.image * length;
  pool(next.area, cut, slice, map, spare, next.rows + at * cut.channels, next.bad + at);
}

static __global__ void __launch_bounds__(kThreads)
    pool_kernel(Cut cut, const void* map, Type type, int64_t length, Pooled next) {
  DYNAMIC_SHARED(float, shared);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  load_planes(cut, slice, map, type, space.planes[0]);
  __syncthreads();
  leave(next, cut, slice, length, space.planes[0], space.planes[1]);
}

// One scale whose rows are pooled.
struct Given {
  Axes bicubic;
  const int64_t* indices;  // [B, L] from this scale's first id on, as the others
  float *rows, *kept;
  const unsigned* bad;
  int64_t* counts;  // [2], or null
};

// A slice of one scale: its rows are NaN where they are not finite, zero where the image has no ids (-1) in this scale;
// then the step out of the map and the next scale's rows. With phi, `up` gets Up, and the rest is left to
// refine_kernel, which `skipped` [B] tells such images, and pool_kernel. Nothing follows the last scale.
static __global__ void __launch_bounds__(kThreads)
    step_kernel(Cut cut, Codes codes, int64_t length, Given given, Move move, float* up, unsigned* skipped, Pooled next,
                bool last) {
  DYNAMIC_SHARED(float, shared);
  SHARED(unsigned, present, [1]);
  const Slice slice = slice_of(cut);
  const int cells = given.bicubic.in.cells();
  const Space space = space_of(cut, shared);
  float *planes = space.planes[0], *spare = space.planes[1];
  const int64_t at = slice.image * length;
  if (threadIdx.x == 0) present[0] = 0;
  __syncthreads();
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    if (given.indices[at + cell] == -1) continue;
    atomicAdd(present, 1u);
    break;
  }
  __syncthreads();
  const bool dropped = present[0] == 0;
  if (threadIdx.x == 0 && slice.index == 0 && skipped) skipped[slice.image] = dropped;
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    const int64_t id = given.indices[at + cell];
    const bool outside = id < 0 || id >= codes.count, bad = given.bad[at + cell] != 0;
    space.ids[cell] = outside || bad ? -1 : static_cast<int>(id);
    if (slice.index > 0) continue;
    given.kept[at + cell] = dropped || bad ? 0 : 1;
    if (!outside || dropped || !given.counts) continue;
    u64* count = reinterpret_cast<u64*>(given.counts);
    atomicAdd(count, 1ull);
  }
  for_cells(cut, slice, cells, [&](int cell, int plane) {
    float* row = given.rows + (at + cell) * cut.channels + slice.first + plane;
    if (dropped)
      *row = 0;
    else if (given.bad[at + cell])
      *row = NAN;
  });
  if (last) return;
  __syncthreads();
  gather(codes, cut, slice, space.ids, cells, planes);
  __syncthreads();
  widen(given.bicubic, planes, slice.planes, spare);
  __syncthreads();
  for_step(given.bicubic, cut, slice, spare, [&](int64_t i, int to, float step) {
    if (up)
      up[i] = step;
    else
      planes[to] = move(i, dropped ? 0 : step);
  });
  if (up) return;
  __syncthreads();
  leave(next, cut, slice, length, planes, spare);
}

Error multiscale_rows(Call& call, View features, View indices, View codebook, Tables tables, View grids, View weight,
                      View bias, double ratio, View rows, View kept) noexcept {
  if (!is_map(features))
    return "multiscale_rows: features: wanted contiguous [B, C, H, W] of float32, float16 or bfloat16 on CUDA";
  if (!dense_on(indices, 2) || indices.type != kInt64 || indices.shape[0] != features.shape[0])
    return "multiscale_rows: indices: wanted contiguous int64 [B, L]";
  Loop loop;
  const int64_t batch = features.shape[0], channels = features.shape[1], length = indices.shape[1];
  if (const Error error = make_loop(call, batch, length, codebook, channels, tables, grids, features.shape[2],
                                    features.shape[3], weight, bias, ratio, false, 2, &loop))
    return error;
  if (codebook.type == kNone) return "multiscale_rows: codebook: wanted contiguous float32 [K, C]";
  if (!holds_on(rows, kFloat32, batch * length * channels) || !holds_on(kept, kFloat32, batch * length))
    return "multiscale_rows: wanted outputs that fit the maps";
  const bool phi = loop.weight != nullptr;
  loop.bad = take<unsigned>(call, batch * length);
  float* residual = take<float>(call, batch * loop.map());
  float* up = phi ? take<float>(call, batch * loop.map()) : nullptr;
  unsigned* skipped = phi ? take<unsigned>(call, batch) : nullptr;
  if (call.counting) return nullptr;

  prepare(call, loop);
  const Cut cut = cut_of(loop);
  const int scales = loop.scales.count;
  int64_t offset = 0;
  const auto next = [&](int s) {
    if (s == scales) return Pooled{};
    return Pooled{loop.area(s), data<float>(rows) + offset * channels, loop.bad + offset};
  };
  Move move = {features.data, features.type, residual};
  launch_slices(call, loop, pool_kernel, cut, features.data, features.type, length, next(0));
  for (int s = 0; s < scales; ++s) {
    const Given given = {loop.bicubic(s),
                         data<int64_t>(indices) + offset,
                         data<float>(rows) + offset * channels,
                         data<float>(kept) + offset,
                         loop.bad + offset,
                         call.counts};
    const bool last = s + 1 == scales;
    offset += loop.scales.cells(s);
    launch_slices(call, loop, step_kernel, cut, loop.codes, length, given, move, up, skipped, next(s + 1), last);
    if (last) break;
    if (phi) {
      refine(call, batch, loop.refinement(s, up, skipped), move);
      launch_slices(call, loop, pool_kernel, cut, residual, kFloat32, length, next(s + 1));
    }
    move.before = residual;
    move.type = kFloat32;
  }
  return nullptr;
}

// A slice of dx: every scale's rows spread along columns, then along rows, in the order of their cells.
static __global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(Cut cut, Sizes scales, int64_t length, const float* kept, const float* grad_rows,
                         void* grad_features, Type type) {
  DYNAMIC_SHARED(float, shared);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  const int numbers = slice.planes * cut.size.cells();
  for (int i = threadIdx.x; i < numbers; i += kThreads) space.planes[0][i] = 0;
  int64_t at = slice.image * length;
  for (int s = 0; s < scales.count; at += scales.cells(s), ++s)
    add_pool_transposed({scales.h[s], scales.w[s]}, cut, slice, space, grad_rows + at * cut.channels, kept + at);
  const int64_t first = (slice.image * cut.channels + slice.first) * cut.size.cells();
  for (int i = threadIdx.x; i < numbers; i += kThreads) set_number(grad_features, type, first + i, space.planes[0][i]);
}

Error multiscale_rows_backward(Call& call, View kept, View grad_rows, View grids, View grad_features) noexcept {
  if (!is_map(grad_features))
    return "multiscale_rows_backward: grad_features: wanted contiguous [B, C, H, W] of float32, float16 or bfloat16 on "
           "CUDA";
  if (!dense_on(kept, 2) || !dense_on(grad_rows, 3))
    return "multiscale_rows_backward: wanted contiguous kept [B, L] and grad_rows [B, L, C]";
  Loop loop;
  const View none = {nullptr, kNone};
  const int64_t batch = grad_features.shape[0], channels = grad_features.shape[1], length = kept.shape[1];
  const Tables tables = {1, false, false, false, {channels}, {1}};
  if (const Error error = make_loop(call, batch, length, none, channels, tables, grids, grad_features.shape[2],
                                    grad_features.shape[3], none, none, 0, false, 3, &loop))
    return error;
  if (kept.shape[0] != batch || kept.type != kFloat32 || !holds_on(grad_rows, kFloat32, batch * length * channels))
    return "multiscale_rows_backward: wanted gradients that fit the maps";
  if (call.counting) return nullptr;
  launch_slices(call, loop, rows_backward_kernel, cut_of(loop), loop.scales, length, data<float>(kept),
                data<float>(grad_rows), grad_features.data, grad_features.type);
  return nullptr;
}

TOKENFLOW_END
