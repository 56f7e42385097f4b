// Tries to break the error bound of csrc/cpu/certified.h, and the same bound with one term halved or dropped.
//   bound [SEED]  prints a line a mutant: term, its factor, checks, failures, the worst failure in units of a sum
// A check takes one row and one code. The code is packed, quantised and scanned by the core itself, in a segment of its
// own (every code stands there twice, a segment is two codes). Were it the best code scored so far, its segment must
// not be ruled out: its sum may not pass the ceiling that belongs to its own canonical score. The families are built
// against one term each: rows and codes for which that term is used up, and no other helps out.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

static double factor_of[16];  // by Term
#define TOKENFLOW_BOUND(term, value) (factor_of[term] * (value))
#include "cpu/search.cpp"

using namespace tokenflow_ext;
using namespace tokenflow_ext::TOKENFLOW_ISA;

static std::mt19937_64 random_bits;
static double uniform(double from, double to) { return std::uniform_real_distribution<>(from, to)(random_bits); }
static float normal() { return std::normal_distribution<float>()(random_bits); }
static int whole(int from, int to) { return std::uniform_int_distribution<>(from, to)(random_bits); }

struct Counts {
  int64_t checks, failures;
  double worst;
};

constexpr int64_t kCodes = kSums, kRows = kTile8;  // distinct codes; rows, a tile of them

struct Problem {
  int64_t channels;
  bool l2;
  std::vector<float> z, codes;  // [kRows, channels], [kCodes, channels]
  Problem(int64_t n, bool l2) : channels(n), l2(l2), z(kRows * n), codes(kCodes * n) {}
};

static void check(const Problem& p, Counts* counts) {
  std::vector<float> twice(2 * p.codes.size());
  for (int64_t k = 0; k < 2 * kCodes; ++k)
    memcpy(&twice[k * p.channels], &p.codes[k / 2 * p.channels], p.channels * sizeof(float));
  Tables tables = {};
  tables.count = 1;
  tables.l2 = p.l2;
  tables.width[0] = p.channels;
  tables.weight[0] = 1;
  search_state.precision = kCertified;
  const int64_t rows = kRowBlock + 1, bytes = bytes_of_search<float>(rows, 2 * kCodes, p.channels, 1);
  std::vector<char> memory(bytes);
  const View workspace = {memory.data(), kUInt8, 1, -1, true, {bytes}};
  const Index<float> index = make_index<float>(twice.data(), 2 * kCodes, p.channels, tables, rows, workspace, 1);
  if (!index.certify) return;
  const Codes8& codes = index.codes8;
  float scale[kRows], of_tile = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    scale[r] = scale8(&p.z[r * p.channels], p.channels, codes);
    of_tile = scale[r] > of_tile ? scale[r] : of_tile;
  }
  std::vector<int32_t> q(kRows * codes.words);
  Row8 row[kRows];
  for (int64_t r = 0; r < kRows; ++r)
    row[r] = quantize8(&p.z[r * p.channels], p.channels, p.l2 ? of_tile : scale[r], codes, &q[r * codes.words]);
  Sum table[kRows * kSums];
  scan_of(codes, p.l2)(q.data(), codes, 0, codes.blocks, start_factor(codes, row[0].unit), table);
  for (int64_t r = 0; r < kRows; ++r) {
    if (!row[r].usable) continue;
    float scores[kPanel];
    for (int64_t k = 0; k < kCodes; ++k) {
      if (k % (kPanel / 2) == 0) score_panels<1>(&p.z[r * p.channels], index.packed, 2 * k / kPanel, scores);
      const float score = scores[2 * k % kPanel];
      const Sum most = ceiling_of(row[r], codes, index.bound, score)(codes.norms[k], codes.gaps[k]);
      ++counts->checks;
      if (table[r * kSums + k] <= most) continue;
      ++counts->failures;
      counts->worst = std::fmax(counts->worst, static_cast<double>(table[r * kSums + k]) - most);
    }
  }
}

// Any rows and codes, of sizes that differ.
static Problem any() {
  Problem p(whole(1, 300), whole(0, 1));
  const double size = std::exp(uniform(-3, 3)), spread = uniform(0, 2);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t d = 0; d < p.channels; ++d) p.z[r * p.channels + d] = normal();
  for (int64_t k = 0; k < kCodes; ++k) {
    const double length = size * std::exp(spread * normal());
    for (int64_t d = 0; d < p.channels; ++d) p.codes[k * p.channels + d] = static_cast<float>(length * normal());
  }
  return p;
}

// What rounding took from the row lies along the code, which is exact.
static Problem against_rows() {
  Problem p(whole(2, 12), whole(0, 1));
  const int most = whole(20, kRowLevels);
  const float step = static_cast<float>(uniform(0.5, 2)), code_step = static_cast<float>(uniform(0.5, 2)) * 0x1p-4f;
  for (int64_t r = 0; r < kRows; ++r) {
    p.z[r * p.channels] = step * static_cast<float>(kRowLevels);
    for (int64_t d = 1; d < p.channels; ++d)
      p.z[r * p.channels + d] = step * (static_cast<float>(whole(-most + 1, most)) - 0.49f);
  }
  for (int64_t k = 0; k < kCodes; ++k)
    for (int64_t d = 1; d < p.channels; ++d)
      p.codes[k * p.channels + d] = static_cast<float>(whole(0, 1) * kCodeLevels) * code_step;
  return p;
}

