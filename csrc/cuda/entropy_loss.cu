// entropy_loss and its backward; equations in cpu/entropy_loss.cpp, passes in softmax.cuh.
// Forward: pack rows and codes, the rows' best logits, sweep<rows> with a = u, then log Z_n and H_n = log Z_n - <u>_n;
// sweep<codes> gives the means m_k; both losses are added in double over blocks, then by one block. Nine launches.
// Backward, with t_k = g2' (log(m_k + eps) + m_k / (m_k + eps)), g' = -g / (N G): pack, best logits, t, sweep<rows>
// with a = t, then offset_n = g1' H_n - <t>_n, and for each gradient spread with first = g1', a = t, and the sum of its
// ranges where blocks share a tile: eight to ten launches.
// Per pair: forward 2 C multiply-adds and 2 exps, backward 5 C and 3. N = 4096, K = 32768, C = 8 / 40, forward: 2.1 /
// 10.7 GFMA and 0.27 G exps: at least 0.22 / 1.1 ms on an A100, 0.064 / 0.32 ms on an H100, backward 2.5 times that;
// at C = 8 the exps and what is around them take as long again or more. Bytes: x, codes, gradients once, (2 C + 4) (N +
// K) numbers of scratch, and at most 512 tiles of 64 C partial sums: 11 MB and 8 us on an A100 at C = 40.
// Paper arithmetic, never run on a GPU. Source: Yu et al., 2310.05737 (entropy); TokenFlow, 2412.03069.
#include "common/ops.h"
#include "cuda/block_sum.cuh"
#include "cuda/softmax_spread.cuh"

TOKENFLOW_BEGIN

// The logarithm of a mean of probabilities plus eps.
static __device__ inline float log_of(float value) { return logf(value > FLT_MIN ? value : FLT_MIN); }

// log Z_n and H_n of rows [G, N], and the sum of a block's H_n.
static __global__ void __launch_bounds__(kSummands)
    entropies_kernel(Softmax job, int ranges, float* log_totals, float* entropies, double* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSummands + threadIdx.x;
  const int64_t g = quotient(i, job.rows.count), n = i - g * job.rows.count;
  float entropy = 0;
  if (g < job.groups) {
    const Sum sum(job, job.rows, ranges, g, n);
    const float log_total = sum.log_total(), rest = log_total - sum.mean();
    entropy = rest > 0 ? rest : 0;
    job.log_total[g * job.rows.padded() + n] = log_total;
    log_totals[i] = log_total;
    entropies[i] = entropy;
  }
  const double all = sum_of_block(entropy);
  if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

// m_k of codes [G, K], and the sum of a block's -m_k log(m_k + eps).
static __global__ void __launch_bounds__(kSummands)
    means_kernel(Softmax job, int ranges, float eps, float* means, double* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSummands + threadIdx.x;
  const int64_t g = quotient(i, job.codes.count), k = i - g * job.codes.count;
  double part = 0;
  if (g < job.groups) {
    const Sum sum(job, job.codes, ranges, g, k);
    const float mean = job.rows.count ? static_cast<float>(sum.total / static_cast<double>(job.rows.count)) : 0;
    means[i] = mean;
    part = -static_cast<double>(mean) * log_of(mean + eps);
  }
  const double all = sum_of_block(part);
  if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

// t_k of codes and what pads them.
static __global__ void __launch_bounds__(kTileThreads) terms_kernel(Softmax job, const float* means, float eps) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  const int64_t g = quotient(i, job.codes.padded()), k = i - g * job.codes.padded();
  if (g >= job.groups) return;
  const float mean = k < job.codes.count ? means[g * job.codes.count + k] : 0, shifted = mean + eps;
  job.term[i] = mean > 0 ? job.scale * job.upstream[1] * (log_of(shifted) + mean / shifted) : 0;
}

static __global__ void __launch_bounds__(kTileThreads) offsets_kernel(Softmax job, int ranges, const float* entropies) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  const int64_t g = quotient(i, job.rows.count), n = i - g * job.rows.count;
  if (g >= job.groups) return;
  job.offset[g * job.rows.padded() + n] =
      job.scale * job.upstream[0] * entropies[i] - Sum(job, job.rows, ranges, g, n).mean();
}

static Error check(const View& x, const View& codebook, const View& ids) {
  if (!dense_on(x, 3) || !dense_on(codebook, 3) || x.type != kFloat32 || codebook.type != kFloat32)
    return "entropy_loss: wanted contiguous float32 x [N, G, C] and codebook [G, K, C] on CUDA";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || codebook.shape[1] < 1 || x.shape[2] < 1)
    return "entropy_loss: codebook: wanted the groups and the width of x, and at least one code and channel";
  if (!dense_on(ids, 2) || ids.type != kInt64 || ids.shape[0] != x.shape[0] || ids.shape[1] != x.shape[1])
    return "entropy_loss: ids: wanted int64 [N, G]";
  if (x.shape[0] * x.shape[1] > kMostRows || codebook.shape[0] * codebook.shape[1] > kMostRows)
    return "entropy_loss: wanted at most 2^31 rows and codes on CUDA";
  return nullptr;
}

