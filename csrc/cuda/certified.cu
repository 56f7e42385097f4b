// The certified search (certified.cuh), per batch of rows:
//   scan     a tile of 128 rows (64 where they are wide or few) stays in shared memory, meets panels of 128 codes, 32 x
//            64 (16 x 64) a warp, and leaves the lowest score of each row and segment of 64 codes:
//            minima [G][rows][2][panels in fours], first those of the panels' first halves
//   resolve  a warp takes a row, scores the lowest segment canonically, and every other one whose minimum does not
//            exceed the ceiling of the best score so far. A row with more than 4 + segments / 16 of them leaves the
//            rest to the float32 search of its tile. A row that is not finite keeps its key.
// What it takes for granted about the hardware, which NVIDIA does not document: one mma of 16 products differs from the
// exact sum by at most 2^-16 (|c| + sum |a b|) + 2^-122. An A100 and an H100, as others measured them, stay eleven
// times below that and more (docs/certified_search.md).
//
// Bytes: 2 K C of codes (C in sixteens) for every tile from the second-level cache; 4 N K / 64 written and read again
// for minima, at most 64 MB at a time. N = 16384, K = 32768, C = 32: 128 tiles read 0.27 GB, minima are 34 MB.
// Operations: 17 GFMA, 0.11 ms on A100 (156 T/s), 0.06 ms on H100 (about 300 T/s through mma.sync); minima 0.5 G, 0.06
// ms on A100 at 64 a cycle and multiprocessor, 0.04 ms on H100. A step of 16 channels is 45 instructions, 16 of them
// mma and 6 loads of 16 bytes, a panel's minima some 130, 72 of them FMNMX (SASS of sm_80). The float32 search takes
// 1.8 and 0.5 ms at least. Paper arithmetic, never run on a GPU.
#include "cuda/certified.cuh"

TOKENFLOW_BEGIN

constexpr int kScanThreads = 256;
constexpr int kStepFours = 256;  // of 16 bytes in 16 channels of 128 rows or codes
constexpr int kAhead = 2;        // steps that are copied at once
constexpr int kResolved = 8;     // rows of a block that resolves, a warp each
#if defined(TOKENFLOW_EMULATED)
constexpr int64_t kMostMinima = 1 << 10;  // numbers; so few that small problems come in several batches
#else
constexpr int64_t kMostMinima = 1 << 24;
#endif

// Of the scan's dynamic shared memory.
static int64_t bytes_of_scan(int tall, int64_t channels) {
  return 16 * (int64_t{steps_of(channels)} * tall * (kStepFours / 2) + 2 * kAhead * kStepFours) + 2 * 4 * kPanel;
}

bool certifiable(int64_t channels) { return bytes_of_scan(1, channels) <= kMaxShared; }

struct Scan {
  const uint4 *rows, *codes;
  const float* panels;                       // in float32, for their starting scores
  int64_t first;                             // row of this batch, a multiple of 128
  int64_t row_panels;                        // of a group
  int channels, all_panels, share, quarter;  // panels of a group, those that a block meets, those in fours
  int64_t batch;                             // rows of a group in `minima`
  float* minima;
};

