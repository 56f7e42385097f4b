// Which instruction set runs: the best that this processor has, or a lower one named by TOKENFLOW_ISA.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace tokenflow_ext {

#if defined(TOKENFLOW_X86)
const int kIsaCount = 3;
const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};
static const char kUnknown[] = "TOKENFLOW_ISA: wanted baseline, avx2 or avx512, got something else";
#elif defined(__aarch64__)
const int kIsaCount = 1;
const char* const kIsaNames[] = {"neon"};
static const char kUnknown[] = "TOKENFLOW_ISA: wanted neon, got something else";
#else
const int kIsaCount = 1;
const char* const kIsaNames[] = {"baseline"};
static const char kUnknown[] = "TOKENFLOW_ISA: wanted baseline, got something else";
#endif

static int best_isa() {
#ifdef TOKENFLOW_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

int choose_isa(const char** error) {
  const int best = best_isa();
  const char* wanted = std::getenv("TOKENFLOW_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (i > best) *error = "TOKENFLOW_ISA: wanted an instruction set that this processor has, got a higher one";
    return i > best ? best : i;
  }
  *error = kUnknown;
  return best;
}

}  // namespace tokenflow_ext
