// checks NAME...: runs these kernels, each says "NAME: as wanted", "NAME: wrong, ..." or "NAME: failed, ...".
// checks threads: every right kernel, from four OS threads at a time. checks log: what the right kernels launch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
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
  std::string end = right ? "as wanted" : std::string("failed, ") + call.failure;
  for (int i = 0; right && i < kNumbers; ++i) {
    if (out[i] == check.wanted(i)) continue;
    end = "wrong, out[" + std::to_string(i) + "] is " + std::to_string(out[i]);
    right = false;
  }
  std::printf("%s: %s\n", check.name, end.c_str());
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

static void log_launches() {
  cuda_emulator::config().log = true;
  for (int i = 0; i < kRightCount; ++i) run(kRight[i]);
  std::puts("launches");
  for (const cuda_emulator::Launch& l : cuda_emulator::take_launches())
    std::printf("%s %ux%ux%u %ux%ux%u %zu %zu\n", l.kernel, l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y,
                l.block.z, l.dynamic_shared, l.static_shared);
}

}  // namespace tokenflow_ext

int main(int argc, char** argv) {
  using namespace tokenflow_ext;
  bool right = argc > 1;
  for (int i = 1; i < argc; ++i) {
    const Check* check = find(kWrong, kWrongCount, argv[i]);
    if (!check) check = find(kRight, kRightCount, argv[i]);
    if (check)
      right &= run(*check);
    else if (!std::strcmp(argv[i], "threads"))
      right &= run_from_threads();
    else if (!std::strcmp(argv[i], "log"))
      log_launches();
    else
      return std::fprintf(stderr, "no such check: %s\n", argv[i]), 3;
  }
  return !right;
}
