// Certified search: scan in 8-bit integers, then score again, canonically, the few segments of codes that an error
// bound cannot rule out. The answer is the canonical search's, ties included; docs/certified_search.md has the proof.
//   s_k = h_k + z.c_k               canonical score: h_k = 0.5 |c_k|^2 for l2, else 0; z the staged row, -y
//   s'_k = unit (H_k + q_z.q_k)     its 8-bit stand-in: z ~ scale_z q_z, c_k ~ scale q_k, unit = scale_z scale
//   |s_k - s'_k| <= bound(|c_k|, |c_k - scale q_k|), with the actual residuals of both sides
// Codes lie in segments of `length` consecutive ids, a register's worth of segments to a block: lane l of register v of
// a block holds code v of segment l. The scan keeps the minimum of each segment; a row's table is 4 K / length bytes.
// Operations: 2 N K C of 8 bits. Bytes: C + 8 a code for the scan, and the panels that the rescoring reads.
#pragma once
#include <math.h>

#include "cpu/scan.h"
#include "cpu/search_state.h"

TOKENFLOW_BEGIN

#if defined(__AVX512F__)

constexpr bool kCanCertify = true;
constexpr int kLanes8 = Register<float>::kLanes;
constexpr int kTile8 = 8;                 // rows a tile
constexpr int64_t kMaxChannels8 = 16384;  // keeps every sum inside 32 bits
constexpr float kMaxStart8 = 1 << 29;
constexpr int64_t kListed8 = 64;  // registers that wait to be scored again

using Ints = Register<float>::I;
using Floats = Register<float>::V;

struct Codes8 {
  int64_t blocks, length, words;  // blocks of kLanes8 segments of `length` codes (even) of `words` times 4 channels
  uint32_t* quantized;            // [blocks][length / 2][words][2][kLanes8]: 4 codes' channels + 128 a word
  float* starts;                  // [blocks][length / 2][2][kLanes8]: h_k
  float *norms, *gaps;            // [segments]: the largest |c_k| and |c_k - scale q_k|, rounded up
  float scale;
  double largest_start;
  bool usable;  // false where a code is not finite, or none has a size that 8 bits can follow

  int64_t segments() const { return blocks * kLanes8; }
  // Where word 0 of code k lies; its others follow in steps of 2 kLanes8.
  int64_t word(int64_t k) const {
    const int64_t segment = k / length, v = k % length;
    return ((segment / kLanes8 * (length / 2) + v / 2) * words * 2 + v % 2) * kLanes8 + segment % kLanes8;
  }
  int64_t start(int64_t k) const {
    const int64_t segment = k / length, v = k % length;
    return (segment / kLanes8 * length + v) * kLanes8 + segment % kLanes8;
  }
};

// Its sizes, without memory. Short segments cost a longer table, long ones more to score again, channel by channel.
static Codes8 layout8(int64_t codes, int64_t channels) {
  Codes8 c = {};
  const int64_t longest = channels < 24 ? 64 : channels < 64 ? 32 : 16;
  c.blocks = (codes + longest * kLanes8 - 1) / (longest * kLanes8);
  c.length = ((codes + c.segments() - 1) / c.segments() + 1) / 2 * 2;
  c.words = (channels + 3) / 4;
  return c;
}

