// Sums over the rows of every code, the same bits always, without a float atomic:
//   sum[g, k] = sum over the rows n with keys[g, n] = k of row n, in row order, in double.
// 1. A stable radix sort of the rows by code, 8 bits at a time (sums.cu): blocks count their digits, one scan says
//    where each puts its rows, and they put them there in row order: rows of a code stay in row order.
// 2. The first of the sorted rows of every code, by bisection.
// 3. A thread for every (code, channel) adds its rows, neighbouring threads neighbouring channels. Up to kChunk rows of
//    a code are so the CPU's sum to the last bit. A code with more is cut into chunks of kChunk rows, which threads of
//    their own add first; then its chunks are added in order. However popular a code is, no thread adds more than
//    kChunk of its rows, and its sum differs from the CPU's only by the order of additions in double.
// No launch depends on what the rows hold: between two rows of the sorted list that kChunk divides, at most two chunks
// of such codes begin, one of the code that lies at the first of them and one of a code that lies at the last.
// Bytes, for N rows of C numbers of b bytes, K codes and p passes, K <= 2^(8 p): N (24 p - 4) for the sort, N (8 + b C)
// for the rows, 4 C K for the sums. N = 262144, K = 32768, C = 32, float32: 11.5 + 35.7 + 4.2 MB, 26 us on A100
// (2.0 TB/s), 15 us on H100 (3.35 TB/s), in ten launches with the caller's (K <= 256: seven, K > 65536: thirteen).
// C N numbers become doubles and are added: 8.4 M, 3 us on A100. A consumer part that does both 0.32 T/s needs 26 us,
// half of what its memory of 1 TB/s needs, and more than that where b = 2. Paper arithmetic, never run on a GPU.
// Scratch: a group 12 N bytes (p = 1) or 20 N, 4 K, 1 KB for every 2048 rows, C N / 32 for the chunks.
#pragma once
#include "cuda/rows.cuh"

TOKENFLOW_BEGIN

constexpr unsigned kNoCode = 0xffffffffu;  // key of a row that is left out
constexpr int64_t kChunk = 512;            // rows of a code that one thread adds
constexpr int kSumThreads = 256;

struct Sums {
  int64_t rows, groups, codes, channels;  // N, G, K, C
  int passes, bits;                       // of the sort; of a digit
  int64_t blocks;                         // of a group, in the sort
  unsigned* keys;                         // [G, N]: code of the row or kNoCode; the caller writes it
  u64* pairs[2];                          // [G, N]: code << 32 | row, sorted by one more digit each pass
  unsigned* digits;                       // [blocks, G, 256]: how many a block has, then where it puts its first
  unsigned* kept;                         // [G]: rows that are not left out
  unsigned* starts;                       // [G, K + 1]: where the rows of a code begin among the sorted
  double* chunks;                         // [G, ceil(N / kChunk), 2, C]

  TOKENFLOW_DEVICE u64* after(int pass) const { return pass % 2 ? pairs[0] : pairs[1]; }
  TOKENFLOW_DEVICE const u64* sorted() const { return after(passes); }
  TOKENFLOW_DEVICE int64_t windows() const { return (rows + kChunk - 1) / kChunk; }
};

// Scratch for rows [N, G, C] and K codes; codes >= 1, no more than kMostRows of N G and K.
Sums take_sums(Call& call, int64_t rows, int64_t groups, int64_t codes, int64_t channels);

// keys -> sorted pairs and starts.
void sort_rows(Call& call, const Sums& sums);

static __device__ inline unsigned row_of(u64 pair) { return static_cast<unsigned>(pair); }
static __device__ inline unsigned code_of(u64 pair) { return static_cast<unsigned>(pair >> 32); }

// Rows [N, G, C] as they are.
struct PlainRows {
  const void* data;
  Type type;
  int64_t groups, channels;

  // Channel c of the rows of one code; `row` is one of them.
  struct Column {
    const PlainRows& rows;
    int64_t at;
    __device__ float operator()(unsigned row) const {
      return number(rows.data, rows.type, row * rows.groups * rows.channels + at);
    }
  };
  __device__ Column column(int64_t g, int64_t c, unsigned row) const { return {*this, g * channels + c}; }
};

