// quantize: search, gather, straight-through value and loss in one call; the search is that of search.cuh.
//   y = row as searched, q = its code;  loss = loss_weight * mean((q - y)^2) over all N G C numbers
// Epilogue: eight lanes a row make y and q unit where they are to be, in the canonical order, and write the id, q in
// the type of x, and what is kept: y, q, code norms. The squares of a row are added as the CPU adds them, then rows
// in double, 32 a block, and blocks by 256 threads, in a fixed order. A row with NaN or inf gets the lowest id, NaN, no
// part in the loss, and is counted.
// Bytes a row of C numbers of b bytes beside the search: b C + 8 read, each code once where the cache holds the table;
// b C + 8 written, 4 C for y, 4 (C + T) for backward. N = 262144, C = 32, float32, for backward: 106 MB, 53 us on A100
// (2.0 TB/s), 32 us on H100 (3.35 TB/s). Where rows are unit, 24 shuffles of a warp for 8 numbers of 4 rows: 6.3 M, 41
// and 27 us at one a cycle and multiprocessor, while memory is read. The search of K = 32768 codes takes some 250 times
// as long. Paper arithmetic, never run on a GPU. Source: tokenflow.md 1.2.
#include "common/ops.h"
#include "cuda/block_sum.cuh"
#include "cuda/rows.cuh"
#include "cuda/search.cuh"

TOKENFLOW_BEGIN

struct Epilogue {
  const void* x;  // [N G, C]
  Type type;
  const float* codebook;  // [G, K, C]
  const u64* keys;        // [N G]
  int64_t count, groups, codes, channels;
  Tables tables;
  void* quantized;                           // [N G, C] of that type
  int64_t* indices;                          // [N G]
  float *searched, *code_rows, *code_norms;  // [N G, C] twice, [N G, T]; or null
  double* squares;                           // of each block
  u64* bad;                                  // or null
};

static __global__ void __launch_bounds__(kTeamThreads, 4) epilogue_kernel(Epilogue job) {
  SHARED(double, squares, [kTeamRows]);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kTeamRows + team_of_block();
  const bool there = mine < job.count;
  const int64_t row = there ? mine : job.count - 1, found = found_id(job.keys[row]), id = found < 0 ? 0 : found;
  const float* code = job.codebook + (group_of(row, job.groups) * job.codes + id) * job.channels;
  const int64_t at = row * job.channels;
  const auto x = [&](int64_t d) { return number(job.x, job.type, at + d); };
  const bool first_lane = there && lane_of_team() == 0;
  float square = 0;
  for (int64_t t = 0, from = 0; t < job.tables.count; from += job.tables.width[t++]) {
    const int64_t width = job.tables.width[t];
    const float norm = job.tables.unit ? team_norm(width, [&](int64_t d) { return x(from + d); }) : 1;
    const float code_norm = job.tables.unit_codes ? team_norm(width, [&](int64_t d) { return code[from + d]; }) : 1;
    if (job.code_norms && first_lane) job.code_norms[row * job.tables.count + t] = code_norm;
    for (int64_t first = 0; first < width; first += kTeam) {
      const int64_t d = from + first + lane_of_team();
      float gap = 0;
      if (d < from + width) {
        const float y = job.tables.unit ? x(d) / norm : x(d);
        const float q = found < 0 ? NAN : job.tables.unit_codes ? code[d] / code_norm : code[d];
        gap = q - y;
        if (there) {
          set_number(job.quantized, job.type, at + d, q);
          if (job.searched) job.searched[at + d] = y;
          if (job.code_rows) job.code_rows[at + d] = q;
        }
      }
#pragma unroll
      for (int j = 0; j < kTeam; ++j) square += __shfl_sync(kAllLanes, gap * gap, j, kTeam);
    }
  }
  const unsigned bad = __ballot_sync(kAllLanes, first_lane && found < 0);
  if (first_lane) job.indices[row] = id;
  if (lane_of_team() == 0) squares[team_of_block()] = there && found >= 0 ? square : 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int r = 0; r < kTeamRows; ++r) sum += squares[r];
    job.squares[blockIdx.x] = sum;
  }
  if (!job.bad || bad == 0 || threadIdx.x % 32) return;
  atomicAdd(job.bad, static_cast<u64>(__popc(bad)));
}

Error quantize(Call& call, View x, View codebook, Tables tables, double loss_weight, View quantized, View indices,
               View loss, View searched, View code_rows, View code_norms) noexcept {
  x = by_group(x, codebook.rank == 3, 1);
  codebook = with_groups(codebook);
  if (!dense_on(x, 3) || !dense_on(codebook, 3) || !floating(x))
    return "quantize: wanted contiguous floats x [..., G, C] and codebook [G, K, C]";
  if (x.type == kFloat64 || codebook.type != kFloat32)
    return "quantize: wanted x of float32, float16 or bfloat16 and a codebook of float32 on CUDA";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || !covers(tables, x.shape[2]))
    return "quantize: codebook: wanted the groups and the width of x";
  if (codebook.shape[1] < 1) return "quantize: codebook: wanted at least one code";
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], count = rows * groups;
  const int64_t numbers = count * channels;
  if (count > kMostRows) return "quantize: x: wanted at most 2^31 rows on CUDA";
  if (!holds_on(quantized, x.type, numbers) || !holds_on(indices, kInt64, count) || !holds_on(loss, kFloat32, 1) ||
      (searched.type != kNone && !holds_on(searched, kFloat32, numbers)) ||
      (code_rows.type != kNone && !holds_on(code_rows, kFloat32, numbers)) ||
      (code_norms.type != kNone && !holds_on(code_norms, kFloat32, count * tables.count)))
    return "quantize: wanted outputs that fit the rows";
  const Searched codes = take_codes(call, codebook, tables, 0, codebook.shape[1], rows);
  u64* keys = take<u64>(call, count);
  const dim3 blocks = blocks_for(count, kTeamRows);
  double* squares = take<double>(call, blocks.x);
  if (call.counting) return nullptr;
  pack_codes(call, codes, keys, count);
  search_rows(call, codes, {x.data, x.type, rows, groups * channels}, keys);
  const Epilogue job = {x.data,
                        x.type,
                        static_cast<const float*>(codebook.data),
                        keys,
                        count,
                        groups,
                        codebook.shape[1],
                        channels,
                        tables,
                        quantized.data,
                        static_cast<int64_t*>(indices.data),
                        static_cast<float*>(searched.data),
                        static_cast<float*>(code_rows.data),
                        static_cast<float*>(code_norms.data),
                        squares,
                        call.counts ? reinterpret_cast<u64*>(call.counts + 1) : nullptr};
  launch(call, epilogue_kernel, blocks, dim3(kTeamThreads), 0, job);
  launch(call, mean_kernel, dim3(1), dim3(kSummands), 0, squares, static_cast<int64_t>(blocks.x), loss_weight,
         static_cast<double>(numbers), static_cast<float*>(loss.data));
  return nullptr;
}

TOKENFLOW_END
