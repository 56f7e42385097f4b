// One namespace per instruction set. Files compiled per instruction set use C headers and intrinsics only: an inline
// std:: function compiled for AVX-512 could be the copy that the linker keeps, and kill older processors.
#pragma once

#define TOKENFLOW_BEGIN namespace tokenflow_ext { namespace TOKENFLOW_ISA {
#define TOKENFLOW_END }}

// In front of what both a processor and a GPU run.
#if defined(__CUDACC__)
#define TOKENFLOW_DEVICE __host__ __device__
#define TOKENFLOW_UNROLL _Pragma("unroll")  // a GPU keeps small arrays in registers where loops over them are unrolled
#else
#define TOKENFLOW_DEVICE
#define TOKENFLOW_UNROLL
#endif
