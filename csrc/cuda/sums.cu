// The stable sort of sums.cuh, least significant digit first. Per pass and group:
//   count   a block counts the digits of kTile rows
//   scan    where each block puts its first row of each digit: digits in order, then blocks in order
//   place   a warp finds by ballots which of its lanes have the same digit: the lower lanes come first. Its rows follow
//           those that it had before, and those of the warps before it
// Every count is an integer, so atomics in shared memory keep the result the same. One block scans a group: a thread
// reads N / 8192 counts twice, some 7 us for a million rows of one group.
#include "cuda/sums.cuh"

TOKENFLOW_BEGIN

constexpr int kDigits = 256;  // at most; one for each thread of a block
constexpr int kWarps = kDigits / 32;
constexpr int kItems = 8;  // rows of a thread
constexpr int64_t kTile = kDigits * kItems;
constexpr int kScanParts = 4;  // of the blocks, each with its own threads in scan
constexpr int kScanThreads = kScanParts * kDigits;

Sums take_sums(Call& call, int64_t rows, int64_t groups, int64_t codes, int64_t channels) {
  Sums s = {rows, groups, codes, channels, 1, 1};
  int bits = 1;
  while (int64_t{1} << bits < codes) ++bits;
  s.passes = (bits + 7) / 8;
  s.bits = (bits + s.passes - 1) / s.passes;
  s.blocks = (rows + kTile - 1) / kTile;
  s.keys = take<unsigned>(call, groups * rows);
  for (int i = 0; i < 2 && i < s.passes; ++i) s.pairs[i] = take<u64>(call, groups * rows);
  s.digits = take<unsigned>(call, s.blocks * groups * kDigits);
  s.kept = take<unsigned>(call, groups);
  s.starts = take<unsigned>(call, groups * (codes + 1));
  s.chunks = take<double>(call, groups * s.windows() * 2 * channels);
  return s;
}

// Row i of the list that a pass sorts: the keys themselves, or the pairs of the pass before. A digit beyond kDigits
// where the row is left out.
struct List {
  const unsigned* keys;
  const u64* pairs;
  int shift, bits;
  __device__ u64 operator[](int64_t i) const {
    return keys ? static_cast<u64>(keys[i]) << 32 | static_cast<unsigned>(i) : pairs[i];
  }
  __device__ unsigned digit(u64 pair) const {
    const unsigned code = code_of(pair);
    return code == kNoCode ? kNoCode : code >> shift & ((1u << bits) - 1);
  }
};

static __device__ inline List list_of(const Sums& sums, int pass, int64_t g) {
  return {pass ? nullptr : sums.keys + g * sums.rows, pass ? sums.after(pass) + g * sums.rows : nullptr,
          pass * sums.bits, sums.bits};
}

// Rows of the list of a pass; blocks of neighbouring groups, and so of the same rows, run together.
static __device__ inline int64_t length_of(const Sums& sums, int pass, int64_t g) {
  return pass ? static_cast<int64_t>(sums.kept[g]) : sums.rows;
}

static __global__ void __launch_bounds__(kDigits) count_kernel(Sums sums, int pass) {
  SHARED(unsigned, count, [kDigits]);
  const int64_t g = blockIdx.x % sums.groups, first = blockIdx.x / sums.groups * kTile;
  const int64_t length = length_of(sums, pass, g), end = first + kTile < length ? first + kTile : length;
  const List list = list_of(sums, pass, g);
  count[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = first + threadIdx.x; i < end; i += kDigits) {
    const unsigned digit = list.digit(list[i]);
    if (digit == kNoCode) continue;
    atomicAdd(&count[digit], 1u);
  }
  __syncthreads();
  sums.digits[static_cast<int64_t>(blockIdx.x) * kDigits + threadIdx.x] = count[threadIdx.x];
}

