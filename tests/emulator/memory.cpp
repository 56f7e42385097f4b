// Shared memory and cp.async. Every block finds poison: NaN, or random bits. Arrays lie as aligned as declared and no
// more, between red zones that AddressSanitizer knows.
#include <stdio.h>
#include <stdlib.h>

#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_emulator {

constexpr size_t kRedZone = 64, kMaxStatic = 48 << 10;
constexpr int kMaxArrays = 64;

struct Array {
  const void* tag;
  size_t offset;
};
static Array arrays[kMaxArrays];
static int array_count;
static size_t used, dynamic_offset, static_bytes;

// What a block can have on this architecture, static and dynamic together (CUDA's programming guide, compute
// capabilities).
size_t shared_limit() {
  switch (config().architecture) {
    case 80:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
      return 99 << 10;
    case 90:
    case 100:
      return 227 << 10;
  }
  fprintf(stderr, "CUDA_EMULATOR_ARCH: wanted 80, 86, 89, 90, 100 or 120, got %d\n", config().architecture);
  abort();
}

static char* arena() { return engine.sets[engine.set].shared; }
char* shared_memory;  // the same, for kernels from PTX

// Space at an address that is a multiple of `alignment` and not of its double, filled with poison.
static size_t place(size_t size, size_t alignment) {
  const size_t step = alignment < 8 ? 8 : alignment;  // red zones begin at multiples of 8
  size_t offset = (used + kRedZone + step - 1) / step * step;
  if (offset % (2 * step) == 0) offset += step;
  used = offset + (size + 7) / 8 * 8;
  if (used + kRedZone > kArena) fail("shared memory: wanted less than %zu bytes", kArena);
  char* const memory = arena();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory + offset, size);
#endif
  // Volatile, for ThreadSanitizer would take a memset for an access of the thread.
  const bool not_a_number = next_random() & 1;
  for (size_t i = 0; i + 8 <= size; i += 8)
    *reinterpret_cast<volatile uint64_t*>(memory + offset + i) =
        not_a_number ? ~0ull : next_random() << 16 ^ next_random();
  for (size_t i = size / 8 * 8; i < size; ++i) *reinterpret_cast<volatile char*>(memory + offset + i) = -1;
  return offset;
}

void begin_shared() {
  shared_memory = arena();
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(arena(), kArena);
#endif
  used = array_count = 0;
  static_bytes = 0;
  dynamic_offset = engine.dynamic_shared ? place(engine.dynamic_shared, 16) : 0;
}

// A thread's way to an array: after what earlier blocks of the set did there.
static void* enter_shared(size_t offset) {
  Lane& lane = self();
  Set& set = engine.sets[engine.set];
  if (!lane.shares) acquire(set.tags[set.block % 2]);
  lane.shares = set.used = true;
  return arena() + offset;
}

void* dynamic_shared() {
  if (!engine.dynamic_shared) fail("DYNAMIC_SHARED in a launch without dynamic shared memory");
  return enter_shared(dynamic_offset);
}

void* static_shared(const void* tag, size_t size, size_t alignment) {
  for (int i = 0; i < array_count; ++i)
    if (arrays[i].tag == tag) return enter_shared(arrays[i].offset);
  if (array_count == kMaxArrays) fail("shared arrays: wanted at most %d", kMaxArrays);
  static_bytes += (size + 15) / 16 * 16;
  if (static_bytes > engine.static_shared) engine.static_shared = static_bytes;
  if (static_bytes > kMaxStatic)
    fail("static shared memory: wanted at most %zu bytes, got %zu", kMaxStatic, static_bytes);
  if (static_bytes + engine.dynamic_shared > shared_limit())
    fail("cudaErrorInvalidValue: %zu bytes of static and %zu of dynamic shared memory, sm_%d has %zu", static_bytes,
         engine.dynamic_shared, config().architecture, shared_limit());
  arrays[array_count] = {tag, place(size, alignment)};
  return enter_shared(arrays[array_count++].offset);
}

// In a random schedule each copy lands at once or at the wait; forward all at the wait, in reverse all at once.
bool issue_copy(void* to, const void* from, int bytes) {
  Lane& lane = self();
  char* const memory = arena();
  if (to < memory || to >= memory + kArena) fail("cp_async%d: the destination is not shared memory", bytes);
  if (lane.last - lane.first == kMaxCopies) fail("thread %d: wanted at most %d copies under way", lane.id, kMaxCopies);
  const bool late = engine.schedule == kForward || (engine.schedule != kReverse && next_random() & 1);
  engine.copies[lane.id][lane.last++ % kMaxCopies] = {to, from, bytes, lane.group};
  return late;
}

void commit_copies() { ++self().group; }

const Copy* next_landing(int groups_left) {
  Lane& lane = self();
  if (lane.first == lane.last) return nullptr;
  const Copy& copy = engine.copies[lane.id][lane.first % kMaxCopies];
  if (copy.group >= lane.group - groups_left) return nullptr;
  ++lane.first;
  return &copy;
}

}  // namespace cuda_emulator
