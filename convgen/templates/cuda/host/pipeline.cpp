// Named barriers, mbarriers and bulk copies.
//
// A bulk copy lands as late as it may: when no thread can go on without it. Of several, the oldest
// does, or any (see Worker::draw): a GPU promises no order.
#include "pipeline.h"

#include <string.h>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int NAMED_BARRIERS = 16;
constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // that a phase of an mbarrier can count
constexpr int MOST_ARRIVALS = (1 << 20) - 1;

Mbarrier& find(uint64_t* address, const char* what, Site site) {
  auto found = worker->mbarriers.find(address);
  if (found == worker->mbarriers.end()) {
    worker->fault(*worker->running,
                  std::string(what) + " (" + text(site) +
                      ") on memory that is no mbarrier: " + shared_place(address));
  }
  check::use_barrier(*worker->running, address, site);
  return found->second;
}

void end_phase_if_complete(uint64_t* address, Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  check::complete(address);
  for (Fiber& fiber : worker->fibers) {
    if (fiber.state != State::at_mbarrier || fiber.waits_for != address) continue;
    if (fiber.mask == (barrier.phase & 1)) continue;
    fiber.state = State::ready;
    check::acquire(fiber, address);
  }
}

}  // namespace

void named_barrier(int id, int threads, bool wait, Site site) {
  Fiber& fiber = *worker->running;
  const char* name = wait ? "named_barrier_sync" : "named_barrier_arrive";
  if (id < 1 || id >= NAMED_BARRIERS || threads <= 0 || threads % 32 != 0 ||
      static_cast<size_t>(threads) > worker->fibers.size()) {
    worker->fault(fiber, std::string(name) + "(" + std::to_string(id) + ", " +
                             std::to_string(threads) + ") (" + text(site) +
                             "): barriers are 1 to 15, threads whole warps of the block");
  }
  NamedBarrier& barrier = worker->named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    worker->fault(fiber, std::string(name) + " (" + text(site) + ") expects " +
                             std::to_string(threads) + " threads at barrier " + std::to_string(id) +
                             ", others expect " + std::to_string(barrier.threads));
  }
  barrier.threads = threads;
  check::release(fiber, &barrier);
  fiber.site = site;
  fiber.waits_for = &barrier;
  if (wait) fiber.state = State::at_named;
  if (++barrier.arrived < threads) {
    if (wait) worker->suspend();
    return;
  }
  barrier.arrived = 0;
  check::complete(&barrier);
  for (Fiber& other : worker->fibers) {
    if (other.state != State::at_named || other.waits_for != &barrier) continue;
    other.state = State::ready;
    check::acquire(other, &barrier);
  }
}

void mbarrier_init(uint64_t* address, int arrivals, Site site) {
  Fiber& fiber = *worker->running;
  if (arrivals <= 0 || arrivals > MOST_ARRIVALS || reinterpret_cast<uintptr_t>(address) % 8 != 0) {
    worker->fault(fiber, "mbarrier_init (" + text(site) + ") for " + std::to_string(arrivals) +
                             " arrivals at " + shared_place(address) +
                             ": 1 to 1048575, at a multiple of 8 bytes");
  }
  check::init_barrier(fiber, address, site);
  worker->mbarriers[address] = {arrivals, arrivals, 0, 0, &fiber, false};
}

void mbarrier_fence() {
  for (auto& [address, barrier] : worker->mbarriers) {
    if (barrier.owner == worker->running) barrier.is_fenced = true;
  }
}

void bulk_fence() { check::fence(*worker->running); }

void mbarrier_arrive(uint64_t* address, int bytes, Site site) {
  Fiber& fiber = *worker->running;
  Mbarrier& barrier = find(address, "mbarrier_arrive", site);
  if (barrier.pending == 0) {
    worker->fault(fiber, "mbarrier_arrive (" + text(site) + ") beyond the " +
                             std::to_string(barrier.arrivals) + " arrivals of phase " +
                             std::to_string(barrier.phase) + " of the mbarrier at " +
                             shared_place(address));
  }
  check::release(fiber, address);
  --barrier.pending;
  barrier.bytes += bytes;
  if (barrier.bytes > MOST_BYTES) {
    worker->fault(fiber, "mbarrier_arrive_expect (" + text(site) + ") makes it " +
                             std::to_string(barrier.bytes) +
                             " bytes that the phase waits for: at most " +
                             std::to_string(MOST_BYTES));
  }
  end_phase_if_complete(address, barrier);
}

