// What the lanes of a warp do together: barriers, shuffles, votes, and products.
#include <stdio.h>

#include <algorithm>

#include "state.h"

namespace convgen {
namespace host {
const char* op_name(WarpOp op) {
  switch (op) {
    case WarpOp::barrier:
      return "__syncwarp";
    case WarpOp::shuffle:
      return "a warp shuffle";
    case WarpOp::multiply:
      return "mma.sync";
    case WarpOp::issue:
      return "wgmma";
    case WarpOp::group_multiply:
      return "wgmma_wait";
    case WarpOp::matrices:
      return "store_matrices";
    case WarpOp::load_matrices:
      return "load_matrices";
    case WarpOp::transpose_matrix:
      return "transpose_matrix";
    case WarpOp::claim:
      return "warpgroup_reg_alloc";
    case WarpOp::release:
      return "warpgroup_reg_dealloc";
    default:
      return "a warp vote";
  }
}

std::string hex(unsigned mask) {
  char buffer[16];
  snprintf(buffer, sizeof buffer, "0x%08x", mask);
  return buffer;
}

uint64_t Worker::warp_collective(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Fiber& fiber = *running;
  if (!(mask >> (fiber.rank % LANES) & 1)) {
    fault(fiber, std::string(op_name(op)) + " (" + text(site) + ") with mask " + hex(mask) +
                     ", which lacks the caller's own lane");
  }
  fiber.site = site;
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.state = State::in_warp;
  if (!complete_warp(fiber)) suspend();
  return fiber.value;
}

// Lets the lanes of a collective go on if all of them are there.
bool Worker::complete_warp(const Fiber& waiting) {
  const size_t first = static_cast<size_t>(waiting.rank) / LANES * LANES;
  std::vector<Fiber*> lanes;
  for (size_t lane = 0; lane < LANES && first + lane < fibers.size(); ++lane) {
    Fiber& other = fibers[first + lane];
    if (!(waiting.mask >> lane & 1) || other.state == State::done) continue;
    if (other.state != State::in_warp) return false;
    if (other.mask != waiting.mask || other.op != waiting.op) {
      if (!(other.mask >> (waiting.rank % LANES) & 1)) return false;  // it has others to wait for
      fault(waiting, std::string("divergent warp collective: it is in ") + op_name(waiting.op) +
                         " with mask " + hex(waiting.mask) + " (" + text(waiting.site) +
                         "), but thread " + text(other.thread) + " in " + op_name(other.op) +
                         " with mask " + hex(other.mask) + " (" + text(other.site) + ")");
      return true;
    }
    lanes.push_back(&other);
  }
  finish_collective(lanes);
  return true;
}

void Worker::finish_collective(std::vector<Fiber*>& lanes) {
  const Fiber& any = *lanes.front();
  if (any.op >= WarpOp::multiply) {
    for (const Fiber* lane : lanes) {
      if (lanes.size() == LANES && lane->source == any.source) continue;
      return fault(*lane, std::string(op_name(any.op)) + " (" + text(lane->site) + ") with " +
                              (lanes.size() < LANES ? "lanes missing from its warp"
                                                    : "another type than the rest of its warp"));
    }
    if (any.op == WarpOp::multiply) multiply_warp(lanes);
    if (any.op == WarpOp::issue) issue_by_warp(lanes);
    if (any.op == WarpOp::group_multiply) multiply_by_warp(lanes);
    if (any.op == WarpOp::matrices) store_matrices_by_warp(lanes);
    if (any.op == WarpOp::load_matrices) load_matrices_by_warp(lanes);
    if (any.op == WarpOp::transpose_matrix) transpose_by_warp(lanes);
    if (any.op >= WarpOp::claim) trade_by_warp(lanes);
  }
  uint64_t values[LANES];
  unsigned present = 0, votes = 0;
  for (const Fiber* lane : lanes) {
    const int index = lane->rank % LANES;
    values[index] = lane->value;
    present |= 1u << index;
    votes |= lane->value ? 1u << index : 0u;
  }
  for (Fiber* lane : lanes) {
    lane->state = State::ready;
    if (any.op == WarpOp::ballot) lane->value = votes;
    if (any.op == WarpOp::shuffle) {
      if (!(present >> lane->source & 1)) {
        fault(*lane, "a warp shuffle (" + text(lane->site) + ") from lane " +
                         std::to_string(lane->source) + ", which takes no part (mask " +
                         hex(lane->mask) + ")");
        return;
      }
      lane->value = values[lane->source];
    }
  }
  // Shuffles and votes order no memory accesses: only __syncwarp does.
  if (any.op == WarpOp::barrier) check::barrier(lanes);
}

void warp_barrier(unsigned mask, Site site) {
  worker->warp_collective(WarpOp::barrier, mask, 0, 0, site);
}

uint64_t warp_shuffle(unsigned mask, uint64_t value, int source_lane, Site site) {
  return worker->warp_collective(WarpOp::shuffle, mask, value, source_lane, site);
}

unsigned warp_ballot(unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(
      worker->warp_collective(WarpOp::ballot, mask, predicate ? 1 : 0, 0, site));
}

}  // namespace host
}  // namespace convgen
