// The multi-scale ops of the core, defined in cpu/multiscale_*.cpp.
// Shapes: B images, C channels, H W map, K codes, T tables, P rows of phi, S scales with grids [S, 3] int64 (h, w, row
// of phi), L = sum of h w over the scales that have ids. "real" is float32, or float64 where an input is float64. phi
// [P, 9, in, D], phi_transposed [P, 9, out, D] with the taps turned around, bias [P, D], where D is C padded to 16 with
// zeros: real, or none. bands: room for the weights of resampling, [S, 2 (H + W), 6] real, H W the largest grid for the
// chain. spare: n pieces of scratch a thread, [threads, n, (H + 1) (W + 2) C + 64] real. J chunks of images have their
// own share of phi's gradient.
#pragma once
#include "common/view.h"

#define TOKENFLOW_DECLARE_MULTISCALE_OPS                                                                               \
  Error multiscale_quantize(                                                                                           \
      View features /*[B, C, H, W] any float*/, View codebook /*[K, C] real*/, Tables tables, View grids, View phi,    \
      View bias, double ratio, bool accumulated, double loss_weight, View bands,                                       \
      View workspace /*[search_bytes] uint8*/, View maps /*[2, B, H W, C]*/, View staged /*[2, B max(h w), C]*/,       \
      View spare /*3 pieces*/, View partial /*[B max(h w, H)] float64*/,                                               \
      View quantized /*[B, C, H, W] type of features*/, View indices /*[B, L]*/, View loss /*[] real*/,                \
      View rows /*[B, L, C] or none*/, View code_rows /*[B, L, C] or none*/, View code_norms /*[B, L, T] or none*/,    \
      View status /*[1] int64: non-finite rows*/, int threads) noexcept;                                               \
  Error multiscale_quantize_backward(                                                                                  \
      View features /*[B, C, H, W], read where accumulated*/, View indices /*[B, L]*/, View rows /*[B, L, C]*/,        \
      View code_rows /*[B, L, C]*/, View code_norms /*[B, L, T]*/, View grad_quantized /*like features, or none*/,     \
      View grad_loss /*[] real or none*/, Tables tables, View grids, View phi, View phi_transposed, View bias,         \
      double ratio, bool accumulated, double commitment_weight, double codebook_weight, int64_t chunks /*J*/,          \
      View bands, View spare /*5 pieces, 5 + S where accumulated*/, View gaps /*[B, L, C]*/,                           \
      View partial_phi /*[J, P C (9 C + 1)]*/, View order /*[B L] int64*/, View starts /*[K + 1] int64*/,              \
      View grad_features /*like features*/, View grad_codebook /*[K, C] or none*/,                                     \
      View grad_phi /*[P C (9 C + 1)]: [P, 9, out, in], [P, C]; or none*/, int threads) noexcept;                      \
  Error multiscale_rows(                                                                                               \
      View features /*[B, C, H, W] any float*/, View indices /*[B, L]*/, View codebook /*[K, C] real*/, Tables tables, \
      View grids, View phi, View bias, double ratio, View bands, View spare /*5 pieces*/, View rows /*[B, L, C]*/,     \
      View kept /*[B, L] real: 1 where a gradient passes*/, View status /*[1]: ids outside*/, int threads) noexcept;   \
  Error multiscale_rows_backward(View kept /*[B, L]*/, View grad_rows /*[B, L, C]*/, View grids, View bands,           \
                                 View spare /*3 pieces*/, View grad_features /*[B, C, H, W] any float*/,               \
                                 int threads) noexcept;                                                                \
  Error multiscale_decode(View indices /*[B, L]*/, View codebook /*[K, C] real*/, Tables tables, View grids,           \
                          int64_t height, int64_t width, View phi, View bias, double ratio, View bands,                \
                          View maps /*[B, H W, C]*/, View spare /*3 pieces*/, View map /*[B, C, H, W] real or none*/,  \
                          View inputs /*[B, R, C] real or none*/, View code_rows /*[B, L, C]*/,                        \
                          View code_norms /*[B, L, T]*/, View status /*[1]: ids outside*/, int threads) noexcept;      \
  Error multiscale_decode_backward(                                                                                    \
      View indices, View code_rows, View code_norms, View grad_map /*[B, C, H, W] or none*/,                           \
      View grad_inputs /*[B, R, C] or none*/, Tables tables, View grids, int64_t height, int64_t width, View phi,      \
      View phi_transposed, View bias, double ratio, int64_t chunks /*J*/, View bands, View spare /*4 pieces*/,         \
      View gaps /*[B, L, C]*/, View partial_phi /*[J, P C (9 C + 1)]*/, View order, View starts,                       \
      View grad_codebook /*[K, C]*/, View grad_phi /*or none*/, int threads) noexcept;                                 \
  Error multiscale_chain(View indices /*[B, L]*/, View codebook /*[K, C] real*/, Tables tables, View grids,            \
                         int64_t refine, View bands, View spare /*3 pieces*/, View inputs /*[B, R, C]*/,               \
                         View code_rows, View code_norms, View status, int threads) noexcept;                          \
  Error multiscale_chain_backward(View indices, View code_rows, View code_norms, View grad_inputs /*[B, R, C]*/,       \
                                  Tables tables, View grids, int64_t refine, View bands, View spare /*3 pieces*/,      \
                                  View gaps /*[B, L, C]*/, View order, View starts, View grad_codebook /*[K, C]*/,     \
                                  int threads) noexcept;
