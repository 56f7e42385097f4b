// The multi-scale ops of the core, defined in cpu/multiscale_*.cpp.
// Shapes: B images, C channels, H W map, K codes, T tables, P rows of phi, S scales with grids [S, 3] int64 (h, w, row
// of phi), L = sum of h w over the scales that have ids. "real" is float32, or float64 where an input is float64. phi is
// weight [P, C out, C in, 3, 3] and bias [P, C], real; or none twice. Scratch comes through Call, and what is counted goes
// there: rows that are not finite, ids outside the table.
#pragma once
#include "common/view.h"

#define TOKENFLOW_DECLARE_MULTISCALE_OPS                                                                               \
  Error multiscale_quantize(                                                                                           \
      Call& call, View features /*[B, C, H, W] any float*/, View codebook /*[K, C] real*/, Tables tables, View grids,  \
      View weight, View bias, double ratio, bool accumulated, double loss_weight,                                      \
      View quantized /*[B, C, H, W] type of features*/, View indices /*[B, L]*/, View loss /*[] real*/,                \
      View rows /*[B, L, C] or none*/, View code_rows /*[B, L, C] or none*/,                                           \
      View code_norms /*[B, L, T] or none*/) noexcept;                                                                 \
  Error multiscale_quantize_backward(                                                                                  \
      Call& call, View features /*[B, C, H, W], read where accumulated*/, View indices /*[B, L]*/,                     \
      View rows /*[B, L, C]*/, View code_rows /*[B, L, C]*/, View code_norms /*[B, L, T]*/,                            \
      View grad_quantized /*like features, or none*/, View grad_loss /*[] real or none*/, Tables tables, View grids,   \
      View weight, View bias, double ratio, bool accumulated, double commitment_weight, double codebook_weight,        \
      View grad_features /*like features*/, View grad_codebook /*[K, C] or none*/,                                     \
      View grad_weight /*[P, C, C, 3, 3] or none*/, View grad_bias /*[P, C] or none*/) noexcept;                       \
  Error multiscale_rows(                                                                                               \
      Call& call, View features /*[B, C, H, W] any float*/, View indices /*[B, L]*/, View codebook /*[K, C] real*/,    \
      Tables tables, View grids, View weight, View bias, double ratio, View rows /*[B, L, C]*/,                        \
      View kept /*[B, L] real: 1 where a gradient passes*/) noexcept;                                                  \
  Error multiscale_rows_backward(Call& call, View kept /*[B, L]*/, View grad_rows /*[B, L, C]*/, View grids,           \
                                 View grad_features /*[B, C, H, W] any float*/) noexcept;                              \
  Error multiscale_decode(Call& call, View indices /*[B, L]*/, View codebook /*[K, C] real*/, Tables tables,           \
                          View grids, int64_t height, int64_t width, View weight, View bias, double ratio,             \
                          View map /*[B, C, H, W] real or none*/, View inputs /*[B, R, C] real or none*/,              \
                          View code_rows /*[B, L, C]*/, View code_norms /*[B, L, T]*/) noexcept;                       \
  Error multiscale_decode_backward(                                                                                    \
      Call& call, View indices, View code_rows, View code_norms, View grad_map /*[B, C, H, W] or none*/,               \
      View grad_inputs /*[B, R, C] or none*/, Tables tables, View grids, int64_t height, int64_t width, View weight,   \
      View bias, double ratio, View grad_codebook /*[K, C]*/, View grad_weight /*[P, C, C, 3, 3] or none*/,            \
      View grad_bias /*[P, C] or none*/) noexcept;                                                                     \
  Error multiscale_chain(Call& call, View indices /*[B, L]*/, View codebook /*[K, C] real*/, Tables tables,            \
                         View grids, int64_t refine, View inputs /*[B, R, C]*/, View code_rows, View code_norms)       \
      noexcept;                                                                                                        \
  Error multiscale_chain_backward(Call& call, View indices, View code_rows, View code_norms,                           \
                                  View grad_inputs /*[B, R, C]*/, Tables tables, View grids, int64_t refine,           \
                                  View grad_codebook /*[K, C]*/) noexcept;
