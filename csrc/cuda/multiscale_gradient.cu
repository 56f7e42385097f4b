// The rows of the multi-scale backwards, [B, L, C]: Up^T of maps, the loss on codes, the normalisations, sums by code.
// A block has a line of one scale's grid with all channels: the map's rows that the line lies in, blended along columns
// into shared memory, then along the line; then a warp a cell for what joins the channels. 73 lines an image for grids
// of 1 to 16: 2336 blocks for 32 images. A map is read about four times a scale, from the second-level cache.
#include "cuda/multiscale_gradient.cuh"

TOKENFLOW_BEGIN

constexpr int64_t kLineFloats = 44 << 8;
constexpr int kWarps = kThreads / 32;

// The sum over a warp, in every lane.
static __device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// A row [C] as a warp has it: g becomes the rows' gradient, gap the code's.
static __device__ inline void finish_row(const Loop& loop, const UpTransposed& call, int64_t n, int cells) {
  const Tables& tables = loop.codes.tables;
  const int lane = threadIdx.x % 32;
  const float* code = call.code_rows + n * loop.channels;
  const float* row = call.rows ? call.rows + n * loop.channels : nullptr;
  float* g = call.maps ? (row ? call.grad_rows : call.gaps) + n * loop.channels : nullptr;
  const bool good = code[0] == code[0];
  if (call.keys && lane == 0) {
    const int64_t id = call.indices[n];
    call.keys[n] = good && id >= 0 && id < call.codes ? static_cast<unsigned>(id) : kNoCode;
  }
  const float loss = call.grad_loss ? *call.grad_loss / cells : 0;
  const float to_row = call.to_row * loss, to_code = call.to_code * loss;
  for (int64_t t = 0, first = 0; t < tables.count; first += tables.width[t], ++t) {
    const int64_t end = first + tables.width[t];
    float norm = 1;
    if (row && tables.unit) {
      float square = 0;
      for (int64_t d = first + lane; d < end; d += 32) square += row[d] * row[d];
      norm = sqrtf(warp_sum(square));
      if (!(norm > 1e-12f)) norm = 1e-12f;
    }
    const float code_norm = tables.unit_codes ? call.code_norms[n * tables.count + t] : 1;
    // The gradients of y and of the code as they are added, then what the normalisations let through.
    const auto y_at = [&](int64_t d) { return row ? row[d] / norm : 0; };
    const auto row_at = [&](int64_t d, float y) { return (g ? g[d] : 0) + (row ? to_row * (y - code[d]) : 0); };
    const auto gap_at = [&](int64_t d, float y) { return row ? to_code * (code[d] - y) : g ? g[d] : 0; };
    float along = 0, along_code = 0;
    for (int64_t d = first + lane; d < end; d += 32) {
      const float y = y_at(d);
      along = fmaf(row_at(d, y), y, along);
      along_code = fmaf(gap_at(d, y), code[d], along_code);
    }
    along = warp_sum(along);
    along_code = warp_sum(along_code);
    if (!row || !tables.unit || !(norm > 1e-12f)) along = 0;
    if (!tables.unit_codes || !(code_norm > 1e-12f)) along_code = 0;
    for (int64_t d = first + lane; d < end; d += 32) {
      const float y = y_at(d);
      const float gap = (gap_at(d, y) - along_code * code[d]) / code_norm, grad = (row_at(d, y) - along * y) / norm;
      if (row && call.grad_rows) call.grad_rows[n * loop.channels + d] = good ? grad : 0;
      if (call.gaps) call.gaps[n * loop.channels + d] = good ? gap : 0;
    }
  }
}

