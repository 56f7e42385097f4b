// lookup: rows[n, g] = codebook[g, indices[n, g]] of any float type, bytes copied as they are; lookup_backward:
//   grad_codebook[g, k] = sum over the rows n with indices[n, g] = k of grad_rows[n, g], in row order (sums.cuh)
// A thread copies one piece of a row, 16 bytes where rows and addresses allow, else 4 or 2. An id outside the table
// reads as a row of NaN, is counted, and sends no gradient.
// Bytes a row of w bytes: 8 + w read, each code once where the cache holds the table, and w written. N = 262144,
// w = 128: 69 MB, 35 us on A100 (2.0 TB/s), 21 us on H100 (3.35 TB/s). Backward: 8 bytes a row for the ids, and what
// sums.cuh counts. Paper arithmetic, never run on a GPU.
#include "common/ops.h"
#include "cuda/sums.cuh"

TOKENFLOW_BEGIN

static int64_t bytes_of(Type type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

static __device__ inline void fill_ones(uint4* to) { *to = make_uint4(~0u, ~0u, ~0u, ~0u); }
static __device__ inline void fill_ones(unsigned* to) { *to = ~0u; }
static __device__ inline void fill_ones(uint16_t* to) { *to = 0xffff; }

// pieces: of a row; count: rows of all groups.
template <class Piece>
static __global__ void __launch_bounds__(kSumThreads)
    lookup_kernel(const int64_t* indices, const Piece* codebook, Piece* rows, int64_t count, int64_t groups,
                  int64_t codes, int64_t pieces, u64* outside) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t row = quotient(i, pieces), piece = i - row * pieces;
  if (row >= count) return;
  const int64_t id = indices[row], g = group_of(row, groups);
  if (id >= 0 && id < codes) {
    rows[i] = codebook[(g * codes + id) * pieces + piece];
    return;
  }
  fill_ones(rows + i);  // NaN in every float type
  if (piece || !outside) return;
  atomicAdd(outside, u64{1});
}

template <class Piece>
static void copy_rows(Call& call, const View& indices, const View& codebook, const View& rows, int64_t bytes) {
  const int64_t count = indices.shape[0] * indices.shape[1], pieces = bytes / static_cast<int64_t>(sizeof(Piece));
  launch(call, lookup_kernel<Piece>, blocks_for(count * pieces, kSumThreads), dim3(kSumThreads), 0,
         static_cast<const int64_t*>(indices.data), static_cast<const Piece*>(codebook.data),
         static_cast<Piece*>(rows.data), count, codebook.shape[0], codebook.shape[1], pieces,
         reinterpret_cast<u64*>(call.counts));
}

Error lookup(Call& call, View indices, View codebook, View rows) noexcept {
  indices = by_group(indices, codebook.rank == 3, 0);
  codebook = with_groups(codebook);
  if (!dense_on(indices, 2) || !dense_on(codebook, 3) || indices.type != kInt64 || !floating(codebook))
    return "lookup: wanted contiguous int64 indices [..., G] and floats codebook [G, K, C]";
  const int64_t count = indices.shape[0] * indices.shape[1];
  if (indices.shape[1] != codebook.shape[0]) return "lookup: indices: wanted the groups of the codebook";
  if (count > kMostRows) return "lookup: indices: wanted at most 2^31 on CUDA";
  if (!holds_on(rows, codebook.type, count * codebook.shape[2]))
    return "lookup: rows: wanted [..., G, C] of the codebook's type";
  if (call.counting) return nullptr;
  const int64_t bytes = codebook.shape[2] * bytes_of(codebook.type);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(codebook.data) | reinterpret_cast<uintptr_t>(rows.data);
  const uintptr_t together = addresses | static_cast<uintptr_t>(bytes);
  if (together % 16 == 0)
    copy_rows<uint4>(call, indices, codebook, rows, bytes);
  else if (together % 4 == 0)
    copy_rows<unsigned>(call, indices, codebook, rows, bytes);
  else
    copy_rows<uint16_t>(call, indices, codebook, rows, bytes);
  return nullptr;
}

static __global__ void __launch_bounds__(kSumThreads) keys_kernel(Sums sums, const int64_t* indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t n = quotient(i, sums.groups), g = i - n * sums.groups;
  if (n >= sums.rows) return;
  const int64_t id = indices[i];
  sums.keys[g * sums.rows + n] = id >= 0 && id < sums.codes ? static_cast<unsigned>(id) : kNoCode;
}

Error lookup_backward(Call& call, View indices, View grad_rows, View grad_codebook) noexcept {
  const bool grouped = grad_codebook.rank == 3;
  indices = by_group(indices, grouped, 0), grad_rows = by_group(grad_rows, grouped, 1);
  grad_codebook = with_groups(grad_codebook);
  if (!dense_on(indices, 2) || !dense_on(grad_rows, 3) || !dense_on(grad_codebook, 3) || indices.type != kInt64 ||
      !floating(grad_rows))
    return "lookup_backward: wanted contiguous int64 indices [..., G], floats grad_rows [..., G, C], "
           "grad_codebook [G, K, C]";
  const int64_t rows = indices.shape[0], groups = grad_codebook.shape[0], codes = grad_codebook.shape[1];
  if (indices.shape[1] != groups || grad_rows.shape[0] != rows || grad_rows.shape[1] != groups ||
      grad_rows.shape[2] != grad_codebook.shape[2] || grad_codebook.type != grad_rows.type || codes < 1)
    return "lookup_backward: wanted gradients that fit the rows";
  if (grad_rows.type == kFloat64)
    return "lookup_backward: grad_rows: wanted float32, float16 or bfloat16 on CUDA, got float64";
  if (rows * groups > kMostRows || codes > kMostRows)
    return "lookup_backward: wanted at most 2^31 indices and codes on CUDA";
  const Sums sums = take_sums(call, rows, groups, codes, grad_rows.shape[2]);
  if (call.counting) return nullptr;
  launch(call, keys_kernel, blocks_for(rows * groups, kSumThreads), dim3(kSumThreads), 0, sums,
         static_cast<const int64_t*>(indices.data));
  sort_rows(call, sums);
  sum_rows(call, sums, PlainRows{grad_rows.data, grad_rows.type, groups, grad_rows.shape[2]},
           SumsOut{grad_codebook.data, grad_codebook.type, nullptr});
  return nullptr;
}

TOKENFLOW_END
