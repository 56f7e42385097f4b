// Codes as the search reads them: panels of P = kPanel, per panel [C][P] channels, then [P] starting scores, so that
// the stream is contiguous and one broadcast channel of a row meets whole registers of codes. And the canonical scores
// of any range of packed codes, which every scan ends with. Bytes: 4 (C + 1) a code, written once a call, or never
// where a call has too few rows to read them twice.
#pragma once
#include "cpu/parallel.h"
#include "cpu/simd.h"

TOKENFLOW_BEGIN

// Codes per panel: two registers of floats, which are what a tile reads, and so reads without gaps.
constexpr int64_t kPanel = kRegisterBytes == 32 ? 16 : 32;
constexpr int64_t kRowBlock = 64;  // rows that are searched together, at most

static inline int64_t panels_of(int64_t codes) { return (codes + kPanel - 1) / kPanel; }

template <class T>
struct Packed {
  const T* panels;   // [panels][C + 1][kPanel]
  int64_t codes;     // those behind the last one score +inf
  int64_t channels;  // C
  int64_t stride() const { return kPanel * (channels + 1); }
};

// `used` codes [used, C] into one panel; its other lanes score +inf and never win.
template <class T>
static void pack_panel(const T* codes, int64_t used, int64_t channels, const Tables& tables, T* panel) {
  typedef T Lanes __attribute__((vector_size(8 * sizeof(T))));
  T* start = panel + channels * kPanel;
  for (int64_t l = 0; l < kPanel; l += 8) {  // eight codes at once: half the time of one by one
    const T* c[8];
    for (int i = 0; i < 8; ++i) c[i] = codes + (l + i < used ? l + i : 0) * channels, start[l + i] = 0;
    const T *c0 = c[0], *c1 = c[1], *c2 = c[2], *c3 = c[3], *c4 = c[4], *c5 = c[5], *c6 = c[6], *c7 = c[7];
    for (int64_t d = 0; d < channels; ++d) {
      const Lanes lanes = {c0[d], c1[d], c2[d], c3[d], c4[d], c5[d], c6[d], c7[d]};
      memcpy(panel + d * kPanel + l, &lanes, sizeof(lanes));
    }
  }
  int64_t first = 0;
  for (int t = 0; t < tables.count; ++t) {
    T square[kPanel] = {};
    for (int64_t d = first; (tables.unit || tables.l2) && d < first + tables.width[t]; ++d)
      for (int64_t l = 0; l < kPanel; ++l) square[l] = fused(panel[d * kPanel + l], panel[d * kPanel + l], square[l]);
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

// Codes [codes, C] of one group into panels.
template <class T>
static Packed<T> pack(const T* codebook, int64_t codes, int64_t channels, const Tables& tables, T* out, int threads) {
  const Packed<T> packed = {out, codes, channels};
  const int64_t panels = panels_of(codes);
  // Some panels at a time: what a thread takes at once outweighs the taking.
  const int64_t batch = 512 / kPanel, batches = (panels + batch - 1) / batch;
  for_each(batches, codes * channels > 16384 ? threads : 1, [&](int64_t i) {
    for (int64_t p = i * batch; p < panels && p < (i + 1) * batch; ++p) {
      const int64_t used = codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel;
      pack_panel(codebook + p * kPanel * channels, used, channels, tables, out + p * packed.stride());
    }
  });
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

template <class T>
static inline bool better(const Best<T>& a, const Best<T>& b) {
  return a.score < b.score || (a.score == b.score && a.id < b.id);
}

// The canonical scores [P, kPanel] of panels [p, p + P) for one staged row; those behind the last repeat panel p.
template <int P, class T>
static inline void score_panels(const T* staged, const Packed<T>& packed, int64_t p, T* scores) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes, kParts = kPanel / kLanes, kCount = P * kParts;
  const T* codes[P];
  V score[kCount];
  for (int i = 0; i < P; ++i)
    codes[i] = packed.panels + (p + i < panels_of(packed.codes) ? p + i : p) * packed.stride();
  for (int i = 0; i < kCount; ++i)
    score[i] = load_register(codes[i / kParts] + packed.channels * kPanel + i % kParts * kLanes);
  for (int64_t d = 0; d < packed.channels; ++d)
    for (int i = 0; i < kCount; ++i)
      score[i] =
          fused(broadcast(staged[d]), load_register(codes[i / kParts] + d * kPanel + i % kParts * kLanes), score[i]);
  memcpy(scores, score, sizeof(score));
}

// best = the lowest (score, id) of it and of the codes in `count` registers of the panels, listed in ascending order;
// ids count from `offset`. Several at a time, so that chains of multiply-adds run side by side.
template <class T>
static void best_in_registers(const T* staged, const Packed<T>& packed, const int32_t* registers, int64_t count,
                              int64_t offset, Best<T>* best) {
  using V = typename Register<T>::V;
  constexpr int kLanes = Register<T>::kLanes, kPerPanel = kPanel / kLanes, kChains = 4;
  for (int64_t first = 0; first < count; first += kChains) {
    const T* codes[kChains];
    V score[kChains];
    V low = broadcast(static_cast<T>(__builtin_inf()));
    for (int i = 0; i < kChains; ++i) {
      const int32_t at = registers[first + i < count ? first + i : count - 1];
      codes[i] = packed.panels + at / kPerPanel * packed.stride() + at % kPerPanel * kLanes;
      score[i] = load_register(codes[i] + packed.channels * kPanel);
    }
    for (int64_t d = 0; d < packed.channels; ++d) {
      const V x = broadcast(staged[d]);
      for (int i = 0; i < kChains; ++i) score[i] = fused(x, load_register(codes[i] + d * kPanel), score[i]);
    }
    for (int i = 0; i < kChains; ++i) low = lower(score[i], low);
    if (!lanes_at_most(low, best->score)) continue;
    const T score_here = lowest_lane(low);
    for (int i = 0; i < kChains; ++i) {
      const uint32_t lanes = lanes_at_most(score[i], score_here);
      if (!lanes) continue;
      const int64_t at = registers[first + i < count ? first + i : count - 1];
      const int lane = __builtin_ctz(lanes);
      const Best<T> here = {score[i][lane], offset + at * kLanes + lane};  // its own sign, where zeros of both tie
      if (better(here, *best)) *best = here;
      break;
    }
  }
}

// The same for whole panels [from, to), a few at most.
template <class T>
static void best_in_panels(const T* staged, const Packed<T>& packed, int64_t from, int64_t to, int64_t offset,
                           Best<T>* best) {
  constexpr int kPerPanel = kPanel / Register<T>::kLanes;
  int32_t registers[8 * kPerPanel];
  for (int64_t p = from; p < to; p += 8) {
    int64_t count = 0;
    for (int64_t i = p * kPerPanel; i < to * kPerPanel && i < (p + 8) * kPerPanel; ++i)
      registers[count++] = static_cast<int32_t>(i);
    best_in_registers(staged, packed, registers, count, offset, best);
  }
}

TOKENFLOW_END
