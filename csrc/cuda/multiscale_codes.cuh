// What the ops that follow given ids begin with: the codes of all ids of a prefix, [B, L, C], read once and divided by
// their norms [B, L, T] where they are to be unit; and which scales of an image have no ids (-1 for all of them).
// Bytes per id: 8 of the id, 8 C of code and row, 4 T of norms.
#pragma once
#include "cuda/multiscale.cuh"

TOKENFLOW_BEGIN

constexpr int kPrefixRows = 64;  // rows of one scale of one image that a block has

// Whether all ids of a grid are -1. All threads of the block.
static __device__ inline bool dropped(const int64_t* ids, int cells) {
  bool present = false;
  for (int cell = threadIdx.x; cell < cells && !present; cell += kThreads) present = ids[cell] != -1;
  return !__syncthreads_or(present);
}

// Blocks (image, scale, part) of a prefix of `scales` scales: the last axis is as long as the scale needs.
struct Part {
  int64_t image, at;  // at: of the scale's first id, in [B, L]
  int scale, first, cells;
};

TOKENFLOW_DEVICE static inline int64_t parts_of(const Sizes& sizes, int scales) {
  int64_t parts = 0;
  for (int s = 0; s < scales; ++s) parts += (sizes.cells(s) + kPrefixRows - 1) / kPrefixRows;
  return parts;
}

static __device__ inline Part part_of(const Sizes& sizes, int scales, int64_t length) {
  const int64_t parts = parts_of(sizes, scales), image = blockIdx.x / parts;
  Part part = {image, image * length, 0, static_cast<int>(blockIdx.x % parts) * kPrefixRows, sizes.cells(0)};
  while (part.first >= part.cells) {
    part.first -= (part.cells + kPrefixRows - 1) / kPrefixRows * kPrefixRows;
    part.at += part.cells;
    part.cells = sizes.cells(++part.scale);
  }
  return part;
}

// codes_rows and norms of a prefix: zeros where a scale is dropped, NaN for other ids outside the table.
struct GatherPrefix {
  const int64_t* indices;  // [B, L]
  int64_t length;
  int scales;             // that have ids
  const float* codebook;  // [K, C]
  int64_t codes;
  float *code_rows, *code_norms;  // [B, L, C], [B, L, T]
  unsigned* flags;                // [B, S]: 1 where the scale is dropped
  int64_t* counts;                // [2], or null

  __device__ void operator()(const Loop& loop) const {
    SHARED(int64_t, ids, [kPrefixRows]);
    SHARED(float, norms, [kMaxTables][kPrefixRows]);
    const Tables& tables = loop.codes.tables;
    const Part part = part_of(loop.scales, scales, length);
    const int rest = part.cells - part.first, rows = rest < kPrefixRows ? rest : kPrefixRows;
    const int channels = static_cast<int>(loop.channels);
    const bool none = dropped(indices + part.at, part.cells);
    const int64_t at = part.at + part.first;
    if (threadIdx.x == 0 && part.first == 0) flags[part.image * scales + part.scale] = none;
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      const int64_t id = indices[at + row];
      const bool outside = id < 0 || id >= codes;
      ids[row] = outside ? -1 : id;
      if (!outside || none || !counts) continue;
      u64* count = reinterpret_cast<u64*>(counts);
      atomicAdd(count, 1ull);
    }
    for (int i = threadIdx.x; i < rows * tables.count; i += kThreads) {
      const int t = i / rows, row = i - t * rows;
      const int64_t id = indices[at + row];
      float norm = none ? 0 : NAN;
      if (id >= 0 && id < codes) {
        const float* code = codebook + id * channels;
        for (int before = 0; before < t; ++before) code += tables.width[before];
        float square = 0;
        for (int64_t d = 0; tables.unit_codes && d < tables.width[t]; ++d) square = fmaf(code[d], code[d], square);
        norm = !tables.unit_codes ? 1 : sqrtf(square) > 1e-12f ? sqrtf(square) : 1e-12f;
      }
      norms[t][row] = norm;
      if (tables.unit_codes || !(norm > 0)) code_norms[(at + row) * tables.count + t] = norm;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * channels; i += kThreads) {
      const int row = i / channels, d = i - row * channels;
      float number = none ? 0 : NAN;
      if (ids[row] >= 0) number = codebook[ids[row] * channels + d];
      if (ids[row] >= 0 && tables.unit_codes) number /= norms[table_of(tables, d)][row];
      code_rows[at * channels + i] = number;
    }
  }
};

// The flags alone, for a backward: a block each.
struct MarkDropped {
  const int64_t* indices;  // [B, L]
  int64_t length;
  int scales;
  unsigned* flags;  // [B, S]

  __device__ void operator()(const Loop& loop) const {
    const int s = static_cast<int>(blockIdx.x) % scales;
    int64_t at = static_cast<int64_t>(blockIdx.x / scales) * length;
    for (int before = 0; before < s; ++before) at += loop.scales.cells(before);
    const bool none = dropped(indices + at, loop.scales.cells(s));
    if (threadIdx.x == 0) flags[blockIdx.x] = none;
  }
};

// The constants of a call with the ids of a prefix; where `inputs` are wanted, the next scale's too, which *all keeps.
static Error make_prefix_loop(Call& call, const View& indices, const View& codes, int64_t channels,
                              const Tables& tables, const View& grids, int64_t height, int64_t width,
                              const View& weight, const View& bias, double ratio, bool transposed, bool inputs,
                              Loop* loop, Loop* all, int64_t* input_rows) {
  const int64_t length = indices.shape[1];
  int64_t given = 0, seen = 0;
  int scales = 0;
  *input_rows = 0;
  for (int64_t s = 0; dense(grids, 2) && grids.type == kInt64 && grids.shape[1] == 3 && s < grids.shape[0]; ++s) {
    const int64_t* grid = data<int64_t>(grids) + 3 * s;
    if (given >= length && (!inputs || s == 0)) break;
    seen += grid[0] * grid[1];
    if (s > 0) *input_rows += grid[0] * grid[1];
    if (given >= length) break;
    given = seen;
    ++scales;
  }
  if (given != length) return "multiscale: indices: wanted whole scales";
  if (codes.type != kNone &&
      (!dense_on(codes, 2) || codes.type != kFloat32 || codes.shape[1] != channels || codes.shape[0] < 1))
    return "multiscale: codebook: wanted contiguous float32 [K, C], float64 only on the CPU";
  const View none = {nullptr, kNone};  // whose norms are not wanted
  if (const Error error = make_loop(call, indices.shape[0], seen, none, channels, tables, grids, height, width, weight,
                                    bias, ratio, transposed, 3, all))
    return error;
  *loop = *all;
  loop->length = length;
  loop->scales.count = scales;
  return nullptr;
}

static bool holds_codes(const Loop& loop, const View& code_rows, const View& code_norms) {
  const int64_t rows = loop.batch * loop.length;
  return holds_on(code_rows, kFloat32, rows * loop.channels) &&
         holds_on(code_norms, kFloat32, rows * loop.codes.tables.count);
}

// planes [c, h w] plane_stride(h w) apart = the slice's channels of rows [h w, C].
static __device__ inline void load_rows(const Cut& cut, const Slice& slice, const float* rows, int cells,
                                        float* planes) {
  const int stride = plane_stride(cells);
  for_cells(cut, slice, cells, [&](int cell, int plane) {
    planes[plane * stride + cell] = rows[cell * cut.channels + slice.first + plane];
  });
}

TOKENFLOW_END
