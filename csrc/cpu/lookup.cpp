// lookup: rows[n, g] = codebook[g, indices[n, g]], and the scatter-add backward.
// Reads 8 + C and writes C numbers a row; an id outside the table reads as a NaN row and is counted. Results beyond the
// last-level cache are written past it: an ordinary store would read every line first.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/ops.h"
#include "cpu/sums.h"

TOKENFLOW_BEGIN

static int64_t bytes_of(Type type) { return type == kFloat64 || type == kInt64 ? 8 : type == kFloat32 ? 4 : 2; }

constexpr int64_t kStreamBytes = 16 << 20;  // results from here on bypass the caches

// to [bytes] = from [bytes], both 16-byte multiples and `to` so aligned, past the caches.
static inline void stream_row(char* to, const char* from, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  memcpy(to, from, bytes);
#endif
}

static inline void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores are ordered with nothing until then
#endif
}

// kBytes: the width of a row where it is known, so that its copy is a few registers and no call; 0: `bytes`.
template <int64_t kBytes, bool kStream>
static int64_t gather(const int64_t* ids, const char* from, char* to, int64_t rows, int64_t groups, int64_t codes,
                      int64_t bytes, int threads) {
  const int64_t width = kBytes ? kBytes : bytes;
  int64_t outside = 0;
#pragma omp parallel num_threads(threads) reduction(+ : outside) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t i = n * groups + g, id = ids[i];
        if (!inside(id, codes)) {
          memset(to + i * width, 0xff, width);  // all ones is a NaN in every float type
          ++outside;
        } else if (kStream) {
          stream_row(to + i * width, from + (g * codes + id) * width, width);
        } else {
          memcpy(to + i * width, from + (g * codes + id) * width, width);
        }
      }
    if (kStream) stream_end();
  }
  return outside;
}

Error lookup(Call& call, View indices, View codebook, View rows) noexcept {
  indices = by_group(indices, codebook.rank == 3, 0);
  codebook = with_groups(codebook);
  if (!dense(indices, 2) || !dense(codebook, 3) || indices.type != kInt64 || !floating(codebook))
    return "lookup: wanted contiguous int64 indices [..., G] and floats codebook [G, K, C]";
  if (indices.shape[1] != codebook.shape[0]) return "lookup: indices: wanted the groups of the codebook";
  if (!holds(rows, codebook.type, indices.shape[0] * indices.shape[1] * codebook.shape[2]))
    return "lookup: rows: wanted [..., G, C] of the codebook's type";
  if (call.counting) return nullptr;
  const int64_t count = indices.shape[0], groups = codebook.shape[0], codes = codebook.shape[1];
  const int64_t bytes = codebook.shape[2] * bytes_of(codebook.type), written = count * groups * bytes;
  const int64_t* ids = static_cast<const int64_t*>(indices.data);
  const char* from = static_cast<const char*>(codebook.data);
  char* to = static_cast<char*>(rows.data);
  const int threads = written < kAloneBytes ? 1 : call.threads;
  const bool aligned = bytes % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  const auto run = written >= kStreamBytes && aligned ? bytes == 32 ? gather<32, true> : gather<0, true>
                   : bytes == 16                      ? gather<16, false>
                   : bytes == 32                      ? gather<32, false>
                   : bytes == 64                      ? gather<64, false>
                   : bytes == 128                     ? gather<128, false>
                                                      : gather<0, false>;
  call.ids_outside = run(ids, from, to, count, groups, codes, bytes, threads);
  return nullptr;
}

template <class T>
static void backward(const int64_t* ids, const View& grad_rows, const View& grad_codebook, const SumSpace& space) {
  const int64_t codes = grad_codebook.shape[1], channels = grad_codebook.shape[2];
  sum_by_code<T>(
      ids, grad_rows, codes, false, space, [](int64_t&, int64_t) {},
      [&](int64_t g, int64_t first, int64_t count, const double* sums, const int64_t*) {
        store_sums<T>(grad_codebook, (g * codes + first) * channels, count * channels, sums);
      },
      [&](int64_t g, int64_t first, int64_t count) {
        const int64_t bytes = channels * bytes_of(grad_codebook.type);
        memset(static_cast<char*>(grad_codebook.data) + (g * codes + first) * bytes, 0, count * bytes);
      });
}

Error lookup_backward(Call& call, View indices, View grad_rows, View grad_codebook) noexcept {
  const bool grouped = grad_codebook.rank == 3;
  indices = by_group(indices, grouped, 0), grad_rows = by_group(grad_rows, grouped, 1);
  grad_codebook = with_groups(grad_codebook);
  if (!dense(indices, 2) || !dense(grad_rows, 3) || !dense(grad_codebook, 3) || indices.type != kInt64 ||
      !floating(grad_rows))
    return "lookup_backward: wanted contiguous int64 indices [..., G], floats grad_rows [..., G, C], "
           "grad_codebook [G, K, C]";
  const int64_t rows = indices.shape[0], groups = grad_codebook.shape[0];
  if (indices.shape[1] != groups || grad_rows.shape[0] != rows || grad_rows.shape[1] != groups ||
      grad_rows.shape[2] != grad_codebook.shape[2] || grad_codebook.type != grad_rows.type ||
      grad_codebook.shape[1] < 1)
    return "lookup_backward: wanted gradients that fit the rows";
  const SumSpace space = take_sums(call, rows, groups, grad_codebook.shape[1], grad_rows.shape[2]);
  if (call.counting) return nullptr;
  const int64_t* ids = static_cast<const int64_t*>(indices.data);
  if (grad_rows.type == kFloat64)
    backward<double>(ids, grad_rows, grad_codebook, space);
  else
    backward<float>(ids, grad_rows, grad_codebook, space);
  return nullptr;
}

TOKENFLOW_END
