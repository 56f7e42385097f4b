// Codes and rows in 8 bits, for the certified search (certified.h): what its scan reads, and the norms and residuals
// that its bound is made of.
// Codes lie in segments of `length` consecutive ids, a register's worth of segments to a block: lane l of register v of
// a block holds code v of segment l.
#pragma once
#include <math.h>

#include "cpu/scan.h"

TOKENFLOW_BEGIN

constexpr int64_t kMaxChannels8 = 16384;  // whose products 32 bits hold

#ifdef TOKENFLOW_INT8

// The terms of the bound. Tests multiply each by less than 1, and have to notice.
enum Term { kOfRow, kOfCode, kOfChain, kOfStartChain, kOfStart, kOfCeiling, kOfPacking, kOfCut, kTerms };
#ifndef TOKENFLOW_BOUND
#define TOKENFLOW_BOUND(term, value) (value)
#endif

constexpr int kTile8 = kRegisters >= 32 ? 8 : 4;                           // rows a tile
constexpr int64_t kBlockBytes8 = 384 << 10;                                // codes that stay in the second-level cache
constexpr int64_t kChannels8 = sizeof(Sum);                                // channels a word
constexpr int64_t kLanes8 = Register<float>::kLanes;                       // numbers of a row at once
constexpr int64_t kListed8 = 64;                                           // registers that wait to be scored again
constexpr int64_t kLongest8 = 64;                                          // codes in a segment at most
constexpr int64_t kPerSegment8 = kLongest8 / Register<float>::kLanes + 1;  // registers that a segment touches
constexpr int kRowOffset = kRowLevels + (kRowLevels & 1);                  // makes rows unsigned

static_assert(kRowLevels + kRowOffset <= UINT8_MAX && kCodeLevels <= INT8_MAX, "levels are bytes");
static_assert(sizeof(Sum) > 2 || 2 * (kRowLevels + kRowOffset) * kCodeLevels <= INT16_MAX, "pairs do not saturate");

static_assert(kMaxChannels8 / kLanes8 * kRowLevels * kRowLevels < 1 << 24, "a lane's sum of squared levels is exact");

using Ints = Register<float>::I;
using Floats = Register<float>::V;

// Scales are such that every sum stays about kReach; a row for which one could pass kMostSum is not scanned.
#if defined(__AVX512F__)
typedef float Start, Factor;  // h_k; the scan makes H_k of it, middle is 0
constexpr float kReach = 1 << 29, kMostSum = 9e8f;
constexpr int64_t kChunk = kMaxChannels8;  // channels a chunk
constexpr float kCodeLength = 1e9f;        // |q_k| at most, of a chunk and roughly
constexpr float kStartError = 0.55f;       // |unit H_k + middle - h_k| in units, besides 2^-22 h_k
#else
typedef int16_t Start, Factor;  // (h_k - middle) / step, rounded
constexpr float kReach = 32000, kMostSum = 32500;
constexpr int64_t kChunk = 96;
constexpr float kCodeLength = 160;  // leaves room for rows of as many steps
constexpr float kStartError = 1.55f;
#endif

// Sums wrap around on the way, so only the last of a chunk and of a code have to fit: those that quantize8() checks, a
// starting score's rounding, and a count a chunk that division took.
static_assert(kMostSum * (1 + 0x1p-20) + 2 + static_cast<double>(kMaxChannels8 / kChunk + 1) < kMostOfSum, "sums fit");

struct Codes8 {
  int64_t blocks, length, words;  // blocks of kSums segments of `length` codes (even) of `words` Sums of channels
  int64_t chunks, chunk;          // of `chunk` words each, the last of what is left
  Sum* quantized;                 // [blocks][length / 2][words][2][kSums]: a channel a byte
  Sum* offsets;                   // [blocks][length / 2][chunks][2][kSums]: minus what kRowOffset adds
  Start* starts;                  // [blocks][length / 2][2][kSums]
  float *norms, *gaps;            // [segments]: the largest |c_k| and |c_k - scale q_k|, rounded up
  float longest, widest;          // the largest of them
  float scale, step, middle;
  float spread;              // |h_k - middle| at most
  float reach, chunk_reach;  // |q_k| at most, of a whole code and of a chunk
  int shift;
  bool usable;  // false where a code is not finite, or none has a size that 8 bits can follow

  int64_t segments() const { return blocks * kSums; }
  // Where the first of `each` numbers of code k lies; its others follow in steps of 2 kSums.
  int64_t at(int64_t k, int64_t each) const {
    const int64_t segment = k / length, v = k % length;
    return ((segment / kSums * (length / 2) + v / 2) * each * 2 + v % 2) * kSums + segment % kSums;
  }
};

