// Exhaustive search in float32 (float64): N rows against K codes of C channels, 2 N K C operations, no N x K anywhere.
//
// Codes are packed once a call into panels of 32: per panel [C][32] channels, then [32] starting scores, so that the
// stream is contiguous and one broadcast channel of a row meets two registers of codes. A tile is 4 rows x 2 registers:
// 8 independent chains hide the latency of the fused multiply-add. Blocks of panels stay in the second-level cache while
// 64 rows pass over them: bytes read from beyond it are 4 K C per 64 rows.
// Who owns what: `packed` and `staged` are workspace tensors from Python.
#pragma once
#include "cpu/simd.h"

TOKENFLOW_BEGIN

constexpr int64_t kPanel = 32;        // codes per panel
constexpr int64_t kRowBlock = 64;     // rows that share a pass over the panels
constexpr int64_t kBlockBytes = 256 << 10;

static inline int64_t panels_of(int64_t codes) { return (codes + kPanel - 1) / kPanel; }

template <class T>
struct Packed {
  const T* panels;   // [panels][C + 1][32]
  int64_t codes;     // in the window
  int64_t channels;  // C
  int64_t stride() const { return kPanel * (channels + 1); }
};

// Codes [lo, lo + codes) of one group's codebook [K, C] into panels; padding lanes score +inf and never win.
template <class T>
static Packed<T> pack(const T* codebook, int64_t lo, int64_t codes, int64_t channels, const Tables& tables, T* out,
                      int threads) {
  const Packed<T> packed = {out, codes, channels};
  const int64_t panels = panels_of(codes);
#pragma omp parallel for num_threads(threads) schedule(static) if (panels > 8)
  for (int64_t p = 0; p < panels; ++p) {
    T* panel = out + p * packed.stride();
    T* start = panel + channels * kPanel;
    const int64_t used = codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel;
    for (int64_t l = 0; l < kPanel; ++l) {
      const T* code = codebook + (lo + p * kPanel + (l < used ? l : 0)) * channels;
      for (int64_t d = 0; d < channels; ++d) panel[d * kPanel + l] = code[d];
      start[l] = 0;
    }
    int64_t first = 0;
    for (int t = 0; t < tables.count; ++t) {
      T square[kPanel] = {};
      for (int64_t d = first; d < first + tables.width[t]; ++d)
        for (int64_t l = 0; l < kPanel; ++l)
          square[l] = fused(panel[d * kPanel + l], panel[d * kPanel + l], square[l]);
      if (tables.unit) {
        for (int64_t l = 0; l < kPanel; ++l) {
          const T norm = root(square[l]);
          square[l] = norm > static_cast<T>(1e-12) ? norm : static_cast<T>(1e-12);
        }
        for (int64_t d = first; d < first + tables.width[t]; ++d)
          for (int64_t l = 0; l < kPanel; ++l) panel[d * kPanel + l] /= square[l];
      } else if (tables.l2) {
        const T weight = static_cast<T>(tables.weight[t]);
        for (int64_t l = 0; l < kPanel; ++l) start[l] += weight * (static_cast<T>(0.5) * square[l]);
      }
      first += tables.width[t];
    }
    for (int64_t l = used; l < kPanel; ++l) start[l] = __builtin_inf();
  }
  return packed;
}

// Row x [C] becomes y [C], as searched, in place; staged [C] (may be y itself) gets its negated, weighted copy.
// False, and a zero row, where x is not finite.
template <class T>
static inline bool stage(const Tables& tables, T* x, T* staged) {
  int64_t channels = 0;
  for (int t = 0; t < tables.count; ++t) channels += tables.width[t];
  const bool good = all_finite(x, channels);
  if (tables.unit) make_unit<T>(tables, x, nullptr);
  int64_t d = 0;
  for (int t = 0; t < tables.count; ++t) {
    const T weight = static_cast<T>(tables.weight[t]);
    for (const int64_t end = d + tables.width[t]; d < end; ++d) staged[d] = good ? -(weight * x[d]) : 0;
  }
  return good;
}

template <class T>
struct Best {
  T score;
  int64_t id;  // inside the window; -1 while no score was below +inf
};

