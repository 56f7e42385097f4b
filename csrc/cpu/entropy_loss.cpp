// entropy_loss: first = 1/(N G) sum_ng H(p_ng), second = -1/G sum_gk m_gk log(m_gk + eps), m_gk = 1/N sum_n p_ngk, in
// nats, for p = softmax_k of logits s_ngk = x_ng . c_gk. Callers bring rows and codes already unit, weighted and
// divided by the temperature.
//
// Forward, for each block of rows: sweep (Z_n, and H_n = log Z_n - sum_k p u, u = s - m), then visit (sums of p over
// rows). Backward. With u = log p,  d H_n / d s_nk = -p_nk (u_nk + H_n), since the normaliser cancels in sum_k p_nk =
// 1, and with t_k = d (m_k log(m_k + eps)) / d m_k = log(m_k + eps) + m_k / (m_k + eps),  d second / d s_nk = -1/(N G)
// p_nk (t_k - <t>_n), <t>_n = sum_k p_nk t_k: the softmax's Jacobian. So for upstream (g1, g2)
//   d loss / d s_nk = -1/(N G) p_nk [g1 (u_nk + H_n) + g2 (t_k - <t>_n)],   dx_n = sum_k (d s_nk) c_k,  dc_k = sum_n (d
//   s_nk) x_n.
// sweep gives <t>_n, visit and spread the rest. Per pair and channel: forward 1 fused multiply-add and 1 where p
// counts, backward 1 and 3 where p counts; 2 (4) exps where p counts. Saved for backward: log Z, H [G, N], m [G, K]. A
// row that is left out (id -1) adds nothing and gets gradient 0; N counts it all the same. Source: Yu et al.,
// 2310.05737 (entropy); TokenFlow, 2412.03069; the derivation is ours.
#include <float.h>
#include <omp.h>

#include "common/ops.h"
#include "cpu/softmax.h"

TOKENFLOW_BEGIN

template <class T>
static inline T log_of(T value) {
  const T smallest = sizeof(T) == 4 ? static_cast<T>(FLT_MIN) : static_cast<T>(DBL_MIN);
  return static_cast<T>(__builtin_log(static_cast<double>(value > smallest ? value : smallest)));
}

template <class T>
static void forward(Call& call, const View& x, const View& codebook, const View& ids, double eps, const View& losses,
                    const View& log_totals, const View& entropies, const View& means) {
  using V = typename Register<T>::V;
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = codebook.shape[1], channels = x.shape[2];
  Softmax<T> s = take_softmax<T>(call, rows, codes, channels, 0, false, false);
  if (call.counting) return;
  double first = 0, second = 0;
  for (int64_t g = 0; g < groups; ++g) {
    pack_codes(s, static_cast<const T*>(codebook.data) + g * codes * channels);
    T* mean = static_cast<T*>(means.data) + g * codes;
    memset(mean, 0, codes * sizeof(T));
    for (int64_t block = 0; block < rows; block += kBlock) {
      load_block(&s, x, codebook, ids, g, block);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q)
        sweep(
            s, q, s.scratch + omp_get_thread_num() * s.scratch_size, [](int64_t, int64_t) {},
            [](int64_t, int64_t, int64_t, int64_t, V u) { return u; });
      gather(s);
      for (int64_t r = 0; r < s.rows; ++r) {
        s.log_total[r] = s.total[r] > 0 ? log_of(s.total[r]) : 0;
        const T entropy = s.log_total[r] - s.mean[r] > 0 ? s.log_total[r] - s.mean[r] : 0;
        static_cast<T*>(log_totals.data)[g * rows + block + r] = s.log_total[r];
        static_cast<T*>(entropies.data)[g * rows + block + r] = entropy;
        first += entropy;
      }
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q)
        for (int64_t p = q * s.span; p < s.last_panel(q); ++p)
          visit(s, p, s.scratch + omp_get_thread_num() * s.scratch_size, [&](const Visit<T>& v) {
            for (int64_t l = 0; l < kCodes; l += Register<T>::kLanes) {
              V sum = {};
              for (int64_t i = 0; i < v.count; ++i) sum += exp_register<T>(load_register(v.u + i * kCodes + l));
              for (int64_t k = 0; k < Register<T>::kLanes && p * kCodes + l + k < codes; ++k)
                mean[p * kCodes + l + k] += sum[k];
            }
          });
    }
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t q = 0; q < s.chunks; ++q) {
      double sum = 0;
      for (int64_t k = q * s.span * kCodes; k < s.last_panel(q) * kCodes && k < codes; ++k) {
        mean[k] = rows > 0 ? mean[k] / static_cast<T>(rows) : 0;
        sum -= mean[k] * log_of(mean[k] + static_cast<T>(eps));
      }
      s.partial[q * 2 * kBlock] = static_cast<T>(sum);
    }
    for (int64_t q = 0; q < s.chunks; ++q) second += s.partial[q * 2 * kBlock];
  }
  static_cast<T*>(losses.data)[0] = rows > 0 ? static_cast<T>(first / static_cast<double>(rows * groups)) : 0;
  static_cast<T*>(losses.data)[1] = static_cast<T>(second / static_cast<double>(groups));
}