// The sums [G, K, C], and how many rows each code has [G, K], or null.
struct SumsOut {
  void* sums;
  Type type;
  float* counts;
};

// at(from) + ... + at(to - 1) in order, eight or four of them on their way at a time. A zero more changes no bit.
template <class T, class At>
static __device__ inline double add_in_order(int64_t from, int64_t to, At at) {
  double sum = 0;
  int64_t i = from;
  for (; i + 8 <= to; i += 8) {
    T value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = at(i + j);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += value[j];
  }
  for (; i < to; i += 4) {
    T value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) value[j] = i + j < to ? at(i + j) : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += value[j];
  }
  return sum;
}

// chunks[g, window, 0 or 1, c] = the sum of a chunk that begins in that window of kChunk sorted rows: 0, of the code of
// the window's first row; 1, of a code that begins later and has the window's last row.
template <class Rows>
static __global__ void __launch_bounds__(kSumThreads, 4) chunk_kernel(Sums sums, Rows rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, slots = 2 * sums.windows();
  const int64_t place = quotient(i, sums.channels), c = i - place * sums.channels;
  const int64_t g = quotient(place, slots), slot = place - g * slots;
  if (g >= sums.groups) return;
  const u64* sorted = sums.sorted() + g * sums.rows;
  const int64_t first = slot / 2 * kChunk, total = sums.kept[g];
  if (first >= total) return;
  const int64_t last = first + kChunk < total ? first + kChunk - 1 : total - 1;
  const bool later = slot % 2 != 0;
  const unsigned code = code_of(sorted[later ? last : first]);
  const unsigned* starts = sums.starts + g * (sums.codes + 1) + code;
  const int64_t begin = starts[0], end = starts[1];
  if (end - begin <= kChunk || (later && begin <= first)) return;
  const int64_t from = later ? begin : begin + (first - begin + kChunk - 1) / kChunk * kChunk;
  if (from >= end) return;
  const int64_t to = from + kChunk < end ? from + kChunk : end;
  const auto column = rows.column(g, c, row_of(sorted[from]));
  sums.chunks[i] = add_in_order<float>(from, to, [&](int64_t j) { return column(row_of(sorted[j])); });
}

// The sum of every (code, channel).
template <class Rows>
static __global__ void __launch_bounds__(kSumThreads, 4) sum_kernel(Sums sums, Rows rows, SumsOut out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t at = quotient(i, sums.channels), c = i - at * sums.channels;
  const int64_t g = quotient(at, sums.codes), code = at - g * sums.codes;
  if (g >= sums.groups) return;
  const u64* sorted = sums.sorted() + g * sums.rows;
  const unsigned* starts = sums.starts + g * (sums.codes + 1) + code;
  const int64_t begin = starts[0], end = starts[1];
  double sum = 0;
  if (end - begin > kChunk) {
    const double* chunks = sums.chunks + g * sums.windows() * 2 * sums.channels + c;
    sum = add_in_order<double>(0, (end - begin + kChunk - 1) / kChunk, [&](int64_t j) {
      const int64_t window = (begin + j * kChunk) / kChunk;
      return chunks[(2 * window + (begin > window * kChunk)) * sums.channels];
    });
  } else if (end > begin) {
    const auto column = rows.column(g, c, row_of(sorted[begin]));
    sum = add_in_order<float>(begin, end, [&](int64_t j) { return column(row_of(sorted[j])); });
  }
  set_number(out.sums, out.type, i, static_cast<float>(sum));
  if (out.counts && c == 0) out.counts[at] = static_cast<float>(end - begin);
}

// After sort_rows; for rows that are not PlainRows.
template <class Rows>
static void sum_rows_of(Call& call, const Sums& sums, const Rows& rows, const SumsOut& out) {
  const dim3 block(kSumThreads);
  launch(call, chunk_kernel<Rows>, blocks_for(sums.groups * 2 * sums.windows() * sums.channels, kSumThreads), block, 0,
         sums, rows);
  launch(call, sum_kernel<Rows>, blocks_for(sums.groups * sums.codes * sums.channels, kSumThreads), block, 0, sums,
         rows, out);
}

void sum_rows(Call& call, const Sums& sums, const PlainRows& rows, const SumsOut& out);

TOKENFLOW_END
