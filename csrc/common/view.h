// A tensor as the core sees it: a pointer, a type, a shape. Made by tensors.h, checked by every op.
#pragma once
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace tokenflow_ext {

enum Type : int { kNone = -1, kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3, kInt64 = 4, kUInt8 = 5 };

constexpr int kMaxRank = 6;

struct View {
  void* data;
  Type type;
  int rank;
  int device;       // -1: CPU
  bool contiguous;  // row major without gaps
  int64_t shape[kMaxRank];
};

constexpr int kMaxTables = 16;

// How the channels of a row fall into tables, and which distance each table measures.
struct Tables {
  int count;                  // T
  bool l2;                    // start the score from 0.5 |c|^2
  bool unit;                  // rows and codes are unit per table when they are searched (metric cosine)
  bool unit_codes;            // the code that is returned is unit
  int64_t width[kMaxTables];  // D_t, their sum is C
  double weight[kMaxTables];  // of the table's distance in the shared score
};

// A contiguous CPU tensor of this rank (it may be empty, and then has no address).
static inline bool dense(const View& v, int rank) {
  return v.type != kNone && v.rank == rank && v.contiguous && v.device == -1;
}

// Tensors come in the shapes that users give them; without gaps, a kernel's view of one moves nothing.
// v [..., G, inner axes] as [N, G, inner axes]; where there are no groups, [..., inner axes] as [N, 1, inner axes].
static inline View by_group(const View& v, bool groups, int inner) {
  View out = v;
  const int lead = v.rank - inner - groups;
  if (lead < 0 || inner > 2) out.type = kNone;  // dense() is false then
  out.rank = 2 + inner;
  out.shape[0] = 1;
  for (int i = 0; i < lead; ++i) out.shape[0] *= v.shape[i];
  out.shape[1] = groups ? v.shape[lead] : 1;
  for (int i = 0; i < inner; ++i) out.shape[2 + i] = v.shape[v.rank - inner + i];
  return out;
}

// v [..., C] as [N, C].
static inline View as_rows(const View& v) {
  View out = by_group(v, false, 1);
  out.rank = 2;
  out.shape[1] = out.shape[2];
  return out;
}

// A codebook [G, K, C], or [K, C] as [1, K, C].
static inline View with_groups(View codebook) {
  if (codebook.rank != 2) return codebook;
  for (int i = 2; i > 0; --i) codebook.shape[i] = codebook.shape[i - 1];
  codebook.shape[0] = 1;
  codebook.rank = 3;
  return codebook;
}

static inline bool floating(const View& v) { return v.type >= kFloat32 && v.type <= kBFloat16; }

// At least `numbers` of this type.
static inline bool holds(const View& v, Type type, int64_t numbers) {
  int64_t size = 1;
  for (int i = 0; i < v.rank; ++i) size *= v.shape[i];
  return v.type == type && v.contiguous && v.device == -1 && size >= numbers;
}

static inline bool covers(const Tables& tables, int64_t channels) {
  for (int t = 0; t < tables.count; ++t) channels -= tables.width[t];
  return channels == 0;
}

// nullptr, or a sentence that Python raises as ValueError.
using Error = const char*;

// Where one call runs, its scratch, and what it counts. The door calls an op twice: first `counting`, when it checks
// its arguments, takes its scratch and returns; then with that many bytes of memory, when it takes the same again and
// runs.
struct Call {
  char* scratch;  // none while counting; on a cache line, on CUDA a multiple of 256
  int64_t size;   // bytes of scratch
  int64_t taken;  // of them
  bool counting;
  int64_t ids_outside;      // of the table, counted on the CPU: Python raises
  int64_t rows_not_finite;  // Python warns
  int threads;              // of the CPU
  int device;               // ordinal on CUDA, -1: CPU memory
  void* stream;             // cudaStream_t
  int64_t* counts;          // CUDA: device memory [2], ids outside and rows not finite, which kernels add to; or none
  int64_t* searched;        // CUDA: [3] behind them, of certified searches while they are traced; or none
  bool certified;           // CUDA: searches scan in bfloat16 and score again what a bound cannot rule out
  const char* failure;      // CUDA: the first error of a launch, which Python raises as RuntimeError
};

// The next `count` numbers of scratch, aligned to cache lines; no pointer to use while counting. AddressSanitizer keeps
// the pieces apart, and guards what lies between them.
template <class T>
static inline T* take(Call& call, int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  char* const here = call.counting ? nullptr : call.scratch + call.taken;
  call.taken += (bytes + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
  call.taken += 64;
  if (here) __asan_poison_memory_region(here + bytes, (bytes + 63) / 64 * 64 + 64 - bytes);
#endif
  return reinterpret_cast<T*>(here);
}

// The last piece of scratch: what is left, at least `bytes` of it as they were counted.
static inline View take_rest(Call& call, int64_t bytes) {
  char* const here = call.counting ? nullptr : call.scratch + call.taken;
  const int64_t rest = call.counting ? bytes : call.size - call.taken;
  call.taken += bytes;
  return {here, kUInt8, 1, -1, true, {rest}};
}

}  // namespace tokenflow_ext
