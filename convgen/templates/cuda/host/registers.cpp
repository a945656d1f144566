// Registers that the warps of a block trade (setmaxnreg).
//
// A block starts with as many for each thread as the register file has for all threads of the
// kernel's launch bound, as ptxas deals them out where one block is to fit on a multiprocessor. A
// claim waits until so many are free. What is never released, no claim gets: on a GPU the warp waits
// for ever.
#include "pipeline.h"

#include <algorithm>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int FILE_REGISTERS = 65536, MOST_REGISTERS = 256, UNIT = 8;  // of a thread: whole units

std::string name_of(int count, bool claims) {
  return std::string("warpgroup_reg_") + (claims ? "alloc<" : "dealloc<") + std::to_string(count) + ">";
}

// Lets claims go on for which there are enough, in the order of their arrival.
void grant() {
  Registers& registers = worker->registers;
  for (auto claim = registers.claims.begin(); claim != registers.claims.end();) {
    int& own = registers.of_warp[claim->warp];
    if (claim->count - own > registers.free) {
      ++claim;
      continue;
    }
    registers.free -= claim->count - own;
    own = claim->count;
    for (size_t lane = 0; lane < LANES; ++lane) {
      Fiber& fiber = worker->fibers[claim->warp * LANES + lane];
      if (fiber.state == State::at_registers) fiber.state = State::ready;
    }
    claim = registers.claims.erase(claim);
  }
}

// All warps of a group trade the same.
std::string record(size_t warp, int count, bool claims) {
  GroupTrades& group = worker->registers.groups[warp / WARPS];
  const size_t index = group.count[warp % WARPS]++;
  if ((warp / WARPS + 1) * WARPS * LANES > worker->fibers.size()) {
    return " by a group of fewer than four warps";
  }
  if (index == group.trades.size()) group.trades.push_back({count, claims});
  const auto& [first_count, first_claims] = group.trades[index];
  if (first_count == count && first_claims == claims) return "";
  return " unlike the rest of its warpgroup, which is in " +
         name_of(first_count, first_claims);
}

}  // namespace

void start_registers() {
  Registers& registers = worker->registers;
  const size_t warps = (worker->fibers.size() + LANES - 1) / LANES;
  const int bound = worker->run.launch.bound;
  const int threads = bound > 0 ? bound : static_cast<int>(warps * LANES);
  registers.started = std::min(MOST_REGISTERS, FILE_REGISTERS / threads / UNIT * UNIT);
  registers.free = 0;
  registers.of_warp.assign(warps, registers.started);
  registers.groups.assign((warps + WARPS - 1) / WARPS, {});
  registers.claims.clear();
}

void trade_registers(int count, bool claims, Site site) {
  worker->warp_collective(claims ? WarpOp::claim : WarpOp::release, 0xffffffffu,
                          static_cast<uint64_t>(count), 0, site);
  // The last lane to come has traded for all; a claim may have to wait.
  Fiber& fiber = *worker->running;
  if (worker->registers.of_warp[static_cast<size_t>(fiber.rank) / LANES] == count) return;
  fiber.state = State::at_registers;
  fiber.waits_for = nullptr;
  fiber.mask = static_cast<unsigned>(count);
  worker->suspend();
}

void trade_by_warp(const std::vector<Fiber*>& lanes) {
  const Fiber& first = *lanes.front();
  const bool claims = first.op == WarpOp::claim;
  const int count = static_cast<int>(first.value);
  const size_t warp = static_cast<size_t>(first.rank) / LANES;
  auto refuse = [&](const Fiber& lane, const std::string& why) {
    worker->fault(lane, name_of(count, claims) + " (" + text(lane.site) + ")" + why);
  };
  for (const Fiber* lane : lanes) {
    if (lane->value != first.value) refuse(*lane, ", and another number by a lane of its warp");
  }
  if (const std::string why = record(warp, count, claims); !why.empty()) refuse(first, why);
  Registers& registers = worker->registers;
  int& own = registers.of_warp[warp];
  if (claims ? count < own : count > own) {
    refuse(first, " by a thread that has " + std::to_string(own));
  }
  if (claims) {
    registers.claims.push_back({warp, count});
  } else {
    registers.free += own - count;
    own = count;
  }
  grant();
}

std::string describe_claim(const Fiber& fiber) {
  const Registers& registers = worker->registers;
  const int count = static_cast<int>(fiber.mask);
  const int own = registers.of_warp[static_cast<size_t>(fiber.rank) / LANES];
  return name_of(count, true) + " with " + std::to_string(own) + " registers for each, while " +
         std::to_string(registers.free * static_cast<int>(LANES)) +
         " are free of the block's " + std::to_string(registers.started) + " a thread";
}

void end_registers() {
  const Registers& registers = worker->registers;
  for (size_t warp = 0; warp < registers.of_warp.size(); ++warp) {
    const GroupTrades& group = registers.groups[warp / WARPS];
    if (group.count[warp % WARPS] == group.trades.size()) continue;
    const auto& [count, claims] = group.trades[group.count[warp % WARPS]];
    return worker->fault(worker->fibers[warp * LANES],
                         name_of(count, claims) +
                             " by other warps of its group and not by its own: the block ended");
  }
}

}  // namespace host
}  // namespace convgen
