// ema_update: the exponential moving average of a batch's counts and sums, and the codebook that follows, in place:
//   ema_counts = d ema_counts + (1 - d) counts,  ema_sums likewise,  n = sum_k ema_counts_k
//   codebook_k = ema_sums_k / ((ema_counts_k + eps) / (n + K eps) n), unit for cosine, where counts_k > 0
// share_kernel has a warp for each 64th of a group's codes, which adds their counts one after another in double, as the
// CPU does: n has its bits. update_kernel has eight lanes for a code; one warp of a block makes its 32 divisors.
// Bytes a code: 3 (C + 1) numbers read, 2 (C + 1) written. K = 32768, C = 32: 22 MB, 11 us on A100 (2.0 TB/s), 6.5 us
// on H100 (3.35 TB/s); before it a chain of K / 64 additions in double, some 10 cycles each: 4 us. Paper arithmetic,
// never run on a GPU. Source: van den Oord et al. 1711.00937, A.1.
#include "common/ops.h"
#include "cuda/rows.cuh"

TOKENFLOW_BEGIN

constexpr int64_t kShares = 64;  // of the codes

struct Ema {
  float *codebook, *ema_counts, *ema_sums;  // [G, K, C], [G, K], [G, K, C]
  const float *counts, *sums;
  int64_t groups, codes, channels;
  Tables tables;
  float keep, take;  // d, 1 - d
  double eps;
  bool normalize_mean;
  double* shares;  // [G, 64]
};

static __global__ void __launch_bounds__(32) share_kernel(Ema job) {
  const int64_t g = blockIdx.x / kShares, j = blockIdx.x % kShares;
  const int64_t end = job.codes * (j + 1) / kShares;
  double share = 0;
  for (int64_t first = job.codes * j / kShares; first < end; first += 32) {
    const int64_t at = g * job.codes + first + threadIdx.x;
    double mine = 0;
    if (first + threadIdx.x < end)
      mine = job.ema_counts[at] = job.keep * job.ema_counts[at] + job.take * job.counts[at];
#pragma unroll
    for (int lane = 0; lane < 32; ++lane) share += __shfl_sync(kAllLanes, mine, lane);
  }
  if (threadIdx.x == 0) job.shares[blockIdx.x] = share;
}

static __global__ void __launch_bounds__(kTeamThreads, 4) update_kernel(Ema job) {
  SHARED(float, divisors, [kTeamRows]);
  const int64_t blocks = (job.codes + kTeamRows - 1) / kTeamRows, g = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kTeamRows;
  if (threadIdx.x < kTeamRows && first + threadIdx.x < job.codes) {
    double total = 0;
#pragma unroll 8
    for (int64_t j = 0; j < kShares; ++j) total += job.shares[g * kShares + j];
    const double average = job.ema_counts[g * job.codes + first + threadIdx.x];
    divisors[threadIdx.x] = static_cast<float>((average + job.eps) / (total + job.codes * job.eps) * total);
  }
  __syncthreads();
  const bool there = first + team_of_block() < job.codes;
  const int64_t code = g * job.codes + (there ? first + team_of_block() : first);
  const bool moves = there && job.counts[code] > 0;
  const float divisor = divisors[there ? team_of_block() : 0];
  float* const codebook = job.codebook + code * job.channels;
  float* const ema_sums = job.ema_sums + code * job.channels;
  const float* const sums = job.sums + code * job.channels;
  // A lane reads again only what it wrote itself.
  for (int64_t t = 0, d = 0; t < job.tables.count; d += job.tables.width[t++]) {
    const int64_t width = job.tables.width[t];
    // The mean's length cancels: unit(sum / count) = unit(sum).
    const float length = job.normalize_mean ? team_norm(width, [&](int64_t i) { return sums[d + i]; }) : 1;
    for (int64_t i = d + lane_of_team(); there && i < d + width; i += kTeam)
      ema_sums[i] = job.keep * ema_sums[i] + job.take * (job.normalize_mean ? sums[i] / length : sums[i]);
    const float norm =
        job.tables.unit ? team_norm(width, [&](int64_t i) { return there ? ema_sums[d + i] / divisor : 0; }) : 1;
    for (int64_t i = d + lane_of_team(); moves && i < d + width; i += kTeam)
      codebook[i] = job.tables.unit ? ema_sums[i] / divisor / norm : ema_sums[i] / divisor;
  }
}

Error ema_update(Call& call, View codebook, View ema_counts, View ema_sums, View counts, View sums, Tables tables,
                 double decay, double eps, bool normalize_mean) noexcept {
  codebook = with_groups(codebook);
  if (!dense_on(codebook, 3) || codebook.type != kFloat32 || !covers(tables, codebook.shape[2]))
    return "ema_update_: codebook: wanted contiguous float32 [G, K, C] on CUDA";
  const int64_t groups = codebook.shape[0], codes = codebook.shape[1], channels = codebook.shape[2];
  const int64_t count = groups * codes, numbers = count * channels;
  if (!holds_on(ema_counts, kFloat32, count) || !holds_on(counts, kFloat32, count) ||
      !holds_on(ema_sums, kFloat32, numbers) || !holds_on(sums, kFloat32, numbers))
    return "ema_update_: wanted counts [G, K] and sums [G, K, C] of the codebook's type";
  double* shares = take<double>(call, groups * kShares);
  if (call.counting) return nullptr;
  const Ema job = {static_cast<float*>(codebook.data),
                   static_cast<float*>(ema_counts.data),
                   static_cast<float*>(ema_sums.data),
                   static_cast<const float*>(counts.data),
                   static_cast<const float*>(sums.data),
                   groups,
                   codes,
                   channels,
                   tables,
                   static_cast<float>(decay),
                   static_cast<float>(1.0 - decay),
                   eps,
                   normalize_mean,
                   shares};
  launch(call, share_kernel, blocks_for(groups * kShares, 1), dim3(32), 0, job);
  launch(call, update_kernel, blocks_for(groups * ((codes + kTeamRows - 1) / kTeamRows), 1), dim3(kTeamThreads), 0,
         job);
  return nullptr;
}

TOKENFLOW_END