template <int kTall>  // sixteens of rows a warp
static __global__ void __launch_bounds__(kScanThreads, 2) certified_kernel(Scan job) {
  constexpr int kSixteens = 4 * kTall, kRows = 16 * kSixteens;
  DYNAMIC_SHARED(float, starts);                                       // [2][128]
  uint4* const codes = reinterpret_cast<uint4*>(starts + 2 * kPanel);  // [2][kAhead][8][32]
  uint4* const rows = codes + 2 * kAhead * kStepFours;                 // [steps][kSixteens][32]
  const int steps = (job.channels + 15) / 16, lines = padded(job.channels), tid = threadIdx.x;
  const int lane = tid % 32, across = tid / 32 % 2, down = tid / 64, t = lane % 4;
  const int64_t group = blockIdx.z, first = job.first + static_cast<int64_t>(blockIdx.x) * kRows;
  const int from = static_cast<int>(blockIdx.y) * job.share;
  const int to = from + job.share < job.all_panels ? from + job.share : job.all_panels;

  const uint4* const row_panel =
      job.rows + (group * job.row_panels + first / kPanel) * steps * kStepFours + first % kPanel / 16 * 32;
  for (int i = tid; i < steps * kSixteens * 32; i += kScanThreads)
    cp_async16(rows + i, row_panel + i / (kSixteens * 32) * kStepFours + i % (kSixteens * 32));
  const auto copy = [&](int panel, int at, int into) {
    const int64_t here = group * job.all_panels + panel;
    if (at == 0 && tid < kPanel / 4)
      cp_async16(starts + into * kPanel + 4 * tid, job.panels + (here * (lines + 1) + lines) * kPanel + 4 * tid);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (at + s == steps) break;
      cp_async16(codes + (into * kAhead + s) * kStepFours + tid,
                 job.codes + (here * steps + at + s) * kStepFours + tid);
    }
    cp_async_commit();
  };
  copy(from, 0, 0);

  float* const minima = job.minima + group * job.batch * 2 * job.quarter;
  const unsigned row = blockIdx.x * kRows + down * kTall * 16 + lane / 4;  // of the batch
  float kept[kTall][2];
  int held = 0;
  for (int panel = from; panel < to; ++panel) {
    float score[kTall][8][4];
    for (int at = 0; at < steps; at += kAhead, held ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      const bool ends = at + kAhead >= steps;
      if (!ends || panel + 1 < to) copy(panel + ends, ends ? 0 : at + kAhead, held ^ 1);
      if (at == 0) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 start =
              *reinterpret_cast<const float2*>(starts + held * kPanel + place_of(across * kSegment + j * 8 + 2 * t));
#pragma unroll
          for (int i = 0; i < kTall; ++i)
            score[i][j][0] = score[i][j][2] = start.x, score[i][j][1] = score[i][j][3] = start.y;
        }
      }
#pragma unroll 1  // fragments of one step at a time have the registers
      for (int s = 0; s < kAhead && at + s < steps; ++s) {
        unsigned a[kTall][4];
#pragma unroll
        for (int i = 0; i < kTall; ++i) {
          const uint4 four = rows[((at + s) * kSixteens + down * kTall + i) * 32 + lane];
          a[i][0] = four.x, a[i][1] = four.y, a[i][2] = four.z, a[i][3] = four.w;
        }
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
          const uint4 four = codes[((held * kAhead + s) * 8 + across * 4 + j / 2) * 32 + lane];
          const unsigned low[2] = {four.x, four.y}, high[2] = {four.z, four.w};
#pragma unroll
          for (int i = 0; i < kTall; ++i) {
            mma_bf16(score[i][j], a[i], low);
            mma_bf16(score[i][j + 1], a[i], high);
          }
        }
      }
    }
    // The lane whose turn it is keeps a row's minimum, so that four panels are written side by side.
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float low = INFINITY;
#pragma unroll
        for (int j = 0; j < 8; ++j) low = fminf(low, fminf(score[i][j][2 * half], score[i][j][2 * half + 1]));
        low = fminf(low, __shfl_xor_sync(~0u, low, 1));
        low = fminf(low, __shfl_xor_sync(~0u, low, 2));
        if (panel % 4 == t) kept[i][half] = low;
        const int mine = panel / 4 * 4 + t;
        if ((panel % 4 != 3 && panel + 1 != to) || mine < from || mine > panel) continue;
        minima[((row + i * 16 + half * 8) * 2 + across) * job.quarter + mine] = kept[i][half];
      }
    }
  }
}

struct Resolve {
  const float *panels, *row_panels;
  const float4 *segments, *row_sizes;
  const float* minima;
  int64_t first, count, batch, groups, row_panel_count;  // rows: before this batch, in a group, in `minima`
  int channels, codes, panel_count, quarter, most;       // segments that a row may score
  u64* keys;
  unsigned* failed;
  u64* counts;  // rows answered, rows handed over, segments scored; or null
};