// Quantizes the packed codes. spare [2, panels * 32]: the norm and the residual of every code.
static void pack8(const Packed<float>& packed, float* spare, Codes8* out, int threads) {
  const int64_t codes = packed.codes, channels = packed.channels, panels = panels_of(codes);
  // Magnitudes order as integers do, NaN above infinity above all others.
  int32_t most = 0, start_bits = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most, start_bits)
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = packed.panels + p * packed.stride();
    Ints here = {};
    for (int64_t i = 0; i < channels * kPanel; i += kLanes8) {
      const Ints bits = (Ints)load_register(panel + i) & INT32_MAX;
      here = bits > here ? bits : here;
    }
    for (int l = 0; l < kLanes8; ++l) most = here[l] > most ? here[l] : most;
    const int64_t used = codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel;
    for (int64_t l = 0; l < used; ++l) {
      int32_t bits;
      memcpy(&bits, panel + channels * kPanel + l, 4);
      start_bits = (bits & INT32_MAX) > start_bits ? bits & INT32_MAX : start_bits;
    }
  }
  float largest, start;
  memcpy(&largest, &most, 4);
  memcpy(&start, &start_bits, 4);
  out->usable = largest >= 1e-10f && largest <= 1e15f && start <= 1e30f;
  if (!out->usable) return;
  out->largest_start = start;
  const float scale = out->scale = largest / 127, inverse = 127 / largest;
  float *norms = spare, *gaps = spare + panels * kPanel;
  const Codes8 c = *out;
  for_each((panels + 15) / 16, threads, [&](int64_t batch) {
    for (int64_t p = 16 * batch; p < panels && p < 16 * batch + 16; ++p) {
      const float* panel = packed.panels + p * packed.stride();
      constexpr int kHalves = kPanel / kLanes8;
      Floats norm[kHalves] = {}, gap[kHalves] = {};
      int64_t to[kPanel];
      const int64_t used = codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel;
      for (int64_t l = 0; l < used; ++l) {
        to[l] = c.word(p * kPanel + l);
        c.starts[c.start(p * kPanel + l)] = panel[channels * kPanel + l];
      }
      for (int64_t w = 0; w < c.words; ++w) {
        uint32_t word[kPanel];
        for (int h = 0; h < kHalves; ++h) {
          Ints bytes = Ints{} + static_cast<int32_t>(0x80808080);
          for (int64_t d = 4 * w; d < 4 * w + 4 && d < channels; ++d) {
            const Floats x = load_register(panel + d * kPanel + h * kLanes8);
            const Floats q = (Floats)_mm512_roundscale_ps((__m512)(x * inverse), 0);
            const Floats rest = fused(broadcast(-scale), q, x);
            gap[h] = fused(rest, rest, gap[h]);
            norm[h] = fused(x, x, norm[h]);
            // q + 128 in the byte: its own lowest bits with the highest turned.
            bytes ^= (__builtin_convertvector(q, Ints) & 0xff) << (d % 4 * 8);
          }
          memcpy(word + h * kLanes8, &bytes, sizeof(bytes));
        }
        for (int64_t l = 0; l < used; ++l) c.quantized[to[l] + w * 2 * kLanes8] = word[l];
      }
      // Upper bounds: the sums' own rounding and what underflowed are added.
      const float up = 1 + static_cast<float>(channels + 16) * 0x1p-23f, lost = static_cast<float>(channels) * 1e-18f;
      for (int64_t l = 0; l < kPanel; ++l) {
        norms[p * kPanel + l] = root(norm[l / kLanes8][l % kLanes8]) * up + lost;
        gaps[p * kPanel + l] = root(gap[l / kLanes8][l % kLanes8]) * up + lost;
      }
    }
  });
  // Lanes without a code repeat the last one: it is rescored under its own id.
  for (int64_t k = codes; k < c.segments() * c.length; ++k) {
    for (int64_t w = 0; w < c.words; ++w)
      c.quantized[c.word(k) + w * 2 * kLanes8] = c.quantized[c.word(codes - 1) + w * 2 * kLanes8];
    c.starts[c.start(k)] = c.starts[c.start(codes - 1)];
  }
  for (int64_t s = 0; s < c.segments(); ++s) {
    c.norms[s] = c.gaps[s] = 0;
    for (int64_t k = s * c.length; k < (s + 1) * c.length; ++k) {
      const int64_t at = k < codes ? k : codes - 1;
      c.norms[s] = norms[at] > c.norms[s] ? norms[at] : c.norms[s];
      c.gaps[s] = gaps[at] > c.gaps[s] ? gaps[at] : c.gaps[s];
    }
  }
}