static __global__ void __launch_bounds__(kThreads, 3) up_transposed_kernel(Loop loop, UpTransposed call) {
  DYNAMIC_SHARED(float, shared);
  const int height = loop.size.h, width = loop.size.w, channels = static_cast<int>(loop.channels);
  const int64_t image = blockIdx.x / call.lines;
  int line = static_cast<int>(blockIdx.x % call.lines), s = 0;
  int64_t at = image * loop.length;
  for (; line >= loop.scales.h[s]; ++s) {
    line -= loop.scales.h[s];
    at += loop.scales.cells(s);
  }
  const Axes bicubic = loop.bicubic(s);
  const int w = bicubic.in.w;
  at += line * w;
  if (call.maps) {
    float* taps = call.space ? call.space + blockIdx.x * call.floats : shared;
    Run* columns = reinterpret_cast<Run*>(taps + height);
    float* across = reinterpret_cast<float*>(columns + width);
    float* to = (call.rows ? call.grad_rows : call.gaps) + at * channels;
    const Run run = bicubic_bands_at(bicubic.in.h, height, line);
    const int64_t map = (call.stacked ? image * loop.scales.count + s : image) * loop.map();
    const unsigned char* left_out = call.bad && call.bad[image] ? call.touched + image * height * width : nullptr;
    const int stride = width | 1;
    for (int y = run.first + static_cast<int>(threadIdx.x); y <= run.last; y += kThreads)
      taps[y] = weight_at(bicubic.rows[y], line);
    for (int j = threadIdx.x; j < w; j += kThreads) columns[j] = bicubic_bands_at(w, width, j);
    for (int first = 0; first < channels; first += call.group) {
      const int planes = channels - first < call.group ? channels - first : call.group;
      __syncthreads();
      for (int i = threadIdx.x; i < planes * width; i += kThreads) {
        const int plane = i / width, x = i - plane * width;
        const int64_t from = map + static_cast<int64_t>(first + plane) * height * width + x;
        float sum = 0;
        for (int y = run.first; y <= run.last; ++y) {
          if (taps[y] == 0 || (left_out && left_out[y * width + x])) continue;
          sum = fmaf(taps[y], number(call.maps, call.type, from + static_cast<int64_t>(y) * width), sum);
        }
        across[plane * stride + x] = sum;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < planes * w; i += kThreads) {
        const int j = i / planes, plane = i - j * planes;
        float sum = 0;
        for (int x = columns[j].first; x <= columns[j].last; ++x) {
          const float weight = weight_at(bicubic.columns[x], j);
          if (weight != 0) sum = fmaf(weight, across[plane * stride + x], sum);
        }
        to[static_cast<int64_t>(j) * channels + first + plane] = sum;
      }
    }
    __syncthreads();
  }
  for (int cell = static_cast<int>(threadIdx.x) / 32; cell < w; cell += kWarps)
    finish_row(loop, call, at + cell, bicubic.in.cells());
}

// finish_row alone, of rows whose gaps are there.
static __global__ void __launch_bounds__(kThreads) finish_rows_kernel(Loop loop, UpTransposed call, int64_t rows) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (n < rows) finish_row(loop, call, n, 1);
}

UpTransposed take_up_transposed(Call& op, const Loop& loop, int64_t images) {
  UpTransposed call = {};
  for (int s = 0; s < loop.scales.count; ++s) call.lines += loop.scales.h[s];
  const int64_t head = loop.size.h + 2 * loop.size.w, stride = loop.size.w | 1;
  call.group = static_cast<int>(head + stride <= kLineFloats ? (kLineFloats - head) / stride : 1);
  if (call.group > loop.channels) call.group = static_cast<int>(loop.channels);
  call.floats = head + call.group * stride;
  const bool fits = call.floats <= kLineFloats;
  call.space = fits ? nullptr : take<float>(op, images * call.lines * call.floats);
  return call;
}

void up_transposed(Call& op, const Loop& loop, int64_t images, const UpTransposed& made) {
  launch(op, up_transposed_kernel, dim3(static_cast<unsigned>(images * made.lines)), dim3(kThreads),
         made.space || !made.maps ? 16 : made.floats * sizeof(float), loop, made);
}

void finish_rows(Call& op, const Loop& loop, int64_t rows, const UpTransposed& made) {
  launch(op, finish_rows_kernel, dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), dim3(kThreads), 0, loop,
         made, rows);
}

void CodeSum::run(Call& call, const Loop& loop, const float* gaps, const View& grad_codebook) const {
  sort_rows(call, sums);
  sum_rows(call, sums, PlainRows{gaps, kFloat32, 1, loop.channels}, SumsOut{grad_codebook.data, kFloat32, nullptr});
}

TOKENFLOW_END
