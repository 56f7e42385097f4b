// Loops over threads, opened only where there is more than one: a region of one thread inside another region, or around
// one, makes OpenMP start new threads instead of waking those that wait (3 ms instead of 5 us).
#pragma once
#include <omp.h>
#include <stdint.h>

#include "common/isa.h"

TOKENFLOW_BEGIN

template <class F>
static inline void for_each(int64_t n, int threads, F f) {
  if (threads == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < n; ++i) f(i);
}

TOKENFLOW_END
