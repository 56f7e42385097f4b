// Softmax over codes without the N x K matrix, for entropy_loss and soft_quantize: p_nk = exp(u_nk), u_nk = s_nk - m_n
// - log Z_n for logits s_nk = x_n . c_k, m_n the logit of the row's best code, Z_n = sum_k exp(s_nk - m_n). From u = -87
// down p is 0, as on the CPU. Passes, each of which makes the logits again:
//   sweep<rows>   sums over the codes of p and of p a; a is u_nk, a number of the code, or a second product g_n . v_k
//   sweep<codes>  sums over the rows of p
//   spread<rows>  dx_n = sum_k ds_nk c_k,  ds_nk = p_nk (first u_nk + a_nk + offset_n)
//   spread<codes> dc_k = sum_n ds_nk x_n
// Rows and codes have the same roles: a block has 64 items of one side, its own, and meets a range of panels of the
// other (search_panels.cuh; both sides are packed in their order, as they are: negated by a weight of -1). 256 threads
// make a tile of 64 x 128 logits, 4 x 8 each, while the next 8 channels are copied. spread puts ds [64][128] into
// shared memory and multiplies it with the panel's channels, up to 64 at a time, 4 x 4 sums a thread. Where channels
// are few, slices of the panel have threads of their own and are added at the end; where they are more than 64, sums
// lie in the output and are fetched once a panel.
// Sums run in this order: items of a thread in a panel, panels, lanes or slices, ranges. Ranges depend on the sizes
// alone (ranges_of), so the bits are the same on every device.
// Per pair: sweep C multiply-adds, spread 2 C, each C2 more where there is a second product, an exp and some 10
// operations more. From the second-level cache a pair takes 3/128 numbers a multiply-add: 12 bytes a cycle and
// multiprocessor where it multiplies without pause. Source: online softmax and recomputation as in FlashAttention,
// 2205.14135.
#pragma once
#include "cuda/rows.cuh"
#include "cuda/search_panels.cuh"

TOKENFLOW_BEGIN

constexpr int kOwn = 64;              // items of a block
constexpr int kStep = 8;              // channels that are copied at once
constexpr int kTall = 4, kWide = 8;   // of the tile's items of each side, a thread's; across a warp 8 threads, down 4
constexpr int kAtOnce = 64;           // channels that spread adds
constexpr int64_t kMostBlocks = 512;  // that share the panels of their items
constexpr int64_t kLeastShare = 4;    // panels of a block
constexpr float kLowest = -87.0f;     // of u
constexpr int kOwnStep = kStep * tile_stride(kOwn), kStepSize = kOwnStep + kStep * kPanel;  // numbers of a copy

enum Of { kLogits, kTerms, kProducts };  // what a is

struct Side {
  float *first, *second;  // panels [G][panels][channels + 1][128] of the two products; the second or none
  int64_t count, panels;  // of a group
  TOKENFLOW_DEVICE int64_t padded() const { return panels * kPanel; }
};

struct Softmax {
  Side rows, codes;
  int64_t groups, channels;         // C
  int lines, second_lines;          // channels in a panel of each product
  float *top, *log_total, *offset;  // [G, padded rows]: m_n, +inf where the row is left out; log Z_n
  float* term;                      // [G, padded codes], where a is a number of the code
  const float* upstream;            // first = scale * upstream[0]; none: 0
  float scale;
  float* partial;  // of one pass: sums of each range
};

// Of panels of the other side, `share` each; as many as blocks share them.
struct Ranges {
  int share, count;
};

static inline Ranges ranges_of(const Softmax& s, bool own_rows) {
  const int64_t own = own_rows ? s.rows.count : s.codes.count, panels = own_rows ? s.codes.panels : s.rows.panels;
  const int64_t tiles = pieces_of(own, kOwn) * s.groups;
  if (tiles == 0 || panels == 0) return {1, 0};
  const int64_t even = pieces_of(panels, tiles < kMostBlocks ? kMostBlocks / tiles : 1);
  const int64_t share = even > kLeastShare ? even : kLeastShare;
  return {static_cast<int>(share), static_cast<int>(pieces_of(panels, share))};
}

// Numbers of a thread's items of one side, for its tile [kTall][kWide].
template <bool kOfOwn>
struct Numbers {
  float value[kOfOwn ? kTall : kWide];

