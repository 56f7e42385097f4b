// multiscale_quantize: residual quantization over a list of grids, two launches a scale.
//   r = x;  each scale: rows = Down r,  ids = nearest codes,  step = phi_s(Up codes),  f += step,  r -= step
//   loss = loss_weight * mean over scales of mean((code - y)^2), or of mean((f - x)^2) where `accumulated`
//
//   once     prepare_kernel: bands, norms, phi;  pack_kernel: the codes as the search reads them;  pool_kernel: Down x
//   a scale  search_kernel: keys = lowest (score, id) of the rows, split over codes
//            step_kernel: a block a slice of channels: keys -> codes -> Up -> f and r -> Down
//   once     finish_kernel, loss_kernel: what is kept of all rows; their errors, added in a fixed order
//
// With phi, which mixes channels, step_kernel ends after Up; refine_kernel steps the maps and pool_kernel pools: four a
// scale. Launches: 2 S + 5, with phi 4 S + 4, one more where `accumulated`, for the last map's error, and one more a
// scale where rows are staged for the search. Nothing waits, no grid-wide barrier: one launch is the barrier of the
// next, and two buffers of keys take turns, the search's own and the one that step_kernel refills.
//
// Order of operations: the CPU's, to the bit, wherever the next search depends on it (resample.cuh, conv3x3.cuh, Move:
// f + step and r - step): rows, ids, f and what is kept have the CPU's bits. The loss adds in another order, in double.
// Since r = x - f, the error of the accumulated map is |r|^2, taken by the next step_kernel, from an r that is then
// stepped into a second buffer.
//
// Layout: r, f [B, C, H, W] as the features; rows of scale s [B h w, C], all scales one behind the other.
//
// TokenFlow-B, 9 scales, 16 x 16, C 40, K 32768, batch 16, 13072 rows:
//   search    17.1 GFMA: 1.76 ms on A100 (19.5 TFLOP/s), 0.51 ms on H100 (67 TFLOP/s)
//   steps     a scale 2.6 MB of r and f, at most 5 MB of rows, codes and keys, all in the second-level cache
//   memory    11 MB of features, codes, results: 5.4 us on A100 (2.0 TB/s), 3.2 us on H100 (3.35 TB/s)
//   launches  23, of which 18 in the loop: 46 us at 2 us each
// VAR, 10 scales, 16 x 16, C 32, K 4096, batch 16, 10880 rows, phi: search 1.43 GFMA, 0.15 and 0.04 ms; phi 0.38 G
// products and as many sums, not fused, 0.08 and 0.02 ms; 45 launches, 90 us: launches are the floor on an H100.
// Paper arithmetic, never run on a GPU. Source: tokenflow.md 1.5 (codes), VAR's loss and phi (accumulated).
#include "cuda/multiscale.cuh"
#include "cuda/search.cuh"

TOKENFLOW_BEGIN

// What a launch leaves for the search of the next scale: its rows [B h w, C], and keys [B h w] that any score beats.
struct Next {
  Axes area;  // nothing is left where area.out.h is 0
  float* rows;
  u64* keys;
};

// The slice's part of Next, from its planes `map`; spare of that size. A block refills its share of the image's keys.
static __device__ inline void leave(const Next& next, const Cut& cut, const Slice& slice, const float* map,
                                    float* spare) {
  const int cells = next.area.out.cells();
  u64* keys = next.keys + slice.image * cells;
  for (int64_t i = slice.index * kThreads + threadIdx.x; i < cells; i += cut.slices * kThreads) keys[i] = kNoKey;
  pool(next.area, cut, slice, map, spare, next.rows + slice.image * cells * cut.channels, nullptr);
}

// Next, from a map [B, C, H, W]: the features, before the first scale, or what phi left.
static __global__ void __launch_bounds__(kThreads) pool_kernel(Cut cut, const void* map, Type type, Next next) {
  DYNAMIC_SHARED(float, shared);
  const Slice slice = slice_of(cut);
  const Space space = space_of(cut, shared);
  load_planes(cut, slice, map, type, space.planes[0]);
  __syncthreads();
  leave(next, cut, slice, space.planes[0], space.planes[1]);
}

// The sum over the block's threads, for thread 0: always in the same order.
static __device__ inline double block_sum(double value) {
  SHARED(double, sums, [kThreads]);
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? sums[0] : 0;
}

