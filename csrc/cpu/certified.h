// Certified search: scan in 8-bit integers, then score again, canonically, the few segments of codes that an error
// bound cannot rule out. The answer is the canonical search's, ties included; docs/certified_search.md has the proof.
//   s_k = h_k + z.c_k                     canonical score: h_k = 0.5 |c_k|^2 for l2, else 0; z the staged row, -y
//   s'_k = middle + unit (H_k + q_z.q_k)  its 8-bit stand-in: z ~ scale_z q_z, c_k ~ scale q_k, unit = scale_z scale
// Where a sum of all channels needs more than 16 bits, it is made of chunks, unit is 2^shift times that, and every
// chunk of q_z.q_k is divided by 2^shift, downwards.
//   s'_k - s_k <= bound(|c_k|, |c_k - scale q_k|), with the actual residuals of both sides
// The scan keeps the minimum of each segment of codes (codes8.h), a `Sum` (simd.h).
// Operations: 2 N K C of 8 bits. Bytes: C + 4 (AVX2) or C + 8 a code for the scan, and the panels that the rescoring
// reads.
#pragma once
#include "cpu/codes8.h"
#include "cpu/search_state.h"

TOKENFLOW_BEGIN

#ifdef TOKENFLOW_INT8

// table [R, segments]: the minimum of every segment of blocks [from, to) for rows q [R, words]; factor of the starts.
template <int R, bool kStarts, bool kChunks>
static __attribute__((noinline, TOKENFLOW_DOT_TARGET)) void scan8(const int32_t* q, const Codes8& codes, int64_t from,
                                                                  int64_t to, Factor factor, Sum* table) {
  const int64_t words = codes.words, length = codes.length, chunk = kChunks ? codes.chunk : words;
  for (int64_t b = from; b < to; ++b) {
    Sums low[R];
    for (int r = 0; r < R; ++r) low[r] = Sums{} + kMostOfSum;
    const Sum* code = codes.quantized + b * length * words * kSums;
    const Sum* offset = codes.offsets + b * length * codes.chunks * kSums;
    const Start* start = codes.starts + b * length * kSums;
    for (int64_t v = 0; v < length; v += 2) {
      Sums s0 = {}, s1 = {}, sum[R][2], total[R][2];
      if (kStarts) s0 = load_starts(start, factor), s1 = load_starts(start + kSums, factor);
      start += 2 * kSums;
      for (int r = 0; r < R; ++r) total[r][0] = s0, total[r][1] = s1;
      int64_t w = 0;
      do {
        Sums o0 = load_sums(offset), o1 = load_sums(offset + kSums);
        if (!kChunks) o0 = add(o0, s0), o1 = add(o1, s1);
        offset += 2 * kSums;
        for (int r = 0; r < R; ++r) sum[r][0] = o0, sum[r][1] = o1;
        for (const int64_t end = w + chunk < words ? w + chunk : words; w < end; ++w) {
          const Sums c0 = load_sums(code), c1 = load_sums(code + kSums);
          code += 2 * kSums;
          for (int r = 0; r < R; ++r) {
            sum[r][0] = dot(sum[r][0], q[r * words + w], c0);
            sum[r][1] = dot(sum[r][1], q[r * words + w], c1);
          }
        }
        for (int r = 0; r < R && kChunks; ++r) {
          total[r][0] = add(total[r][0], sum[r][0] >> codes.shift);
          total[r][1] = add(total[r][1], sum[r][1] >> codes.shift);
        }
      } while (kChunks && w < words);
      const auto& of_all = kChunks ? total : sum;
      for (int r = 0; r < R; ++r) low[r] = lower(lower(low[r], of_all[r][0]), of_all[r][1]);
    }
    for (int r = 0; r < R; ++r) memcpy(table + r * codes.segments() + b * kSums, &low[r], sizeof(low[r]));
  }
}

using Scan8 = void (*)(const int32_t*, const Codes8&, int64_t, int64_t, Factor, Sum*);

// The scan of these codes, with starting scores or without, for kTile8 rows.
static inline Scan8 scan_of(const Codes8& codes, bool starts) {
  if (codes.chunks > 1) return starts ? scan8<kTile8, true, true> : scan8<kTile8, false, true>;
  return starts ? scan8<kTile8, true, false> : scan8<kTile8, false, false>;
}

// What the bound needs of the call besides row and codes.
struct Bound {
  int64_t channels;
  bool starts;  // l2
  bool clip;    // l2 with every weight 1: a better code cannot be longer than |y| + its distance
  double max_weight;
};

// The largest sum that a code can have and still beat or tie with a score, by its norm and gap: (4) to (6) of
// docs/certified_search.md.
struct Ceiling {
  float base, by_norm, by_start, by_gap, cut;

  Sum operator()(float norm, float gap) const {
    const float c = norm < cut ? norm : cut;
    const float error = c * (by_norm + by_start * c) + by_gap * gap;
    // What is added here is rounded itself: 2^-20 of its size covers it. A sum is an integer: a fraction holds none.
    const float most = base + error + TOKENFLOW_BOUND(kOfCeiling, (error + __builtin_fabsf(base)) * 0x1p-20f);
    // A ceiling beyond all sums rules nothing out; one below them stays above what it was.
    if (!(most < static_cast<float>(kMostOfSum))) return kMostOfSum;
    return static_cast<Sum>(most > -kMostSum ? most : -kMostSum);
  }
};

