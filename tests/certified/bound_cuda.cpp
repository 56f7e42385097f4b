// Tries to break the error bound of csrc/cuda/certified.cuh, and the same bound with one term scaled or dropped,
// against the tensor cores of tests/emulator/mma.cpp.
//   bound_cuda [SEED]  prints a line a mutant: term, its factor, checks, failures, the worst failure in parts of the
//   error
// A check takes one row and one code. Both are staged, rounded and scanned by the kernels, the code in a segment of its
// own: it stands there 64 times. Were it the best code scored so far, its segment must not be ruled out: its minimum
// may not pass the ceiling that belongs to its own canonical score. The families are built against one term each: rows
// and codes for which that term is used up, and no other helps out; with tensor cores that err as much as is allowed
// where the term is about them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

static float factor_of[8];  // by BoundTerm
#define TOKENFLOW_BOUND(term, value) (factor_of[term] * (value))
#include "cuda/certified.cuh"

using namespace tokenflow_ext;
using namespace tokenflow_ext::cuda;

static std::mt19937_64 random_bits;
static double uniform(double from, double to) { return std::uniform_real_distribution<>(from, to)(random_bits); }
static float normal() { return std::normal_distribution<float>()(random_bits); }
static int whole(int from, int to) { return std::uniform_int_distribution<>(from, to)(random_bits); }
static float sign() { return whole(0, 1) ? 1.0f : -1.0f; }

constexpr int kCodes = 16, kRows = 24;  // distinct codes, and rows

struct Problem {
  int channels;
  bool l2;
  cuda_emulator::TensorCores cores;
  std::vector<float> x, codes;  // [kRows, channels], [kCodes, channels]
  Problem(int n, bool l2, cuda_emulator::TensorCores cores)
      : channels(n), l2(l2), cores(cores), x(kRows * n), codes(kCodes * n) {}
};

struct Mutant {
  const char* term;
  int which;  // -1: all of them
  float factor;
  int64_t checks, failures;
  double worst;
};

static void check(const Problem& p, std::vector<Mutant>& mutants) {
  const int64_t n = p.channels, count = kCodes * kSegment;
  std::vector<float> codebook(count * n);
  for (int64_t k = 0; k < count; ++k) memcpy(&codebook[k * n], &p.codes[k / kSegment * n], n * sizeof(float));
  Tables tables = {};
  tables.count = 1;
  tables.l2 = p.l2;
  tables.width[0] = n;
  tables.weight[0] = 1;
  View book = {codebook.data(), kFloat32, 2, -1, true, {count, n}};
  Call call = {};
  call.device = -1;
  call.counting = call.certified = true;
  take_codes(call, book, tables, 0, count, kRows);
  std::vector<u64> memory(call.taken / 8 + 8, ~0ull), keys(kRows);
  call.size = call.taken;
  call.taken = 0;
  call.counting = false;
  call.scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  const Searched codes = take_codes(call, book, tables, 0, count, kRows);
  cuda_emulator::config().tensor_cores = p.cores;
  pack_codes(call, codes, keys.data(), kRows);
  search_certified(call, codes, {p.x.data(), kFloat32, kRows, n}, keys.data());
  if (call.failure) std::fprintf(stderr, "%s\n", call.failure), std::exit(2);
  if (*codes.certified.failed > 1) std::fprintf(stderr, "the marks of tiles do not begin at 0\n"), std::exit(2);
  const int64_t lines = padded(n), quarter = pieces_of(pieces_of(count, kPanel), 4) * 4;
  for (int64_t r = 0; r < kRows; ++r) {
    const float4 row = codes.certified.row_sizes[r];
    for (int64_t k = 0; k < kCodes; ++k) {
      const float* panel = codes.panels + k / 2 * (lines + 1) * kPanel + place_of(k % 2 * kSegment);
      float score = panel[lines * kPanel];
      for (int64_t d = 0; d < n; ++d) score = fmaf(codes.row_panels[d * kPanel + r], panel[d * kPanel], score);
      const float lowest = codes.certified.minima[(r * 2 + k % 2) * quarter + k / 2];
      const float4 segment = codes.certified.segments[k];
      for (Mutant& mutant : mutants) {
        for (float& factor : factor_of) factor = mutant.which < 0 ? mutant.factor : 1;
        if (mutant.which >= 0) factor_of[mutant.which] = mutant.factor;
        const float ceiling = ceiling_of(bound_of(row.x, row.y, p.channels), segment, score);
        ++mutant.checks;
        if (!(lowest > ceiling)) continue;
        ++mutant.failures;
        mutant.worst = std::fmax(mutant.worst, (lowest - ceiling) / (static_cast<double>(lowest) - score));
      }
    }
  }
}

static cuda_emulator::TensorCores any_cores() { return static_cast<cuda_emulator::TensorCores>(whole(0, 6)); }

