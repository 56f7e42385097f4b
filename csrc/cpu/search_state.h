// What the search was told and what it did, for the whole process: `tokenflow_ext.search_precision` and
// `tokenflow_ext.trace` are their faces. Compiled once, not per instruction set.
#pragma once
#include <stdint.h>

namespace tokenflow_ext {

enum Precision : int { kAuto = 0, kFullPrecision = 1, kCertified = 2 };

struct SearchState {
  int precision;          // Precision
  bool has_int8_dot;      // this processor multiplies 8-bit integers four at a time (AVX512-VNNI)
  int64_t int8_rows;      // rows answered by the certified scan,
  int64_t float_rows;     // by the scan in the type of the scores,
  int64_t fallback_rows;  // and of these, after the certified scan gave up on them
  int64_t rescored;       // segments that the certified rows were scored on again
};

extern SearchState search_state;

static inline void count(int64_t* counter, int64_t n) { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }

}  // namespace tokenflow_ext
