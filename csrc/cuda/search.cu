// The nearest-code search (search.cuh): keys[n, g] = min over k of (score(x[n, g], c[g, k]), k), canonical scores
// (common/canonical.h): one chain of multiply-adds over the channels in order, in one accumulator a row and code.
// A block has a tile of 128 rows (32 where there is little work) and a range of panels (search_panels.cuh). It makes
// its rows unit, weighted and negated in shared memory, then meets them with every panel, 8 rows x 8 codes a thread (4
// x 4); the next channels are copied while it multiplies, one barrier a copy. A panel leaves the lowest score a row and
// thread and where it was; which of the codes it was is found out once, at the end, by scoring them again. Ranges of
// the same rows meet in atomicMin of (score, id).
//
// Bytes: 4 G K (C + 1) for every tile from the second-level cache, 4 N G C for every range from memory.
// Operations: N G K C multiply-adds: of the instructions of a large tile 89 % where C is large, 76 % at C = 8 (counted
// in the SASS of sm_80). N = 16384, K = 32768, C = 8 / 40 / 256: 4.3 / 21.5 / 137 GFMA, at least 0.44 / 2.2 / 14.1 ms
// on an A100, 0.13 / 0.64 / 4.1 ms on an H100. Paper arithmetic, never run on a GPU.
#include "cuda/certified.cuh"
#include "cuda/search.cuh"
#include "cuda/search_panels.cuh"

TOKENFLOW_BEGIN

constexpr int kFewRows = 32;    // of the small tile
constexpr int kManyRows = 128;  // of the large tile

// How threads share a tile and a panel: `kTall` rows x `kWide` codes each, in fours that lie half a tile apart.
template <int kRows>
struct Shape {
  static constexpr int kTall = kRows == kManyRows ? 8 : 4, kWide = kTall, kFours = kWide / 4;
  static constexpr int kAcross = kPanel / kWide / 8, kDown = kRows / kTall / 4;  // warps of 8 x 4 threads
  static constexpr int kChunk = kRows == kManyRows ? 8 : 32;                     // channels that are copied at once
  // Shared memory in floats: two chunks of codes, two lines of starting scores, a panel for every row of every thread,
  // marks of rows, then rows, or two chunks of them.
  static constexpr int kCodes = 2 * kChunk * kPanel, kRowChunk = kChunk * tile_stride(kRows);
  static_assert(kDown * kAcross * 32 == kTileThreads, "a tile and a panel take all threads");
  static_assert(kChunk * kRows == 4 * kTileThreads, "a chunk of rows is four numbers a thread");

  static int64_t bytes(int64_t channels, int tables, bool stay) {
    const int64_t rows = stay ? tables * kRows + int64_t{padded(channels)} * tile_stride(kRows) : kRows + 2 * kRowChunk;
    return (kCodes + 2 * kPanel + kTall * kTileThreads + rows) * static_cast<int64_t>(sizeof(float));
  }
  static bool stay(int64_t channels, int tables) { return bytes(channels, tables, true) <= kMaxShared; }
};

struct Search {
  SearchedRows rows;
  Tables tables;
  int64_t groups;
  int channels, codes, panel_count, share;  // panels of a group, panels that a block meets
  const float *panels, *row_panels;         // the latter for rows that do not stay in shared memory, else null
  u64* keys;
  const u64* above;
  const unsigned* only;  // [G][tiles], which to search where not 0; or null
};

// rows [C][tile_stride] = the tile's rows as they are searched, negated and weighted; zeros where a row is not finite,
// which a NaN among its norms [T][kRows] marks.
template <int kRows>
static __device__ __forceinline__ void stage(const Search& job, int64_t group, int64_t first, float* rows,
                                             float* norms) {
  const int tid = threadIdx.x, row = tid % kRows, lines = padded(job.channels);
  load_tile<kRows>(job.rows.data, job.rows.type, first * job.rows.stride + group * job.channels, job.rows.stride,
                   job.rows.count - first, job.channels, lines, rows);
  __syncthreads();
  for (int t = tid / kRows; t < job.tables.count; t += kTileThreads / kRows) {
    int d = 0;
    for (int before = 0; before < t; ++before) d += static_cast<int>(job.tables.width[before]);
    float square = 0;
    bool good = true;
    for (const int end = d + static_cast<int>(job.tables.width[t]); d < end; ++d) {
      const float x = rows[d * tile_stride(kRows) + row];
      good &= fabsf(x) <= FLT_MAX;
      square = fmaf(x, x, square);
    }
    const float norm = sqrtf(square);
    norms[t * kRows + row] = good ? norm > 1e-12f ? norm : 1e-12f : NAN;
  }
  __syncthreads();
  bool good = true;
  for (int t = 0; t < job.tables.count; ++t) good &= norms[t * kRows + row] == norms[t * kRows + row];
  int t = 0, end = static_cast<int>(job.tables.width[0]);
  for (int d = tid / kRows; d < lines; d += kTileThreads / kRows) {
    while (d >= end && t + 1 < job.tables.count) end += static_cast<int>(job.tables.width[++t]);
    float* const x = rows + d * tile_stride(kRows) + row;
    const float y = job.tables.unit ? *x / norms[t * kRows + row] : *x;
    *x = d >= job.channels ? -0.0f : good ? -(static_cast<float>(job.tables.weight[t]) * y) : 0;
  }
}