  // From those of the block's items, or of the panel's.
  __device__ __forceinline__ Numbers(const float* numbers, int across, int down) {
    load_four(numbers + 4 * (kOfOwn ? down : across), value);
    if (!kOfOwn) load_four(numbers + kPanel / 2 + 4 * across, value + kWide / 2);
  }
  __device__ __forceinline__ float at(int r, int k) const { return value[kOfOwn ? r : k]; }
};

// A block's place: its own items, the group's panels of the other side; and its threads'.
template <bool kOwnRows>
struct Place {
  int64_t group, own_at, other_at;  // the first item of each side among the padded ones of all groups
  int across, down;
  const float *own, *other, *own2, *other2;  // channels of both products
  int64_t size, size2;                       // of a panel

  __device__ __forceinline__ explicit Place(const Softmax& job) {
    const Side &mine = kOwnRows ? job.rows : job.codes, &its = kOwnRows ? job.codes : job.rows;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    across = warp % 2 * 8 + lane % 8;
    down = warp / 2 * 4 + lane / 8;
    group = blockIdx.z;
    own_at = group * mine.padded() + static_cast<int64_t>(blockIdx.x) * kOwn;
    other_at = group * its.padded();
    size = static_cast<int64_t>(job.lines + 1) * kPanel;
    size2 = static_cast<int64_t>(job.second_lines + 1) * kPanel;
    own = mine.first + own_at / kPanel * size + own_at % kPanel;
    own2 = mine.second + own_at / kPanel * size2 + own_at % kPanel;
    other = its.first + group * its.panels * size;
    other2 = its.second + group * its.panels * size2;
  }
  // The first row, or code, of the block's pairs with a panel.
  __device__ __forceinline__ int64_t row_at(int panel) const { return kOwnRows ? own_at : at(panel); }
  __device__ __forceinline__ int64_t code_at(int panel) const { return kOwnRows ? at(panel) : own_at; }
  __device__ __forceinline__ int64_t at(int panel) const { return other_at + static_cast<int64_t>(panel) * kPanel; }
};

// Eight channels of the block's items and of a panel, on their way.
static __device__ __forceinline__ void copy_step(const float* own, const float* other, float* to) {
  const int tid = threadIdx.x, channel = tid / (kOwn / 4), item = tid % (kOwn / 4) * 4;
  if (channel < kStep) cp_async16(to + channel * tile_stride(kOwn) + item, own + channel * kPanel + item);
  cp_async16(to + kOwnStep + 4 * tid, other + 4 * tid);
  cp_async_commit();
}

// sum += own x other. The first eight channels are on their way into steps[held]; when it ends, those of the next
// product are, where there is one.
static __device__ __forceinline__ void product(const float* own, const float* other, int lines, const float* next_own,
                                               const float* next_other, int across, int down, float* steps, int* held,
                                               float (&sum)[kTall][kWide]) {
  for (int at = 0; at < lines; at += kStep, *held ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const float* const step = steps + *held * kStepSize;
    float* const next = steps + (*held ^ 1) * kStepSize;
    if (at + kStep < lines)
      copy_step(own + (at + kStep) * kPanel, other + (at + kStep) * kPanel, next);
    else if (next_own)
      copy_step(next_own, next_other, next);
    multiply<false, kOwn>(step + kTall * down, step + kOwnStep + 4 * across, nullptr, sum);
  }
}

// value[r][k] = of(r, k) for the thread's pairs.
template <class F>
static __device__ __forceinline__ void set_pairs(float (&value)[kTall][kWide], F of) {
#pragma unroll
  for (int r = 0; r < kTall; ++r) {
#pragma unroll
    for (int k = 0; k < kWide; ++k) value[r][k] = of(r, k);
  }
}

