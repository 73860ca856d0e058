// Groups the accesses of lanes into warp requests: what a coalescer and the shared-memory banks would see.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>

#include "device.h"
#include "state.h"
#include "trace_access.h"

namespace emu {
namespace {

struct Instruction {
  const void* pc;
  Access access;
  Space space;
  int bytes;
  bool operator<(const Instruction& o) const {
    return std::tie(pc, access, space, bytes) < std::tie(o.pc, o.access, o.space, o.bytes);
  }
};

struct LaneAddress {
  int lane;
  uintptr_t address;
};

// One warp's n-th execution of an instruction. Lanes are matched by how often each has executed it.
using Requests = std::vector<std::vector<LaneAddress>>;
using WarpTrace = std::map<Instruction, std::pair<Requests, size_t[32]>>;

std::unordered_map<const Warp*, WarpTrace> open_traces;
std::map<Instruction, Traffic> totals;
std::vector<Traffic> reported;
std::vector<Finding> findings;

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

void count_global(const std::vector<LaneAddress>& lanes, int bytes, Traffic& total) {
  std::set<uintptr_t> sectors, starts;
  for (const LaneAddress& lane : lanes) {
    starts.insert(lane.address);
    for (uintptr_t s = lane.address / 32; s <= (lane.address + bytes - 1) / 32; s++) sectors.insert(s);
  }
  total.sectors += sectors.size();
  total.ideal_sectors += divide_up(starts.size() * bytes, 32);
}

// 32 banks of 4 bytes. 8-byte accesses are served by half warp, 16-byte ones by quarter warp. Lanes that read one word
// share a pass; atomics on one word do not.
void count_shared(const std::vector<LaneAddress>& lanes, int bytes, Access access, Traffic& total) {
  const int lanes_per_phase = std::max(1, 128 / std::max(bytes, 4));
  for (int first = 0; first < 32; first += lanes_per_phase) {
    std::map<uintptr_t, std::multiset<uintptr_t>> words_of_bank;
    std::set<uintptr_t> words;
    for (const LaneAddress& lane : lanes) {
      if (lane.lane < first || lane.lane >= first + lanes_per_phase) continue;
      for (uintptr_t w = lane.address / 4; w <= (lane.address + bytes - 1) / 4; w++) {
        words.insert(w);
        auto& bank = words_of_bank[w % 32];
        if (access == Access::atomic || !bank.count(w)) bank.insert(w);
      }
    }
    size_t passes = 0;
    for (const auto& [bank, in_bank] : words_of_bank) passes = std::max(passes, in_bank.size());
    total.passes += passes;
    total.ideal_passes += divide_up(words.size(), 32);
  }
}

void check_written(const Place& place, size_t bytes, const void* pc) {
  if (!place.written) return;
  for (size_t i = 0; i < bytes; i++) {
    if ((*place.written)[place.offset + i]) continue;
    for (const Finding& finding : findings)
      if (finding.at[0] == pc) return;
    findings.push_back(make_finding("uninitialised-read", {pc}, "%s reads %s memory that nothing has written",
                                    name_of(running).text, place.space == Space::shared ? "shared" : "global"));
    return;
  }
}

}  // namespace

void trace(const void* p, size_t bytes, Access access, const void* pc) {
  if (!running) return;
  const Place place = place_of(p);
  if (place.space == Space::other) return;
  if (place.written && place.offset + bytes > place.written->size()) return;
  if (access != Access::store) check_written(place, bytes, pc);
  for (size_t i = 0; access != Access::load && place.written && i < bytes; i++) (*place.written)[place.offset + i] = true;

  auto& [requests, executed] = open_traces[running->warp][{pc, access, place.space, static_cast<int>(bytes)}];
  const int lane = running->context.lane;
  const size_t n = executed[lane]++;
  if (n == requests.size()) requests.emplace_back();
  requests[n].push_back({lane, reinterpret_cast<uintptr_t>(p)});
}

void trace_load(const void* p, size_t bytes, const void* pc) { trace(p, bytes, Access::load, pc); }
void trace_store(const void* p, size_t bytes, const void* pc) { trace(p, bytes, Access::store, pc); }
void trace_atomic(const void* p, size_t bytes, const void* pc) { trace(p, bytes, Access::atomic, pc); }

void trace_block_ends(const Block* block) {
  for (const Warp& warp : block->warps) {
    const auto found = open_traces.find(&warp);
    if (found == open_traces.end()) continue;
    for (const auto& [instruction, trace] : found->second) {
      const auto& [pc, access, space, bytes] = instruction;
      Traffic& total = totals.try_emplace(instruction, Traffic{pc, static_cast<int>(access), static_cast<int>(space), bytes}).first->second;
      for (const auto& lanes : trace.first) {
        total.requests++;
        total.lanes += lanes.size();
        if (space == Space::global) count_global(lanes, bytes, total);
        else count_shared(lanes, bytes, access, total);
      }
    }
    open_traces.erase(found);
  }
}

const std::vector<Traffic>& traffic() {
  reported.clear();
  for (const auto& [instruction, total] : totals) reported.push_back(total);
  return reported;
}

const std::vector<Finding>& trace_findings() { return findings; }

void clear_trace() {
  open_traces.clear();
  totals.clear();
  findings.clear();
}

}  // namespace emu
