// Warp operations: exactly the lanes of the mask meet, at one place of the source, for one operation.
#include "engine.h"

namespace cuda_emulator {

constexpr uint64_t kPoison = 0xbadbadbadbadbadbull;  // of a lane that takes no part: undefined on the GPU

static const char* const kNames[] = {"__shfl_sync",      "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
                                     "__ballot_sync",    "__any_sync",        "__all_sync",        "__syncwarp",
                                     "__match_any_sync", "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                     "mma.sync"};

static uint64_t shuffled(const Lane* warp, const Lane& lane, WarpOp op, unsigned mask) {
  const int base = lane.lane & ~(lane.width - 1), end = base + lane.width;
  int from = lane.lane;
  if (op == kShuffle) from = base + (lane.from & (lane.width - 1));
  if (op == kUp && lane.lane - lane.from >= base) from = lane.lane - lane.from;
  if (op == kDown && lane.lane + lane.from < end) from = lane.lane + lane.from;
  if (op == kXor && (lane.lane ^ lane.from) < end) from = lane.lane ^ lane.from;
  return mask >> from & 1 ? warp[from].value : kPoison;
}

// The same result for every lane.
static uint64_t agreed(const Lane* warp, WarpOp op, unsigned mask) {
  uint64_t ballot = 0, sum = 0, low = ~0u, high = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint64_t value = warp[i].value;
    ballot |= static_cast<uint64_t>(value != 0) << i;
    sum = static_cast<uint32_t>(sum + value);
    if (value < low) low = value;
    if (value > high) high = value;
  }
  switch (op) {
    case kBallot:
      return ballot;
    case kAny:
      return ballot != 0;
    case kAll:
      return ballot == mask;
    case kAddAll:
      return sum;
    case kMinAll:
      return low;
    default:
      return high;
  }
}

static uint64_t alike(const Lane* warp, const Lane& lane, unsigned mask) {
  uint64_t lanes = 0;
  for (int j = 0; j < 32; ++j)
    if ((mask >> j & 1) && warp[j].value == lane.value) lanes |= 1u << j;
  return lanes;
}

static void complete(Lane* warp, WarpOp op, unsigned mask) {
  if (op == kMma) multiply(warp);
  const uint64_t result = op <= kXor || op == kSync || op == kMma ? 0 : agreed(warp, op, mask);
  for (unsigned left = mask; left; left &= left - 1) {
    Lane& lane = warp[__builtin_ctz(left)];
    lane.result = op <= kXor ? shuffled(warp, lane, op, mask) : op == kMatch ? alike(warp, lane, mask) : result;
    state_of(lane) = kReady;
  }
}

// The meeting that this lane joins or opens.
static Rendezvous& meeting_of(const Lane& lane, const Lane* warp, WarpOp op, unsigned mask, const char* site) {
  Rendezvous* free = nullptr;
  for (Rendezvous& meeting : engine.meetings[lane.warp]) {
    if (!meeting.arrived) {
      free = &meeting;
    } else if (meeting.mask & mask) {
      if (meeting.mask != mask || meeting.op != op || (meeting.site != site && strcmp(meeting.site, site)))
        fail("warp %d diverged: lane %d is at %s of %s with mask 0x%x, others wait at %s of %s with mask 0x%x",
             lane.warp, lane.lane, kNames[op], site, mask, kNames[meeting.op], meeting.site, meeting.mask);
      return meeting;
    }
  }
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && state_of(warp[i]) == kExited)
      fail("thread %d: %s of %s waits for lane %d, which has exited", lane.id, kNames[op], site, i);
  if (!free) fail("thread %d: %s of %s: more than %d groups of one warp wait", lane.id, kNames[op], site, kMaxGroups);
  *free = {mask, 0, op, site, engine.meeting_count[lane.warp]++ % 8};
  return *free;
}

uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int from, int width, const char* site) {
  Lane& lane = self();
  Lane* const warp = &engine.lanes[lane.warp * 32];
  const int present = engine.threads - lane.warp * 32;
  lane.site = site;
  if (!(mask >> lane.lane & 1))
    fail("thread %d: %s of %s: mask 0x%x lacks its own lane", lane.id, kNames[op], site, mask);
  if (present < 32 && mask >> present)
    fail("thread %d: %s of %s: mask 0x%x names lanes that do not exist, the warp has %d", lane.id, kNames[op], site,
         mask, present);
  lane.value = value;
  lane.from = from;
  lane.width = width;
  Rendezvous& meeting = meeting_of(lane, warp, op, mask, site);
  char& tag = engine.warp_tags[lane.warp][meeting.tag];
  if (op == kSync) release(tag);  // a shuffle orders no memory
  state_of(lane) = kInWarp;
  meeting.arrived |= 1u << lane.lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    complete(warp, op, mask);
  }
  if (state_of(lane) != kReady || random_threads()) pause();
  if (op == kSync) acquire(tag);
  return lane.result;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const char* site) {
  Lane& lane = self();
  memcpy(lane.a, a, sizeof lane.a);
  memcpy(lane.b, b, sizeof lane.b);
  memcpy(lane.d, d, sizeof lane.d);
  warp_op(kMma, ~0u, 0, 0, 32, site);
  memcpy(d, lane.d, sizeof lane.d);
}

}  // namespace cuda_emulator
