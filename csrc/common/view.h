// A tensor as the core sees it: a pointer, a type, a shape. Made by tokenflow_ext/ops/_native.py, checked here again.
#pragma once
#include <stdint.h>

namespace tokenflow_ext {

enum Type : int { kNone = -1, kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3, kInt64 = 4 };

constexpr int kMaxRank = 6;

struct View {
  void* data;
  Type type;
  int rank;
  int device;       // -1: CPU
  bool contiguous;  // row major without gaps
  int64_t shape[kMaxRank];
};

constexpr int kMaxTables = 16;

// How the channels of a row fall into tables, and which distance each table measures.
struct Tables {
  int count;                    // T
  bool l2;                      // start the score from 0.5 |c|^2
  bool unit;                    // rows and codes are unit per table when they are searched (metric cosine)
  bool unit_codes;              // the code that is returned is unit
  int64_t width[kMaxTables];    // D_t, their sum is C
  double weight[kMaxTables];    // of the table's distance in the shared score
};

// A contiguous CPU tensor of this rank (it may be empty, and then has no address).
static inline bool dense(const View& v, int rank) { return v.type != kNone && v.rank == rank && v.contiguous && v.device == -1; }

static inline bool floating(const View& v) { return v.type >= kFloat32 && v.type <= kBFloat16; }

// At least `numbers` of this type, as workspace must be.
static inline bool holds(const View& v, Type type, int64_t numbers) {
  int64_t size = 1;
  for (int i = 0; i < v.rank; ++i) size *= v.shape[i];
  return v.type == type && v.contiguous && v.device == -1 && size >= numbers;
}

static inline bool covers(const Tables& tables, int64_t channels) {
  for (int t = 0; t < tables.count; ++t) channels -= tables.width[t];
  return channels == 0;
}

// nullptr, or a sentence that Python raises as ValueError.
using Error = const char*;

}  // namespace tokenflow_ext
