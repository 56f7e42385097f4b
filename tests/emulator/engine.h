// What the files of the emulator share: the block that runs, its threads, where they wait.
#pragma once
#include <string>

#include "cuda_emulator.h"
#include "fiber.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace cuda_emulator {

enum State : uint8_t { kReady, kAtBarrier, kInWarp, kExited };

constexpr int kMaxThreads = 1024, kMaxCopies = 1024, kMaxGroups = 4;
constexpr size_t kArena = 512 << 10;

// Lanes of a warp that wait for one another.
struct Rendezvous {
  unsigned mask, arrived;
  WarpOp op;
  const char* site;
  int tag;
};

struct Lane : Thread {
  int id, warp, lane;
  const char* site;  // of the last barrier or warp operation
  Fiber* fiber;
  // At a barrier or in a warp operation.
  bool predicate;
  uint64_t value, result;
  int from, width;
  // Of mma.sync: A and B as two bfloat16 a register, C and D.
  uint32_t a[4], b[2];
  float d[4];
  // cp.async: copies [first, last) are under way, `group` is the one not yet committed.
  int first, last, group;
  bool shares;  // has used shared memory
};

// Instructions of PTX that run one after another, and where the first is.
struct Block {
  const char* site;
  int instructions;
};
// A kernel that ptx.py made.
struct Translation {
  const char* file;
  const char* symbol;
  void (*thread)(const void* parameters);
  unsigned max_threads;
  const Block* blocks;
  const bool* seen;  // whether a block ever ran
  int block_count;
};
bool any_translations();
const Translation* translation_of(const void* kernel);  // or nullptr

// Memory that two blocks use would look shared by them to ThreadSanitizer, and fibers are too dear to have one for
// every thread of a grid. So blocks alternate between sets of fibers, each with its own shared memory; blocks of one
// set are ordered where they use it.
#if defined(CUDA_EMULATOR_TSAN)
constexpr int kSets = 2;
#else
constexpr int kSets = 1;
#endif

struct Set {
  Fiber fibers[kMaxThreads];
  int block;     // of its blocks that used shared memory
  bool used;     // by the last one
  char tags[2];  // from what a block did in shared memory to what the next does
  alignas(4096) char shared[kArena];
};

struct Engine {
  Lane lanes[kMaxThreads];
  State states[kMaxThreads];
  int order[kMaxThreads], position;  // of the round: whose turn is next
  Copy copies[kMaxThreads][kMaxCopies];
  Rendezvous meetings[kMaxThreads / 32][kMaxGroups];
  Set sets[kSets];
  int set;
  int threads, live;
  // The barrier of the block: who waits, for what.
  int waiting, parity;
  Vote vote;
  const char* barrier;
  int meeting_count[kMaxThreads / 32];
  char barrier_tags[2], warp_tags[kMaxThreads / 32][8], fence_tag, begin_tag, end_tag;
  // The launch.
  int launch;
  Schedule schedule;
  const void* kernel;
  void (*thread)(const void*);
  const void* arguments;
  size_t dynamic_shared, static_shared;
  const char* failure;
  bool from_ptx;
  uint64_t random;
};
extern Engine engine;  // not on the heap: ThreadSanitizer takes each allocation for a write of the thread that makes it

inline Lane& self() { return *static_cast<Lane*>(current); }
inline bool random_threads() { return engine.schedule == kRandomThreads; }
uint64_t next_random();
inline State& state_of(const Lane& lane) { return engine.states[lane.id]; }
void pause(bool for_good = false);  // others run
void multiply(Lane* warp);          // mma.cpp: the matrices of all its lanes
void begin_shared();                // memory.cpp: of a new block
size_t shared_limit();
// The symbol of a kernel: the source that it stands in, its name with types and all.
struct Symbol {
  std::string file, name;
};
const Symbol& kernel_symbol(const void* kernel);
std::string demangled(const char* symbol);
const char* kernel_name(const void* kernel);  // for people
const char* keep(const char* text);  // for the rest of the program

}  // namespace cuda_emulator