// u of the thread's pairs with a panel, no lower than kLowest. Behind the channels stands NaN where an item is not
// finite or does not exist, so that its pairs have p = 0.
template <bool kOwnRows>
static __device__ __forceinline__ void logits(const Softmax& job, const Place<kOwnRows>& place, int panel,
                                              const float* next_own, const float* next_other, float* steps, int* held,
                                              float (&u)[kTall][kWide]) {
  const int across = place.across, down = place.down;
  const float* const other = place.other + panel * place.size;
  const Numbers<true> mine(place.own + job.lines * kPanel, across, down);
  const Numbers<false> its(other + job.lines * kPanel, across, down);
  set_pairs(u, [&](int r, int k) { return mine.at(r, k) + its.at(r, k); });
  product(place.own, other, job.lines, next_own, next_other, across, down, steps, held, u);
  const int64_t row = place.row_at(panel);
  const Numbers<kOwnRows> top(job.top + row, across, down), log_total(job.log_total + row, across, down);
  set_pairs(u, [&](int r, int k) {
    const float log_p = u[r][k] - top.at(r, k) - log_total.at(r, k);
    return log_p > kLowest ? log_p : kLowest;
  });
}

// The second product of the same pairs. An upstream gradient that is not finite stands as zeros with NaN behind them:
// it makes all that its row has part in NaN.
template <bool kOwnRows>
static __device__ __forceinline__ void second_product(const Softmax& job, const Place<kOwnRows>& place, int panel,
                                                      const float* next_own, const float* next_other, float* steps,
                                                      int* held, float (&a)[kTall][kWide]) {
  const float* const other = place.other2 + panel * place.size2;
  const Numbers<kOwnRows> upstream((kOwnRows ? place.own2 : other) + job.second_lines * kPanel, place.across,
                                   place.down);
  set_pairs(a, [&](int r, int k) { return upstream.at(r, k); });
  product(place.own2, other, job.second_lines, next_own, next_other, place.across, place.down, steps, held, a);
}

static __device__ __forceinline__ float p_of(float u) { return u > kLowest ? expf(u) : 0; }

// partial[range, 0 or 1, g, own item] = sums over the range of p, of p a.
template <bool kOwnRows, Of kOf>
static __global__ void __launch_bounds__(kTileThreads, 2) sweep_kernel(Softmax job, int share) {
  SHARED_ALIGNED(16, float, steps, [2 * kStepSize]);
  SHARED(float, halves, [2][2][kOwn]);
  const Place<kOwnRows> place(job);
  const Side& own = kOwnRows ? job.rows : job.codes;
  const int panels = static_cast<int>((kOwnRows ? job.codes : job.rows).panels);
  const int from = static_cast<int>(blockIdx.y) * share, to = from + share < panels ? from + share : panels;
  int held = 0;
  float sums[2][kTall] = {};
  copy_step(place.own, place.other + from * place.size, steps);
  for (int panel = from; panel < to; ++panel) {
    const float* const next = panel + 1 < to ? place.other + (panel + 1) * place.size : nullptr;
    float u[kTall][kWide], a[kTall][kWide];
    if (kOf == kProducts) {
      logits(job, place, panel, place.own2, place.other2 + panel * place.size2, steps, &held, u);
      second_product(job, place, panel, next ? place.own : nullptr, next, steps, &held, a);
    } else {
      logits(job, place, panel, next ? place.own : nullptr, next, steps, &held, u);
    }
    if (kOf == kLogits) set_pairs(a, [&](int r, int k) { return u[r][k]; });
    if (kOf == kTerms) {
      const Numbers<!kOwnRows> term(job.term + place.code_at(panel), place.across, place.down);
      set_pairs(a, [&](int r, int k) { return term.at(r, k); });
    }
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
      float total = 0, weighted = 0;
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const float p = p_of(u[r][k]);
        total += p;
        weighted = fmaf(p, a[r][k], weighted);
      }
      sums[0][r] += total;
      sums[1][r] += weighted;
    }
  }
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
      float sum = sums[part][r];
#pragma unroll
      for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
      if (lane % 8 == 0) halves[place.across / 8][part][kTall * place.down + r] = sum;
    }
  }
  __syncthreads();
  const int part = threadIdx.x / kOwn, item = threadIdx.x % kOwn;
  if (part < 2)
    job.partial[(static_cast<int64_t>(blockIdx.y) * 2 + part) * job.groups * own.padded() + place.own_at + item] =
        halves[0][part][item] + halves[1][part][item];
}

