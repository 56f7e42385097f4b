// The ops of the core. Each is defined once in cpu/<op>.cpp and compiled per instruction set.
// Shapes: N rows, G groups, K codes, C channels, T tables. "real" is float32, or float64 when x is float64.
#pragma once
#include "common/view.h"

#define TOKENFLOW_DECLARE_OPS                                                                                       \
  Error normalize_rows(View x /*[N, C] any float*/, View y /*[N, C] type of x*/, int threads) noexcept;             \
  Error normalize_rows_backward(View x /*[N, C]*/, View grad_y /*[N, C]*/, View grad_x /*[N, C]*/, int threads)     \
      noexcept;                                                                                                     \
  int64_t search_bytes(int64_t rows, int64_t topk, int64_t codes, int64_t channels, bool wide, int threads) noexcept; \
  Error nearest_code(Call& call, View x /*[..., G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,  \
                     int64_t topk, int64_t lo, int64_t hi, View indices /*[..., G, topk] int64*/,                   \
                     View scores /*[..., G, topk] real or none*/, int threads) noexcept;                            \
  Error quantize(View x /*[N, G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,                   \
                 double loss_weight, View searched /*[N, G, C] real*/, View staged /*[N, C] real*/,                 \
                 View workspace, View partial /*[G, ceil(N / 8)] float64*/,                                           \
                 View quantized /*[N, G, C] type of x*/, View indices /*[N, G]*/, View loss /*[] real*/,            \
                 View code_rows /*[N, G, C] real or none*/, View code_norms /*[N, G, T] real or none*/,             \
                 View status /*[1]*/, int threads) noexcept;                                                        \
  Error quantize_backward(View x /*[N, G, C]*/, View code_rows /*[N, G, C] real*/,                                  \
                          View code_norms /*[N, G, T] real or none*/, View indices /*[N, G]*/,                      \
                          View grad_quantized /*[N, G, C] type of x or none*/, View grad_loss /*[] real or none*/,  \
                          Tables tables, double commitment_weight, double codebook_weight,                          \
                          View spare /*[J, 2, 8, C] real*/, View gaps /*[N, G, C] real or none*/,                   \
                          View keys /*[N, G] or none*/, View members, View starts, View sums /*see sums.h*/,        \
                          View grad_x /*[N, G, C] type of x or none*/, View grad_codebook /*[G, K, C] or none*/,    \
                          int threads) noexcept;                                                                    \
  Error entropy_loss(View x /*[N, G, C] real*/, View codebook /*[G, K, C] real*/,                                   \
                     View ids /*[N, G] best codes, -1 leaves out*/, double eps, View space /*[numbers] real*/,      \
                     View mask /*[panels, 4] int64*/, View losses /*[2] real*/, View log_totals /*[G, N] real*/,    \
                     View entropies /*[G, N] real*/, View means /*[G, K] real*/, int threads) noexcept;             \
  Error entropy_loss_backward(View x, View codebook, View ids, double eps, View space, View mask,                   \
                              View log_totals, View entropies, View means, View grad_losses /*[2] real*/,           \
                              View grad_x /*[N, G, C] real or none*/,                                               \
                              View grad_codebook /*[G, K, C] real or none*/, int threads) noexcept;                 \
  Error soft_quantize_backward(View x /*[N, G, C] real*/, View keys /*[G, K, C] real*/,                             \
                               View values /*[G, K, Dv] real*/, View ids /*[N, G] best codes, -1 leaves out*/,      \
                               View grad /*[N, G, Dv] real*/, View space, View mask,                                \
                               View grad_x /*[N, G, C] or none*/, View grad_keys /*[G, K, C] or none*/,             \
                               int threads) noexcept;                                                               \
  Error lookup(View indices /*[N, G]*/, View codebook /*[G, K, C] any float*/, View rows /*[N, G, C] same type*/,   \
               View status /*[1] int64: ids outside the table*/, int threads) noexcept;                             \
  Error lookup_backward(View indices /*[N, G]*/, View grad_rows /*[N, G, C]*/, View members, View starts,           \
                        View sums /*see cpu/sums.h*/, View grad_codebook /*[G, K, C] type of grad_rows*/) noexcept;   \
  Error code_statistics(View x /*[N, G, C] any float*/, View indices /*[N, G]*/, View members, View starts,         \
                        View space /*see cpu/sums.h*/, View counts /*[G, K] real*/, View sums /*[G, K, C] real*/,   \
                        View status /*[2] int64: ids outside, non-finite rows*/) noexcept;             \
  Error ema_update(View codebook /*[G, K, C]*/, View ema_counts /*[G, K]*/, View ema_sums /*[G, K, C]*/,            \
                   View counts /*[G, K]*/, View sums /*[G, K, C]*/, View partial /*[G, 64] float64*/,               \
                   Tables tables, double decay, double eps, bool normalize_mean, int threads) noexcept;             \
  Error peaks(View rates /*[2] float64: float32 FLOP/s, int8 OP/s*/, double seconds, int threads) noexcept;