// The sum of |r|^2 over this block's share of an image's pixels, those that are not finite left out, for thread 0.
// Eight threads share a pixel's channels.
static __device__ inline double map_error(const Cut& cut, const Slice& slice, const float* residual) {
  const int64_t pixels = cut.size.cells(), last = (slice.index + 1) * pixels / cut.slices;
  const float* map = residual + slice.image * cut.channels * pixels;
  double sum = 0;
  for (int64_t first = slice.index * pixels / cut.slices; first < last; first += kThreads / 8) {
    const int64_t pixel = first + threadIdx.x / 8;
    float square = 0;
    bool good = true;
    for (int64_t c = threadIdx.x % 8; c < cut.channels && pixel < last; c += 8) {
      const float rest = map[c * pixels + pixel];
      good &= fabsf(rest) <= FLT_MAX;
      square += rest * rest;
    }
    if (!good) square = NAN;
    for (int step = 4; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
    if (threadIdx.x % 8 == 0 && square == square) sum += square;
  }
  return block_sum(sum);
}

static __global__ void __launch_bounds__(kThreads) map_error_kernel(Cut cut, const float* residual, double* errors) {
  const double sum = map_error(cut, slice_of(cut), residual);
  if (threadIdx.x == 0) errors[blockIdx.x] = sum;
}

// One scale after its search.
struct Found {
  Axes bicubic;
  const u64* keys;   // [B, h w]; none where the row is not finite
  int64_t* indices;  // [B, L] from this scale's first id on
  int64_t length;    // L
};

// A slice of one scale: keys to codes, Up, the step of the maps, the next scale's rows. With phi, `up` [B, C, H, W]
// gets Up and the rest is left to refine_kernel and pool_kernel. errors [blocks], if any, get |r|^2 as the scale before
// left it, which is why r is not stepped in place then.
static __global__ void __launch_bounds__(kThreads)
    step_kernel(Cut cut, Codes codes, Found found, Move move, float* up, Next next, double* errors) {
  DYNAMIC_SHARED(float, shared);
  const Slice slice = slice_of(cut);
  const int cells = found.bicubic.in.cells();
  const Space space = space_of(cut, shared);
  float *planes = space.planes[0], *spare = space.planes[1];
  if (errors) {
    const double sum = map_error(cut, slice, static_cast<const float*>(move.before));
    if (threadIdx.x == 0) errors[blockIdx.x] = sum;
  }
  for (int cell = threadIdx.x; cell < cells; cell += kThreads) {
    const u64 key = found.keys[slice.image * cells + cell];
    const int id = static_cast<int>(found_id(key));
    space.ids[cell] = id;
    if (cell / kThreads % cut.slices == slice.index) found.indices[slice.image * found.length + cell] = id < 0 ? 0 : id;
  }
  __syncthreads();
  gather(codes, cut, slice, space.ids, cells, planes);
  __syncthreads();
  widen(found.bicubic, planes, slice.planes, spare);
  __syncthreads();
  for_step(found.bicubic, cut, slice, spare, [&](int64_t i, int at, float step) {
    if (up)
      up[i] = step;
    else
      planes[at] = move(i, step);
  });
  if (up || next.area.out.h == 0) return;
  __syncthreads();
  leave(next, cut, slice, planes, spare);
}

constexpr int kFinished = 128;  // rows that a block of finish_kernel has

// What is kept of the rows, of all scales at once.
struct Kept {
  const float* pooled;              // scale by scale [B h w, C]
  const int64_t* indices;           // [B, L]
  float *rows, *code_rows, *norms;  // [B, L, C], [B, L, C], [B, L, T], or null
  double* errors;                   // [blocks], or null
  int64_t* counts;                  // [2], or null
};

// 128 rows of one scale: |code - y|^2, and what backward and statistics read. A row that is not finite is NaN there.
static __global__ void __launch_bounds__(kThreads)
    finish_kernel(Sizes scales, int64_t batch, int64_t length, Codes codes, Kept kept) {
  SHARED(int64_t, places, [kFinished]);
  SHARED(int, ids, [kFinished]);
  SHARED(bool, counted, [kFinished]);
  SHARED(float, norms, [kMaxTables][kFinished]);
  const Tables& tables = codes.tables;
  const int64_t channels = codes.channels;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kFinished, offset = 0;
  int s = 0;
  for (; first >= batch * scales.cells(s); ++s) {
    first -= (batch * scales.cells(s) + kFinished - 1) / kFinished * kFinished;
    offset += scales.cells(s);
  }
  const int64_t cells = scales.cells(s), rest = batch * cells - first;
  const int rows = static_cast<int>(rest < kFinished ? rest : kFinished);
  const float* pooled = kept.pooled + (batch * offset + first) * channels;
  if (static_cast<int>(threadIdx.x) < rows) {
    const int64_t n = first + threadIdx.x, at = n / cells * length + offset + n % cells;
    const float* x = pooled + threadIdx.x * channels;
    bool good = true;
    for (int t = 0; t < tables.count; ++t) {
      float square = 0;
      for (int64_t d = 0; d < tables.width[t]; ++d, ++x) {
        good &= fabsf(*x) <= FLT_MAX;
        square = fmaf(*x, *x, square);
      }
      const float norm = sqrtf(square);
      norms[t][threadIdx.x] = !tables.unit ? 1 : norm > 1e-12f ? norm : 1e-12f;
    }
    const int64_t id = good ? kept.indices[at] : -1;
    places[threadIdx.x] = at;
    ids[threadIdx.x] = static_cast<int>(id);
    float code = NAN;
    if (good) code = codes.codebook[id * channels];
    if (good && codes.norms) code /= codes.norms[id * tables.count];
    counted[threadIdx.x] = code == code;
    for (int t = 0; kept.norms && (codes.norms || !good) && t < tables.count; ++t)
      kept.norms[at * tables.count + t] = good ? codes.norms[id * tables.count + t] : NAN;
    if (!good && kept.counts) {
      u64* bad = reinterpret_cast<u64*>(kept.counts + 1);
      atomicAdd(bad, 1ull);
    }
  }
  __syncthreads();
  double error = 0;
  for (unsigned i = threadIdx.x; i < rows * static_cast<unsigned>(channels); i += kThreads) {
    const unsigned row = i / static_cast<unsigned>(channels);
    const int64_t d = i - row * channels, id = ids[row], to = places[row] * channels + d;
    const int t = table_of(tables, d);
    float x = pooled[i], code = NAN;
    if (id >= 0) code = codes.codebook[id * channels + d];
    if (id >= 0 && codes.norms) code /= codes.norms[id * tables.count + t];
    if (kept.rows) kept.rows[to] = id >= 0 ? x : NAN;
    if (kept.code_rows) kept.code_rows[to] = code;
    if (tables.unit) x /= norms[t][row];
    if (counted[row]) error += (code - x) * (code - x);
  }
  if (!kept.errors) return;
  error = block_sum(error);
  if (threadIdx.x == 0) kept.errors[blockIdx.x] = error;
}

// loss = factor * sum over scales of the mean of their errors: `blocks` of them, or those of finish_kernel where 0. A
// warp has a scale at a time.
static __global__ void __launch_bounds__(kThreads)
    loss_kernel(Sizes scales, int64_t batch, int64_t channels, int64_t pixels, int64_t blocks, const double* errors,
                double factor, float* loss) {
  SHARED(double, means, [kMaxScales]);
  const int lane = threadIdx.x % 32;
  for (int s = threadIdx.x / 32; s < scales.count; s += kThreads / 32) {
    int64_t first = 0, count = blocks;
    for (int before = 0; before < s; ++before)
      first += blocks ? blocks : (batch * scales.cells(before) + kFinished - 1) / kFinished;
    if (!blocks) count = (batch * scales.cells(s) + kFinished - 1) / kFinished;
    double sum = 0;
    for (int64_t i = lane; i < count; i += 32) sum += errors[first + i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const int64_t numbers = batch * channels * (blocks ? pixels : scales.cells(s));
    if (lane == 0) means[s] = numbers ? sum / static_cast<double>(numbers) : 0;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = 0;
  for (int s = 0; s < scales.count; ++s) total += means[s];
  *loss = static_cast<float>(factor * total / static_cast<double>(scales.count));
}

Error multiscale_quantize(Call& call, View features, View codebook, Tables tables, View grids, View weight, View bias,
                          double ratio, bool accumulated, double loss_weight, View quantized, View indices, View loss,
                          View rows, View code_rows, View code_norms) noexcept {
  if (!is_map(features))
    return "multiscale_quantize: features: wanted contiguous [B, C, H, W] of float32, float16 or bfloat16 on CUDA";
  if (!dense_on(indices, 2) || indices.type != kInt64 || indices.shape[0] != features.shape[0])
    return "multiscale_quantize: indices: wanted contiguous int64 [B, L]";
  Loop loop;
  const int64_t batch = features.shape[0], channels = features.shape[1], length = indices.shape[1];
  if (const Error error = make_loop(call, batch, length, codebook, channels, tables, grids, features.shape[2],
                                    features.shape[3], weight, bias, ratio, false, 2, &loop))
    return error;
  if (codebook.type == kNone) return "multiscale_quantize: codebook: wanted contiguous float32 [K, C]";
  const int64_t maps = batch * loop.map(), numbers = batch * length * channels;
  if (!holds_on(quantized, features.type, maps) || !holds_on(loss, kFloat32, 1) ||
      (rows.type != kNone && !holds_on(rows, kFloat32, numbers)) ||
      (code_rows.type != kNone &&
       (!holds_on(code_rows, kFloat32, numbers) || !holds_on(code_norms, kFloat32, batch * length * tables.count))))
    return "multiscale_quantize: wanted outputs that fit the maps";
  const int scales = loop.scales.count;
  const bool phi = loop.weight != nullptr;
  int64_t largest = 0, finishing = 0;
  for (int s = 0; s < scales; ++s) {
    const int64_t cells = loop.scales.cells(s);
    largest = cells > largest ? cells : largest;
    finishing += (batch * cells + kFinished - 1) / kFinished;
  }
  const int64_t slices = batch * loop.slices;  // of all images
  float* residual[2] = {take<float>(call, maps), accumulated && !phi ? take<float>(call, maps) : nullptr};
  float* sum = quantized.type == kFloat32 ? data<float>(quantized) : take<float>(call, maps);
  float* up = phi ? take<float>(call, maps) : nullptr;
  float* pooled = take<float>(call, numbers);
  u64* keys[2] = {take<u64>(call, batch * largest), take<u64>(call, batch * largest)};
  double* errors = take<double>(call, accumulated ? scales * slices : finishing);
  const Searched codes = take_codes(call, codebook, tables, 0, codebook.shape[0], batch * largest);
  if (call.counting) return nullptr;

  prepare(call, loop);
  pack_codes(call, codes, keys[0], 0);
  const Cut cut = cut_of(loop);
  int64_t offset = 0;
  const auto next = [&](int s) {
    if (s == scales) return Next{};
    return Next{loop.area(s), pooled + batch * offset * channels, keys[s % 2]};
  };
  Move move = {features.data, features.type, residual[0], nullptr, sum, kFloat32};
  launch_slices(call, loop, pool_kernel, cut, features.data, features.type, next(0));
  for (int s = 0; s < scales; ++s) {
    const int64_t cells = loop.scales.cells(s);
    const float* pooled_rows = pooled + batch * offset * channels;
    search_rows(call, codes, {pooled_rows, kFloat32, batch * cells, channels}, keys[s % 2]);
    const Found found = {loop.bicubic(s), keys[s % 2], data<int64_t>(indices) + offset, length};
    offset += cells;
    if (s + 1 == scales) move.total = quantized.data, move.total_type = quantized.type;
    double* before = accumulated && s > 0 ? errors + (s - 1) * slices : nullptr;
    launch_slices(call, loop, step_kernel, cut, loop.codes, found, move, up, next(s + 1), before);
    if (phi) {
      refine(call, batch, loop.refinement(s, up, nullptr), move);
      if (s + 1 < scales) launch_slices(call, loop, pool_kernel, cut, move.after, kFloat32, next(s + 1));
    }
    move.before = move.after;
    move.type = kFloat32;
    move.sum = sum;
    if (residual[1]) move.after = residual[(s + 1) % 2];
  }
  if (accumulated)
    launch_slices(call, loop, map_error_kernel, cut, static_cast<const float*>(move.before),
                  errors + (scales - 1) * slices);
  const Kept kept = {pooled,
                     data<int64_t>(indices),
                     data<float>(rows),
                     data<float>(code_rows),
                     data<float>(code_norms),
                     accumulated ? nullptr : errors,
                     call.counts};
  launch(call, finish_kernel, dim3(static_cast<unsigned>(finishing)), dim3(kThreads), 0, loop.scales, batch, length,
         loop.codes, kept);
  launch(call, loss_kernel, dim3(1), dim3(kThreads), 0, loop.scales, batch, channels,
         static_cast<int64_t>(loop.size.cells()), accumulated ? slices : 0, errors, loss_weight, data<float>(loss));
  return nullptr;
}

TOKENFLOW_END
