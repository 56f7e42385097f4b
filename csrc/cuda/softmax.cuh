// Softmax over codes without the N x K matrix, for entropy_loss and soft_quantize: p_nk = exp(u_nk), u_nk = s_nk - m_n
// - log Z_n for logits s_nk = x_n . c_k, m_n that of the row's best code, Z_n = sum_k exp(s_nk - m_n). Passes, each of
// which makes the logits again:
//   sweep<rows>   sums over the codes of p and of p a; a is u_nk, a number of the code, or a second product g_n . v_k
//   sweep<codes>  sums over the rows of p
//   spread<rows>  dx_n = sum_k ds_nk c_k,  ds_nk = p_nk (first u_nk + a_nk + offset_n)  (softmax_spread.cuh)
//   spread<codes> dc_k = sum_n ds_nk x_n
// Rows and codes have the same roles: a block has 64 items of one side, its own, and meets a range of panels of the
// other (search_panels.cuh; both sides are packed in their order, as they are: negated by a weight of -1). 256 threads
// make a tile of 64 x 128 logits, 4 x 8 each, while the next 8 channels are copied.
// Sums run in this order: items of a thread in a panel, panels, lanes or slices, ranges. Ranges depend on the sizes
// alone (ranges_of), so the bits are the same on every device.
// Per pair: sweep C multiply-adds, spread 2 C, each C2 more where there is a second product; an exp, some 16
// instructions with what is around it. Of the instructions of sweep 256 of 333 a copy multiply and add, so at C = 8 /
// 40 / 256 30 / 58 / 73 %; of spread's 34 / 51 / 73 % (counted in the SASS of sm_80). From the second-level cache come
// 3 numbers for 128 multiply-adds: 12 bytes a cycle and multiprocessor, were it to multiply without pause. Paper
// arithmetic, never run on a GPU. Source: online softmax and recomputation as in FlashAttention, 2205.14135.
#pragma once
#include "cuda/rows.cuh"
#include "cuda/search_panels.cuh"

TOKENFLOW_BEGIN

constexpr int kOwn = 64;              // items of a block
constexpr int kStep = 8;              // channels that are copied at once
constexpr int kTall = 4, kWide = 8;   // of the tile's items of each side, a thread's; across a warp 8 threads, down 4
constexpr int64_t kMostBlocks = 512;  // that share the panels of their items
constexpr int64_t kLeastShare = 4;    // panels of a block
constexpr float kLowest = -120.0f;    // of u: expf is 0 there
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

// A block's place: its own items and a panel of the other side; and its threads'.
template <bool kOwnRows>
struct Place {
  int64_t group, own_at, other_at;  // the first item of each side among the padded ones of all groups
  int across, down;
  const float *own, *other, *own2, *other2;  // channels of both products
  int size, size2;                           // of a panel