// What rounding took from the code lies along the row, which is exact.
static Problem against_codes() {
  Problem p(whole(2, 12), whole(0, 1));
  const float step = static_cast<float>(uniform(0.5, 2)), code_step = static_cast<float>(uniform(0.5, 2)) * 0x1p-4f;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t d = 1; d < p.channels; ++d) p.z[r * p.channels + d] = step * static_cast<float>(kRowLevels);
  for (int64_t k = 0; k < kCodes; ++k) {
    p.codes[k * p.channels] = code_step * static_cast<float>(kCodeLevels);
    for (int64_t d = 1; d < p.channels; ++d)
      p.codes[k * p.channels + d] = code_step * (static_cast<float>(whole(-30, 30)) - 0.49f);
  }
  return p;
}

// Exact rows and codes of many equal channels: the float32 chain alone errs, in every step to the same side.
static Problem against_chain() {
  Problem p(16384, false);
  const float code_step = 1 + static_cast<float>(whole(1, 1 << 16)) * 0x1p-17f;
  for (int64_t r = 0; r < kRows; ++r) {
    const float step = 1 + static_cast<float>(whole(1, 1 << 16)) * 0x1p-17f;
    for (int64_t d = 0; d < p.channels; ++d) p.z[r * p.channels + d] = d == 1 ? 0 : -13 * step;
    p.z[r * p.channels] = static_cast<float>(kRowLevels) * step;
  }
  for (int64_t k = 0; k < kCodes; ++k) {
    for (int64_t d = 2; d < p.channels; ++d)
      p.codes[k * p.channels + d] = static_cast<float>(k % 2 ? 8 : 16) * code_step;
    p.codes[k * p.channels + 1] = static_cast<float>(kCodeLevels) * code_step;
  }
  return p;
}

// Long codes and tiny rows: every step takes a little more than half a unit in the last place of the starting score.
static Problem against_start_chain() {
  Problem p(whole(4096, 16384), true);
  for (int64_t k = 0; k < kCodes; ++k)
    for (int64_t d = 0; d < p.channels; ++d) p.codes[k * p.channels + d] = 1 + 0x1p-10f * static_cast<float>(k);
  const double start = 0.5 * static_cast<double>(p.channels);
  const double last = std::exp2(std::floor(std::log2(start)) - 23);
  for (int64_t r = 0; r < kRows; ++r) {
    const float z = static_cast<float>(-uniform(0.5, 0.7) * last);
    for (int64_t d = 0; d < p.channels; ++d) p.z[r * p.channels + d] = z;
  }
  return p;
}

// Exact rows and codes under short rows: the starting scores are all that is rounded.
static Problem against_starts() {
  Problem p(whole(1, 6), true);
  const float code_step = static_cast<float>(uniform(0.5, 2));
  for (float& z : p.z) z = 0;
  for (int64_t k = 0; k < kCodes; ++k)
    for (int64_t d = 0; d < p.channels; ++d)
      p.codes[k * p.channels + d] =
          static_cast<float>(d == 0 && k == 0 ? kCodeLevels : whole(-kCodeLevels, kCodeLevels)) * code_step;
  return p;
}

// One channel, a long code behind the row: as long as a code of its score can be.
static Problem against_cut() {
  Problem p(1, true);
  const float step = static_cast<float>(uniform(0.5, 2));
  for (int64_t r = 0; r < kRows; ++r)
    p.z[r] = r == 0 ? -step * static_cast<float>(kRowLevels)
                    : -step * (static_cast<float>(whole(0, kRowLevels / 2)) + 0.49f);
  for (int64_t k = 0; k < kCodes; ++k) p.codes[k] = step * static_cast<float>(2 * kCodeLevels - 6 * k) / 2;
  return p;
}

int main(int argc, char** argv) {
  struct Mutant {
    const char* name;
    double factor;
    std::vector<int> terms;
  };
  std::vector<int> all;
  for (int t = 0; t < kTerms; ++t) all.push_back(t);
  const std::vector<Mutant> mutants = {{"none", 1, {}},
                                       {"all", 0.5, all},
                                       {"all", 0.9, all},
                                       {"row", 0, {kOfRow}},
                                       {"row", 0.5, {kOfRow}},
                                       {"code", 0, {kOfCode}},
                                       {"code", 0.5, {kOfCode}},
                                       {"chain", 0, {kOfChain}},
                                       {"start chain", 0, {kOfStartChain}},
                                       {"start", 0, {kOfStart}},
                                       {"start", 0.5, {kOfStart}},
                                       {"cut", 0.5, {kOfCut}},
                                       {"cut", 0.9, {kOfCut}},
                                       {"ceiling", 0, {kOfCeiling}},
                                       {"packing", 0, {kOfPacking}}};
  const std::vector<std::pair<std::function<Problem()>, int>> families = {
      {any, 100},          {against_rows, 200},      {against_codes, 200},
      {against_chain, 25}, {against_start_chain, 6}, {against_starts, 500},
      {against_cut, 200},
  };
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  for (const Mutant& mutant : mutants) {
    for (double& factor : factor_of) factor = 1;
    for (int term : mutant.terms) factor_of[term] = mutant.factor;
    Counts counts = {0, 0, 0};
    random_bits.seed(seed);
    for (const auto& family : families)
      for (int i = 0; i < family.second; ++i) check(family.first(), &counts);
    std::printf("%s,%g,%lld,%lld,%g\n", mutant.name, mutant.factor, static_cast<long long>(counts.checks),
                static_cast<long long>(counts.failures), counts.worst);
  }
}