// A row in 8 bits.
struct Row8 {
  double norm, residual, size;  // |z|, |z - scale q|, |scale q|: upper bounds
  double unit;                  // scale of the row times that of the codes
  int32_t offset;               // what + 128 on the codes added to every sum
};

// q [words] of z [channels] under `scale`.
static Row8 quantize8(const float* z, int64_t channels, float scale, const Codes8& codes, int32_t* q) {
  const float inverse = 1 / scale;
  double norm = 0, residual = 0, size = 0;
  int64_t sum = 0;
  memset(q, 0, codes.words * sizeof(*q));
  int8_t* bytes = reinterpret_cast<int8_t*>(q);
  for (int64_t d = 0; d < channels; ++d) {
    const float rounded = __builtin_rintf(z[d] * inverse);
    const float value = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;
    const double near = static_cast<double>(scale) * value, rest = z[d] - near;
    bytes[d] = static_cast<int8_t>(value);
    sum += bytes[d];
    norm += static_cast<double>(z[d]) * z[d];
    residual += rest * rest;
    size += near * near;
  }
  constexpr double kUp = 1 + 1e-9;
  return {__builtin_sqrt(norm) * kUp, __builtin_sqrt(residual) * kUp, __builtin_sqrt(size) * kUp,
          static_cast<double>(scale) * codes.scale, static_cast<int32_t>(128 * sum)};
}

