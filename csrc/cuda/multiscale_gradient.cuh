// What decode, chain and the multi-scale backwards share: stacks, which hold a map [C, H, W] for every scale of some
// images, and the rows [B, L, C] of gradients. Sums over pixels, rows and images have a fixed order; nothing is atomic.
// Stacks are made for as many images at a time as stay in the second-level cache: a stack is S times the features.
#pragma once
#include "cuda/multiscale_codes.cuh"
#include "cuda/sums.cuh"

TOKENFLOW_BEGIN

constexpr int64_t kStackFloats = int64_t{1} << 21;  // 8 MB: two stacks, written and read, stay in 40 MB of cache

// Images whose stacks are made at a time: equal shares of the batch.
static inline int64_t stacked_images(const Loop& loop) {
  const int64_t most = kStackFloats / (loop.scales.count * loop.map() + 1) + 1, shares = (loop.batch + most - 1) / most;
  return shares < 2 ? loop.batch : (loop.batch + shares - 1) / shares;
}

// A block for every slice of the first images.
template <class... P, class... A>
static void launch_images(Call& call, const Loop& loop, int64_t images, void (*kernel)(P...), A... arguments) {
  launch(call, kernel, dim3(static_cast<unsigned>(images * loop.slices)), dim3(kThreads),
         loop.space ? 16 : loop.floats * sizeof(float), arguments...);
}

// stack [n, S, C, H, W] = Up codes of every scale of n images; code_rows begin with their first.
void upsample(Call& call, const Loop& loop, int64_t images, const float* code_rows, float* stack);

// steps = phi of a stack; maps whose `skipped` [n, S] is set are zeros.
void refine_stack(Call& call, const Loop& loop, int64_t images, const float* up, const unsigned* skipped, float* steps);

// grad_up = phi's transpose of a stack, or of one map an image [n, C, H, W] for all scales where `shared`.
void refine_transposed(Call& call, const Loop& loop, int64_t images, const float* grad_steps, bool shared,
                       float* grad_up);

static bool holds_phi(const Loop& loop, const View& grad_weight, const View& grad_bias) {
  return grad_weight.type == kNone ||
         (holds_on(grad_weight, kFloat32, loop.phi_rows * 9 * loop.channels * loop.channels) &&
          holds_on(grad_bias, kFloat32, loop.phi_rows * loop.channels));
}

// The gradient of phi over all images, in so many shares; none where it is not wanted.
struct PhiSum {
  int shares;
  float* partial;

  // Of n images: u, and dstep as refine_transposed has it; `more`: onto the images before.
  void add(Call& call, const Loop& loop, int64_t images, const float* up, const float* grad_steps, bool shared,
           const unsigned* skipped, bool more) const;
  // `any`: whether add was called.
  void finish(Call& call, const Loop& loop, bool any, const View& grad_weight, const View& grad_bias) const;
};
PhiSum take_phi_sum(Call& call, const Loop& loop, const View& grad_weight);

// The rows of the transpose of Up, line by line of every scale's grid, all channels of a line in one block.
struct UpTransposed {
  const void* maps;  // G [B, C, H, W], or [B, S, C, H, W] where `stacked`; or none: zeros
  Type type;
  bool stacked;
  const unsigned* bad;           // [B]: 1 for images with pixels where G is left out, or null
  const unsigned char* touched;  // [B, H, W]: 1 at those
  const float* rows;             // [B, L, C]: of the loss on codes, or null
  const float *code_rows, *code_norms;
  const float* grad_loss;  // [], or null
  float to_row, to_code;   // its factors 2 w / (S B C), without the cells of a scale
  float* grad_rows;  // [B, L, C]: Up^T G + to_row (y - code), through the rows' normalisation; where there are rows
  float* gaps;       // [B, L, C]: to_code (code - y), or Up^T G, through the codes' normalisation; or null
  const int64_t* indices;  // [B, L]
  int64_t codes;           // K
  unsigned* keys;          // [B, L]: ids of rows that have a gradient, for the sums by code; or null
  int lines, group;        // lines of all scales; channels at a time
  int64_t floats;
  float* space;  // of the blocks where it does not fit into shared memory, else null
};

// Room for up_transposed of so many images; then the call, for n images, whose pointers `lines` has.
UpTransposed take_up_transposed(Call& call, const Loop& loop, int64_t images);
void up_transposed(Call& call, const Loop& loop, int64_t images, const UpTransposed& lines);

// Its last part alone, for rows whose gaps are there.
void finish_rows(Call& call, const Loop& loop, int64_t rows, const UpTransposed& lines);

// The codebook's gradient [K, C], where it is wanted: the gaps [B L, C] summed by code.
struct CodeSum {
  Sums sums;
  bool wanted;

  // `lines` writes the keys, of rows from `first` on.
  void keys_from(UpTransposed* lines, const int64_t* indices, int64_t first) const {
    lines->indices = indices + first;
    lines->codes = sums.codes;
    lines->keys = wanted ? sums.keys + first : nullptr;
  }
  void run(Call& call, const Loop& loop, const float* gaps, const View& grad_codebook) const;
};

static CodeSum take_code_sum(Call& call, const Loop& loop, const View& grad_codebook) {
  if (grad_codebook.type == kNone) return {};
  return {take_sums(call, loop.batch * loop.length, 1, grad_codebook.shape[0], loop.channels), true};
}

TOKENFLOW_END
