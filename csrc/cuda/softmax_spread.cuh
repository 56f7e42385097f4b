// Gradients of a softmax's logits, to the rows or to the codes (softmax.cuh): out_i = sum_j ds_ij y_j, y the other
// side's channels. A block puts ds [64][128] of its items and a panel into shared memory and multiplies it with the
// panel's channels, up to 64 at a time, 4 x 4 sums a thread. Where channels are few, slices of the panel have threads
// of their own and are added at the end. A panel's sums are added to those of the panels before it: in shared memory,
// or, where there are more channels than 64, in the output, which is fetched once a panel (4 bytes a cycle and
// multiprocessor, and as many back). Shared memory: 65 to 94 KB; two blocks a multiprocessor on an H100, on an A100 up
// to C = 40.
#pragma once
#include "cuda/softmax.cuh"

TOKENFLOW_BEGIN

constexpr int kAtOnce = 64;  // channels

// How spread shares its channels: `width` of them at a time, 4 x 4 sums a thread, and so many slices of a panel.
struct Channels {
  int width, slices;
  static Channels of(int lines) {
    const int width = padded(pieces_of(lines, pieces_of(lines, kAtOnce)));
    const int free = kTileThreads / (kOwn / 4) / (width / 4);
    return {width, free >= 8 ? 8 : free >= 4 ? 4 : free >= 2 ? 2 : 1};
  }
  size_t bytes() const {
    return (2 * kStepSize + (kOwn + width) * tile_stride(kPanel) + slices * kOwn * width) * sizeof(float);
  }
};

// The thread's pairs into the tile [64][132] that begins at its first.
static __device__ __forceinline__ void store_tile(const float (&value)[kTall][kWide], float* tile) {
#pragma unroll
  for (int r = 0; r < kTall; ++r) {
    float* const to = tile + r * tile_stride(kPanel);
    *reinterpret_cast<float4*>(to) = make_float4(value[r][0], value[r][1], value[r][2], value[r][3]);
    *reinterpret_cast<float4*>(to + kPanel / 2) = make_float4(value[r][4], value[r][5], value[r][6], value[r][7]);
  }
}