static __device__ __forceinline__ u64 lowest_of_warp(u64 key) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_xor_sync(~0u, key, step);
    key = other < key ? other : key;
  }
  return key;
}

// The lowest key of the 64 codes of half a panel, by all lanes; the row has a number every `kResolved`.
static __device__ __forceinline__ u64 score_segment(const Resolve& job, const float* panels, const float* row,
                                                    int panel, int half) {
  const int lane = threadIdx.x % 32, lines = padded(job.channels), place = half * 32 + lane;
  const float* code = panels + static_cast<int64_t>(panel) * (lines + 1) * kPanel + place;
  float low = code[lines * kPanel], high = code[lines * kPanel + kPanel / 2];
#pragma unroll 4
  for (int d = 0; d < job.channels; ++d, code += kPanel) {
    const float x = row[d * kResolved];
    low = fmaf(x, code[0], low);
    high = fmaf(x, code[kPanel / 2], high);
  }
  const int id = panel * kPanel + half * kSegment + lane / 4 * 8 + lane % 4;
  u64 key = kNoKey;
  if (id < job.codes) key = key_of(low, static_cast<unsigned>(id));
  if (id + 4 < job.codes) {
    const u64 other = key_of(high, static_cast<unsigned>(id + 4));
    key = other < key ? other : key;
  }
  return lowest_of_warp(key);
}

static __global__ void __launch_bounds__(kResolved * 32, 4) resolve_kernel(Resolve job) {
  DYNAMIC_SHARED(float, rows);  // [channels][kResolved]
  const int tid = threadIdx.x, lane = tid % 32, lines = padded(job.channels);
  const int64_t group = blockIdx.z, block = static_cast<int64_t>(blockIdx.x) * kResolved;
  const int64_t n = job.first + block + tid / 32, at = group * job.row_panel_count * kPanel + n;
  const float* const staged = job.row_panels +
                              (group * job.row_panel_count + (job.first + block) / kPanel) * (lines + 1) * kPanel +
                              (job.first + block) % kPanel;
  for (int i = tid; i < job.channels * kResolved; i += kResolved * 32)
    rows[i] = staged[static_cast<int64_t>(i / kResolved) * kPanel + i % kResolved];
  __syncthreads();
  if (n >= job.count) return;
  const float4 sizes = job.row_sizes[at];
  const bool finite = sizes.z == 0;
  const RowBound bound = bound_of(sizes.x, sizes.y, job.channels);
  const float* const row = rows + tid / 32;
  const float* const panels = job.panels + group * job.panel_count * static_cast<int64_t>(lines + 1) * kPanel;
  const float4* const segments = job.segments + group * job.panel_count * 2;
  const float* const minima = job.minima + (group * job.batch + n - job.first) * 2 * job.quarter;

  // Where minima lie: i of [2][panels in fours] is half i / quarter of panel i % quarter.
  const int places = finite ? 2 * job.quarter : 0;  // else the row keeps its key
  u64 first = kNoKey;
  for (int i = lane; i < places; i += 32) {
    if (i % job.quarter >= job.panel_count) continue;
    const u64 key = key_of(minima[i], static_cast<unsigned>(i));
    first = key < first ? key : first;
  }
  const int start = static_cast<int>(id_of(lowest_of_warp(first)));
  u64 key = finite ? score_segment(job, panels, row, start % job.quarter, start / job.quarter) : kNoKey;
  int scored = finite;
  for (int base = 0; base < places && scored <= job.most; base += 32) {
    const int i = base + lane, panel = i % job.quarter;
    bool left = i < places && panel < job.panel_count && i != start;
    if (left) left = !(minima[i] > ceiling_of(bound, segments[2 * panel + i / job.quarter], score_of(key)));
    for (unsigned rest = __ballot_sync(~0u, left); rest && scored <= job.most; rest &= rest - 1, ++scored) {
      const int which = base + __ffs(static_cast<int>(rest)) - 1;
      const u64 other = score_segment(job, panels, row, which % job.quarter, which / job.quarter);
      key = other < key ? other : key;
    }
  }
  if (lane != 0) return;
  const int64_t out = n * job.groups + group;
  if (key < job.keys[out]) job.keys[out] = key;
  const bool too_many = scored > job.most;
  if (too_many) {
    atomicOr(job.failed + group * job.row_panel_count + n / kPanel, 1u);
  }
  if (!job.counts) return;
  atomicAdd(job.counts + too_many, u64{1});
  atomicAdd(job.counts + 2, static_cast<u64>(scored));
}

