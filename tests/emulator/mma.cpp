// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: where the elements of a warp's matrices lie, as the PTX ISA
// says, and how tensor cores add, as those who measured them say. With g = lane / 4 and t = lane % 4:
//   A [16][16]  register i holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next, the first in the low half
//   B [16][8]   register i holds column g, rows 2 t + 8 i and the next
//   C, D        register i holds row g + 8 (i / 2), column 2 t + i % 2
// Not IEEE sums. A step takes `size` exact products and the accumulator, cuts each to `bits` fraction bits below the
// largest of their exponents (a product's is the sum of its factors'), adds them exactly, and cuts the sum to float32:
//   ampere 8 products, 24 bits; hopper 16, 25; volta 4, 23; all towards zero
// Sources: Fasi et al., PeerJ CS 7:e330 (2021); Xie et al., arXiv 2511.10909; Khattak and Mikaitis, arXiv 2512.07004.
// Nobody documents them, and other GPUs may differ. So there are models that no GPU has, for the tests of error bounds:
//   floored, ceiled       4 products, 23 bits, towards -inf or +inf
//   worst_up, worst_down  the exact sum, moved by 2^-16 (|c| + sum |a b|), which is all that cuda/certified.cuh allows
#include "engine.h"

namespace cuda_emulator {

constexpr int kDepth = 16;  // products of one mma

struct Model {
  int size, bits;
  TensorCores rounding;  // kAmpere: towards zero
};
static const Model kModels[] = {{8, 24, kAmpere}, {16, 25, kAmpere}, {4, 23, kAmpere},   {4, 23, kFloored},
                                {4, 23, kCeiled}, {16, 0, kWorstUp}, {16, 0, kWorstDown}};

// significand * 2^(exponent - fraction), the significand with its sign; 1 <= its size / 2^fraction < 2, or 0.
struct Number {
  int32_t significand;
  int exponent;
};

// Of float32 bits, whose lowest `dropped` are zero and left out.
static Number number_of(uint32_t bits, int dropped) {
  const int exponent = static_cast<int>(bits >> 23 & 255);
  int32_t significand = static_cast<int32_t>(bits & 0x7fffff) | (exponent ? 0x800000 : 0);
  significand >>= dropped;
  return {bits >> 31 ? -significand : significand, (exponent ? exponent : 1) - 127};
}

static bool finite_bits(uint32_t bits) { return (bits >> 23 & 255) != 255; }
static uint32_t bits_of(float value) { return bits_as<uint32_t>(value); }

// The integer next to value 2^shift in the direction that the model cuts to.
static int64_t cut(int64_t value, int shift, TensorCores rounding) {
  if (shift >= 0) return value * (int64_t{1} << shift);
  if (shift < -62) shift = -62;
  const int64_t low = value >> -shift;  // towards -inf
  const bool exact = low * (int64_t{1} << -shift) == value;
  if (rounding == kFloored || exact) return low;
  return rounding == kCeiled || value < 0 ? low + 1 : low;
}

// sum 2^unit as float32.
static float rounded(int64_t sum, int unit, TensorCores rounding) {
  if (sum == 0) return 0;
  int top = 63 - __builtin_clzll(static_cast<uint64_t>(sum < 0 ? -sum : sum));
  int drop = top - 23;
  if (unit + drop < -149) drop = -149 - unit;
  if (drop > 0) sum = cut(sum, -drop, rounding), unit += drop;
  return static_cast<float>(ldexp(static_cast<double>(sum), unit));  // exact, or infinite
}

static float step(const Number* a, const Number* b, int count, float c, const Model& model) {
  constexpr int kLowest = -1000;  // below every exponent
  const Number start = number_of(bits_of(c), 0);
  int largest = start.significand ? start.exponent : kLowest;
  for (int i = 0; i < count; ++i) {
    const int exponent = a[i].exponent + b[i].exponent;
    if (a[i].significand && b[i].significand && exponent > largest) largest = exponent;
  }
  if (largest == kLowest) return 0;
  int64_t sum = cut(start.significand, model.bits - 23 + start.exponent - largest, model.rounding);
  for (int i = 0; i < count; ++i)  // significands of 7 fraction bits each
    sum += cut(int64_t{a[i].significand} * b[i].significand, model.bits - 14 + a[i].exponent + b[i].exponent - largest,
               model.rounding);
  return rounded(sum, largest - model.bits, model.rounding);
}

static float worst(const Number* a, const Number* b, float c, TensorCores way) {
  double sum = c, size = fabs(static_cast<double>(c));
  for (int i = 0; i < kDepth; ++i) {
    const double product =
        ldexp(static_cast<double>(a[i].significand * b[i].significand), a[i].exponent + b[i].exponent - 14);
    sum += product;
    size += fabs(product);
  }
  const double error = size * (0x1p-16 - 0x1p-22);  // the rest is for the rounding to float32
  return static_cast<float>(way == kWorstUp ? sum + error : sum - error);
}

// Infinities and NaN as IEEE has them.
static float special(const uint32_t* a, const uint32_t* b, float c) {
  float sum = c;
  for (int i = 0; i < kDepth; ++i) sum += bits_as<float>(a[i]) * bits_as<float>(b[i]);
  return sum == sum ? sum : bits_as<float>(0x7fffffffu);
}

void multiply(Lane* warp) {
  uint32_t a[16][kDepth], b[8][kDepth];
  Number rows[16][kDepth], columns[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = warp[lane].a[i] >> 16 * half << 16;
      for (int i = 0; i < 2; ++i) b[g][2 * t + 8 * i + half] = warp[lane].b[i] >> 16 * half << 16;
    }
  }
  bool odd_row[16] = {}, odd_column[8] = {};
  const auto read = [](const uint32_t* bits, Number* numbers) {
    bool odd = false;
    for (int k = 0; k < kDepth; ++k) {
      numbers[k] = number_of(bits[k], 16);
      odd |= !finite_bits(bits[k]);
    }
    return odd;
  };
  for (int r = 0; r < 16; ++r) odd_row[r] = read(a[r], rows[r]);
  for (int c = 0; c < 8; ++c) odd_column[c] = read(b[c], columns[c]);
  const Model& model = kModels[config().tensor_cores];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 4 + 8 * (i / 2), c = lane % 4 * 2 + i % 2;
      float& d = warp[lane].d[i];
      if (odd_row[r] || odd_column[c] || !finite_bits(bits_of(d))) {
        d = special(a[r], b[c], d);
      } else if (model.bits == 0) {
        d = worst(rows[r], columns[c], d, model.rounding);
      } else {
        for (int k = 0; k < kDepth; k += model.size) d = step(rows[r] + k, columns[c] + k, model.size, d, model);
      }
    }
  }
}

}  // namespace cuda_emulator