// out[range, own items' place in their tensor] = sums over the range of ds times the other side's channels.
template <bool kOwnRows, Of kOf>
static __global__ void __launch_bounds__(kTileThreads, 2)
    spread_kernel(Softmax job, int share, Channels channels, float* out) {
  constexpr int kStride = tile_stride(kPanel), kApart = kOwn / 4;  // between own items of a thread
  DYNAMIC_SHARED(float, steps);
  float* const slopes = steps + 2 * kStepSize;             // ds [64][132]
  float* const values = slopes + kOwn * kStride;           // [width][132]
  float* const parts = values + channels.width * kStride;  // [slices][64][width]
  Place<kOwnRows> place(job);
  const Side& own = kOwnRows ? job.rows : job.codes;
  const int panels = static_cast<int>((kOwnRows ? job.codes : job.rows).panels);
  const int from = static_cast<int>(blockIdx.y) * share, to = from + share < panels ? from + share : panels;
  const int tid = threadIdx.x, teams = channels.width / 4, slice = tid / teams / kApart;
  const int team = tid % teams, mine = tid / teams % kApart, length = kPanel / channels.slices;
  const bool once = channels.width >= job.lines;
  const float first = kOf == kTerms ? job.scale * job.upstream[0] : 0;
  // The block's items lie `between` apart in their tensor [N, G, C] or [G, K, C].
  const int64_t between = kOwnRows ? job.groups * job.channels : job.channels;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kOwn;
  const int64_t before = blockIdx.y * own.count * job.groups + place.group * (kOwnRows ? 1 : own.count);
  out += before * job.channels + item * between;
  const int items = own.count - item < kOwn ? static_cast<int>(own.count - item) : kOwn;

  int held = 0;
  place.advance(from);
  copy_step(kOf == kProducts ? place.own2 : place.own, kOf == kProducts ? place.other2 : place.other, steps);
  for (int panel = from; panel < to; ++panel, place.advance(1)) {
    const auto copy_values = [&](int at) {
      const int count = job.lines - at < channels.width ? job.lines - at : channels.width;
#pragma unroll 2
      for (int line = tid / 32; line < count; line += kTileThreads / 32)
        cp_async16(values + line * kStride + tid % 32 * 4, place.other + (at + line) * kPanel + tid % 32 * 4);
      cp_async_commit();
    };
    {
      float* const pairs = slopes + kTall * place.down * kStride + 4 * place.across;
      float ds[kTall][kWide];
      if (kOf == kProducts) {  // a waits in shared memory for u
        second_product(job, place, steps, &held, ds);
        store_tile(ds, pairs);
      }
      logits<kOf>(job, place, panel + 1 < to, steps, &held, ds);
      copy_values(0);
      const Numbers<kOwnRows> offset(job.offset + place.row_at(), place.across, place.down);
      const auto slope = [&](int r, int k, float a) {
        const float u = ds[r][k], of_pair = expf(u) * fmaf(first, u, a + offset.at(r, k));
        return u > kLowest ? of_pair : 0;
      };
      if (kOf == kProducts) {
#pragma unroll
        for (int r = 0; r < kTall; ++r) {
          float a[kWide];
          load_four(pairs + r * kStride, a);
          load_four(pairs + r * kStride + kPanel / 2, a + kWide / 2);
#pragma unroll
          for (int k = 0; k < kWide; ++k) ds[r][k] = slope(r, k, a[k]);
        }
      } else {
        const Numbers<!kOwnRows> term(job.term + place.code_at(), place.across, place.down);
        set_pairs(ds, [&](int r, int k) { return slope(r, k, term.at(r, k)); });
      }
      store_tile(ds, pairs);
    }
    for (int at = 0; at < job.lines; at += channels.width) {
      if (at > 0) {
        __syncthreads();
        copy_values(at);
      }
      cp_async_wait<0>();
      __syncthreads();
      if (slice >= channels.slices) continue;
      float sum[4][4] = {};
      for (int i = slice * length; i < (slice + 1) * length; i += 4) {
        float c[4][4];
#pragma unroll
        for (int w = 0; w < 4; ++w) load_four(values + (team + w * teams) * kStride + i, c[w]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float ds[4];
          load_four(slopes + (mine + r * kApart) * kStride + i, ds);
#pragma unroll
          for (int w = 0; w < 4; ++w) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[r][w] = fmaf(ds[j], c[w][j], sum[r][w]);
          }
        }
      }
      float* const there =
          once ? parts + (slice * kOwn + mine) * channels.width + team : out + mine * between + at + team;
      const int64_t below = kApart * (once ? channels.width : between);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float* const total = there + r * below + w * teams;
          if (once || (mine + r * kApart < items && at + team + w * teams < job.channels))
            *total = panel == from ? sum[r][w] : *total + sum[r][w];
        }
      }
    }
  }
  if (!once) return;
  __syncthreads();
  for (int i = tid; i < kOwn * channels.width; i += kTileThreads) {
    const int row = i / channels.width, channel = i % channels.width;
    float sum = 0;
    for (int part = 0; part < channels.slices; ++part) sum += parts[part * kOwn * channels.width + i];
    if (row < items && channel < job.channels) out[row * between + channel] = sum;
  }
}

// out = the ranges' sums, in their order.
static __global__ void __launch_bounds__(kTileThreads)
    ranges_kernel(const float* partial, int ranges, int64_t numbers, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= numbers) return;
  float sum = 0;
#pragma unroll 4
  for (int range = 0; range < ranges; ++range) sum += partial[range * numbers + i];
  out[i] = sum;
}

// One launch, and one more where ranges are added.
template <bool kOwnRows, Of kOf>
static void spread(Call& call, const Softmax& s, const View& gradient) {
  if (gradient.type == kNone) return;
  const Ranges ranges = ranges_of(s, kOwnRows);
  const int64_t own = (kOwnRows ? s.rows : s.codes).count, numbers = s.groups * own * s.channels;
  const dim3 grid(static_cast<unsigned>(pieces_of(own, kOwn)), static_cast<unsigned>(ranges.count),
                  static_cast<unsigned>(s.groups));
  const Channels channels = Channels::of(s.lines);
  float* const out = static_cast<float*>(gradient.data);
  launch(call, spread_kernel<kOwnRows, kOf>, grid, dim3(kTileThreads), channels.bytes(), s, ranges.share, channels,
         ranges.count == 1 ? out : s.partial);
  if (ranges.count != 1)
    launch(call, ranges_kernel, blocks_for(numbers, kTileThreads), dim3(kTileThreads), 0, s.partial, ranges.count,
           numbers, out);
}

TOKENFLOW_END
