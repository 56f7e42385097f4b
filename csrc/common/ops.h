// The ops of the core. Each is defined once a backend: in cpu/<op>.cpp, compiled per instruction set, and in cuda/<op>.cu.
// Shapes: N rows, G groups, K codes, C channels, T tables. "real" is float32, or float64 when x is float64. Scratch comes
// through Call, and what is counted goes there: rows that are not finite, ids outside the table.
// Where a shape begins with "...", rows come in the shape that users give them, and a codebook [G, K, C], with all that
// has its axis G, may be [K, C] without it: by_group, as_rows and with_groups make them the same.
#pragma once
#include "common/view.h"

#define TOKENFLOW_DECLARE_OPS                                                                                        \
  Error normalize_rows(Call& call, View x /*[..., C] any float*/, View y /*like x*/) noexcept;                       \
  Error normalize_rows_backward(Call& call, View x /*[..., C]*/, View grad_y /*like x*/, View grad_x /*like x*/)     \
      noexcept;                                                                                                      \
  Error nearest_code(Call& call, View x /*[..., G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,  \
                     int64_t topk, int64_t lo, int64_t hi, View indices /*[..., G, topk] int64*/,                    \
                     View scores /*[..., G, topk] real or none*/) noexcept;                                          \
  Error quantize(Call& call, View x /*[..., G, C] any float*/, View codebook /*[G, K, C] real*/, Tables tables,      \
                 double loss_weight, View quantized /*like x*/, View indices /*[..., G]*/,                           \
                 View loss /*[] real*/, View searched /*[..., G, C] real or none*/,                                  \
                 View code_rows /*[..., G, C] real or none*/, View code_norms /*[..., G, T] real or none*/) noexcept;\
  Error quantize_backward(Call& call, View x /*[..., G, C]*/, View code_rows /*[..., G, C] real*/,                   \
                          View code_norms /*[..., G, T] real or none*/, View indices /*[..., G]*/,                   \
                          View grad_quantized /*like x, or none*/, View grad_loss /*[] real or none*/,               \
                          Tables tables, double commitment_weight, double codebook_weight,                           \
                          View grad_x /*like x, or none*/, View grad_codebook /*[G, K, C] or none*/)                 \
      noexcept;                                                                                                      \
  Error entropy_loss(Call& call, View x /*[N, G, C] real*/, View codebook /*[G, K, C] real*/,                        \
                     View ids /*[N, G] best codes, -1 leaves out*/, double eps, View losses /*[2] real*/,            \
                     View log_totals /*[G, N] real*/, View entropies /*[G, N] real*/, View means /*[G, K] real*/)    \
      noexcept;                                                                                                      \
  Error entropy_loss_backward(Call& call, View x, View codebook, View ids, double eps, View log_totals,              \
                              View entropies, View means, View grad_losses /*[2] real*/,                             \
                              View grad_x /*[N, G, C] real or none*/,                                                \
                              View grad_codebook /*[G, K, C] real or none*/) noexcept;                               \
  Error soft_quantize_backward(Call& call, View x /*[N, G, C] real*/, View keys /*[G, K, C] real*/,                  \
                               View values /*[G, K, Dv] real*/, View ids /*[N, G] best codes, -1 leaves out*/,       \
                               View grad /*[N, G, Dv] real*/, View grad_x /*[N, G, C] or none*/,                     \
                               View grad_keys /*[G, K, C] or none*/) noexcept;                                       \
  Error lookup(Call& call, View indices /*[..., G]*/, View codebook /*[G, K, C] any float*/,                         \
               View rows /*[..., G, C] same type*/) noexcept;                                                        \
  Error lookup_backward(Call& call, View indices /*[..., G]*/, View grad_rows /*[..., G, C]*/,                       \
                        View grad_codebook /*[G, K, C] type of grad_rows*/) noexcept;                                \
  Error code_statistics(Call& call, View x /*[..., G, C] any float*/, View indices /*[..., G]*/,                     \
                        View counts /*[G, K] real*/, View sums /*[G, K, C] real or none*/) noexcept;                 \
  Error ema_update(Call& call, View codebook /*[G, K, C]*/, View ema_counts /*[G, K]*/,                              \
                   View ema_sums /*[G, K, C]*/, View counts /*[G, K]*/, View sums /*[G, K, C]*/, Tables tables,      \
                   double decay, double eps, bool normalize_mean) noexcept;                                          \
  Error peaks(Call& call, View rates /*[2] float64: float32 FLOP/s, int8 OP/s*/, double seconds) noexcept;