// Its sizes, without memory. Short segments cost a longer table, long ones more to score again, channel by channel.
static inline Codes8 layout8(int64_t codes, int64_t channels) {
  Codes8 c = {};
  const int64_t longest = channels < 24 ? kLongest8 : channels < 64 ? 32 : 16;
  c.blocks = (codes + longest * kSums - 1) / (longest * kSums);
  c.length = ((codes + c.segments() - 1) / c.segments() + 1) / 2 * 2;
  c.words = (channels + kChannels8 - 1) / kChannels8;
  c.chunks = (c.words * kChannels8 + kChunk - 1) / kChunk;
  c.chunk = (c.words + c.chunks - 1) / c.chunks;
  while (1 << c.shift < c.chunks) ++c.shift;
  return c;
}

// How a code's score starts, beside its products: H_k = (h_k - middle) / unit.
#if defined(__AVX512F__)
static inline void prepare_starts(float largest, Codes8* c) { c->step = 1, c->middle = 0, c->spread = largest; }
static inline Start start_of(float h, const Codes8&) { return h; }
static inline Factor start_factor(const Codes8&, double unit) { return static_cast<float>(1 / unit); }
static inline Sums load_starts(const Start* p, Factor factor) {
  return (Sums)_mm512_cvtps_epi32((__m512)(load_register(p) * factor));
}
#else
static inline void prepare_starts(float largest, Codes8* c) {
  c->middle = c->spread = largest > 1e-30f ? 0.5f * largest : 0;
  c->step = c->middle / 32767;
}
static inline Start start_of(float h, const Codes8& c) {
  return static_cast<Start>(c.step > 0 ? __builtin_rintf((h - c.middle) / c.step) : 0);
}
static inline Factor start_factor(const Codes8& c, double unit) {  // in 2^-15; below 1, or no row can be scanned
  const double factor = __builtin_rint(c.step / unit * 32768);
  return static_cast<Factor>(factor < 32767 ? factor : 32767);
}
static inline Sums load_starts(const Start* p, Factor factor) {
  return (Sums)_mm256_mulhrs_epi16((__m256i)load_sums(p), _mm256_set1_epi16(factor));
}
#endif