static __device__ __forceinline__ u64 lower_of(u64 a, u64 b) { return b < a ? b : a; }

// The lowest key above the floor of codes id .. id + 3 of a group, which are neighbours in their panel; the row has a
// number every `stride`.
static __device__ __forceinline__ u64 best_of_four(const Search& job, const float* panels, const float* row, int stride,
                                                   int id, u64 floor) {
  const int lines = padded(job.channels);
  const float* code = panels + static_cast<int64_t>(id / kPanel) * (lines + 1) * kPanel + place_of(id % kPanel);
  float score[4], c[4];
  load_four(code + static_cast<int64_t>(lines) * kPanel, score);
  for (int d = 0; d < job.channels; ++d, code += kPanel, row += stride) {
    load_four(code, c);
#pragma unroll
    for (int k = 0; k < 4; ++k) score[k] = fmaf(*row, c[k], score[k]);
  }
  u64 lowest = kNoKey;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const u64 key = key_of(score[k], static_cast<unsigned>(id + k));
    if (id + k < job.codes && key > floor) lowest = lower_of(lowest, key);
  }
  return lowest;
}

template <int kRows, bool kStay>
static __global__ void __launch_bounds__(kTileThreads, 2) search_kernel(Search job) {
  using S = Shape<kRows>;
  if (kRows == kManyRows && job.only && !job.only[blockIdx.z * gridDim.x + blockIdx.x]) return;
  DYNAMIC_SHARED(float, codes);
  float* const starts = codes + S::kCodes;
  int* const where = reinterpret_cast<int*>(starts + 2 * kPanel);  // [kTall][threads]: the panels of their best scores
  float* const norms = starts + 2 * kPanel + S::kTall * kTileThreads;
  const int marks = kStay ? job.tables.count : 1, tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  float* const rows = norms + marks * kRows;
  const int across = warp % S::kAcross * 8 + lane % 8, down = warp / S::kAcross * 4 + lane / 8;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows, group = blockIdx.z;
  const int lines = padded(job.channels), from = static_cast<int>(blockIdx.y) * job.share;
  const int to = from + job.share < job.panel_count ? from + job.share : job.panel_count;
  const int64_t panel_size = static_cast<int64_t>(lines + 1) * kPanel;
  const float* const panels = job.panels + group * job.panel_count * panel_size;
  const float* const row_panel =
      kStay ? nullptr : job.row_panels + (group * gridDim.x + blockIdx.x) * static_cast<int64_t>(lines + 1) * kRows;

  // Channels at, at + 1, .. of the next panel, which lies behind the last one.
  const float* next = panels + from * panel_size + 4 * tid;
  const auto copy = [&](int at, int into) {
    const int n = S::kChunk == 8 || lines - at >= S::kChunk ? S::kChunk : lines - at;
    if (at == 0 && tid < kPanel / 4) cp_async16(starts + into * kPanel + 4 * tid, next + lines * kPanel);
#pragma unroll
    for (int d = 0; d < S::kChunk; d += 8, next += 8 * kPanel) {
      if (d == n) break;
      cp_async16(codes + (into * S::kChunk + d) * kPanel + 4 * tid, next);
    }
    if (at + n == lines) next += kPanel;
    if (!kStay && tid / (kRows / 4) < n)  // a chunk of rows has four numbers for every thread
      cp_async16(rows + into * S::kRowChunk + tid / (kRows / 4) * tile_stride(kRows) + tid % (kRows / 4) * 4,
                 row_panel + at * kRows + 4 * tid);
    cp_async_commit();
  };
  copy(0, 0);
  if (kStay) {
    stage<kRows>(job, group, first, rows, norms);
  } else if (tid < kRows) {
    norms[tid] = row_panel[static_cast<int64_t>(lines) * kRows + tid];
  }

  // The first of the thread's codes in a panel, and its rows in the tile.
  const int code = across % 16 * 8 + across / 16 * 4;
  const auto row_of = [&](int r) { return 4 * down + r / 4 * (kRows / 2) + r % 4; };
  float best[S::kTall];
#pragma unroll
  for (int r = 0; r < S::kTall; ++r) best[r] = INFINITY;
  int held = 0;
  for (int panel = from; panel < to; ++panel) {
    float score[S::kTall][S::kWide];
    for (int at = 0; at < lines; at += S::kChunk, held ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      const bool ends = at + S::kChunk >= lines;
      if (!ends || panel + 1 < to) copy(ends ? 0 : at + S::kChunk, held ^ 1);
      const float* c = codes + held * S::kChunk * kPanel + 4 * across;
      const float* x = rows + 4 * down + (kStay ? at * tile_stride(kRows) : held * S::kRowChunk);
      int d = 0;
      if (at == 0) {
        multiply<true, kRows>(x, c, starts + held * kPanel + 4 * across, score);
        d = 8;
      }
      for (; d < S::kChunk && (S::kChunk == 8 || at + d < lines); d += 8)
        multiply<false, kRows>(x + d * tile_stride(kRows), c + d * kPanel, nullptr, score);
    }
    if (kRows == kFewRows && job.above) {  // a large tile has no registers for floors
#pragma unroll
      for (int r = 0; r < S::kTall; ++r) {
        const int64_t n = first + row_of(r);
        const u64 floor = n < job.rows.count ? job.above[n * job.groups + group] : 0;
        const float floor_score = score_of(floor);
        const int after = static_cast<int>(id_of(floor)) - (panel * kPanel + code);
#pragma unroll
        for (int k = 0; k < S::kWide; ++k)
          if (!(score[r][k] > floor_score || (score[r][k] == floor_score && k > after))) score[r][k] = INFINITY;
      }
    }
#pragma unroll
    for (int r = 0; r < S::kTall; ++r) {
      float low = score[r][0];
#pragma unroll
      for (int k = 1; k < S::kWide; ++k) low = fminf(low, score[r][k]);  // the number, where one is NaN
      if (low < best[r]) best[r] = low, where[r * kTileThreads + tid] = panel;
    }
  }

  // The best of each row: the lowest first code of the threads that share it, then the very code.
  __syncthreads();
  u64* const found = reinterpret_cast<u64*>(codes);  // [kAcross][kRows]
#pragma unroll
  for (int r = 0; r < S::kTall; ++r) {
    u64 key = kNoKey;
    if (best[r] < INFINITY) key = key_of(best[r], static_cast<unsigned>(where[r * kTileThreads + tid] * kPanel + code));
    for (int step = 1; step < 8; step *= 2) key = lower_of(key, __shfl_xor_sync(~0u, key, step));
    if (lane % 8 == 0) found[warp % S::kAcross * kRows + row_of(r)] = key;
  }
  __syncthreads();
  const int row = tid / S::kFours, stride = kStay ? tile_stride(kRows) : kRows;
  const float* const staged = kStay ? rows : row_panel;
  bool mine = row < kRows && first + row < job.rows.count;
  for (int m = 0; mine && m < marks; ++m) mine = norms[m * kRows + row] == norms[m * kRows + row];
  const int64_t out = (first + row) * job.groups + group;
  const u64 floor = mine && job.above ? job.above[out] : 0;
  u64 key = kNoKey;
  for (int w = 0; mine && w < S::kAcross; ++w) key = lower_of(key, found[w * kRows + row]);
  const bool any = key != kNoKey;
  if (any)
    key = best_of_four(job, panels, staged + row, stride, static_cast<int>(id_of(key)) + tid % S::kFours * 4, floor);
  if (S::kFours == 2) key = lower_of(key, __shfl_xor_sync(~0u, key, 1));
  if (any && tid % S::kFours == 0) {
    atomicMin(job.keys + out, key);
  }
  // Where no score is below +inf, the codes of +inf, then those of NaN: a warp goes through them.
  const int end = to * kPanel < job.codes ? to * kPanel : job.codes;
  for (unsigned rest = __ballot_sync(~0u, mine && !any && tid % S::kFours == 0); rest; rest &= rest - 1) {
    const int owner = __ffs(static_cast<int>(rest)) - 1;
    const u64 its_floor = __shfl_sync(~0u, floor, owner);
    const float* const its_row = staged + (warp * 32 + owner) / S::kFours;
    u64 lowest = kNoKey;
    for (int id = from * kPanel + 4 * lane; id < end; id += kPanel)
      lowest = lower_of(lowest, best_of_four(job, panels, its_row, stride, id, its_floor));
    for (int step = 1; step < 32; step *= 2) lowest = lower_of(lowest, __shfl_xor_sync(~0u, lowest, step));
    if (lane == owner && lowest != kNoKey) {
      atomicMin(job.keys + out, lowest);
    }
  }
}

