// The nearest-code search (search.cuh): keys[n, g] = min over k of (score(x[n, g], c[g, k]), k), canonical scores
// (common/canonical.h): one chain of multiply-adds over the channels in order, in one accumulator a row and code.
//   pack_kernel    codes become panels, unit or raw, with starting scores; rows that are too wide to stay in a block's
//                  memory are staged the same way
//   search_kernel  a block has a tile of rows and a range of panels. It makes its rows unit, weighted and negated in
//                  shared memory, then meets them with every panel, eight rows x eight codes a thread; the next
//                  channels are copied while it multiplies. A panel leaves the lowest score a row and thread and where
//                  it was; which of the eight codes it was is found out once, at the end, by scoring them again. Ranges
//                  of the same rows meet in atomicMin of (score, id).
// Layout: rows [C][tile + 4] in shared memory; panels [C][128], then [128] starting scores. Code 8 i + j of a panel
// lies at 4 i + j for j < 4, at 64 + 4 i + j - 4 else: a thread's eight codes are neighbours, and its two loads of four
// meet those of neighbouring threads on all 32 banks. Operations: N G K (C fma + 1.25 others); bytes: 4 G K (C + 1) for
// every tile of 128 rows from the second-level cache, 4 N G C for every range from memory. N = 16384, K = 32768, C = 8
// / 40 / 256: 4.3 / 21.5 / 137 GFMA, at least 0.44 / 2.2 / 14.1 ms on an A100, 0.13 / 0.64 / 4.1 ms on an H100. Paper
// arithmetic, never run on a GPU.
#include "cuda/search.cuh"
#include "cuda/tile.cuh"

TOKENFLOW_BEGIN

constexpr int kPanel = 128;               // codes
constexpr int kFewRows = 32;              // of the small tile
constexpr int kManyRows = 128;            // of the large tile
constexpr int64_t kMaxShared = 99 << 10;  // bytes that a block may have on every architecture
constexpr int kItems = 32;                // codes or rows that a block packs,
constexpr int kChannels = 64;             // channels of them at a time

static int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Channels in a panel or a tile; those behind the last add -0 * +0 = -0, which changes no score.
TOKENFLOW_DEVICE static inline int padded(int64_t channels) { return static_cast<int>((channels + 7) / 8 * 8); }

// The place of code i of a panel in [128].
TOKENFLOW_DEVICE static inline int place_of(int i) { return i % 8 / 4 * (kPanel / 2) + i / 8 * 4 + i % 4; }

// Codes or rows [G, count, C], `stride` numbers from one to the next and `between` from one group to the next.
struct Items {
  const void* data;
  Type type;
  int64_t count, stride, between, channels;
};

struct Packing {
  Items items;
  Tables tables;
  int width;     // items in a panel: [padded C + 1][width] numbers
  bool as_rows;  // staged, in their order; the last line is 0, NaN where the row is not finite. Else codes
  float* panels;
  u64* keys;  // filled with kNoKey
  int64_t key_count;
};

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
      last[item] = good ? 0 : NAN;
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
struct Search {
  SearchedRows rows;
  const float* row_panels;  // or none: blocks keep their rows
  const float* panels;
  const u64* above;  // keys that the ones to find come after
  u64* keys;
  int64_t groups, codes, panels_of_group, panels_of_range;
  int channels;
  Tables tables;
};

// Eight channels of a panel, and its starting scores before the first of them.
struct Chunk {
  float codes[8][kPanel];
  float starts[kPanel];
};

// What a block has of its dynamic memory: two chunks of codes, then its rows [padded C][tile + 4], or two chunks of
// them.
template <int kTile>
static int64_t shared_bytes(int64_t lines) {
  return 2 * static_cast<int64_t>(sizeof(Chunk)) + lines * tile_stride(kTile) * static_cast<int64_t>(sizeof(float));
}

