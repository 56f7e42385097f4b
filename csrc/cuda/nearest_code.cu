// nearest_code: indices[n, g, j] = id of the j-th best canonical score of row x[n, g] over codes [lo, hi) of group g.
// Launches: codes packed once; for every j a search above the last key, and its keys written out. Bytes beside the
// search's (search.cu): 16 a row and j for keys and ids, 4 where scores are wanted. Paper arithmetic in search.cu.
#include "common/ops.h"
#include "cuda/search.cuh"

TOKENFLOW_BEGIN

struct Found {
  const u64* keys;  // [N G] of this pass
  u64* next;        // of the next one, which are filled here
  int64_t* counts;  // of the call, or none
  int64_t rows, lo, topk, pass;
  int64_t* indices;  // [N G, topk]
  float* scores;     // or none
};

static __global__ void __launch_bounds__(256) unpack_kernel(Found job) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (n >= job.rows) return;
  if (job.next) job.next[n] = kNoKey;
  const int64_t id = found_id(job.keys[n]), out = n * job.topk + job.pass;
  job.indices[out] = job.lo + (id < 0 ? job.pass : id);
  if (job.scores) job.scores[out] = id < 0 ? NAN : score_of(job.keys[n]);
  if (id < 0 && job.pass == 0 && job.counts) {
    atomicAdd(reinterpret_cast<u64*>(job.counts + 1), u64{1});
  }
}

Error nearest_code(Call& call, View x, View codebook, Tables tables, int64_t topk, int64_t lo, int64_t hi, View indices,
                   View scores) noexcept {
  x = by_group(x, codebook.rank == 3, 1);
  codebook = with_groups(codebook);
  if (!dense_on(x, 3) || !dense_on(codebook, 3) || !floating(x) || x.type == kFloat64)
    return "nearest_code: x: wanted contiguous float32, float16 or bfloat16 [..., G, C] on CUDA";
  if (codebook.type != kFloat32) return "nearest_code: codebook: wanted float32 on CUDA";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || !covers(tables, x.shape[2]))
    return "nearest_code: codebook: wanted the groups and the width of x";
  if (lo < 0 || hi > codebook.shape[1] || topk < 1 || hi - lo < topk) return "nearest_code: window: wanted topk codes";
  const int64_t rows = x.shape[0] * x.shape[1];
  if (!holds_on(indices, kInt64, rows * topk) || (scores.type != kNone && !holds_on(scores, kFloat32, rows * topk)))
    return "nearest_code: wanted outputs that fit the rows";
  const Searched codes = take_codes(call, codebook, tables, lo, hi, x.shape[0]);
  u64* keys[2] = {take<u64>(call, rows), take<u64>(call, topk > 1 ? rows : 0)};
  if (call.counting || rows == 0) return nullptr;
  const SearchedRows searched = {x.data, x.type, x.shape[0], x.shape[1] * x.shape[2]};
  pack_codes(call, codes, keys[0], rows);
  for (int64_t pass = 0; pass < topk; ++pass) {
    u64 *const now = keys[pass % 2], *const other = keys[(pass + 1) % 2];
    search_rows(call, codes, searched, now, pass > 0 ? other : nullptr);
    launch(
        call, unpack_kernel, dim3(static_cast<unsigned>((rows + 255) / 256)), dim3(256), 0,
        Found{now, pass + 1 < topk ? other : nullptr, call.counts, rows, lo, topk, pass,
              static_cast<int64_t*>(indices.data), static_cast<float*>(scores.type == kNone ? nullptr : scores.data)});
  }
  return nullptr;
}

TOKENFLOW_END
