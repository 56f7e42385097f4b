#include "cpu/search_state.h"

namespace tokenflow_ext {

static bool has_int8_dot() {
#ifdef TOKENFLOW_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

SearchState search_state = {kAuto, has_int8_dot(), 0, 0, 0, 0};

}  // namespace tokenflow_ext