// Rows of the tile, raw in `rows`, become what is searched; good[r] tells the finite ones.
template <int kTile>
static __device__ __forceinline__ void stage_rows(const Tables& tables, int channels, int lines, float* rows,
                                                  float (*norms)[kTile], bool* good) {
  const int tid = threadIdx.x;
  if (tid < kTile) {
    bool finite = true;
    int d = 0;
    for (int t = 0; t < tables.count; ++t) {
      float square = 0;
      for (const int end = d + static_cast<int>(tables.width[t]); d < end; ++d) {
        const float x = rows[d * tile_stride(kTile) + tid];
        finite &= fabsf(x) <= FLT_MAX;
        square = fmaf(x, x, square);
      }
      const float norm = sqrtf(square);
      norms[t][tid] = norm > 1e-12f ? norm : 1e-12f;
    }
    good[tid] = finite;
  }
  __syncthreads();
  const int r = tid % kTile;
  int t = 0, end = static_cast<int>(tables.width[0]);
  for (int d = tid / kTile; d < lines; d += kTileThreads / kTile) {
    while (d >= end && t + 1 < tables.count) end += static_cast<int>(tables.width[++t]);
    float x = rows[d * tile_stride(kTile) + r];
    if (tables.unit) x /= norms[t][r];
    x = good[r] ? -(static_cast<float>(tables.weight[t]) * x) : 0;
    rows[d * tile_stride(kTile) + r] = d < channels ? x : -0.0f;
  }
}

// The canonical score of code `place` of a panel for row r of the block.
static __device__ __forceinline__ float score_again(const float* rows, int stride, const float* panel, int lines,
                                                    int place) {
  float score = panel[lines * kPanel + place];
  for (int d = 0; d < lines; ++d) score = fmaf(rows[d * stride], panel[d * kPanel + place], score);
  return score;
}