template <int kTall>
static void scan(Call& call, Scan job, int64_t rows, int64_t groups) {
  const int64_t tiles = pieces_of(rows, 64 * kTall);
  job.share = static_cast<int>(share_of(call, tiles * groups, job.all_panels));
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(pieces_of(job.all_panels, job.share)),
                  static_cast<unsigned>(groups));
  launch(call, certified_kernel<kTall>, grid, dim3(kScanThreads),
         static_cast<size_t>(bytes_of_scan(kTall, job.channels)), job);
}

void search_certified(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys) {
  const Certified& own = codes.certified;
  const int channels = static_cast<int>(codes.channels);
  const int64_t row_panels = pieces_of(rows.count, kPanel), panels = pieces_of(codes.codes, kPanel);
  const Items items = {rows.data, rows.type, rows.count, rows.stride, codes.channels, codes.channels};
  pack(call, {items, codes.tables, kPanel, true, codes.row_panels, nullptr, 0}, codes.groups);
  round_to_halves(call, {codes.row_panels, rows.count, channels, true, own.rows, own.row_sizes, own.failed},
                  codes.groups);
  const int quarter = static_cast<int>(pieces_of(panels, 4) * 4);
  const bool tall = rows.count > kPanel / 2 && bytes_of_scan(2, channels) <= kMaxShared;
  for (int64_t first = 0; first < rows.count; first += own.batch) {
    const int64_t count = rows.count - first < own.batch ? rows.count - first : own.batch;
    const Scan job = {own.rows, own.codes, codes.panels, first,     row_panels, channels, static_cast<int>(panels),
                      0,        quarter,   own.batch,    own.minima};
    if (tall)
      scan<2>(call, job, count, codes.groups);
    else
      scan<1>(call, job, count, codes.groups);
    const Resolve rest = {codes.panels,
                          codes.row_panels,
                          own.segments,
                          own.row_sizes,
                          own.minima,
                          first,
                          rows.count,
                          own.batch,
                          codes.groups,
                          row_panels,
                          channels,
                          static_cast<int>(codes.codes),
                          static_cast<int>(panels),
                          quarter,
                          static_cast<int>(4 + 2 * panels / 16),
                          keys,
                          own.failed,
                          reinterpret_cast<u64*>(call.searched)};
    launch(call, resolve_kernel,
           dim3(static_cast<unsigned>(pieces_of(count, kResolved)), 1, static_cast<unsigned>(codes.groups)),
           dim3(kResolved * 32), static_cast<size_t>(channels * kResolved) * sizeof(float), rest);
  }
  search_failed(call, codes, rows, keys, own.failed);
}

Certified take_certified(Call& call, int64_t groups, int64_t codes, int64_t channels, int64_t max_rows) {
  const int64_t panels = pieces_of(codes, kPanel), row_panels = pieces_of(max_rows, kPanel);
  const int64_t fours = steps_of(channels) * int64_t{kStepFours}, numbers = groups * 2 * pieces_of(panels, 4) * 4;
  const int64_t fitting = kMostMinima / numbers / kPanel;
  const int64_t batch = (fitting < 1 ? 1 : fitting < row_panels ? fitting : row_panels) * kPanel;
  return {take<uint4>(call, groups * panels * fours),
          take<uint4>(call, groups * row_panels * fours),
          take<float4>(call, groups * panels * (kPanel / kSegment)),
          take<float4>(call, groups * row_panels * kPanel),
          take<float>(call, batch * numbers),
          take<unsigned>(call, groups * row_panels),
          batch};
}

TOKENFLOW_END