static bool saved(const View& x, const View& codebook, const View& log_totals, const View& entropies,
                  const View& means) {
  const int64_t rows = x.shape[0] * x.shape[1];
  return holds_on(log_totals, kFloat32, rows) && holds_on(entropies, kFloat32, rows) &&
         holds_on(means, kFloat32, codebook.shape[0] * codebook.shape[1]);
}

static void prepare(Call& call, const Softmax& s, const View& x, const View& codebook, const View& ids,
                    const void* log_totals) {
  pack_side(call, s, true, false, x.data, s.channels);
  pack_side(call, s, false, false, codebook.data, s.channels);
  tops(call, s, codebook, ids, log_totals);
}

Error entropy_loss(Call& call, View x, View codebook, View ids, double eps, View losses, View log_totals,
                   View entropies, View means) noexcept {
  if (const Error error = check(x, codebook, ids)) return error;
  if (!saved(x, codebook, log_totals, entropies, means) || !holds_on(losses, kFloat32, 2))
    return "entropy_loss: wanted outputs that fit the rows and codes";
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = codebook.shape[1];
  const Softmax s = take_softmax(call, rows, codes, groups, x.shape[2], 0, false, false);
  const dim3 row_blocks = blocks_for(rows * groups, kSummands), code_blocks = blocks_for(codes * groups, kSummands);
  double *row_sums = take<double>(call, row_blocks.x), *code_sums = take<double>(call, code_blocks.x);
  if (call.counting) return nullptr;
  float* const loss = static_cast<float*>(losses.data);
  const dim3 block(kSummands);
  prepare(call, s, x, codebook, ids, nullptr);
  sweep<true, kLogits>(call, s);
  launch(call, entropies_kernel, row_blocks, block, 0, s, ranges_of(s, true).count,
         static_cast<float*>(log_totals.data), static_cast<float*>(entropies.data), row_sums);
  sweep<false, kLogits>(call, s);
  launch(call, means_kernel, code_blocks, block, 0, s, ranges_of(s, false).count, eps, static_cast<float*>(means.data),
         code_sums);
  launch(call, mean_kernel, dim3(1), block, 0, row_sums, static_cast<int64_t>(row_blocks.x), 1.0,
         static_cast<double>(rows * groups), loss);
  launch(call, mean_kernel, dim3(1), block, 0, code_sums, static_cast<int64_t>(code_blocks.x), 1.0,
         static_cast<double>(groups), loss + 1);
  return nullptr;
}

Error entropy_loss_backward(Call& call, View x, View codebook, View ids, double eps, View log_totals, View entropies,
                            View means, View grad_losses, View grad_x, View grad_codebook) noexcept {
  if (const Error error = check(x, codebook, ids)) return error;
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = codebook.shape[1], channels = x.shape[2];
  const bool to_rows = grad_x.type != kNone, to_codes = grad_codebook.type != kNone;
  if (!saved(x, codebook, log_totals, entropies, means) || !holds_on(grad_losses, kFloat32, 2) ||
      (to_rows && !holds_on(grad_x, kFloat32, rows * groups * channels)) ||
      (to_codes && !holds_on(grad_codebook, kFloat32, groups * codes * channels)))
    return "entropy_loss_backward: wanted gradients of the shapes and type of x and codebook";
  Softmax s = take_softmax(call, rows, codes, groups, channels, 0, to_rows, to_codes);
  s.upstream = static_cast<const float*>(grad_losses.data);
  s.scale = static_cast<float>(-1.0 / static_cast<double>(rows > 0 ? rows * groups : 1));
  if (call.counting) return nullptr;
  const dim3 block(kTileThreads);
  prepare(call, s, x, codebook, ids, log_totals.data);
  launch(call, terms_kernel, blocks_for(groups * s.codes.padded(), kTileThreads), block, 0, s,
         static_cast<const float*>(means.data), eps);
  sweep<true, kTerms>(call, s);
  launch(call, offsets_kernel, blocks_for(rows * groups, kTileThreads), block, 0, s, ranges_of(s, true).count,
         static_cast<const float*>(entropies.data));
  spread<true, kTerms>(call, s, grad_x);
  spread<false, kTerms>(call, s, grad_codebook);
  return nullptr;
}

TOKENFLOW_END