// kRows x kCodes scores a thread; 256 threads make a tile of rows and one panel. kAbove: keys after a floor.
template <int kRows, int kCodes, bool kAbove>
static __global__ void __launch_bounds__(kTileThreads, 2) search_kernel(Search job) {
  constexpr int kGroups = kPanel / kCodes, kTile = kTileThreads / kGroups * kRows, kStride = tile_stride(kTile);
  DYNAMIC_SHARED(Chunk, chunks);
  SHARED(float, norms, [kMaxTables][kTile]);
  SHARED(bool, good, [kTile]);
  float* const rows = reinterpret_cast<float*>(chunks + 2);
  const int tid = threadIdx.x, cg = tid % kGroups, rg = tid / kGroups;
  const int lines = padded(job.channels), chunks_of_panel = lines / 8;
  const int64_t g = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_panel = blockIdx.z * job.panels_of_range;
  const int64_t left_panels = job.panels_of_group - first_panel;
  const int panels = static_cast<int>(left_panels < job.panels_of_range ? left_panels : job.panels_of_range);
  const int64_t panel_numbers = static_cast<int64_t>(lines + 1) * kPanel;
  const float* const codes = job.panels + (g * job.panels_of_group + first_panel) * panel_numbers;
  const float* staged = nullptr;  // this tile of the row panels
  if (job.row_panels) staged = job.row_panels + (g * gridDim.x + blockIdx.x) * static_cast<int64_t>(lines + 1) * kTile;

  // The next chunk of the codes: panels lie one behind the other, a line of starting scores after each.
  const float* next = codes + tid * 4;
  int chunk_to_copy = 0, buffer = 0;
  const auto copy = [&] {
    const int chunk = chunk_to_copy;
    cp_async16(&chunks[buffer].codes[tid / 32][tid % 32 * 4], next);
    if (chunk == 0 && tid < kPanel / 4) cp_async16(&chunks[buffer].starts[tid * 4], next + lines * kPanel);
    if (staged && tid < 2 * kTile)
      for (int i = tid; i < 2 * kTile; i += kTileThreads)
        cp_async16(rows + (buffer * 8 + i / (kTile / 4)) * kStride + i % (kTile / 4) * 4,
                   staged + chunk * 8 * kTile + i * 4);
    cp_async_commit();
    const bool ends = ++chunk_to_copy == chunks_of_panel;
    chunk_to_copy = ends ? 0 : chunk_to_copy;
    next += ends ? 9 * kPanel : 8 * kPanel;
    buffer ^= 1;
  };

  copy();
  if (staged) {
    if (tid < kTile) good[tid] = staged[lines * kTile + tid] == 0;
  } else {
    load_tile<kTile>(job.rows.data, job.rows.type, first_row * job.rows.stride + g * job.channels, job.rows.stride,
                     job.rows.count - first_row, job.channels, lines, rows);
    __syncthreads();
    stage_rows<kTile>(job.tables, job.channels, lines, rows, norms, good);
  }

  // The panel of a thread's best score is written when that falls, seldom: it need not take a register.
  SHARED(int, where, [kRows][kTileThreads]);
  float acc[kRows][kCodes], best[kRows];
  u64 floors[kAbove ? kRows : 1], lowest[kAbove ? kRows : 1];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    best[r] = INFINITY;
    where[r][tid] = -1;
    const int64_t n = first_row + rg * kRows + r;
    if (kAbove) {
      floors[r] = n < job.rows.count ? job.above[n * job.groups + g] : kNoKey;
      lowest[r] = kNoKey;
    }
  }
  // The first of the thread's codes inside a panel: eight neighbours, or four of them.
  const int first_code = kCodes == 8 ? cg * 8 : cg % 16 * 8 + cg / 16 * 4;
  for (int panel = 0, at = 0; panel < panels;) {
    const bool last = panel == panels - 1 && at == chunks_of_panel - 1;
    if (!last) copy();
    if (last) {
      cp_async_wait<0>();
    } else {
      cp_async_wait<1>();
    }
    __syncthreads();
    const int now = last ? buffer ^ 1 : buffer;
    const Chunk& chunk = chunks[now];
    if (at == 0) {
#pragma unroll
      for (int h = 0; h < kCodes / 4; ++h) {
        const float4 start = *reinterpret_cast<const float4*>(&chunk.starts[h * 64 + cg * 4]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          acc[r][h * 4] = start.x;
          acc[r][h * 4 + 1] = start.y;
          acc[r][h * 4 + 2] = start.z;
          acc[r][h * 4 + 3] = start.w;
        }
      }
    }
    const float* line = rows + (staged ? now : at) * 8 * kStride + rg * kRows;
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float x[kRows], c[kCodes];
#pragma unroll
      for (int i = 0; i < kRows; i += 4)
        *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(line + d * kStride + i);
#pragma unroll
      for (int i = 0; i < kCodes; i += 4)
        *reinterpret_cast<float4*>(c + i) = *reinterpret_cast<const float4*>(&chunk.codes[d][i * 16 + cg * 4]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kCodes; ++i) acc[r][i] = fmaf(x[r], c[i], acc[r][i]);
    }
    if (at == chunks_of_panel - 1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kAbove) {
          const int64_t code = (first_panel + panel) * kPanel + first_code;
#pragma unroll
          for (int i = 0; i < kCodes; ++i) {
            const u64 key = key_of(acc[r][i], static_cast<unsigned>(code + i));
            if (code + i < job.codes && key > floors[r] && key < lowest[r]) lowest[r] = key;
          }
        } else {
          float low = acc[r][0];
#pragma unroll
          for (int i = 1; i < kCodes; ++i) low = fminf(acc[r][i], low);
          if (low < best[r]) best[r] = low, where[r][tid] = panel;
        }
      }
    }
    __syncthreads();
    at = at == chunks_of_panel - 1 ? 0 : at + 1;
    panel += at == 0;
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t n = first_row + rg * kRows + r;
    u64 key = kNoKey;
    if (kAbove) {
      key = lowest[r];
    } else if (where[r][tid] >= 0) {
      key = key_of(best[r], static_cast<unsigned>((first_panel + where[r][tid]) * kPanel + first_code));
    }
#pragma unroll
    for (int lane = kGroups / 2; lane > 0; lane /= 2) {
      const u64 other = __shfl_xor_sync(0xffffffffu, key, lane);
      key = other < key ? other : key;
    }
    if (!kAbove) {
      // One run of kCodes codes has the best score, or none has one below +inf: then every code is looked at.
      const int64_t from = key == kNoKey ? first_panel * kPanel : id_of(key);
      const int64_t left = job.codes - from;
      const int64_t count = key == kNoKey ? (left < panels * kPanel ? left : panels * kPanel) : kCodes;
      key = kNoKey;
      for (int64_t i = cg; i < count; i += kGroups) {
        const int64_t code = from + i;
        const float* panel = codes + (code / kPanel - first_panel) * panel_numbers;
        const float* row = staged ? staged + rg * kRows + r : rows + rg * kRows + r;
        const float score = score_again(row, staged ? kTile : kStride, panel, lines, place_of(code % kPanel));
        const u64 here = key_of(score, static_cast<unsigned>(code));
        if (code < job.codes && here < key) key = here;
      }
#pragma unroll
      for (int lane = kGroups / 2; lane > 0; lane /= 2) {
        const u64 other = __shfl_xor_sync(0xffffffffu, key, lane);
        key = other < key ? other : key;
      }
    }
    if (cg == 0 && n < job.rows.count && good[rg * kRows + r] && key != kNoKey)
      atomicMin(&job.keys[n * job.groups + g], key);
  }
}