// Quantizes the packed codes. spare [3, panels * kPanel]: of every code the norm, the residual and the longest chunk.
static inline void pack8(const Packed<float>& packed, float* spare, Codes8* out, int threads) {
  constexpr int kLanes = Register<float>::kLanes, kParts = kPanel / kLanes;
  const int64_t codes = packed.codes, channels = packed.channels, panels = panels_of(codes);
  float *norms = spare, *gaps = norms + panels * kPanel, *reaches = gaps + panels * kPanel;
  // Upper bounds of square roots: the sums' own rounding and what underflowed are added.
  const float up = 1 + TOKENFLOW_BOUND(kOfPacking, static_cast<float>(channels + 16) * 0x1p-23f);
  const float lost = TOKENFLOW_BOUND(kOfPacking, static_cast<float>(channels) * 1e-18f);
  // Magnitudes order as integers do, NaN above infinity above all others.
  int32_t most = 0, start_bits = 0, norm_bits = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most, start_bits, norm_bits)
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = packed.panels + p * packed.stride();
    Ints here = {};
    Floats square[kParts] = {};
    for (int64_t i = 0; i < channels * kParts; ++i) {
      const Floats x = load_register(panel + i * kLanes);
      const Ints bits = (Ints)x & INT32_MAX;
      here = bits > here ? bits : here;
      square[i % kParts] = fused(x, x, square[i % kParts]);
    }
    for (int l = 0; l < kLanes; ++l) most = here[l] > most ? here[l] : most;
    const auto largest = [](float x, int32_t* bits_so_far) {
      int32_t bits;
      memcpy(&bits, &x, 4);
      *bits_so_far = (bits & INT32_MAX) > *bits_so_far ? bits & INT32_MAX : *bits_so_far;
    };
    for (int64_t l = 0; l < kPanel && p * kPanel + l < codes; ++l) {
      norms[p * kPanel + l] = root(square[l / kLanes][l % kLanes]) * up + lost;
      largest(norms[p * kPanel + l], &norm_bits);
      largest(panel[channels * kPanel + l], &start_bits);
    }
  }
  float largest, start;
  memcpy(&largest, &most, 4);
  memcpy(&start, &start_bits, 4);
  memcpy(&out->longest, &norm_bits, 4);
  out->usable = largest >= 1e-10f && largest <= 1e15f && start <= 1e30f;
  if (!out->usable) return;
  const float by_length = out->longest / (kCodeLength * __builtin_sqrtf(static_cast<float>(1 << out->shift)));
  const float scale = out->scale = largest / kCodeLevels > by_length ? largest / kCodeLevels : by_length;
  const float inverse = 1 / scale;
  prepare_starts(start, out);
  const Codes8 c = *out;
  for_each((panels + 15) / 16, threads, [&](int64_t batch) {
    for (int64_t p = 16 * batch; p < panels && p < 16 * batch + 16; ++p) {
      const float* panel = packed.panels + p * packed.stride();
      Floats gap[kParts] = {}, longest[kParts] = {};
      const int64_t used = codes - p * kPanel < kPanel ? codes - p * kPanel : kPanel;
      int64_t to[kPanel], offset[kPanel];
      for (int64_t l = 0; l < used; ++l) {
        to[l] = c.at(p * kPanel + l, c.words);
        offset[l] = c.at(p * kPanel + l, c.chunks);
        c.starts[c.at(p * kPanel + l, 1)] = start_of(panel[channels * kPanel + l], c);
      }
      for (int64_t first = 0; first < c.words; first += c.chunk) {
        Floats total[kParts] = {}, square[kParts] = {};
        for (int64_t w = first; w < first + c.chunk && w < c.words; ++w) {
          int32_t word[kPanel];
          for (int i = 0; i < kParts; ++i) {
            Ints bytes = {};
            for (int64_t d = kChannels8 * w, b = 0; b < kChannels8 && d < channels; ++d, ++b) {
              const Floats x = load_register(panel + d * kPanel + i * kLanes), q = nearest(x * inverse);
              const Floats rest = fused(broadcast(-scale), q, x);
              gap[i] = fused(rest, rest, gap[i]);
              square[i] = fused(q, q, square[i]);
              total[i] += q;
              bytes |= (__builtin_convertvector(q, Ints) & 0xff) << static_cast<int32_t>(8 * b);
            }
            memcpy(word + i * kLanes, &bytes, sizeof(bytes));
          }
          for (int64_t l = 0; l < used; ++l, to[l - 1] += 2 * kSums) c.quantized[to[l]] = static_cast<Sum>(word[l]);
        }
        for (int i = 0; i < kParts; ++i) longest[i] = square[i] > longest[i] ? square[i] : longest[i];
        for (int64_t l = 0; l < used; ++l, offset[l - 1] += 2 * kSums)
          c.offsets[offset[l]] = static_cast<Sum>(-kRowOffset * static_cast<int32_t>(total[l / kLanes][l % kLanes]));
      }
      for (int64_t l = 0; l < used; ++l) {
        gaps[p * kPanel + l] = root(gap[l / kLanes][l % kLanes]) * up + lost;
        reaches[p * kPanel + l] = root(longest[l / kLanes][l % kLanes]) * up;
      }
    }
  });
  // Lanes without a code repeat the last one: it is rescored under its own id.
  const auto repeat = [&](auto* numbers, int64_t each, int64_t k) {
    for (int64_t i = 0; i < each; ++i)
      numbers[c.at(k, each) + i * 2 * kSums] = numbers[c.at(codes - 1, each) + i * 2 * kSums];
  };
  for (int64_t k = codes; k < c.segments() * c.length; ++k) {
    repeat(c.quantized, c.words, k);
    repeat(c.offsets, c.chunks, k);
    repeat(c.starts, 1, k);
  }
  out->widest = out->chunk_reach = 0;
  for (int64_t s = 0; s < c.segments(); ++s) {
    c.norms[s] = c.gaps[s] = 0;
    for (int64_t k = s * c.length; k < (s + 1) * c.length; ++k) {
      const int64_t at = k < codes ? k : codes - 1;
      c.norms[s] = norms[at] > c.norms[s] ? norms[at] : c.norms[s];
      c.gaps[s] = gaps[at] > c.gaps[s] ? gaps[at] : c.gaps[s];
      out->chunk_reach = reaches[at] > out->chunk_reach ? reaches[at] : out->chunk_reach;
    }
    out->widest = c.gaps[s] > out->widest ? c.gaps[s] : out->widest;
  }
  out->reach = (out->longest + out->widest) / scale * (1 + 1e-5f);
}

// The first n numbers of x, zeros behind them.
static inline Floats some_of(const float* x, int64_t n) {
  if (n >= kLanes8) return load_register(x);
  Floats v = {};
  if (n > 0) memcpy(&v, x, n * sizeof(float));
  return v;
}

static inline float sum_of(Floats v) {
  float sum = 0;
  for (int i = 0; i < kLanes8; ++i) sum += v[i];
  return sum;
}

