// soft_quantize's backward. Forward is the search for the highest logit s_nk = x_n . k_k and a gather, quantized_n =
// v[id_n]; backward treats it as sum_k p_nk v_k, p = softmax(s): with g the upstream gradient and a_nk = g_n . v_k,
//   d loss / d s_nk = p_nk (a_nk - <a>_n),  <a>_n = sum_k p_nk a_nk,   dx_n = sum_k (d s_nk) k_k,  dk_k = sum_n (d
//   s_nk) x_n;
// the gradient of the values is that of the gather. Callers bring rows already scaled, and a bias as one channel more.
// For each block of rows: sweep (Z_n and <a>_n), then visit and spread. Per pair: 2 D + 2 Dv fused multiply-adds and an
// exp where p counts in visit, 2 D more in spread; D and, where p counts, Dv and an exp in sweep. Nothing is saved but
// the ids. Source: IBQ, 2412.02692; CODA, 2503.17760; the closed form is in the notes on related systems.
#include <omp.h>

#include "common/ops.h"
#include "cpu/softmax.h"

TOKENFLOW_BEGIN

template <class T>
static void backward(Call& call, const View& x, const View& keys, const View& values, const View& ids, const View& grad,
                     const View& grad_x, const View& grad_keys) {
  using V = typename Register<T>::V;
  const int64_t rows = x.shape[0], groups = x.shape[1], channels = x.shape[2];
  const int64_t codes = keys.shape[1], width = values.shape[2], padded = pad(width, kTile);
  const bool to_rows = grad_x.type != kNone, to_codes = grad_keys.type != kNone;
  Softmax<T> s = take_softmax<T>(call, rows, codes, channels, width, to_rows, to_codes);
  T* value_panel = take<T>(call, s.panels * kCodes * width);  // [panels][Dv][32]
  T* upstream = take<T>(call, kBlock * padded);               // [256][Dv up to 8]
  if (call.counting) return;
  static const T zeros[kCodes] = {};
  for (int64_t g = 0; g < groups; ++g) {
    pack_codes(s, static_cast<const T*>(keys.data) + g * codes * channels);
    const T* table = static_cast<const T*>(values.data) + g * codes * width;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t p = 0; p < s.panels; ++p)
      transpose_panel(table + p * kCodes * width, codes - p * kCodes, width, value_panel + p * kCodes * width);
    for (int64_t block = 0; block < rows; block += kBlock) {
      load_block(&s, x, keys, ids, g, block);
      memset(upstream, 0, kBlock * padded * sizeof(T));
      for (int64_t r = 0; r < s.rows; ++r)
        memcpy(upstream + r * padded, static_cast<const T*>(grad.data) + ((block + r) * groups + g) * width,
               width * sizeof(T));
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q) {
        T* scratch = s.scratch + omp_get_thread_num() * s.scratch_size;
        T* along = scratch + kTile * kCodes;  // a [8][32]
        sweep(
            s, q, scratch,
            [&](int64_t t, int64_t p) {
              T* out[kTile];
              for (int64_t r = 0; r < kTile; ++r) out[r] = along + r * kCodes;
              product<T, kCodes>(upstream + t * kTile * padded, padded, 1, value_panel + p * kCodes * width, kCodes,
                                 width, zeros, out);
            },
            [&](int64_t, int64_t r, int64_t, int64_t l, V) { return load_register(along + r * kCodes + l); });
      }
      gather(s);
      for (int64_t r = 0; r < s.rows; ++r)
        s.log_total[r] = s.total[r] > 0 ? static_cast<T>(__builtin_log(static_cast<double>(s.total[r]))) : 0;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q) {
        if (to_rows) memset(s.grad_x + q * kBlock * s.wide(), 0, kBlock * s.wide() * sizeof(T));
        for (int64_t p = q * s.span; p < s.last_panel(q); ++p)
          visit(s, p, s.scratch + omp_get_thread_num() * s.scratch_size, [&](const Visit<T>& v) {
            memset(v.values, 0, kGroup * padded * sizeof(T));
            for (int64_t i = 0; i < v.count; ++i)
              memcpy(v.values + i * padded, upstream + v.row[i] * padded, padded * sizeof(T));
            for (int64_t i = 0; i < v.count; i += kTile) {
              T* out[kTile];
              for (int64_t r = 0; r < kTile; ++r) out[r] = v.spare + (i + r) * kCodes;
              product<T, kCodes>(v.values + i * padded, padded, 1, value_panel + p * kCodes * width, kCodes, width,
                                 zeros, out);
            }
            for (int64_t i = 0; i < pad(v.count, kTile); ++i)
              for (int64_t l = 0; l < kCodes; l += Register<T>::kLanes) {
                const V mean = broadcast(i < v.count ? s.mean[v.row[i]] : 0);
                const V slope = exp_register<T>(load_register(v.u + i * kCodes + l)) *
                                (load_register(v.spare + i * kCodes + l) - mean);
                memcpy(v.u + i * kCodes + l, &slope, sizeof(V));
              }
            spread(s, q, v, v.u);
          });
      }
      if (to_rows) store_rows(s, grad_x, g, block);
    }
    if (to_codes) store_codes(s, static_cast<T*>(grad_keys.data) + g * codes * channels);
  }
}

Error soft_quantize_backward(Call& call, View x, View keys, View values, View ids, View grad, View grad_x,
                             View grad_keys) noexcept {
  if (!dense(x, 3) || !dense(keys, 3) || !dense(values, 3) || (x.type != kFloat32 && x.type != kFloat64) ||
      keys.type != x.type || values.type != x.type)
    return "soft_quantize: wanted contiguous x [N, G, C], keys [G, K, C], values [G, K, Dv], all float32 or all "
           "float64";
  if (x.shape[2] != keys.shape[2] || x.shape[1] != keys.shape[0] || keys.shape[1] < 1 ||
      values.shape[0] != keys.shape[0] || values.shape[1] != keys.shape[1])
    return "soft_quantize: keys: wanted the groups and the width of x, and as many codes as values, at least one";
  if (!dense(ids, 2) || ids.type != kInt64 || ids.shape[0] != x.shape[0] || ids.shape[1] != x.shape[1] ||
      !holds(grad, x.type, x.shape[0] * x.shape[1] * values.shape[2]))
    return "soft_quantize: wanted int64 ids [N, G] and a gradient [N, G, Dv]";
  if ((grad_x.type != kNone && !(dense(grad_x, 3) && holds(grad_x, x.type, x.shape[0] * x.shape[1] * x.shape[2]))) ||
      (grad_keys.type != kNone && !holds(grad_keys, x.type, keys.shape[0] * keys.shape[1] * keys.shape[2])))
    return "soft_quantize: wanted gradients of the shapes and type of x and keys";
  const auto of_type = x.type == kFloat64 ? backward<double> : backward<float>;
  of_type(call, x, keys, values, ids, grad, grad_x, grad_keys);
  return nullptr;
}

TOKENFLOW_END