  __device__ __forceinline__ explicit Place(const Softmax& job) {
    const Side &mine = kOwnRows ? job.rows : job.codes, &its = kOwnRows ? job.codes : job.rows;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    across = warp % 2 * 8 + lane % 8;
    down = warp / 2 * 4 + lane / 8;
    group = blockIdx.z;
    own_at = group * mine.padded() + static_cast<int64_t>(blockIdx.x) * kOwn;
    other_at = group * its.padded();
    size = (job.lines + 1) * kPanel;
    size2 = (job.second_lines + 1) * kPanel;
    own = mine.first + own_at / kPanel * size + own_at % kPanel;
    own2 = mine.second + own_at / kPanel * size2 + own_at % kPanel;
    other = its.first + group * its.panels * size;
    other2 = its.second + group * its.panels * size2;
  }
  __device__ __forceinline__ void advance(int64_t panels) {
    other += panels * size;
    other2 += panels * size2;
    other_at += panels * kPanel;
  }
  // The first row, or code, of the block's pairs with the panel.
  __device__ __forceinline__ int64_t row_at() const { return kOwnRows ? own_at : other_at; }
  __device__ __forceinline__ int64_t code_at() const { return kOwnRows ? other_at : own_at; }
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
    own += kStep * kPanel;
    other += kStep * kPanel;
    if (at + kStep < lines)
      copy_step(own, other, next);
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

// u of the thread's pairs with the panel, no lower than kLowest, then the way to the next panel, where there is one.
// Behind the channels stands NaN where an item is not finite or does not exist, so that its pairs have p = 0.
template <Of kOf, bool kOwnRows>
static __device__ __forceinline__ void logits(const Softmax& job, const Place<kOwnRows>& place, bool more, float* steps,
                                              int* held, float (&u)[kTall][kWide]) {
  const int across = place.across, down = place.down;
  const Numbers<true> mine(place.own + job.lines * kPanel, across, down);
  const Numbers<false> its(place.other + job.lines * kPanel, across, down);
  set_pairs(u, [&](int r, int k) { return mine.at(r, k) + its.at(r, k); });
  const float* const next_own = !more ? nullptr : kOf == kProducts ? place.own2 : place.own;
  const float* const next = kOf == kProducts ? place.other2 + place.size2 : place.other + place.size;
  product(place.own, place.other, job.lines, next_own, next, across, down, steps, held, u);
  const Numbers<kOwnRows> top(job.top + place.row_at(), across, down);
  const Numbers<kOwnRows> log_total(job.log_total + place.row_at(), across, down);
  set_pairs(u, [&](int r, int k) {
    const float log_p = u[r][k] - top.at(r, k) - log_total.at(r, k);
    return log_p > kLowest ? log_p : kLowest;
  });
}

// The second product of the pairs, before their first. An upstream gradient that is not finite stands as zeros with NaN
// behind them: it makes all that its row has part in NaN.
template <bool kOwnRows>
static __device__ __forceinline__ void second_product(const Softmax& job, const Place<kOwnRows>& place, float* steps,
                                                      int* held, float (&a)[kTall][kWide]) {
  const float* const upstream = (kOwnRows ? place.own2 : place.other2) + job.second_lines * kPanel;
  const Numbers<kOwnRows> marks(upstream, place.across, place.down);
  set_pairs(a, [&](int r, int k) { return marks.at(r, k); });
  product(place.own2, place.other2, job.second_lines, place.own, place.other, place.across, place.down, steps, held, a);
}

// partial[range, 0 or 1, g, own item] = sums over the range of p, of p a.
template <bool kOwnRows, Of kOf>
static __global__ void __launch_bounds__(kTileThreads, 2) sweep_kernel(Softmax job, int share) {
  SHARED_ALIGNED(16, float, steps, [2 * kStepSize]);
  SHARED(float, halves, [2][2][kOwn]);
  Place<kOwnRows> place(job);
  const Side& own = kOwnRows ? job.rows : job.codes;
  const int panels = static_cast<int>((kOwnRows ? job.codes : job.rows).panels);
  const int from = static_cast<int>(blockIdx.y) * share, to = from + share < panels ? from + share : panels;
  int held = 0;
  float sums[2][kTall] = {};
  place.advance(from);
  copy_step(kOf == kProducts ? place.own2 : place.own, kOf == kProducts ? place.other2 : place.other, steps);
  for (int panel = from; panel < to; ++panel, place.advance(1)) {
    float u[kTall][kWide], a[kTall][kWide];
    if (kOf == kProducts) second_product(job, place, steps, &held, a);
    logits<kOf>(job, place, panel + 1 < to, steps, &held, u);
    if (kOf == kLogits) set_pairs(a, [&](int r, int k) { return u[r][k]; });
    if (kOf == kTerms) {
      const Numbers<!kOwnRows> term(job.term + place.code_at(), place.across, place.down);
      set_pairs(a, [&](int r, int k) { return term.at(r, k); });
    }
#pragma unroll
    for (int r = 0; r < kTall; ++r) {
      float total = 0, weighted = 0;
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        const float p = expf(u[r][k]);
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

TOKENFLOW_END
