// code_statistics: counts[g, k] = rows of code k, sums[g, k] = their sum. Rows with NaN or inf are counted, not added.
// Eight lanes a row look whether it is finite and write its key; then the sums by code (sums.cuh). Counts alone are
// added by atomics on integers, and a warp whose 32 rows have one code adds once, as in a codebook that collapsed.
// Bytes a row of C numbers of b bytes: 8 + b C read, 4 written; then what sums.cuh counts, which reads the rows again
// (up to 40 MB of them from the second-level cache on A100, 50 MB on H100). N = 262144, K = 32768, C = 32, float32:
// 87 MB, 44 us on A100 (2.0 TB/s), 26 us on H100 (3.35 TB/s). Counts alone: 38 MB, 19 and 11 us. Paper arithmetic,
// never run on a GPU.
#include "common/ops.h"
#include "cuda/sums.cuh"

TOKENFLOW_BEGIN

struct Hits {
  const void* x;
  Type type;
  const int64_t* indices;
  int64_t rows, groups, codes, channels;
  unsigned* keys;    // [G, N]
  unsigned* totals;  // [G, K], which become zeros; or null
  u64* counts;       // of ids outside, of rows that are not finite; or null
};

static __global__ void __launch_bounds__(kTeamThreads) hits_kernel(Hits job) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTeamThreads + threadIdx.x;
  if (job.totals && thread < job.groups * job.codes) job.totals[thread] = 0;
  const int64_t count = job.rows * job.groups, row = thread / kTeam;
  if (static_cast<int64_t>(blockIdx.x) * kTeamRows >= count) return;
  bool bad = false;
  if (row < count)
    for (int64_t d = lane_of_team(); d < job.channels; d += kTeam)
      bad |= !finite(number(job.x, job.type, row * job.channels + d));
  bad = any_of_team(bad);
  if (lane_of_team() || row >= count) return;
  const int64_t id = job.indices[row], g = group_of(row, job.groups);
  const bool inside = id >= 0 && id < job.codes;
  job.keys[g * job.rows + static_cast<unsigned>(row) / static_cast<unsigned>(job.groups)] =
      inside && !bad ? static_cast<unsigned>(id) : kNoCode;
  if (!job.counts || (inside && !bad)) return;
  atomicAdd(job.counts + inside, u64{1});
}

static __global__ void __launch_bounds__(kSumThreads)
    add_hits_kernel(const unsigned* keys, int64_t rows, int64_t groups, int64_t codes, unsigned* totals) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x, g = quotient(i, rows);
  const unsigned key = g < groups ? keys[i] : kNoCode;
  const int64_t at = key == kNoCode ? -1 : g * codes + key;
  const bool one = __all_sync(kAllLanes, at == __shfl_sync(kAllLanes, at, 0));
  if (at < 0 || (one && threadIdx.x % 32)) return;
  atomicAdd(totals + at, one ? 32u : 1u);
}

static __global__ void __launch_bounds__(kSumThreads)
    counts_kernel(const unsigned* totals, int64_t numbers, float* counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i < numbers) counts[i] = static_cast<float>(totals[i]);
}

Error code_statistics(Call& call, View x, View indices, View counts, View sums) noexcept {
  const bool grouped = counts.rank == 2;
  x = by_group(x, grouped, 1), indices = by_group(indices, grouped, 0), counts = as_rows(counts);
  if (!dense_on(x, 3) || !dense_on(indices, 2) || !dense_on(counts, 2) || !floating(x) || indices.type != kInt64)
    return "code_statistics: wanted contiguous floats x [..., G, C], int64 indices [..., G], counts [G, K]";
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = counts.shape[1], channels = x.shape[2];
  const bool sum = sums.type != kNone;
  if (x.type == kFloat64) return "code_statistics: x: wanted float32, float16 or bfloat16 on CUDA, got float64";
  if (indices.shape[0] != rows || indices.shape[1] != groups || counts.shape[0] != groups || counts.type != kFloat32 ||
      codes < 1 || channels < 1 || (sum && !holds_on(sums, kFloat32, groups * codes * channels)))
    return "code_statistics: wanted float32 outputs that fit the rows";
  if (rows * groups > kMostRows || codes > kMostRows)
    return "code_statistics: wanted at most 2^31 rows and codes on CUDA";
  const Sums space = sum ? take_sums(call, rows, groups, codes, channels) : Sums{};
  Hits job = {x.data, x.type, static_cast<const int64_t*>(indices.data), rows, groups, codes, channels, space.keys};
  if (!sum) job.keys = take<unsigned>(call, rows * groups);
  if (!sum) job.totals = take<unsigned>(call, groups * codes);
  if (call.counting) return nullptr;
  job.counts = reinterpret_cast<u64*>(call.counts);
  const int64_t teams = rows * groups * kTeam, zeros = sum ? 0 : groups * codes;
  launch(call, hits_kernel, blocks_for(teams > zeros ? teams : zeros, kTeamThreads), dim3(kTeamThreads), 0, job);
  float* out = static_cast<float*>(counts.data);
  if (sum) {
    sort_rows(call, space);
    sum_rows(call, space, PlainRows{x.data, x.type, groups, channels}, SumsOut{sums.data, kFloat32, out});
    return nullptr;
  }
  const dim3 block(kSumThreads);
  launch(call, add_hits_kernel, blocks_for(rows * groups, kSumThreads), block, 0, job.keys, rows, groups, codes,
         job.totals);
  launch(call, counts_kernel, blocks_for(groups * codes, kSumThreads), block, 0, job.totals, groups * codes, out);
  return nullptr;
}

TOKENFLOW_END