// A row in 8 bits.
struct Row8 {
  double norm, residual, size;  // |z|, |z - scale q|, |scale q|: upper bounds
  double unit;                  // what a sum counts
  bool usable;                  // every sum fits
};

// What the longest chunk and the whole of a row may do to the sums of a chunk and of a code, in `scale`s.
static inline double most_sum(double chunk, double whole, double scale, const Codes8& codes) {
  const double of_chunk = chunk * codes.chunk_reach;
  const double of_code = (codes.spread / (scale * codes.scale) + whole * codes.reach) / (1 << codes.shift);
  return of_chunk > of_code ? of_chunk : of_code;
}

// The scale of a row z [channels]; of a tile of rows under one unit it is the largest. A wish: quantize8() checks.
static inline float scale8(const float* z, int64_t channels, const Codes8& codes) {
  Floats largest = {};
  float longest = 0, whole = 0;
  for (int64_t first = 0; first < channels; first += codes.chunk * kChannels8) {
    const int64_t end = first + codes.chunk * kChannels8 < channels ? first + codes.chunk * kChannels8 : channels;
    Floats square = {};
    for (int64_t d = first; d < end; d += kLanes8) {
      const Floats x = some_of(z + d, end - d), size = x < 0 ? -x : x;
      largest = size > largest ? size : largest;
      square = fused(x, x, square);
    }
    const float sum = sum_of(square);
    longest = sum > longest ? sum : longest;
    whole += sum;
  }
  const float most = -lowest_lane(-largest) / kRowLevels;
  const double least = most_sum(__builtin_sqrtf(longest), __builtin_sqrtf(whole), 1, codes) / kReach;
  return most > least ? most : static_cast<float>(least);
}

// q [words] of z [channels] under `scale`: bytes, plus kRowOffset, as `dot` wants them.
static inline Row8 quantize8(const float* z, int64_t channels, float scale, const Codes8& codes, int32_t* q) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes8)));
  const bool usable = scale > 1e-15f && scale < 1e15f;
  scale = usable ? scale : 1;
  const float inverse = 1 / scale;
  Floats norm = {}, residual = {};
  float longest = 0, whole = 0;
  for (int64_t first = 0; first < codes.words; first += codes.chunk) {
    const int64_t words = first + codes.chunk < codes.words ? codes.chunk : codes.words - first;
    Floats square = {};
    for (int64_t w = 0; w < words; w += kLanes8 / kChannels8) {
      const int64_t d = (first + w) * kChannels8, left = (words - w) * kChannels8;
      const Floats x = some_of(z + d, channels - d < left ? channels - d : left), rounded = nearest(x * inverse);
      const Floats below = rounded > kRowLevels ? Floats{} + kRowLevels : rounded;
      const Floats value = below < -kRowLevels ? Floats{} - kRowLevels : below;
      const Floats rest = fused(broadcast(-scale), value, x);
      norm = fused(x, x, norm);
      residual = fused(rest, rest, residual);
      square = fused(value, value, square);
      const Bytes bytes = __builtin_convertvector(__builtin_convertvector(value, Ints) + kRowOffset, Bytes);
      int32_t some[kLanes8 / kChannels8];
      if (kChannels8 == 4) {
        memcpy(some, &bytes, sizeof(bytes));
      } else {
        for (int64_t i = 0; i < kLanes8 / 2; ++i) some[i] = 0x10001 * (bytes[2 * i] | bytes[2 * i + 1] << 8);
      }
      const int64_t count = words - w < kLanes8 / kChannels8 ? words - w : kLanes8 / kChannels8;
      memcpy(q + first + w, some, count * sizeof(int32_t));
    }
    const float sum = sum_of(square);
    longest = sum > longest ? sum : longest;
    whole += sum;
  }
  // Upper bounds: those of packing for what was summed in float32, and as many roundings for sums of integers.
  const double up = 1 + TOKENFLOW_BOUND(kOfPacking, static_cast<double>(channels + 16) * 0x1p-23);
  const double lost = TOKENFLOW_BOUND(kOfPacking, static_cast<double>(channels) * 1e-18);
  const double size = __builtin_sqrt(static_cast<double>(whole)) * up;
  const double most = most_sum(__builtin_sqrt(static_cast<double>(longest)) * up, size, scale, codes);
  return {__builtin_sqrt(static_cast<double>(sum_of(norm))) * up + lost,
          __builtin_sqrt(static_cast<double>(sum_of(residual))) * up + lost, scale * size,
          static_cast<double>(scale) * codes.scale * (1 << codes.shift), usable && most <= kMostSum};
}

#endif

TOKENFLOW_END
