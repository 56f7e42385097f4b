// Rows by teams of eight neighbouring lanes, in the order of operations of cpu/rows.h, so that norms and gradients have
// the CPU's bits:
//   lane j of a team has the numbers j, j + 8, ... of its row: a warp reads 32 bytes of each of four rows at a time
//   chain   one sum over the row, number by number: each lane hands its own around in turn
//   dot     eight partial sums, one a lane, then those 4, 2 and 1 apart, then the numbers that 8 leaves over
// All lanes of a warp come here together and with the same n: teams beyond the last row repeat it and write nothing.
#pragma once
#include "cuda/gpu.h"

TOKENFLOW_BEGIN

constexpr int kTeam = 8;
constexpr int kTeamThreads = 256;
constexpr int kTeamRows = kTeamThreads / kTeam;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMostRows = int64_t{1} << 31;  // of all groups, and codes: they are counted in 32 bits

static inline dim3 blocks_for(int64_t items, int64_t each) {
  return dim3(static_cast<unsigned>((items + each - 1) / each));
}

static __device__ inline int lane_of_team() { return static_cast<int>(threadIdx.x) % kTeam; }
static __device__ inline int team_of_block() { return static_cast<int>(threadIdx.x) / kTeam; }

// a / b for a >= 0, b > 0; the short way where both have 32 bits.
static __device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  return a / b;
}

// Of n G + g.
static __device__ inline int64_t group_of(int64_t row, int64_t groups) {
  return static_cast<unsigned>(row) % static_cast<unsigned>(groups);
}

// Whether any lane of the team says so.
static __device__ inline bool any_of_team(bool mine) {
  const unsigned votes = __ballot_sync(kAllLanes, mine);
  return (votes >> (threadIdx.x % 32 / kTeam * kTeam) & 0xffu) != 0;
}

// sum = add(sum, number) over at(0) .. at(n - 1), from 0 on; zeros that follow must change nothing.
template <class At, class Add>
static __device__ inline float team_chain(int64_t n, At at, Add add) {
  float sum = 0;
  for (int64_t first = 0; first < n; first += kTeam) {
    const int64_t d = first + lane_of_team();
    const float mine = d < n ? at(d) : 0;
#pragma unroll
    for (int j = 0; j < kTeam; ++j) sum = add(sum, __shfl_sync(kAllLanes, mine, j, kTeam));
  }
  return sum;
}

// The canonical norm of at(0) .. at(n - 1), floored.
template <class At>
static __device__ inline float team_norm(int64_t n, At at) {
  const float norm = sqrtf(team_chain(n, at, [](float sum, float v) { return fmaf(v, v, sum); }));
  return norm > 1e-12f ? norm : 1e-12f;
}

// sum over d of the products at(d).
template <class At>
static __device__ inline float team_dot(int64_t n, At at) {
  const int64_t whole = n / kTeam * kTeam;
  float sum = 0;
  for (int64_t d = lane_of_team(); d < whole; d += kTeam) sum += at(d);
#pragma unroll
  for (int apart = kTeam / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart, kTeam);
  return sum +
         team_chain(n - whole, [&](int64_t d) { return at(whole + d); }, [](float rest, float v) { return rest + v; });
}

TOKENFLOW_END