Searched take_codes(Call& call, const View& codebook, const Tables& tables, int64_t lo, int64_t hi, int64_t max_rows) {
  const View all = with_groups(codebook);
  const int64_t groups = all.shape[0], channels = all.shape[2], lines = padded(channels) + 1;
  Searched codes = {static_cast<const float*>(all.data) + lo * channels,
                    hi - lo,
                    all.shape[1] * channels,
                    groups,
                    channels,
                    tables,
                    take<float>(call, groups * pieces_of(hi - lo, kPanel) * kPanel * lines),
                    nullptr,
                    max_rows,
                    {}};
  if (call.certified && certifiable(channels))
    codes.certified = take_certified(call, groups, hi - lo, channels, max_rows);
  if (codes.certified.batch || !Shape<kManyRows>::stay(channels, tables.count))
    codes.row_panels = take<float>(call, groups * pieces_of(max_rows, kManyRows) * kManyRows * lines);
  return codes;
}

int64_t share_of(const Call& call, int64_t tiles, int64_t panels) {
  const int64_t at_once = 2 * multiprocessors(call);
  int64_t best = panels, cost = pieces_of(tiles, at_once) * (panels + 2);
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t parts = waves * at_once / tiles;
    if (parts < 2) continue;
    const int64_t share = pieces_of(panels, parts < panels ? parts : panels);
    const int64_t its_cost = pieces_of(tiles * pieces_of(panels, share), at_once) * (share + 2);
    if (its_cost < cost) best = share, cost = its_cost;
  }
  return best;
}