// R rows against the half-open range of register pairs [from, to) of the packed codes. Never inlined: the
// 8 sums stay in registers only where the caller does not compete for them (1.4x in multiscale_quantize).
template <class T, int R>
static __attribute__((noinline)) void scan_tile(const T* staged, const Packed<T>& packed, int64_t from, int64_t to, Best<T>* best) {
  using V = typename Register<T>::V;
  using I = typename Register<T>::I;
  constexpr int kLanes = Register<T>::kLanes;
  constexpr int64_t kPairs = kPanel / (2 * kLanes);  // register pairs per panel
  const int64_t channels = packed.channels;
  V low[R][2];
  I at[R][2];
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h) low[r][h] = broadcast(static_cast<T>(__builtin_inf())), at[r][h] = I{} - 1;
  for (int64_t pair = from; pair < to; ++pair) {
    const T* codes = packed.panels + pair / kPairs * packed.stride() + pair % kPairs * 2 * kLanes;
    V score[R][2];
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h) score[r][h] = load_register(codes + channels * kPanel + h * kLanes);
    for (int64_t d = 0; d < channels; ++d) {
      const V c0 = load_register(codes + d * kPanel), c1 = load_register(codes + d * kPanel + kLanes);
      for (int r = 0; r < R; ++r) {
        const V x = broadcast(staged[r * channels + d]);
        score[r][0] = fused(x, c0, score[r][0]);
        score[r][1] = fused(x, c1, score[r][1]);
      }
    }
    const I here = I{} + static_cast<typename Register<T>::Index>(pair);
    for (int r = 0; r < R; ++r)
      for (int h = 0; h < 2; ++h) {
        const I better = score[r][h] < low[r][h];
        low[r][h] = better ? score[r][h] : low[r][h];
        at[r][h] = better ? here : at[r][h];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      for (int l = 0; l < kLanes; ++l) {
        if (at[r][h][l] < 0) continue;
        const int64_t id = static_cast<int64_t>(at[r][h][l]) * 2 * kLanes + h * kLanes + l;
        if (low[r][h][l] < best[r].score || (low[r][h][l] == best[r].score && id < best[r].id))
          best[r] = {low[r][h][l], id};
      }
}

// The canonical scores [32] of one panel for one staged row.
template <class T>
static inline void score_panel(const T* staged, const Packed<T>& packed, int64_t p, T* scores) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes, kRegisters = kPanel / kLanes;
  const T* panel = packed.panels + p * packed.stride();
  V score[kRegisters];
  for (int i = 0; i < kRegisters; ++i) score[i] = load_register(panel + packed.channels * kPanel + i * kLanes);
  for (int64_t d = 0; d < packed.channels; ++d)
    for (int i = 0; i < kRegisters; ++i)
      score[i] = fused(broadcast(staged[d]), load_register(panel + d * kPanel + i * kLanes), score[i]);
  memcpy(scores, score, sizeof(score));
}

// staged [rows, C] against all packed codes: best [rows].
template <class T>
static void search(const T* staged, int64_t rows, const Packed<T>& packed, Best<T>* best) {
  constexpr int64_t kPairs = kPanel / (2 * Register<T>::kLanes);
  const int64_t channels = packed.channels, pairs = panels_of(packed.codes) * kPairs;
  int64_t block = kBlockBytes / static_cast<int64_t>(packed.stride() * sizeof(T)) * kPairs;
  if (block < kPairs) block = kPairs;
  for (int64_t r = 0; r < rows; ++r) best[r] = {static_cast<T>(__builtin_inf()), -1};
  for (int64_t from = 0; from < pairs; from += block) {
    const int64_t to = from + block < pairs ? from + block : pairs;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) scan_tile<T, 4>(staged + r * channels, packed, from, to, best + r);
    if (rows - r == 3) scan_tile<T, 3>(staged + r * channels, packed, from, to, best + r);
    if (rows - r == 2) scan_tile<T, 2>(staged + r * channels, packed, from, to, best + r);
    if (rows - r == 1) scan_tile<T, 1>(staged + r * channels, packed, from, to, best + r);
  }
  // No score below +inf: the first code whose score is a number, and if none is, the first code.
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t p = 0; best[r].id < 0 && p < panels_of(packed.codes); ++p) {
      T scores[kPanel];
      score_panel(staged + r * channels, packed, p, scores);
      for (int64_t l = 0; best[r].id < 0 && l < kPanel && p * kPanel + l < packed.codes; ++l)
        if (scores[l] == scores[l]) best[r] = {scores[l], p * kPanel + l};
    }
    if (best[r].id < 0) best[r] = {static_cast<T>(__builtin_nan("")), 0};
  }
}

TOKENFLOW_END
