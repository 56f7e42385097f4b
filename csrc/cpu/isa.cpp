// Which instruction set runs: the best that this processor has, or a lower one named by TOKENFLOW_ISA.
#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#ifdef TOKENFLOW_X86
#include <cpuid.h>
#endif

namespace tokenflow_ext {

#if defined(TOKENFLOW_X86)
const int kIsaCount = 3;
const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};
#elif defined(__aarch64__)
const int kIsaCount = 1;
const char* const kIsaNames[] = {"neon"};
#else
const int kIsaCount = 1;
const char* const kIsaNames[] = {"baseline"};
#endif

#ifdef TOKENFLOW_X86
static bool has_f16c() {  // clang 16 knows no __builtin_cpu_supports("f16c")
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static int best_isa() {
#ifdef TOKENFLOW_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return 1;
#endif
  return 0;
}

int choose_isa(std::string* error) {
  const int best = best_isa();
  const char* const wanted = std::getenv("TOKENFLOW_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (i > best)
      *error = std::string("TOKENFLOW_ISA: wanted at most ") + kIsaNames[best] + ", the best of this processor, got " +
               wanted;
    return i > best ? best : i;
  }
  std::string names = kIsaNames[0];
  for (int i = 1; i < kIsaCount; ++i) names += (i + 1 < kIsaCount ? ", " : " or ") + std::string(kIsaNames[i]);
  *error = "TOKENFLOW_ISA: wanted " + names + ", got " + wanted;
  return best;
}

}  // namespace tokenflow_ext