// Any rows and codes, of sizes that differ.
static Problem any() {
  Problem p(whole(1, 300), whole(0, 1), any_cores());
  const double size = std::exp(uniform(-3, 3)), spread = uniform(0, 2);
  for (float& x : p.x) x = normal();
  for (int k = 0; k < kCodes; ++k) {
    const double length = size * std::exp(spread * normal());
    for (int d = 0; d < p.channels; ++d) p.codes[k * p.channels + d] = static_cast<float>(length * normal());
  }
  return p;
}

// A number that bfloat16 has.
static float exact() { return std::ldexp(static_cast<float>(128 + whole(0, 127)), -7); }

// What rounding took from one side lies along the other, which is exact and of one size, so that Cauchy and Schwarz are
// equal; signs are such that the scan's score is too high. The row is negated when it is staged.
static Problem against_rounding(bool of_row) {
  Problem p(whole(1, 16), false, cuda_emulator::kAmpere);
  const float size = std::ldexp(1.0f, whole(-6, 6));
  std::vector<float> signs(p.channels);
  for (float& s : signs) s = sign();
  std::vector<float>&rounded = of_row ? p.x : p.codes, &other = of_row ? p.codes : p.x;
  for (size_t i = 0; i < rounded.size(); ++i) {
    const float s = signs[i % p.channels];
    rounded[i] = s * (1 + static_cast<float>(uniform(0.98, 0.999)) * 0x1p-8f) * size;  // to s size
  }
  for (size_t i = 0; i < other.size(); ++i) other[i] = signs[i % p.channels];
  return p;
}

// Exact rows and codes; what the tensor cores hold is large from the first product on, and every mma errs by its size.
static Problem against_sums() {
  Problem p(16 * whole(4, 41), false, cuda_emulator::kWorstUp);
  for (int r = 0; r < kRows; ++r) p.x[r * p.channels] = sign() * exact();
  for (int k = 0; k < kCodes; ++k) p.codes[k * p.channels] = sign() * exact();
  return p;
}

// The same with starting scores: long codes, tiny rows.
static Problem against_start() {
  Problem p(16 * whole(4, 41), true, cuda_emulator::kWorstUp);
  for (float& x : p.x) x = 0x1p-40f * exact();
  for (float& c : p.codes) c = sign() * exact();
  return p;
}

// Also every step of the float32 chain loses a product of just below half a unit in the last place.
static Problem against_chain() {
  Problem p(16 * whole(38, 41), false, cuda_emulator::kWorstUp);
  for (int r = 0; r < kRows; ++r)
    for (int d = 0; d < p.channels; ++d) p.x[r * p.channels + d] = d ? -0x1p-12f : -1;
  for (int k = 0; k < kCodes; ++k)
    for (int d = 0; d < p.channels; ++d) p.codes[k * p.channels + d] = d ? 0x1p-12f * (1 - 0x1p-7f) : 1;
  return p;
}

int main(int argc, char** argv) {
  random_bits.seed(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1);
  std::vector<Mutant> mutants = {{"none", -1, 1, 0, 0, 0},
                                 {"all", -1, 0.5f, 0, 0, 0},
                                 {"all", -1, 0.9f, 0, 0, 0},
                                 {"row", kBoundRow, 0, 0, 0, 0},
                                 {"row", kBoundRow, 0.5f, 0, 0, 0},
                                 {"row", kBoundRow, 0.9f, 0, 0, 0},
                                 {"gap", kBoundGap, 0, 0, 0, 0},
                                 {"gap", kBoundGap, 0.5f, 0, 0, 0},
                                 {"gap", kBoundGap, 0.9f, 0, 0, 0},
                                 {"sums", kBoundSums, 0, 0, 0, 0},
                                 {"sums", kBoundSums, 0.5f, 0, 0, 0},
                                 {"sums", kBoundSums, 0.9f, 0, 0, 0},
                                 {"start", kBoundStart, 0, 0, 0, 0},
                                 {"start", kBoundStart, 0.5f, 0, 0, 0},
                                 {"start", kBoundStart, 0.9f, 0, 0, 0},
                                 {"chain", kBoundChain, 0, 0, 0, 0}};
  for (int i = 0; i < 60; ++i) check(any(), mutants);
  for (int i = 0; i < 20; ++i) {
    check(against_rounding(true), mutants);
    check(against_rounding(false), mutants);
    check(against_start(), mutants);
    check(against_sums(), mutants);
    if (i < 5) check(against_chain(), mutants);
  }
  for (const Mutant& m : mutants)
    std::printf("%s,%g,%lld,%lld,%.3g\n", m.term, m.factor, static_cast<long long>(m.checks),
                static_cast<long long>(m.failures), m.worst);
  return 0;
}
