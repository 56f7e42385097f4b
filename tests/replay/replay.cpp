// The core without Python: reads recorded calls, makes each one, writes what every tensor then holds.
//   replay CALLS RESULTS [THREADS]
// For processors that only an emulator has, and for sanitizers, which see the kernels alone. tests/replay/__init__.py
// records the calls and describes both files; a tensor gets memory of exactly its size, as far off a cache line as the
// recorded one lay. The list of ops is that of csrc/bindings.cpp, collected by CMake; or, for the CUDA kernels in
// emulation, that of csrc/cuda/bindings.h (tests/emulator/programs.py).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "common/multiscale_ops.h"
#include "common/ops.h"
#if defined(TOKENFLOW_EMULATED)
#include "cuda/mma_probe.h"
#include "cuda_emulator.h"
#else
#include "cpu/isa.h"
#endif

namespace tokenflow_ext {
#if defined(TOKENFLOW_EMULATED)
namespace cuda {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
#define TOKENFLOW_CUDA_OP(name) \
  if (call.op == #name) return call.make(cuda::name)
static const char* const kIsaNames[] = {"cuda"};
static int choose_isa(std::string*) {
  cuda_emulator::config().log = true;
  return 0;
}
#else
namespace baseline {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
#ifdef TOKENFLOW_X86
namespace avx2 {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
namespace avx512 {
TOKENFLOW_DECLARE_OPS TOKENFLOW_DECLARE_MULTISCALE_OPS
}
#define TOKENFLOW_OP(name) \
  if (call.op == #name) return call.make(isa == 2 ? avx512::name : isa == 1 ? avx2::name : baseline::name)
#else
#define TOKENFLOW_OP(name) \
  if (call.op == #name) return call.make(baseline::name)
#endif
#endif

[[noreturn]] static void fail(const char* what) {
  std::fprintf(stderr, "replay: %s\n", what);
  std::exit(2);
}

// As the recorded tensors; where traffic is counted, as cudaMalloc would.
#if defined(CUDA_EMULATOR_TRACE)
constexpr int64_t kAlignment = 256, kAligned = 1;
#else
constexpr int64_t kAlignment = 64, kAligned = 64;
#endif

struct Buffer {
  void* start;  // of the allocation
  char* data;
  int64_t bytes;
};

struct Record {
  std::FILE* in;
  int threads;  // instead of the recorded number; 0 keeps it
  std::string op;
  std::vector<Buffer> buffers;
  bool certified;  // its name ends with "+certified": CUDA's searches are to be
  int64_t counts[5];

  void bytes(void* out, int64_t n) {
    if (n && std::fread(out, 1, n, in) != static_cast<size_t>(n)) fail("the file of calls ends early");
  }
  template <class T>
  T number() {
    T value;
    bytes(&value, 8);
    return value;
  }

  // False at the end of the file.
  bool read() {
    int64_t length;
    if (std::fread(&length, 8, 1, in) != 1) return false;
    std::memset(counts, 0, sizeof counts);
    op.resize(length);
    bytes(&op[0], length);
    const size_t mark = op.find("+certified");
    certified = mark != std::string::npos;
    if (certified) op.resize(mark);
    buffers.resize(number<int64_t>());
    for (Buffer& buffer : buffers) {
      buffer.bytes = number<int64_t>();
      const int64_t offset = number<int64_t>() % kAligned;
      if (posix_memalign(&buffer.start, kAlignment, buffer.bytes + offset)) fail("no memory");
      buffer.data = static_cast<char*>(buffer.start) + offset;
      bytes(buffer.data, buffer.bytes);
    }
    return true;
  }

  void argument(int64_t* value) { *value = number<int64_t>(); }
  void argument(bool* value) { *value = number<int64_t>() != 0; }
  void argument(double* value) { *value = number<double>(); }
  void argument(View* view) {
    *view = {nullptr, kNone, 0, -1, true, {}};
    view->type = static_cast<Type>(number<int64_t>());
    if (view->type == kNone) return;
    view->rank = static_cast<int>(number<int64_t>());
    for (int i = 0; i < view->rank; ++i) view->shape[i] = number<int64_t>();
    const int64_t buffer = number<int64_t>();
    view->data = buffer < 0 ? nullptr : buffers[buffer].data;
  }
  void argument(Tables* tables) {
    *tables = {};
    tables->count = static_cast<int>(number<int64_t>());
    tables->l2 = number<int64_t>() != 0;
    tables->unit = number<int64_t>() != 0;
    tables->unit_codes = number<int64_t>() != 0;
    for (int t = 0; t < tables->count; ++t) tables->width[t] = number<int64_t>();
    for (int t = 0; t < tables->count; ++t) tables->weight[t] = number<double>();
  }

  // Scratch of exactly the bytes that were counted, full of NaN.
  template <class... Args>
  Error make(Error (*function)(Call&, Args...) noexcept) {
    std::tuple<Args...> arguments;
    std::apply([&](Args&... each) { (argument(&each), ...); }, arguments);
    const auto run = [&](Call& call) {
      return std::apply([&](Args&... each) { return function(call, each...); }, arguments);
    };
    const int recorded = static_cast<int>(number<int64_t>());
    Call call = {};
    call.certified = certified;
    call.threads = threads ? threads : recorded;
    call.device = -1;
#if defined(TOKENFLOW_REPLAY_DEVICE)  // tests/test_cuda_host.py
    call.device = TOKENFLOW_REPLAY_DEVICE;
    call.stream = reinterpret_cast<void*>(TOKENFLOW_REPLAY_STREAM);
#endif
    call.counting = true;
    if (const Error error = run(call)) return error;
    void* scratch = nullptr;
    if (posix_memalign(&scratch, kAlignment, call.taken)) fail("no memory");
    std::memset(scratch, -1, call.taken);
    call.scratch = static_cast<char*>(scratch);
    call.size = call.taken;
    call.taken = 0;
    call.counting = false;
#if defined(TOKENFLOW_EMULATED)
    call.counts = counts;
    call.searched = counts + 2;
#endif
    run(call);
    if (call.failure) fail(call.failure);
    std::free(scratch);
    counts[0] += call.ids_outside;
    counts[1] += call.rows_not_finite;
    return nullptr;
  }

  void write(Error error, std::FILE* out) {
    const std::string sentence = error ? error : "";
    const int64_t length = sentence.size();
    std::fwrite(&length, 8, 1, out);
    std::fwrite(sentence.data(), 1, sentence.size(), out);
    std::fwrite(counts, 8, 5, out);
    for (Buffer& buffer : buffers) {
      std::fwrite(buffer.data, 1, buffer.bytes, out);
      std::free(buffer.start);
    }
  }
};

static Error make(Record& call, int isa) {
  (void)isa;
#include "ops.inc"
  fail(("no such op: " + call.op).c_str());
}

}  // namespace tokenflow_ext

int main(int argc, char** argv) {
  using namespace tokenflow_ext;
  std::string error;
  const int isa = choose_isa(&error);
  if (!error.empty()) fail(error.c_str());
  if (argc < 3) fail("wanted replay CALLS RESULTS [THREADS]");
  Record call = {std::fopen(argv[1], "rb"), argc > 3 ? std::atoi(argv[3]) : 0, {}, {}, {}};
  std::FILE* out = std::fopen(argv[2], "wb");
  if (!call.in || !out) fail("a file could not be opened");
  int64_t calls = 0;
  for (; call.read(); ++calls) call.write(make(call, isa), out);
  if (std::fclose(out)) fail("the results could not be written");
  std::fclose(call.in);
  std::printf("%s %lld\n", kIsaNames[isa], static_cast<long long>(calls));
#if defined(TOKENFLOW_EMULATED)
  for (const auto& l : cuda_emulator::take_launches())
    std::printf("%s: %u threads, %zu + %zu shared bytes%s\n", l.kernel, l.block.x * l.block.y * l.block.z,
                l.dynamic_shared, l.static_shared, l.from_ptx ? ", from PTX" : "");
  for (const auto& each : cuda_emulator::take_traffic()) {
    const auto& t = each.second;
    std::printf("traffic: %s: %llu %llu %llu %llu %llu %llu\n", each.first.c_str(), (unsigned long long)t.requests,
                (unsigned long long)t.sectors, (unsigned long long)t.least_sectors,
                (unsigned long long)t.shared_requests, (unsigned long long)t.wavefronts,
                (unsigned long long)t.least_wavefronts);
  }
  for (const auto& c : cuda_emulator::coverage()) {
    std::printf("PTX: %d of %d instructions of %s ran; not those at", c.ran, c.all, c.kernel.c_str());
    for (const char* site : c.missed) std::printf(" %s", site);
    std::puts("");
  }
#endif
}