// table [R, segments]: the minimum of every segment of blocks [from, to) for rows q [R, words]; inverse = 1 / unit.
template <int R, bool kStarts>
static __attribute__((noinline, target("avx512vnni"))) void scan8(const int32_t* q, const Codes8& codes, int64_t from,
                                                                  int64_t to, float inverse, int32_t* table) {
  const int64_t words = codes.words, length = codes.length;
  for (int64_t b = from; b < to; ++b) {
    Ints low[R];
    for (int r = 0; r < R; ++r) low[r] = Ints{} + INT32_MAX;
    const uint32_t* code = codes.quantized + b * length * words * kLanes8;
    const float* start = codes.starts + b * length * kLanes8;
    for (int64_t v = 0; v < length; v += 2) {
      Ints sum[R][2];
      Ints s0 = {}, s1 = {};
      if (kStarts) {
        s0 = (Ints)_mm512_cvtps_epi32((__m512)(load_register(start) * inverse));
        s1 = (Ints)_mm512_cvtps_epi32((__m512)(load_register(start + kLanes8) * inverse));
        start += 2 * kLanes8;
      }
      for (int r = 0; r < R; ++r) sum[r][0] = s0, sum[r][1] = s1;
      for (int64_t w = 0; w < words; ++w) {
        const __m512i c0 = _mm512_loadu_si512(code), c1 = _mm512_loadu_si512(code + kLanes8);
        code += 2 * kLanes8;
        for (int r = 0; r < R; ++r) {
          const __m512i x = _mm512_set1_epi32(q[r * words + w]);
          sum[r][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sum[r][0], c0, x);
          sum[r][1] = (Ints)_mm512_dpbusd_epi32((__m512i)sum[r][1], c1, x);
        }
      }
      for (int r = 0; r < R; ++r) {
        low[r] = (Ints)_mm512_min_epi32((__m512i)low[r], (__m512i)sum[r][0]);
        low[r] = (Ints)_mm512_min_epi32((__m512i)low[r], (__m512i)sum[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) memcpy(table + r * codes.segments() + b * kLanes8, &low[r], sizeof(low[r]));
  }
}

// What the bound needs of the call besides row and codes.
struct Bound {
  int64_t channels;
  bool starts;  // l2
  bool clip;    // l2 with every weight 1: a better code cannot be longer than |y| + its distance
  double max_weight;
};

// best = the canonical search's answer for row z, from its table of minima. Returns how many segments were scored;
// none, and no answer, where that would be more than `limit`.
static int64_t resolve8(const float* z, const Row8& row, const int32_t* table, const Codes8& codes,
                        const Packed<float>& packed, const Bound& bound, int64_t limit, Best<float>* best) {
  const int64_t segments = codes.segments();
  // The registers of a segment, to score again.
  const auto list = [&](int64_t segment, int32_t* registers) {
    const int64_t first = segment * codes.length, end = first + codes.length;
    const int64_t last = end < packed.codes ? end : packed.codes;
    int64_t n = 0;
    for (int64_t i = first / kLanes8; i * kLanes8 < last; ++i) registers[n++] = static_cast<int32_t>(i);
    return n;
  };
  int32_t registers[kListed8];
  Ints least = Ints{} + INT32_MAX;
  for (int64_t s = 0; s < segments; s += kLanes8) {
    Ints here;
    memcpy(&here, table + s, sizeof(here));
    least = here < least ? here : least;
  }
  const int32_t lowest = _mm512_reduce_min_epi32((__m512i)least);
  int64_t first = 0;
  while (table[first] != lowest) ++first;
  *best = {__builtin_inff(), -1};
  best_in_registers(z, packed, registers, list(first, registers), 0, best);
  if (best->id < 0) return 0;  // the segment of a repeated last code, or scores that overflow

  // docs/certified_search.md, (5): code k can win only if s'_k <= score + slack + its own share of the bound.
  const double u = 0x1p-24, n = static_cast<double>(bound.channels), gamma = n * u / (1 - n * u);
  double longest = 1e300;
  if (bound.clip) {
    const double a = (1 + gamma) * row.norm, b = (1 - gamma) * (1 - gamma);
    const double root = a * a + 2 * b * (best->score + n * 0x1p-126);
    longest = (a + __builtin_sqrt(root > 0 ? root : 0)) / b * (1 + 1e-6);
  }
  constexpr double kUp = 1 + 0x1p-20;
  const float base = static_cast<float>((best->score + n * 0x1p-126) / row.unit + 1);
  const float by_norm = static_cast<float>((row.residual + gamma * row.norm) / row.unit * kUp);
  const float by_start =
      static_cast<float>(bound.starts ? (gamma + 0x1p-22) * 0.5 * bound.max_weight / row.unit * kUp : 0);
  const float by_gap = static_cast<float>(row.size / row.unit * kUp);
  const float cut = static_cast<float>(longest < 1e30 ? longest : 1e30);
  int64_t scored = 1, listed = 0;
  for (int64_t s = 0; s < segments; s += kLanes8) {
    const Floats norm = load_register(codes.norms + s), gap = load_register(codes.gaps + s);
    const Floats c = norm < cut ? norm : broadcast(cut);
    const Floats error = c * (by_norm + by_start * c) + by_gap * gap;
    // The sums here are rounded themselves: 2^-20 of their size covers it.
    const Floats slack = (error + __builtin_fabsf(base)) * 0x1p-20f + 1.0f;
    Floats most = base + error + slack;
    most = most < 1e9f ? most : broadcast(1e9f);
    most = most > -1e9f ? most : broadcast(-1e9f);
    const Ints ceiling = __builtin_convertvector(most, Ints) + row.offset;
    uint32_t mask = _mm512_cmple_epi32_mask(_mm512_loadu_si512(table + s), (__m512i)ceiling);
    scored += __builtin_popcount(mask);
    if (scored > limit) return 0;
    for (; mask; mask &= mask - 1) {
      const int64_t segment = s + __builtin_ctz(mask);
      if (segment != first) listed += list(segment, registers + listed);
      if (listed + 5 <= kListed8) continue;
      best_in_registers(z, packed, registers, listed, 0, best);
      listed = 0;
    }
  }
  best_in_registers(z, packed, registers, listed, 0, best);
  return scored;
}

#else

constexpr bool kCanCertify = false;

#endif

TOKENFLOW_END
