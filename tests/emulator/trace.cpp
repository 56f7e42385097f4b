// A model of what a GPU does with the requests of kernels from PTX, counted where they were compiled with
// -DCUDA_EMULATOR_TRACE: the lanes of a warp that come to an instruction for the n-th time of a block are one request.
//   global   32-byte sectors that a request touches, and the fewest that could hold its bytes
//   shared   wavefronts: lanes go in groups of at most 128 bytes; a group takes as many as the words of one bank, of 32
// Warps that diverge may be split otherwise by the GPU, and its caches may join requests: it is a model.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "ptx.h"

namespace cuda_emulator {

struct Access {
  uint64_t address;
  int bytes;
};
struct Place {
  const char* site;
  bool shared;
  bool operator<(const Place& other) const {
    return std::make_pair(site, shared) < std::make_pair(other.site, other.shared);
  }
};

static std::map<Place, std::vector<std::vector<Access>>> visits;  // of the block that runs, by thread
static std::map<std::string, Traffic> counted;
static uint64_t block_number = ~0ull;
static const void* kernel_of_visits;

static void count_request(Traffic& traffic, bool shared, const std::vector<Access>& lanes) {
  std::set<uint64_t> pieces;
  uint64_t bytes = 0;
  if (!shared) {
    std::set<uint64_t> addresses;
    for (const Access& a : lanes) {
      if (addresses.insert(a.address).second) bytes += a.bytes;
      for (uint64_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; ++s) pieces.insert(s);
    }
    ++traffic.requests;
    traffic.sectors += pieces.size();
    traffic.least_sectors += (bytes + 31) / 32;
    return;
  }
  ++traffic.shared_requests;
  const size_t group = std::max(1, 128 / std::max(4, lanes[0].bytes));
  for (size_t first = 0; first < lanes.size(); first += group) {
    std::map<uint64_t, std::set<uint64_t>> banks;
    for (size_t i = first; i < std::min(lanes.size(), first + group); ++i)
      for (uint64_t word = lanes[i].address / 4; word <= (lanes[i].address + lanes[i].bytes - 1) / 4; ++word)
        banks[word % 32].insert(word);
    size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.second.size());
    traffic.wavefronts += most;
    ++traffic.least_wavefronts;
  }
}

static void count_block() {
  if (visits.empty()) return;
  Traffic& traffic = counted[kernel_symbol(kernel_of_visits).file + ": " + kernel_name(kernel_of_visits)];
  for (const auto& place : visits) {
    const auto& threads = place.second;
    for (size_t warp = 0; warp < threads.size(); warp += 32) {
      for (size_t visit = 0;; ++visit) {
        std::vector<Access> lanes;
        for (size_t t = warp; t < std::min(threads.size(), warp + 32); ++t)
          if (visit < threads[t].size()) lanes.push_back(threads[t][visit]);
        if (lanes.empty()) break;
        count_request(traffic, place.first.shared, lanes);
      }
    }
  }
  visits.clear();
}

void trace(const char* site, bool shared, uint64_t address, int bytes) {
  const uint64_t number = static_cast<uint64_t>(engine.launch) << 40 ^ engine.sets[engine.set].block;
  if (number != block_number) count_block();
  block_number = number;
  kernel_of_visits = engine.kernel;
  auto& threads = visits[{site, shared}];
  threads.resize(engine.threads);
  threads[self().id].push_back({address, bytes});
}

std::map<std::string, Traffic> take_traffic() {
  count_block();
  return std::exchange(counted, {});
}

}  // namespace cuda_emulator