// A block for each group; threads (part of the blocks, digit).
static __global__ void __launch_bounds__(kScanThreads) scan_kernel(Sums sums) {
  SHARED(unsigned, part_sum, [kScanParts][kDigits]);
  SHARED(unsigned, warp_sum, [kWarps]);
  SHARED(unsigned, base, [kDigits]);
  const int64_t g = blockIdx.x, stride = sums.groups * kDigits;
  const int digit = threadIdx.x % kDigits, part = threadIdx.x / kDigits, lane = threadIdx.x % 32;
  const int64_t first = sums.blocks * part / kScanParts, end = sums.blocks * (part + 1) / kScanParts;
  unsigned* column = sums.digits + g * kDigits + digit;
  unsigned sum = 0;
#pragma unroll 8
  for (int64_t b = first; b < end; ++b) sum += column[b * stride];
  part_sum[part][digit] = sum;
  __syncthreads();
  unsigned before = 0;  // rows of lower digits, as soon as all of them are added
  if (part == 0) {
    unsigned total = 0;
    for (int p = 0; p < kScanParts; ++p) total += part_sum[p][digit];
    before = total;
    for (int apart = 1; apart < 32; apart *= 2) {
      const unsigned left = __shfl_up_sync(kAllLanes, before, apart);
      if (lane >= apart) before += left;
    }
    if (lane == 31) warp_sum[digit / 32] = before;
    before -= total;
  }
  __syncthreads();
  if (part == 0) {
    for (int w = 0; w < digit / 32; ++w) before += warp_sum[w];
    base[digit] = before;
  }
  __syncthreads();
  unsigned at = base[digit];
  for (int p = 0; p < part; ++p) at += part_sum[p][digit];
  for (int64_t b = first; b < end; b += 8) {
    unsigned count[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) count[j] = b + j < end ? column[(b + j) * stride] : 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (b + j < end) column[(b + j) * stride] = at;
      at += count[j];
    }
  }
  if (threadIdx.x == kScanThreads - 1) sums.kept[g] = at;
}

static __global__ void __launch_bounds__(kDigits) place_kernel(Sums sums, int pass) {
  SHARED(unsigned, count, [kWarps][kDigits]);  // rows of a warp; then where its first one goes
  const int64_t g = blockIdx.x % sums.groups, first = blockIdx.x / sums.groups * kTile;
  const int64_t end = length_of(sums, pass, g);
  const List list = list_of(sums, pass, g);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int digit = lane; digit < kDigits; digit += 32) count[warp][digit] = 0;
  u64 pair[kItems];
  unsigned digit[kItems], rank[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int64_t i = first + (warp * kItems + j) * 32 + lane;
    pair[j] = i < end ? list[i] : ~u64{0};
    digit[j] = list.digit(pair[j]);
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const bool placed = digit[j] != kNoCode;
    unsigned alike = __ballot_sync(kAllLanes, placed);
    for (int bit = 0; bit < list.bits; ++bit) {
      const bool set = digit[j] >> bit & 1;
      const unsigned votes = __ballot_sync(kAllLanes, set);
      alike &= set ? votes : ~votes;
    }
    const int before = __popc(alike & ((1u << lane) - 1));
    if (placed) rank[j] = count[warp][digit[j]] + before;
    __syncwarp();
    if (placed && before == 0) count[warp][digit[j]] += __popc(alike);
    __syncwarp();
  }
  __syncthreads();
  unsigned at = sums.digits[static_cast<int64_t>(blockIdx.x) * kDigits + threadIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const unsigned mine = count[w][threadIdx.x];
    count[w][threadIdx.x] = at;
    at += mine;
  }
  __syncthreads();
  u64* to = sums.after(pass + 1) + g * sums.rows;
#pragma unroll
  for (int j = 0; j < kItems; ++j)
    if (digit[j] != kNoCode) to[count[warp][digit[j]] + rank[j]] = pair[j];
}

// starts[g, k] = how many sorted rows have a lower code.
static __global__ void __launch_bounds__(kSumThreads) starts_kernel(Sums sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t g = quotient(i, sums.codes + 1), code = i - g * (sums.codes + 1);
  if (g >= sums.groups) return;
  const u64* sorted = sums.sorted() + g * sums.rows;
  unsigned low = 0, high = sums.kept[g];
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (code_of(sorted[middle]) < code)
      low = middle + 1;
    else
      high = middle;
  }
  sums.starts[i] = low;
}

void sort_rows(Call& call, const Sums& sums) {
  const dim3 grid(static_cast<unsigned>(sums.blocks * sums.groups)), block(kDigits);
  for (int pass = 0; pass < sums.passes; ++pass) {
    launch(call, count_kernel, grid, block, 0, sums, pass);
    launch(call, scan_kernel, dim3(static_cast<unsigned>(sums.groups)), dim3(kScanThreads), 0, sums);
    launch(call, place_kernel, grid, block, 0, sums, pass);
  }
  launch(call, starts_kernel, blocks_for(sums.groups * (sums.codes + 1), kSumThreads), dim3(kSumThreads), 0, sums);
}

void sum_rows(Call& call, const Sums& sums, const PlainRows& rows, const SumsOut& out) {
  sum_rows_of(call, sums, rows, out);
}

TOKENFLOW_END