void mbarrier_wait(uint64_t* address, int parity, Site site) {
  Fiber& fiber = *worker->running;
  Mbarrier& barrier = find(address, "mbarrier_wait", site);
  if ((barrier.phase & 1) != static_cast<unsigned>(parity)) {
    check::acquire(fiber, address);
    return;
  }
  fiber.site = site;
  fiber.waits_for = address;
  fiber.mask = static_cast<unsigned>(parity);
  fiber.state = State::at_mbarrier;
  worker->suspend();
}

void bulk_copy(void* to, const void* from, int bytes, uint64_t* address, Site site) {
  Fiber& fiber = *worker->running;
  require_copies_barrier(address, "bulk_copy", site);
  if (bytes <= 0 || (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
                     static_cast<uintptr_t>(bytes)) %
                            16 !=
                        0) {
    worker->fault(fiber, "unaligned bulk copy of " + std::to_string(bytes) + " bytes (" +
                             text(site) + "): size and addresses are multiples of 16");
  }
  issue_bulk({{to, from, bytes, 0}, address, &fiber, site, false, {}});
}

void issue_bulk(const BulkCopy& bulk) {
  check::issue_copy(*bulk.issuer, bulk.copy, true, bulk.site);
  memset(bulk.copy.to, 0xff, static_cast<size_t>(bulk.copy.bytes));
  worker->bulk_copies.push_back(bulk);
}

void require_copies_barrier(uint64_t* address, const char* what, Site site) {
  if (find(address, what, site).is_fenced) return;
  worker->fault(*worker->running, std::string(what) + " (" + text(site) + ") with the mbarrier at " +
                                      shared_place(address) +
                                      ", which its initializer has not made known: "
                                      "mbarrier_fence() is missing");
}

bool land_bulk_copy() {
  if (worker->bulk_copies.empty()) return false;
  const auto which = worker->bulk_copies.begin() +
                     static_cast<ptrdiff_t>(worker->draw(worker->bulk_copies.size()));
  const BulkCopy bulk = *which;
  worker->bulk_copies.erase(which);
  check::land_copy(*bulk.issuer, bulk.copy, bulk.barrier);
  if (bulk.is_box) {
    fill_box(bulk.box);
  } else {
    memcpy(bulk.copy.to, bulk.copy.from, static_cast<size_t>(bulk.copy.bytes));
  }
  Mbarrier& barrier = worker->mbarriers[bulk.barrier];
  barrier.bytes -= bulk.copy.bytes;
  // The phase cannot have ended before: its bytes were expected, or its arrival is still to come.
  end_phase_if_complete(bulk.barrier, barrier);
  return true;
}

std::string describe_wait(const Fiber& fiber) {
  if (fiber.state == State::at_named) {
    const NamedBarrier& barrier = *static_cast<const NamedBarrier*>(fiber.waits_for);
    return "named barrier " + std::to_string(&barrier - worker->named) + ", where " +
           std::to_string(barrier.arrived) + " of " + std::to_string(barrier.threads) +
           " threads have come";
  }
  uint64_t* address = static_cast<uint64_t*>(fiber.waits_for);
  const Mbarrier& barrier = worker->mbarriers[address];
  return "mbarrier_wait for parity " + std::to_string(fiber.mask) + " of the mbarrier at " +
         shared_place(address) + ", in whose phase " + std::to_string(barrier.phase) + " " +
         std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) +
         " bytes are missing";
}

bool is_shared(const void* address, size_t bytes) {
  const char* at = static_cast<const char*>(address);
  const char* dynamic = reinterpret_cast<const char*>(worker->dynamic);
  const size_t size = static_cast<size_t>(worker->run.launch.shared_bytes);
  if (at >= dynamic && at + bytes <= dynamic + size) return true;
  for (const SharedArray& array : shared_arrays()) {
    const char* low = shared_anchor() + array.offset;
    if (at >= low && at + bytes <= low + array.bytes) return true;
  }
  return false;
}

std::string shared_place(const void* address) {
  const char* at = static_cast<const char*>(address);
  const char* dynamic = reinterpret_cast<const char*>(worker->dynamic);
  if (at >= dynamic && at < dynamic + worker->run.launch.shared_bytes) {
    return "offset " + std::to_string(at - dynamic) + " of dynamic shared memory";
  }
  for (const SharedArray& array : shared_arrays()) {
    const char* low = shared_anchor() + array.offset;
    if (at >= low && at < low + array.bytes) {
      return "offset " + std::to_string(at - low) + " of shared array " + array.name;
    }
  }
  return "an address outside of shared memory";
}

}  // namespace host
}  // namespace convgen
