// Choice of the instruction set at load time.
#pragma once
#include <string>

namespace tokenflow_ext {

extern const int kIsaCount;
extern const char* const kIsaNames[];  // by rank: baseline, avx2, avx512 on x86; neon on aarch64

// Rank of the instruction set that runs; *error becomes a sentence where TOKENFLOW_ISA cannot be honoured.
int choose_isa(std::string* error);

}  // namespace tokenflow_ext