// How spread shares its channels: `width` of them at a time, 4 x 4 sums a thread, and so many slices of a panel.
struct Channels {
  int width, slices;
  static Channels of(int lines) {
    const int width = padded(pieces_of(lines, pieces_of(lines, kAtOnce))), free = kTileThreads / (kOwn / 4) / (width / 4);
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
  float* const slopes = steps + 2 * kStepSize;      // ds [64][132]
  float* const values = slopes + kOwn * kStride;    // [width][132]
  float* const parts = values + channels.width * kStride;  // [slices][64][width]
  const Place<kOwnRows> place(job);
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
  out += (blockIdx.y * own.count * job.groups + place.group * (kOwnRows ? 1 : own.count)) * job.channels + item * between;
  const int64_t items = own.count - item < kOwn ? own.count - item : kOwn;

  int held = 0;
  copy_step(place.own, place.other + from * place.size, steps);
  for (int panel = from; panel < to; ++panel) {
    const float* const other = place.other + panel * place.size;
    const auto copy_values = [&](int at) {
      const int count = job.lines - at < channels.width ? job.lines - at : channels.width;
      for (int i = tid; i < count * (kPanel / 4); i += kTileThreads)
        cp_async16(values + i / (kPanel / 4) * kStride + i % (kPanel / 4) * 4, other + at * kPanel + 4 * i);
      cp_async_commit();
    };
    {
      const float* const next = panel + 1 < to ? other + place.size : nullptr;
      float* const mine = slopes + kTall * place.down * kStride + 4 * place.across;
      float ds[kTall][kWide];
      if (kOf == kProducts) {  // p waits in shared memory for a
        logits(job, place, panel, place.own2, place.other2 + panel * place.size2, steps, &held, ds);
        set_pairs(ds, [&](int r, int k) { return p_of(ds[r][k]); });
        store_tile(ds, mine);
        second_product(job, place, panel, next ? place.own : nullptr, next, steps, &held, ds);
      } else {
        logits(job, place, panel, next ? place.own : nullptr, next, steps, &held, ds);
      }
      copy_values(0);
      const Numbers<kOwnRows> offset(job.offset + place.row_at(panel), place.across, place.down);
      if (kOf == kProducts) {
#pragma unroll
        for (int r = 0; r < kTall; ++r) {
          float p[kWide];
          load_four(mine + r * kStride, p);
          load_four(mine + r * kStride + kPanel / 2, p + kWide / 2);
#pragma unroll
          for (int k = 0; k < kWide; ++k) ds[r][k] = p[k] > 0 ? p[k] * (ds[r][k] + offset.at(r, k)) : 0;
        }
      } else {
        const Numbers<!kOwnRows> term(job.term + place.code_at(panel), place.across, place.down);
        set_pairs(ds, [&](int r, int k) {
          const float u = ds[r][k], slope = p_of(u) * fmaf(first, u, term.at(r, k) + offset.at(r, k));
          return u > kLowest ? slope : 0;
        });
      }
      store_tile(ds, mine);
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
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int row = mine + r * kApart, channel = at + team + w * teams;
          if (once) {
            float* const there = parts + (slice * kOwn + row) * channels.width + channel;
            *there = panel == from ? sum[r][w] : *there + sum[r][w];
          } else if (row < items && channel < job.channels) {
            float* const there = out + row * between + channel;
            *there = panel == from ? sum[r][w] : *there + sum[r][w];
          }
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
static __global__ void __launch_bounds__(kTileThreads) ranges_kernel(const float* partial, int ranges, int64_t numbers,
                                                                     float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= numbers) return;
  float sum = 0;
#pragma unroll 4
  for (int range = 0; range < ranges; ++range) sum += partial[range * numbers + i];
  out[i] = sum;
}

// The sums of own item n of group g that `sweep` made.
struct Sum {
  double total, weighted;
  __device__ Sum(const Softmax& job, const Side& own, int ranges, int64_t g, int64_t n) : total(0), weighted(0) {
    const int64_t numbers = job.groups * own.padded();
    const float* at = job.partial + g * own.padded() + n;
    for (int range = 0; range < ranges; ++range, at += 2 * numbers) {
      total += at[0];
      weighted += at[numbers];
    }
  }
  __device__ float log_total() const { return total > 0 ? logf(static_cast<float>(total)) : 0; }
  __device__ float mean() const { return total > 0 ? static_cast<float>(weighted / total) : 0; }
};

// top, log_total (those of a forward pass [G, N], or 0), offset 0, of rows and what pads them; ids [N, G].
static __global__ void __launch_bounds__(kTileThreads)
    tops_kernel(Softmax job, const float* codebook, const int64_t* ids, const float* log_totals) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  const int64_t g = quotient(i, job.rows.padded()), n = i - g * job.rows.padded();
  if (g >= job.groups) return;
  float top = INFINITY;
  if (n < job.rows.count) {
    const int64_t id = ids[n * job.groups + g];
    if (id >= 0 && id < job.codes.count) {
      const float* const code = codebook + (g * job.codes.count + id) * job.channels;
      const float* const row = job.rows.first + i / kPanel * (job.lines + 1) * kPanel + i % kPanel;
      float score = row[job.lines * kPanel];  // NaN where the row is not finite
      for (int64_t d = 0; d < job.channels; ++d) score = fmaf(row[d * kPanel], code[d], score);
      if (fabsf(score) <= FLT_MAX) top = score;
    }
  }
  job.top[i] = top;
  job.log_total[i] = log_totals && n < job.rows.count ? log_totals[g * job.rows.count + n] : 0;
  job.offset[i] = 0;
}

// Takes what a call needs; `second` is the width of the second product or 0.
static inline Softmax take_softmax(Call& call, int64_t rows, int64_t codes, int64_t groups, int64_t channels,
                                   int64_t second, bool to_rows, bool to_codes) {
  Softmax s = {};
  s.groups = groups;
  s.channels = channels;
  s.lines = padded(channels);
  s.second_lines = padded(second);
  for (Side* side : {&s.rows, &s.codes}) {
    side->count = side == &s.rows ? rows : codes;
    side->panels = pieces_of(side->count, kPanel);
    side->first = take<float>(call, groups * side->padded() * (s.lines + 1));
    if (second) side->second = take<float>(call, groups * side->padded() * (s.second_lines + 1));
  }
  for (float** numbers : {&s.top, &s.log_total, &s.offset}) *numbers = take<float>(call, groups * s.rows.padded());
  s.term = take<float>(call, groups * s.codes.padded());
  int64_t most = 0;
  for (const bool own_rows : {true, false}) {
    const Side& own = own_rows ? s.rows : s.codes;
    const int64_t ranges = ranges_of(s, own_rows).count, sums = ranges * 2 * groups * own.padded();
    const bool spreads = (own_rows ? to_rows : to_codes) && ranges != 1;
    const int64_t gradients = spreads ? ranges * groups * own.count * channels : 0;
    most = sums > most ? sums : most;
    most = gradients > most ? gradients : most;
  }
  s.partial = take<float>(call, most);
  return s;
}

// Items [.., G, ..] of a side and a product into their panels; one launch.
static inline void pack_side(Call& call, const Softmax& s, bool of_rows, bool second, const void* data, int64_t width) {
  const Side& side = of_rows ? s.rows : s.codes;
  Tables as_they_are = {};
  as_they_are.count = 1;
  as_they_are.width[0] = width;
  as_they_are.weight[0] = -1;
  const Items items = of_rows ? Items{data, kFloat32, side.count, s.groups * width, width, width}
                              : Items{data, kFloat32, side.count, width, side.count * width, width};
  pack(call, {items, as_they_are, static_cast<int>(kPanel), true, second ? side.second : side.first, nullptr, 0},
       s.groups);
}

// One launch; log_totals of a forward pass, or none.
static inline void tops(Call& call, const Softmax& s, const View& codebook, const View& ids, const void* log_totals) {
  launch(call, tops_kernel, blocks_for(s.groups * s.rows.padded(), kTileThreads), dim3(kTileThreads), 0, s,
         static_cast<const float*>(codebook.data), static_cast<const int64_t*>(ids.data),
         static_cast<const float*>(log_totals));
}

template <bool kOwnRows, Of kOf>
static void sweep(Call& call, const Softmax& s) {
  const Ranges ranges = ranges_of(s, kOwnRows);
  const int64_t tiles = pieces_of((kOwnRows ? s.rows : s.codes).count, kOwn);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ranges.count), static_cast<unsigned>(s.groups));
  launch(call, sweep_kernel<kOwnRows, kOf>, grid, dim3(kTileThreads), 0, s, ranges.share);
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
