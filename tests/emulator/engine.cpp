// Launches, blocks, schedules, barriers.
#include "engine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <deque>
#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>

namespace cuda_emulator {

Thread* current;
dim3 block_size, grid_size;
Engine engine;

static std::vector<Launch> launches;
static std::mutex one_launch;

// The place of an environment variable's word among those that it may be.
template <class T>
static T named(const char* variable, std::initializer_list<const char*> words) {
  const char* const word = getenv(variable);
  if (!word) return static_cast<T>(0);
  int i = 0;
  for (const char* known : words) {
    if (!strcmp(word, known)) return static_cast<T>(i);
    ++i;
  }
  fprintf(stderr, "%s: wanted one of", variable);
  for (const char* known : words) fprintf(stderr, " %s", known);
  fprintf(stderr, ", got %s\n", word);
  abort();
}

Config& config() {
  static Config config = [] {
    Config read;
    read.schedule = named<Schedule>("CUDA_EMULATOR_SCHEDULE", {"forward", "reverse", "threads", "warps"});
    read.tensor_cores = named<TensorCores>(
        "CUDA_EMULATOR_TENSOR_CORES", {"ampere", "hopper", "volta", "floored", "ceiled", "worst_up", "worst_down"});
    if (const char* seed = getenv("CUDA_EMULATOR_SEED")) read.seed = strtoull(seed, nullptr, 10);
    if (const char* architecture = getenv("CUDA_EMULATOR_ARCH")) read.architecture = atoi(architecture);
    return read;
  }();
  return config;
}

std::vector<Launch> take_launches() {
  const std::lock_guard<std::mutex> lock(one_launch);
  return std::exchange(launches, {});
}

const char* keep(const char* text) {
  static std::deque<std::string> kept;
  for (const std::string& known : kept)
    if (known == text) return known.c_str();
  return kept.emplace_back(text).c_str();
}

uint64_t next_random() {
  uint64_t& x = engine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x * 0x2545f4914f6cdd1dull >> 16;
}

// Where the threads of the block are, neighbours that are at one place together.
static std::string where() {
  std::string lines;
  int shown = 0;
  for (int i = 0; i < engine.threads && shown < 12; ++i) {
    const Lane& lane = engine.lanes[i];
    const State state = engine.states[i];
    int last = i;
    while (last + 1 < engine.threads && engine.states[last + 1] == state &&
           (state == kExited || engine.lanes[last + 1].site == lane.site))
      ++last;
    const char* const doing = state == kExited      ? "exited"
                              : state == kAtBarrier ? "wait at __syncthreads"
                              : state == kInWarp    ? "wait in a warp operation"
                                                    : "can run, last seen";
    char line[512];
    snprintf(line, sizeof line, "\n  threads %d-%d %s %s", i, last, doing,
             state == kExited ? ""
             : lane.site      ? lane.site
                              : "at the start");
    lines += line;
    ++shown;
    i = last;
  }
  return lines;
}

static void note(const char* what) {
  const uint3 block = engine.lanes[0].block;
  char head[1024];
  snprintf(head, sizeof head, "%s, block (%u, %u, %u): %s", kernel_name(engine.kernel), block.x, block.y, block.z,
           what);
  engine.failure = keep((head + where()).c_str());
}

// A round gives every thread that can run one turn, in the order of the schedule.
static void begin_round() {
  engine.position = 0;
  const Schedule schedule = engine.schedule;
  const int n = engine.threads, warps = (n + 31) / 32;
  int* const order = engine.order;
  if (schedule == kRandomThreads) {
    for (int i = n - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
  } else if (schedule == kRandomWarps) {
    int warp[kMaxThreads / 32];
    for (int w = 0; w < warps; ++w) warp[w] = w;
    for (int w = warps - 1; w > 0; --w) std::swap(warp[w], warp[next_random() % (w + 1)]);
    for (int w = 0, at = 0; w < warps; ++w)
      for (int i = warp[w] * 32; i < n && i < warp[w] * 32 + 32; ++i) order[at++] = i;
  }
}

// The fiber whose turn it is; the scheduler's when no thread can run.
static Fiber& next_turn() {
  for (int round = 0; round < 2; ++round) {
    while (engine.position < engine.threads) {
      const int i = engine.order[engine.position++];
      if (engine.states[i] != kReady) continue;
      current = &engine.lanes[i];
      return *engine.lanes[i].fiber;
    }
    begin_round();
  }
  return scheduler;
}

void pause(bool for_good) {
  Fiber& from = *self().fiber;
  Fiber& to = engine.failure ? scheduler : next_turn();
  if (&from != &to) change(from, to, for_good);
}

void fail(const char* format, ...) {
  char what[768];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  note(what);
  pause(true);
  abort();
}

static void complete_barrier() {
  if (!engine.waiting || engine.waiting < engine.live) return;
  int set = 0;
  for (int i = 0; i < engine.threads; ++i)
    if (engine.states[i] == kAtBarrier) set += engine.lanes[i].predicate;
  const int result = engine.vote == kCount ? set : engine.vote == kAnd ? set == engine.live : set > 0;
  for (int i = 0; i < engine.threads; ++i) {
    if (engine.states[i] != kAtBarrier) continue;
    engine.states[i] = kReady;
    engine.lanes[i].result = result;
  }
  engine.waiting = 0;
  engine.parity ^= 1;
}

// The life of a thread.
static void body() {
  begun();
  Lane& lane = self();
  if (lane.fiber->launch != engine.launch) acquire(engine.begin_tag);
  lane.fiber->launch = engine.launch;
  engine.thread(engine.arguments);
  if (lane.first != lane.last) fail("thread %d exits with cp.async copies that it never waited for", lane.id);
  for (const Rendezvous& meeting : engine.meetings[lane.warp])
    if (meeting.arrived && meeting.mask >> lane.lane & 1)
      fail("thread %d exits while its warp waits for it at %s", lane.id, meeting.site);
  Set& set = engine.sets[engine.set];
  if (lane.shares) release(set.tags[(set.block + 1) % 2]);
  state_of(lane) = kExited;
  --engine.live;
  complete_barrier();
  pause(true);
  abort();
}

int sync_block(Vote vote, bool predicate, const char* site) {
  Lane& lane = self();
  lane.site = site;
  lane.predicate = predicate;
  if (engine.waiting == 0) {
    engine.vote = vote;
    engine.barrier = site;
  } else if (engine.barrier != site && strcmp(engine.barrier, site)) {
    fail("thread %d is at the __syncthreads of %s, others wait at that of %s", lane.id, site, engine.barrier);
  }
  const int parity = engine.parity;
  release(engine.barrier_tags[parity]);
  state_of(lane) = kAtBarrier;
  ++engine.waiting;
  complete_barrier();
  if (state_of(lane) != kReady || random_threads()) pause();
  acquire(engine.barrier_tags[parity]);
  return static_cast<int>(lane.result);
}

void fence() {
  release(engine.fence_tag);
  acquire(engine.fence_tag);
}

void before_atomic() {
  if (random_threads() && next_random() % 8 == 0) pause();
}

static void begin_block(dim3 block, uint3 index) {
  Set& set = engine.sets[engine.set];
  set.block += set.used;  // one that used none hands nothing on: the next follows the one before
  set.used = false;
  engine.live = engine.threads;
  engine.waiting = 0;
  for (auto& warp : engine.meetings)
    for (Rendezvous& meeting : warp) meeting.arrived = 0;
  begin_shared();
  for (int i = 0; i < engine.threads; ++i) {
    Lane& lane = engine.lanes[i];
    const unsigned id = i;
    lane.thread = {id % block.x, id / block.x % block.y, id / (block.x * block.y)};
    lane.block = index;
    lane.id = i;
    lane.warp = i / 32;
    lane.lane = i % 32;
    engine.states[i] = kReady;
    engine.order[i] = engine.schedule == kReverse ? engine.threads - 1 - i : i;
    lane.site = nullptr;
    lane.first = lane.last = lane.group = 0;
    lane.shares = false;
    lane.fiber = &engine.sets[engine.set].fibers[i];
    prepare(*lane.fiber, body);
  }
}

static void run_block() {
  begin_round();
  change(scheduler, next_turn());
  if (engine.live && !engine.failure) note("deadlock, no thread can run");
}

// What the driver would say, or nullptr.
static const char* limits(dim3 grid, dim3 block, size_t dynamic_shared) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "cudaErrorInvalidConfiguration";
  return dynamic_shared > shared_limit() ? "cudaErrorInvalidValue" : nullptr;
}

// The kernel of a launch as translated from PTX, where the program has such kernels: then all of them must be.
static const char* translate(const void* kernel, dim3 block) {
  engine.from_ptx = any_translations();
  if (!engine.from_ptx) return nullptr;
  const Translation* const found = translation_of(kernel);
  if (!found) return keep((std::string(kernel_name(kernel)) + " is not among the kernels from PTX").c_str());
  if (block.x * block.y * block.z > found->max_threads)
    return keep((std::string("cudaErrorInvalidValue: __launch_bounds__ of ") + kernel_name(kernel)).c_str());
  engine.thread = found->thread;
  return nullptr;
}

const char* run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void (*thread)(const void*),
                const void* arguments, const void* parameters) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (const char* error = limits(grid, block, dynamic_shared)) return error;
  engine.thread = thread;
  if (const char* error = translate(kernel, block)) return error;
  engine.schedule = config().schedule;
  engine.kernel = kernel;
  engine.arguments = engine.from_ptx ? parameters : arguments;
  engine.dynamic_shared = dynamic_shared;
  engine.static_shared = 0;
  engine.failure = nullptr;
  ++engine.launch;
  engine.random = (config().seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  engine.threads = block.x * block.y * block.z;
  block_size = block;
  grid_size = grid;
  for (Set& set : engine.sets)
    for (int i = 0; i < engine.threads; ++i) make(set.fibers[i], i);
  enter_launch();
  release(engine.begin_tag);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  engine.set = 0;
  std::vector<uint32_t> order;
  if (engine.schedule >= kRandomThreads) {
    order.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = static_cast<uint32_t>(i);
    for (uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
  }
  for (uint64_t i = 0; i < blocks && !engine.failure; ++i) {
    const uint64_t b = order.size() ? order[i] : engine.schedule == kReverse ? blocks - 1 - i : i;
    if (kSets == 2 && (i == 1 || (i > 1 && next_random() % 4 != 0))) engine.set ^= 1;
    begin_block(block, {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                        static_cast<unsigned>(b / grid.x / grid.y)});
    run_block();
  }
  current = nullptr;
  if (engine.failure)
    for (Set& set : engine.sets)
      for (Fiber& fiber : set.fibers) abandon(fiber);
  for (Set& set : engine.sets)
    for (int i = 0; i < engine.threads; ++i)
      if (set.fibers[i].launch == engine.launch) leave_launch(set.fibers[i], engine.end_tag);
  acquire(engine.end_tag);
  if (config().log) launches.push_back({kernel_name(kernel), grid, block, dynamic_shared, engine.static_shared, engine.from_ptx});
  return engine.failure;
}

}  // namespace cuda_emulator
