// checks NAME: runs one kernel, says "as wanted", "wrong: ..." or "failed: ...". checks threads: launches from four OS
// threads.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "checks.h"

namespace tokenflow_ext {

static const Check* find(const Check* checks, int count, const char* name) {
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(checks[i].name, name)) return &checks[i];
  return nullptr;
}

// On the heap, each in its exact size.
static bool run(const Check& check) {
  float* const out = static_cast<float*>(std::calloc(kNumbers, sizeof(float)));
  float* const in = static_cast<float*>(aligned_alloc(16, kNumbers * sizeof(float)));
  unsigned* const counter = static_cast<unsigned*>(std::calloc(1, sizeof(unsigned)));
  for (int i = 0; i < kNumbers; ++i) in[i] = static_cast<float>(i);
  Call call = {};
  check.run(call, {out, in, counter});
  bool right = !call.failure;
  if (call.failure) std::printf("failed: %s\n", call.failure);
  for (int i = 0; right && i < kNumbers; ++i) {
    if (out[i] == check.wanted(i)) continue;
    std::printf("wrong: out[%d] is %g, wanted %g\n", i, out[i], check.wanted(i));
    right = false;
  }
  std::free(out), std::free(in), std::free(counter);
  return right;
}

static bool run_from_threads() {
  std::vector<std::thread> threads;
  bool right[4];
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &right] {
      right[t] = true;
      for (int i = 0; i < kRightCount; ++i) right[t] &= run(kRight[(i + 3 * t) % kRightCount]);
    });
  for (std::thread& thread : threads) thread.join();
  return right[0] && right[1] && right[2] && right[3];
}

}  // namespace tokenflow_ext

int main(int argc, char** argv) {
  using namespace tokenflow_ext;
  const char* const name = argc > 1 ? argv[1] : "";
  if (!std::strcmp(name, "names")) {
    for (int i = 0; i < kWrongCount; ++i) std::printf("wrong %s\n", kWrong[i].name);
    for (int i = 0; i < kRightCount; ++i) std::printf("right %s\n", kRight[i].name);
    return 0;
  }
  bool right;
  if (!std::strcmp(name, "threads")) {
    right = run_from_threads();
  } else {
    const Check* check = find(kWrong, kWrongCount, name);
    if (!check) check = find(kRight, kRightCount, name);
    if (!check) return std::fprintf(stderr, "no such check: %s\n", name), 3;
    right = run(*check);
  }
  if (right) std::puts("as wanted");
  return !right;
}
