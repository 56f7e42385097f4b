// The ops of the core. Each is defined once a backend: in cpu/<op>.cpp, compiled per instruction set, and in cuda/<op>.cu.
// Shapes: N rows, G groups, K codes, C channels, T tables. "real" is float32, or float64 when x is float64. Scratch comes
// through Call, and what is counted goes there: rows that are not finite, ids outside the table.
#pragma once
#include "common/view.h"

#define TOKENFLOW_DECLARE_OPS                                                                                          \
  Error normalize_rows(Call& call, View x /*[N, C] any float*/, View y /*[N, C] type of x*/) noexcept;                 \
  Error normalize_rows_backward(Call& call, View x /*[N, C]*/, View grad_y /*[N, C]*/, View grad_x /*[N, C]*/)         \
      noexcept;                                                                                                        \
  Error nearest_code(Call& call, View x /*[..., G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,    \
                     int64_t topk, int64_t lo, int64_t hi, View indices /*[..., G, topk] int64*/,                      \
                     View scores /*[..., G, topk] real or none*/) noexcept;                                            \
  Error quantize(Call& call, View x /*[N, G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,          \
                 double loss_weight, View quantized /*[N, G, C] type of x*/, View indices /*[N, G]*/,                  \
                 View loss /*[] real*/, View searched /*[N, G, C] real or none*/,                                      \
                 View code_rows /*[N, G, C] real or none*/, View code_norms /*[N, G, T] real or none*/) noexcept;      \
  Error quantize_backward(Call& call, View x /*[N, G, C]*/, View code_rows /*[N, G, C] real*/,                         \
                          View code_norms /*[N, G, T] real or none*/, View indices /*[N, G]*/,                         \
                          View grad_quantized /*[N, G, C] type of x or none*/, View grad_loss /*[] real or none*/,     \
                          Tables tables, double commitment_weight, double codebook_weight,                             \
                          View grad_x /*[N, G, C] type of x or none*/, View grad_codebook /*[G, K, C] or none*/)       \
      noexcept;                                                                                                        \
  Error entropy_loss(Call& call, View x /*[N, G, C] real*/, View codebook /*[G, K, C] real*/,                          \
                     View ids /*[N, G] best codes, -1 leaves out*/, double eps, View losses /*[2] real*/,              \
                     View log_totals /*[G, N] real*/, View entropies /*[G, N] real*/, View means /*[G, K] real*/)      \
      noexcept;                                                                                                        \
  Error entropy_loss_backward(Call& call, View x, View codebook, View ids, double eps, View log_totals,                \
                              View entropies, View means, View grad_losses /*[2] real*/,                               \
                              View grad_x /*[N, G, C] real or none*/,                                                  \
                              View grad_codebook /*[G, K, C] real or none*/) noexcept;                                 \
  Error soft_quantize_backward(Call& call, View x /*[N, G, C] real*/, View keys /*[G, K, C] real*/,                    \
                               View values /*[G, K, Dv] real*/, View ids /*[N, G] best codes, -1 leaves out*/,         \
                               View grad /*[N, G, Dv] real*/, View grad_x /*[N, G, C] or none*/,                       \
                               View grad_keys /*[G, K, C] or none*/) noexcept;                                         \
  Error lookup(Call& call, View indices /*[N, G]*/, View codebook /*[G, K, C] any float*/,                             \
               View rows /*[N, G, C] same type*/) noexcept;                                                            \
  Error lookup_backward(Call& call, View indices /*[N, G]*/, View grad_rows /*[N, G, C]*/,                             \
                        View grad_codebook /*[G, K, C] type of grad_rows*/) noexcept;                                  \
  Error code_statistics(Call& call, View x /*[N, G, C] any float*/, View indices /*[N, G]*/,                           \
                        View counts /*[G, K] real*/, View sums /*[G, K, C] real or none*/) noexcept;                   \
  Error ema_update(Call& call, View codebook /*[G, K, C]*/, View ema_counts /*[G, K]*/,                                \
                   View ema_sums /*[G, K, C]*/, View counts /*[G, K]*/, View sums /*[G, K, C]*/, Tables tables,        \
                   double decay, double eps, bool normalize_mean) noexcept;                                            \
  Error peaks(Call& call, View rates /*[2] float64: float32 FLOP/s, int8 OP/s*/, double seconds) noexcept;
