// quantize_backward: the closed form. y = row as searched, q = its code, loss as in quantize.cu:
//   dL/dy = dL/dquantized + grad_loss * 2 commitment (y - q) / (N G C)     (straight-through: d quantized / dy = 1)
//   dL/dq_k = sum over rows of code k of grad_loss * 2 codebook_weight (q - y) / (N G C)
// and both go through the normalisation where there was one.
//   scale      the factors of (y - q) and (q - y), once, in double
//   rows       eight lanes a row: dx; for the codebook the row's key, none where it is left out, and the norms of y
//   sums.cuh   adds (q - y) by code, made again from x and the norms: nothing of size N C is written
//   through    eight lanes a code, where codes are unit: its sum goes through the normalisation, in place
// The order of operations is the CPU's (cpu/rows.h), and so are the bits where a code has up to kChunk rows.
// Bytes a row of C numbers of b bytes: 3 b C + 4 C + 24 read (x twice), b C + 8 T written, and the sort of sums.cuh; a
// code 8 C read and 8 C written. N = 262144, K = 32768, C = 32, float32: 202 MB, 101 us on A100 (2.0 TB/s), 60 us on
// H100 (3.35 TB/s). Paper arithmetic, never run on a GPU. Source: tokenflow.md 1.2, checked against autograd.
#include "common/ops.h"
#include "cuda/sums.cuh"

TOKENFLOW_BEGIN

// What backward reads of the rows, and the factors.
struct Rows {
  const void* x;  // [N, G, C]
  Type type;
  const float *code_rows, *code_norms;  // [N, G, C]; [N, G, T] or null
  int64_t groups, channels;
  Tables tables;
  float* scales;  // [2]: of (y - q) in dL/dy, of (q - y) in dL/dq
  float* norms;   // [N, G, T] of x, where rows are unit; or null

  // to_code (q - y) in channel c of the rows of one code, which all have the same q.
  struct Column {
    const Rows& rows;
    int64_t g, c, table;
    float q, to_code;
    __device__ float operator()(unsigned row) const {
      const int64_t at = row * rows.groups + g;
      float y = number(rows.x, rows.type, at * rows.channels + c);
      if (rows.norms) y /= rows.norms[at * rows.tables.count + table];
      return to_code * (q - y);
    }
  };
  __device__ Column column(int64_t g, int64_t c, unsigned row) const {
    int table = 0;
    for (int64_t end = tables.width[0]; c >= end; end += tables.width[table]) ++table;
    return {*this, g, c, table, code_rows[(row * groups + g) * channels + c], scales[1]};
  }
};

static __global__ void __launch_bounds__(1)
    scale_kernel(const float* grad_loss, double numbers, double commitment_weight, double codebook_weight,
                 float* scales) {
  const double scale = grad_loss && numbers > 0 ? 2.0 * *grad_loss / numbers : 0;
  scales[0] = static_cast<float>(scale * commitment_weight);
  scales[1] = static_cast<float>(scale * codebook_weight);
}

struct Gradients {
  const int64_t* indices;      // [N, G]
  const void* grad_quantized;  // type of x, or null
  void* grad_x;                // type of x, or null
  int64_t rows, codes;
  unsigned* keys;  // [G, N], or null
};

static __global__ void __launch_bounds__(kTeamThreads, 4) rows_kernel(Rows rows, Gradients job) {
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kTeamRows + team_of_block(), count = job.rows * rows.groups;
  const bool there = mine < count;
  const int64_t row = there ? mine : count - 1, at = row * rows.channels;
  const float* q = rows.code_rows + at;
  const auto x = [&](int64_t d) { return number(rows.x, rows.type, at + d); };
  // A code that is not finite (a row that was not, or a codebook without a number) sends and gets no gradient.
  bool bad = false;
  for (int64_t d = lane_of_team(); d < rows.channels; d += kTeam) bad |= !finite(x(d)) || !finite(q[d]);
  bad = any_of_team(bad);
  const float to_row = rows.scales[0];
  for (int64_t t = 0, from = 0; t < rows.tables.count; from += rows.tables.width[t++]) {
    const int64_t width = rows.tables.width[t];
    const float norm = rows.tables.unit ? team_norm(width, [&](int64_t d) { return x(from + d); }) : 1;
    if (rows.norms && there && lane_of_team() == 0) rows.norms[row * rows.tables.count + t] = norm;
    if (!job.grad_x) continue;
    const auto y = [&](int64_t d) { return rows.tables.unit ? x(d) / norm : x(d); };
    const auto to_y = [&](int64_t d) {
      const float straight = job.grad_quantized ? number(job.grad_quantized, rows.type, at + d) : 0;
      return straight + to_row * (y(d) - q[d]);
    };
    float along = 0;
    if (rows.tables.unit) along = team_dot(width, [&](int64_t d) { return to_y(from + d) * y(from + d); });
    if (!(norm > 1e-12f)) along = 0;
    for (int64_t d = from + lane_of_team(); there && d < from + width; d += kTeam) {
      float gradient = to_y(d);
      if (rows.tables.unit) gradient = (gradient - along * y(d)) / norm;
      set_number(job.grad_x, rows.type, at + d, bad ? 0 : gradient);
    }
  }
  if (!job.keys || !there || lane_of_team()) return;
  const int64_t id = job.indices[row], g = group_of(row, rows.groups);
  const bool used = !bad && id >= 0 && id < job.codes;
  job.keys[g * job.rows + static_cast<unsigned>(row) / static_cast<unsigned>(rows.groups)] =
      used ? static_cast<unsigned>(id) : kNoCode;
}