template <class T>
static void backward(Call& call, const View& x, const View& codebook, const View& ids, double eps,
                     const View& log_totals, const View& entropies, const View& means, const View& grad_losses,
                     const View& grad_x, const View& grad_codebook) {
  using V = typename Register<T>::V;
  const int64_t rows = x.shape[0], groups = x.shape[1], codes = codebook.shape[1], channels = x.shape[2];
  const bool to_rows = grad_x.type != kNone, to_codes = grad_codebook.type != kNone;
  Softmax<T> s = take_softmax<T>(call, rows, codes, channels, 0, to_rows, to_codes);
  T* term = take<T>(call, s.panels * kCodes);  // t_k
  if (call.counting) return;
  const T scale = static_cast<T>(-1.0 / static_cast<double>(rows > 0 ? rows * groups : 1));
  const T first = scale * static_cast<const T*>(grad_losses.data)[0];
  const T second = scale * static_cast<const T*>(grad_losses.data)[1];
  for (int64_t g = 0; g < groups; ++g) {
    pack_codes(s, static_cast<const T*>(codebook.data) + g * codes * channels);
    const T* mean = static_cast<const T*>(means.data) + g * codes;
    const T* entropy = static_cast<const T*>(entropies.data) + g * rows;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t k = 0; k < s.panels * kCodes; ++k) {
      const T shifted = k < codes ? mean[k] + static_cast<T>(eps) : 1;
      term[k] = k < codes && mean[k] > 0 ? log_of(shifted) + mean[k] / shifted : 0;
    }
    for (int64_t block = 0; block < rows; block += kBlock) {
      load_block(&s, x, codebook, ids, g, block);
      memcpy(s.log_total, static_cast<const T*>(log_totals.data) + g * rows + block, s.rows * sizeof(T));
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q)
        sweep(
            s, q, s.scratch + omp_get_thread_num() * s.scratch_size, [](int64_t, int64_t) {},
            [&](int64_t, int64_t, int64_t p, int64_t l, V) { return load_register(term + p * kCodes + l); });
      gather(s);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
      for (int64_t q = 0; q < s.chunks; ++q) {
        if (to_rows) memset(s.grad_x + q * kBlock * s.wide(), 0, kBlock * s.wide() * sizeof(T));
        for (int64_t p = q * s.span; p < s.last_panel(q); ++p)
          visit(s, p, s.scratch + omp_get_thread_num() * s.scratch_size, [&](const Visit<T>& v) {
            for (int64_t i = 0; i < pad(v.count, kTile); ++i) {
              const int64_t r = i < v.count ? v.row[i] : 0;
              const T offset = first * entropy[block + r] - second * s.mean[r];
              for (int64_t l = 0; l < kCodes; l += Register<T>::kLanes) {
                const V u = load_register(v.u + i * kCodes + l), t = load_register(term + p * kCodes + l);
                const V slope =
                    exp_register<T>(u) * fused(broadcast(first), u, fused(broadcast(second), t, broadcast(offset)));
                memcpy(v.u + i * kCodes + l, &slope, sizeof(V));
              }
            }
            spread(s, q, v, v.u);
          });
      }
      if (to_rows) store_rows(s, grad_x, g, block);
    }
    if (to_codes) store_codes(s, static_cast<T*>(grad_codebook.data) + g * codes * channels);
  }
}

static Error check(const View& x, const View& codebook, const View& ids) {
  if (!dense(x, 3) || !dense(codebook, 3) || (x.type != kFloat32 && x.type != kFloat64) || codebook.type != x.type)
    return "entropy_loss: wanted contiguous x [N, G, C] and codebook [G, K, C], both float32 or both float64";
  if (x.shape[2] != codebook.shape[2] || x.shape[1] != codebook.shape[0] || codebook.shape[1] < 1)
    return "entropy_loss: codebook: wanted the groups and the width of x, and at least one code";
  if (!dense(ids, 2) || ids.type != kInt64 || ids.shape[0] != x.shape[0] || ids.shape[1] != x.shape[1])
    return "entropy_loss: ids: wanted int64 [N, G]";
  return nullptr;
}

static bool saved(const View& x, const View& codebook, const View& log_totals, const View& entropies,
                  const View& means) {
  const int64_t rows = x.shape[0] * x.shape[1];
  return holds(log_totals, x.type, rows) && holds(entropies, x.type, rows) &&
         holds(means, x.type, codebook.shape[0] * codebook.shape[1]);
}

Error entropy_loss(Call& call, View x, View codebook, View ids, double eps, View losses, View log_totals,
                   View entropies, View means) noexcept {
  if (const Error error = check(x, codebook, ids)) return error;
  if (!saved(x, codebook, log_totals, entropies, means) || !holds(losses, x.type, 2))
    return "entropy_loss: wanted outputs that fit the rows and codes";
  const auto of_type = x.type == kFloat64 ? forward<double> : forward<float>;
  of_type(call, x, codebook, ids, eps, losses, log_totals, entropies, means);
  return nullptr;
}

Error entropy_loss_backward(Call& call, View x, View codebook, View ids, double eps, View log_totals, View entropies,
                            View means, View grad_losses, View grad_x, View grad_codebook) noexcept {
  if (const Error error = check(x, codebook, ids)) return error;
  const int64_t codes = codebook.shape[0] * codebook.shape[1] * codebook.shape[2];
  if (!saved(x, codebook, log_totals, entropies, means) || !holds(grad_losses, x.type, 2) ||
      (grad_x.type != kNone && !(dense(grad_x, 3) && holds(grad_x, x.type, x.shape[0] * x.shape[1] * x.shape[2]))) ||
      (grad_codebook.type != kNone && !holds(grad_codebook, x.type, codes)))
    return "entropy_loss_backward: wanted gradients of the shapes and type of x and codebook";
  const auto of_type = x.type == kFloat64 ? backward<double> : backward<float>;
  of_type(call, x, codebook, ids, eps, log_totals, entropies, means, grad_losses, grad_x, grad_codebook);
  return nullptr;
}

TOKENFLOW_END
