// Packing for the search (search_panels.cuh): codes become panels, unit or raw, with starting scores; rows that are too
// wide to stay in a block's memory are made unit, weighted and negated, and staged the same way. Norms in the canonical
// order (common/canonical.h). Bytes: 4 G K C read twice where C > 64, the second time mostly from the second-level
// cache, and 4 G K (C + 1) written; K = 32768, C = 40: 11 MB, 5.3 us on A100 (2.0 TB/s), 3.2 us on H100 (3.35 TB/s).
// Paper arithmetic, never run on a GPU.
#include "cuda/certified.cuh"
#include "cuda/search.cuh"
#include "cuda/search_panels.cuh"

TOKENFLOW_BEGIN

constexpr int kItems = 32;     // codes or rows that a block packs,
constexpr int kChannels = 64;  // channels of them at a time

// A block has 32 items of one panel. Twice over their channels: norms, one item a thread; then what is stored.
static __global__ void __launch_bounds__(kTileThreads, 4) pack_kernel(Packing job) {
  SHARED(float, tile, [kChannels * tile_stride(kItems)]);
  SHARED(float, norms, [kMaxTables][kItems]);
  SHARED(float, last, [kItems]);
  const int tid = threadIdx.x, item = tid % kItems, lines = padded(job.items.channels);
  const int channels = static_cast<int>(job.items.channels), parts = job.width / kItems;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + tid; i < job.key_count;
       i += static_cast<int64_t>(gridDim.x) * kTileThreads)
    job.keys[i] = kNoKey;
  const int64_t panels = (job.items.count + job.width - 1) / job.width, panel = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts) * kItems;
  const int64_t group = panel / panels, first = panel % panels * job.width + part, there = job.items.count - first;
  const int64_t from = group * job.items.between + first * job.items.stride;
  const auto load = [&](int at) {
    const int rest = channels - at;
    load_tile<kItems>(job.items.data, job.items.type, from + at, job.items.stride, there, rest,
                      lines - at < kChannels ? lines - at : kChannels, tile);
  };

  int t = 0, end = static_cast<int>(job.tables.width[0]);
  float square = 0, start = 0;
  bool good = true;
  const auto close = [&] {
    const float norm = sqrtf(square);
    norms[t][item] = norm > 1e-12f ? norm : 1e-12f;
    start += static_cast<float>(job.tables.weight[t]) * (0.5f * square);
    square = 0;
    if (++t < job.tables.count) end += static_cast<int>(job.tables.width[t]);
  };
  for (int at = 0; at < lines; at += kChannels) {
    if (at > 0) __syncthreads();
    load(at);
    __syncthreads();
    for (int d = at; tid < kItems && d < channels && d < at + kChannels; ++d) {
      while (d == end) close();
      const float x = tile[(d - at) * tile_stride(kItems) + item];
      good &= fabsf(x) <= FLT_MAX;
      square = fmaf(x, x, square);
    }
  }
  if (tid < kItems) {
    close();
    if (job.as_rows)
      last[item] = good && item < there ? 0 : NAN;
    else
      last[item] = item >= there ? INFINITY : job.tables.l2 ? start : 0;
  }
  __syncthreads();

  float* out = job.panels + panel * (lines + 1) * job.width + (job.as_rows ? part + item : place_of(part + item));
  const bool keep = !job.as_rows || last[item] == 0;
  t = 0;
  end = static_cast<int>(job.tables.width[0]);
  for (int at = 0; at < lines; at += kChannels) {
    if (lines > kChannels) {
      if (at > 0) __syncthreads();
      load(at);
      __syncthreads();
    }
    for (int d = at + tid / kItems; d < lines && d < at + kChannels; d += kTileThreads / kItems) {
      while (d >= end && t + 1 < job.tables.count) end += static_cast<int>(job.tables.width[++t]);
      float x = tile[(d - at) * tile_stride(kItems) + item];
      if (job.tables.unit) x /= norms[t][item];
      if (job.as_rows) x = keep ? -(static_cast<float>(job.tables.weight[t]) * x) : 0;
      if (d >= channels) x = job.as_rows ? -0.0f : 0.0f;
      out[static_cast<int64_t>(d) * job.width] = x;
    }
  }
  if (tid < kItems) out[static_cast<int64_t>(lines) * job.width] = last[item];
}

void pack(Call& call, const Packing& job, int64_t groups) {
  const int64_t blocks = groups * pieces_of(job.items.count, job.width) * (job.width / kItems);
  launch(call, pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), 0, job);
}

void pack_codes(Call& call, const Searched& codes, u64* keys, int64_t count) {
  const Items items = {codes.codebook, kFloat32, codes.codes, codes.channels, codes.between, codes.channels};
  pack(call, {items, codes.tables, kPanel, false, codes.panels, keys, count}, codes.groups);
  if (!codes.certified.batch) return;
  round_to_halves(call,
                  {codes.panels, codes.codes, static_cast<int>(codes.channels), false, codes.certified.codes,
                   codes.certified.segments, nullptr},
                  codes.groups);
}

TOKENFLOW_END