static inline Ceiling ceiling_of(const Row8& row, const Codes8& codes, const Bound& bound, float score) {
  const double u = 0x1p-24, n = static_cast<double>(bound.channels), underflow = n * 0x1p-126;
  const double gamma = n * u / (1 - n * u), chain = TOKENFLOW_BOUND(kOfChain, gamma);
  double longest = 1e300;
  if (bound.clip) {
    const double a = (1 + gamma) * row.norm, b = (1 - gamma) * (1 - gamma);
    const double root = a * a + 2 * b * (score + underflow);
    longest = TOKENFLOW_BOUND(kOfCut, (a + __builtin_sqrt(root > 0 ? root : 0)) / b * (1 + 1e-6));
  }
  constexpr double kUp = 1 + 0x1p-20;
  const double by_norm = TOKENFLOW_BOUND(kOfRow, row.residual) + chain * row.norm;
  // h_k <= (1 + 2 gamma) 0.5 max_weight |c_k|^2
  const double most_start = (1 + 2 * gamma) * 0.5 * bound.max_weight;
  const double by_start = TOKENFLOW_BOUND(kOfStartChain, (gamma + 0x1p-22) * most_start);
  Ceiling c;
  const double start = bound.starts ? TOKENFLOW_BOUND(kOfStart, kStartError) : 0;
  c.base = static_cast<float>((score - codes.middle + underflow) / row.unit + start);
  c.by_norm = static_cast<float>(by_norm / row.unit * kUp);
  c.by_start = static_cast<float>(bound.starts ? by_start / row.unit * kUp : 0);
  c.by_gap = static_cast<float>(TOKENFLOW_BOUND(kOfCode, row.size) / row.unit * kUp);
  c.cut = static_cast<float>(longest < 1e30 ? longest : 1e30);
  return c;
}

// best = the canonical search's answer for row z, from its table of minima. Returns how many segments were scored;
// none, and no answer, where that would be more than `limit`.
static inline int64_t resolve8(const float* z, const Row8& row, const Sum* table, const Codes8& codes,
                        const Packed<float>& packed, const Bound& bound, int64_t limit, Best<float>* best) {
  constexpr int kLanes = Register<float>::kLanes;
  const int64_t segments = codes.segments();
  // The registers of a segment, to score again.
  const auto list = [&](int64_t segment, int32_t* registers) {
    const int64_t first = segment * codes.length, end = first + codes.length;
    const int64_t last = end < packed.codes ? end : packed.codes;
    int64_t n = 0;
    for (int64_t i = first / kLanes; i * kLanes < last; ++i) registers[n++] = static_cast<int32_t>(i);
    return n;
  };
  int32_t registers[kListed8];
  Sums least = load_sums(table);
  for (int64_t s = kSums; s < segments; s += kSums) least = lower(least, load_sums(table + s));
  const Sum lowest = lowest_lane(least);
  int64_t first = 0;
  while (!lanes_at_most(load_sums(table + first), lowest)) first += kSums;
  first += __builtin_ctz(lanes_at_most(load_sums(table + first), lowest));
  *best = {__builtin_inff(), -1};
  best_in_registers(z, packed, registers, list(first, registers), 0, best);
  if (best->id < 0) return 0;  // the segment of a repeated last code, or scores that overflow

  const Ceiling ceiling = ceiling_of(row, codes, bound, best->score);
  const Sum highest = ceiling(codes.longest, codes.widest);
  int64_t scored = 1, listed = 0;
  for (int64_t s = 0; s < segments; s += kSums) {
    for (uint32_t mask = lanes_at_most(load_sums(table + s), highest); mask; mask &= mask - 1) {
      const int64_t segment = s + __builtin_ctz(mask);
      if (segment == first || table[segment] > ceiling(codes.norms[segment], codes.gaps[segment])) continue;
      if (++scored > limit) return 0;
      listed += list(segment, registers + listed);
      if (listed + kPerSegment8 <= kListed8) continue;
      best_in_registers(z, packed, registers, listed, 0, best);
      listed = 0;
    }
  }
  best_in_registers(z, packed, registers, listed, 0, best);
  return scored;
}

#endif

// Whether this processor has the instructions that the scan is made of.
static inline bool can_certify() {
#if defined(__AVX512F__)
  return search_state.has_int8_dot;
#elif defined(TOKENFLOW_INT8)
  return true;
#else
  return false;
#endif
}

// Where 8 bits win: enough rows to pay for the second packing, codes long and many enough, and not so long that too
// many segments survive. Measured with normal rows and codes.
static inline bool pays_to_certify(int64_t rows, int64_t codes, int64_t channels) {
#if defined(__AVX512F__)
  return channels >= 5 && codes >= 512 && rows >= 256;
#else
  return rows >= 256 && codes >= 512 && codes >= 4 * channels && channels >= 6 && channels <= 768 &&
         codes * channels >= 16384;
#endif
}

TOKENFLOW_END