template <int kRows, int kCodes, bool kAbove>
static void search_tiles(Call& call, Search job) {
  constexpr int kTile = kTileThreads / (kPanel / kCodes) * kRows;
  const int64_t tiles = pieces_of(job.rows.count, kTile), lines = padded(job.channels);
  // Two blocks a multiprocessor are wanted; a range has four panels at least, as its rows have to be staged for it.
  const int64_t wanted = pieces_of(2 * multiprocessors(call), tiles * job.groups > 0 ? tiles * job.groups : 1);
  const int64_t most = pieces_of(job.panels_of_group, 4);
  job.panels_of_range = pieces_of(job.panels_of_group, wanted < most ? wanted : most);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(job.groups),
                  static_cast<unsigned>(pieces_of(job.panels_of_group, job.panels_of_range)));
  const size_t shared = shared_bytes<kTile>(job.row_panels ? 16 : lines);
  launch(call, search_kernel<kRows, kCodes, kAbove>, grid, dim3(kTileThreads), shared, job);
}

// Rows in all tables' norms beside what shared_bytes counts.
static bool rows_stay(int tile, int64_t channels) {
  const int64_t fixed = (kMaxTables * 4 + 1) * tile + 32 * kTileThreads;
  return (tile == kFewRows ? shared_bytes<kFewRows>(padded(channels)) : shared_bytes<kManyRows>(padded(channels))) +
             fixed <=
         kMaxShared;
}

static bool few(int64_t rows, int64_t channels) { return rows <= 4 * kFewRows || !rows_stay(kManyRows, channels); }

static int64_t panel_numbers(const Searched& codes, int64_t count, int width) {
  return codes.groups * pieces_of(count, width) * (padded(codes.channels) + 1) * width;
}

Searched take_codes(Call& call, const View& codebook, const Tables& tables, int64_t lo, int64_t hi, int64_t max_rows) {
  const int64_t all = codebook.shape[codebook.rank - 2], channels = codebook.shape[codebook.rank - 1];
  Searched codes = {static_cast<const float*>(codebook.data) + lo * channels,
                    hi - lo,
                    all * channels,
                    codebook.rank == 3 ? codebook.shape[0] : 1,
                    channels,
                    tables,
                    nullptr,
                    nullptr,
                    max_rows};
  codes.panels = take<float>(call, panel_numbers(codes, hi - lo, kPanel));
  if (!rows_stay(kFewRows, channels)) codes.row_panels = take<float>(call, panel_numbers(codes, max_rows, kFewRows));
  return codes;
}

void pack_codes(Call& call, const Searched& codes, u64* keys, int64_t count) {
  const Items items = {codes.codebook, kFloat32, codes.codes, codes.channels, codes.between, codes.channels};
  const int64_t blocks = codes.groups * pieces_of(codes.codes, kPanel) * (kPanel / kItems);
  launch(call, pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), 0,
         Packing{items, codes.tables, kPanel, false, codes.panels, keys, count});
}

void search_rows(Call& call, const Searched& codes, const SearchedRows& rows, u64* keys, const u64* above) {
  if (rows.count == 0) return;
  const bool wide = !rows_stay(kFewRows, codes.channels);
  if (wide) {
    const Items items = {rows.data, rows.type, rows.count, rows.stride, codes.channels, codes.channels};
    const int64_t blocks = codes.groups * pieces_of(rows.count, kFewRows);
    launch(call, pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTileThreads), 0,
           Packing{items, codes.tables, kFewRows, true, codes.row_panels, nullptr, 0});
  }
  const Search job = {rows,
                      wide ? codes.row_panels : nullptr,
                      codes.panels,
                      above,
                      keys,
                      codes.groups,
                      codes.codes,
                      pieces_of(codes.codes, kPanel),
                      0,
                      static_cast<int>(codes.channels),
                      codes.tables};
  if (above)
    search_tiles<4, 4, true>(call, job);
  else if (few(rows.count, codes.channels))
    search_tiles<4, 4, false>(call, job);
  else
    search_tiles<8, 8, false>(call, job);
}

TOKENFLOW_END