// grad [G, K, C] of unit codes becomes that of the codes, where there are rows; all of them carry the same code and
// norms.
static __global__ void __launch_bounds__(kTeamThreads, 4) through_kernel(Sums sums, Rows rows, float* grad) {
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kTeamRows + team_of_block();
  const int64_t count = sums.groups * sums.codes, code = mine < count ? mine : count - 1;
  const int64_t g = quotient(code, sums.codes);
  const unsigned* starts = sums.starts + code + g;
  const bool used = mine < count && starts[1] > starts[0];
  const int64_t row = used ? row_of(sums.sorted()[g * sums.rows + starts[0]]) * sums.groups + g : 0;
  const float* q = rows.code_rows + row * sums.channels;
  float* const out = grad + code * sums.channels;
  for (int64_t t = 0, from = 0; t < rows.tables.count; from += rows.tables.width[t++]) {
    const int64_t width = rows.tables.width[t];
    float along = team_dot(width, [&](int64_t d) { return used ? out[from + d] * q[from + d] : 0; });
    const float norm = used ? rows.code_norms[row * rows.tables.count + t] : 1;
    if (!(norm > 1e-12f)) along = 0;
    for (int64_t d = from + lane_of_team(); used && d < from + width; d += kTeam)
      out[d] = (out[d] - along * q[d]) / norm;
  }
}

Error quantize_backward(Call& call, View x, View code_rows, View code_norms, View indices, View grad_quantized,
                        View grad_loss, Tables tables, double commitment_weight, double codebook_weight, View grad_x,
                        View grad_codebook) noexcept {
  x = by_group(x, grad_codebook.rank == 3, 1);
  grad_codebook = with_groups(grad_codebook);
  if (!dense_on(x, 3) || !floating(x) || x.type == kFloat64 || !covers(tables, x.shape[2]))
    return "quantize_backward: x: wanted contiguous float32, float16 or bfloat16 [..., G, C] on CUDA";
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2], count = rows * groups;
  const int64_t numbers = count * channels;
  if (!holds_on(code_rows, kFloat32, numbers) || !holds_on(indices, kInt64, count) ||
      (tables.unit_codes && !holds_on(code_norms, kFloat32, count * tables.count)) ||
      (grad_quantized.type != kNone && !holds_on(grad_quantized, x.type, numbers)) ||
      (grad_loss.type != kNone && !holds_on(grad_loss, kFloat32, 1)) ||
      (grad_x.type != kNone && !holds_on(grad_x, x.type, numbers)))
    return "quantize_backward: wanted gradients that fit the rows";
  const bool wants_codes = grad_codebook.type != kNone;
  if (wants_codes && (!dense_on(grad_codebook, 3) || grad_codebook.shape[0] != groups || grad_codebook.shape[1] < 1 ||
                      !holds_on(grad_codebook, kFloat32, groups * grad_codebook.shape[1] * channels)))
    return "quantize_backward: grad_codebook: wanted [G, K, C]";
  if (count > kMostRows || (wants_codes && grad_codebook.shape[1] > kMostRows))
    return "quantize_backward: wanted at most 2^31 rows and codes on CUDA";
  Rows job = {x.data,
              x.type,
              static_cast<const float*>(code_rows.data),
              static_cast<const float*>(code_norms.data),
              groups,
              channels,
              tables,
              take<float>(call, 2),
              nullptr};
  const int64_t codes = wants_codes ? grad_codebook.shape[1] : 0;
  const Sums sums = wants_codes ? take_sums(call, rows, groups, codes, channels) : Sums{};
  if (wants_codes && tables.unit) job.norms = take<float>(call, count * tables.count);
  if (call.counting) return nullptr;
  launch(call, scale_kernel, dim3(1), dim3(1), 0, static_cast<const float*>(grad_loss.data),
         static_cast<double>(numbers), commitment_weight, codebook_weight, job.scales);
  const Gradients gradients = {
      static_cast<const int64_t*>(indices.data), grad_quantized.data, grad_x.data, rows, codes, sums.keys};
  launch(call, rows_kernel, blocks_for(count, kTeamRows), dim3(kTeamThreads), 0, job, gradients);
  if (!wants_codes) return nullptr;
  sort_rows(call, sums);
  sum_rows_of(call, sums, job, SumsOut{grad_codebook.data, kFloat32, nullptr});
  if (tables.unit_codes)
    launch(call, through_kernel, blocks_for(groups * codes, kTeamRows), dim3(kTeamThreads), 0, sums, job,
           static_cast<float*>(grad_codebook.data));
  return nullptr;
}

TOKENFLOW_END