template <int kRows>
static void search(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const u64* above,
                   const unsigned* only) {
  const int64_t tiles = pieces_of(rows.count, kRows), panels = pieces_of(codes.codes, kPanel);
  const bool stay = Shape<kRows>::stay(codes.channels, codes.tables.count);
  if (!stay && !only) {
    const Items items = {rows.data, rows.type, rows.count, rows.stride, codes.channels, codes.channels};
    pack(call, {items, codes.tables, kRows, true, codes.row_panels, nullptr, 0}, codes.groups);
  }
  const int64_t share = share_of(call, tiles * codes.groups, panels);
  const Search job = {rows,
                      codes.tables,
                      codes.groups,
                      static_cast<int>(codes.channels),
                      static_cast<int>(codes.codes),
                      static_cast<int>(panels),
                      static_cast<int>(share),
                      codes.panels,
                      stay ? nullptr : codes.row_panels,
                      keys,
                      above,
                      only};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(pieces_of(panels, share)),
                  static_cast<unsigned>(codes.groups));
  launch(call, stay ? search_kernel<kRows, true> : search_kernel<kRows, false>, grid, dim3(kTileThreads),
         static_cast<size_t>(Shape<kRows>::bytes(codes.channels, codes.tables.count, stay)), job);
}

void search_failed(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const unsigned* failed) {
  search<kManyRows>(call, codes, rows, keys, nullptr, failed);
}

void search_rows(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const u64* above) {
  if (rows.count == 0) return;
  if (codes.certified.batch && !above) return search_certified(call, codes, rows, keys);
  // Small tiles for few rows, for so little work that large ones would leave multiprocessors idle, and above floors.
  const int64_t blocks = codes.groups * pieces_of(rows.count, kManyRows) * pieces_of(codes.codes, kPanel);
  if (rows.count <= kFewRows || blocks < multiprocessors(call) || above)
    search<kFewRows>(call, codes, rows, keys, above, nullptr);
  else
    search<kManyRows>(call, codes, rows, keys, above, nullptr);
}

TOKENFLOW_END
