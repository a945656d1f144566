// Checks of what goes on beside the threads: copies under way, barriers in shared memory, and the
// asynchronous proxy, by which TMA stores and wgmma read shared memory (see checker.h).
#include <algorithm>

#include "checker.h"

namespace convgen {
namespace host {

namespace {

// What is reported meanwhile names this place in the source.
class At {
 public:
  At(const std::string*& site, const Site& at) : site_(site), text_(" (" + text(at) + ")") {
    site_ = &text_;
  }
  ~At() { site_ = nullptr; }
  At(const At&) = delete;
  At& operator=(const At&) = delete;

 private:
  const std::string*& site_;
  const std::string text_;
};

}  // namespace

void Checker::access(const Fiber& fiber, const void* address, size_t bytes, bool write,
                     const Site& site) {
  const At at(site_, site);
  access(fiber, address, bytes, write, nullptr);
}

void Checker::raise_flag(const Fiber& fiber, const int* flag, const Site& site) {
  const At at(site_, site);
  access(fiber, flag, sizeof *flag, true, nullptr, true);
}

// ---- Copies ---------------------------------------------------------------------------------

void Checker::issue_copy(const Fiber& fiber, const AsyncCopy& copy, bool bulk, const Site& site) {
  const At at(site_, site);
  const size_t bytes = static_cast<size_t>(copy.bytes);
  if (copy.from) access(fiber, copy.from, bytes, false, nullptr);
  char* low = static_cast<char*>(copy.to);
  const SharedRange* range = find_shared(low, bytes);
  if (!range) return unknown(fiber, low, bytes, true, nullptr);
  if (bulk) {
    visit(*range, low, bytes, [&](Shadow& s, unsigned) {
      if (is_unfenced(s)) unfenced(fiber, *range, low, bytes, "copies into", s.writer);
    });
  }
  write_shared(fiber, *range, low, bytes, bulk ? Way::bulk : Way::copy, false, nullptr);
  visit(*range, low, bytes,
        [](Shadow& s, unsigned mask) { s.in_flight |= static_cast<uint8_t>(mask); });
}

void Checker::perform_copy(const Fiber& fiber, const AsyncCopy& copy, Way way) {
  char* low = static_cast<char*>(copy.to);
  const size_t bytes = static_cast<size_t>(copy.bytes);
  const SharedRange* range = find_shared(low, bytes);
  if (!range) return;
  visit(*range, low, bytes,
        [](Shadow& s, unsigned mask) { s.in_flight &= static_cast<uint8_t>(~mask); });
  write_shared(fiber, *range, low, bytes, way, true, nullptr);
}

// A write of the issuer's, at a time of its own that only the barrier's phase makes known.
void Checker::land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier) {
  perform_copy(issuer, copy, Way::bulk);
  clocks.release(issuer, barrier);
}

// ---- Barriers -------------------------------------------------------------------------------

void Checker::init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  access(fiber, barrier, sizeof *barrier, true, site);
  clocks.forget(barrier);
}

// Whoever uses a barrier must know that it is initialized.
void Checker::use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  const SharedRange* range = find_shared(reinterpret_cast<char*>(barrier), sizeof *barrier);
  if (!range) return;
  visit(*range, reinterpret_cast<char*>(barrier), sizeof *barrier, [&](Shadow& s, unsigned) {
    if (clocks.before(s.writer, s.write_clock, static_cast<size_t>(fiber.rank))) return;
    report(fiber,
           "uses the mbarrier at " + shared_place(barrier) + " (" + text(site) +
               "), which thread " + thread(s.writer) + " initialized without a barrier between",
           nullptr);
  });
}

// ---- The asynchronous proxy -----------------------------------------------------------------

size_t Checker::vector_index(const SharedRange& range, const char* at) const {
  const uintptr_t first = reinterpret_cast<uintptr_t>(range.low) / VECTOR;
  return range.first_vector + reinterpret_cast<uintptr_t>(at) / VECTOR - first;
}

size_t Checker::agent(const Fiber& fiber) const {
  return threads_ + static_cast<size_t>(fiber.rank) / 32;
}

void Checker::require_fence(const Fiber& fiber, const void* address, size_t bytes,
                            const Site& site) {
  const char* low = static_cast<const char*>(address);
  const SharedRange* range = find_shared(low, bytes);
  if (!range) return;
  const At at(site_, site);
  visit(*range, low, bytes, [&](Shadow& s, unsigned) {
    if (is_unfenced(s)) unfenced(fiber, *range, low, bytes, "reads", s.writer);
  });
}

// What is read has to be there for all readers now, and to stay until they have read it.
void Checker::issue_reads(const std::vector<Fiber*>& readers,
                          const std::vector<const char*>& vectors, bool unwritten,
                          const Site& site) {
  const At at(site_, site);
  const Fiber& fiber = *readers.front();
  const bool by_warp = readers.size() > 1;
  const size_t t = by_warp ? agent(fiber) : static_cast<size_t>(fiber.rank);
  if (by_warp) clocks.learn_common(readers, t);
  has_async_reads_ = true;
  for (const char* low : vectors) {
    const SharedRange* range = find_shared(low, VECTOR);
    if (!range) return unknown(fiber, low, VECTOR, false, nullptr);
    visit(*range, low, VECTOR, [&](Shadow& s, unsigned mask) {
      if (s.in_flight & mask) {
        report(fiber,
               "reads shared memory that an asynchronous copy of thread " + thread(s.writer) +
                   " still fills: " + place(*range, low, VECTOR),
               nullptr);
      }
      if ((s.written & mask) != mask) {
        if (unwritten) return;
        report(fiber, "reads shared memory that nobody wrote: " + place(*range, low, VECTOR),
               nullptr);
      }
      if (!clocks.before(s.writer, s.write_clock, t)) {
        race(fiber, *range, low, VECTOR, "reads", "wrote", s.writer, nullptr);
      }
      if (is_unfenced(s)) unfenced(fiber, *range, low, VECTOR, "reads", s.writer);
    });
    VectorShadow& vector = vectors_[vector_index(*range, low)];
    ++vector.pending;
    vector.reader = static_cast<uint16_t>(fiber.rank);
  }
}

void Checker::perform_reads(const std::vector<Fiber*>& readers,
                            const std::vector<const char*>& vectors, const Site& site) {
  const At at(site_, site);
  const Fiber& fiber = *readers.front();
  const size_t t = agent(fiber);
  const bool by_warp = readers.size() > 1;
  if (by_warp) warp_reads_.resize(vectors_.size() * warps_);
  for (const char* low : vectors) {
    const SharedRange* range = find_shared(low, VECTOR);
    if (!range) continue;
    const size_t index = vector_index(*range, low);
    VectorShadow& vector = vectors_[index];
    --vector.pending;
    if (!by_warp) {
      read_shared(fiber, *range, const_cast<char*>(low), VECTOR, nullptr);
      continue;
    }
    uint32_t* const clock = &warp_reads_[index * warps_];
    if (!vector.by_warps) std::fill(clock, clock + warps_, 0u);
    vector.by_warps = true;
    clock[t - threads_] = clocks.now(t);
  }
  if (by_warp) clocks.tell(t, readers);
}

// Nobody may write what is being read, or has been read by products that it does not know ended.
void Checker::check_pending_reads(const Fiber& fiber, const SharedRange& range, char* low,
                                  size_t bytes, const char* verb, const void* code) {
  const size_t end = vector_index(range, low + bytes - 1);
  for (size_t i = vector_index(range, low); i <= end; ++i) {
    const VectorShadow& vector = vectors_[i];
    if (vector.pending > 0) {
      report(fiber,
             std::string(verb) + " shared memory that products or a TMA store of thread " +
                 thread(vector.reader) + " still read: " + place(range, low, bytes),
             code);
    }
    if (!vector.by_warps) continue;
    for (size_t warp = 0; warp < warps_; ++warp) {
      const uint32_t clock = warp_reads_[i * warps_ + warp];
      if (clock == 0 || clocks.before(static_cast<uint16_t>(threads_ + warp), clock,
                                      static_cast<size_t>(fiber.rank))) {
        continue;
      }
      report(fiber,
             std::string("race on shared memory: it ") + verb + " " + place(range, low, bytes) +
                 ", which products of thread " + thread(static_cast<uint16_t>(32 * warp)) +
                 " read without a barrier between",
             code);
    }
  }
}

void Checker::unfenced(const Fiber& fiber, const SharedRange& range, const char* low, size_t bytes,
                       const char* does, uint16_t writer) {
  report(fiber,
         std::string(does) + " shared memory, by the asynchronous proxy, that thread " +
             thread(writer) + " wrote without bulk_fence() behind: " + place(range, low, bytes),
         nullptr);
}

// ---- The names that the interpreter calls ---------------------------------------------------

namespace check {

void start_launch(Worker& worker) { checker = new Checker(worker); }
void end_launch() {
  delete checker;
  checker = nullptr;
}
void start_block() { checker->start_block(); }
void barrier() { checker->barrier(); }
void barrier(const std::vector<Fiber*>& fibers) { checker->clocks.barrier(fibers); }
void release(const Fiber& fiber, const void* object) { checker->clocks.release(fiber, object); }
void complete(const void* object) { checker->clocks.complete(object); }
void acquire(const Fiber& fiber, const void* object) { checker->clocks.acquire(fiber, object); }
void access(const Fiber& fiber, const void* at, size_t bytes, bool write, const Site& site) {
  checker->access(fiber, at, bytes, write, site);
}
void raise_flag(const Fiber& fiber, const int* flag, const Site& site) {
  checker->raise_flag(fiber, flag, site);
}
void init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  checker->init_barrier(fiber, barrier, site);
}
void use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  checker->use_barrier(fiber, barrier, site);
}
void issue_copy(const Fiber& fiber, const AsyncCopy& copy, bool bulk, const Site& site) {
  checker->issue_copy(fiber, copy, bulk, site);
}
void perform_copy(const Fiber& fiber, const AsyncCopy& copy) {
  checker->perform_copy(fiber, copy, Way::copy);
}
void land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier) {
  checker->land_copy(issuer, copy, barrier);
}
void await(const Fiber& fiber) { checker->await(fiber); }
void fence(const Fiber& fiber) { checker->fence(fiber); }
void require_fence(const Fiber& fiber, const void* at, size_t bytes, const Site& site) {
  checker->require_fence(fiber, at, bytes, site);
}
void issue_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                 bool unwritten, const Site& site) {
  checker->issue_reads(readers, vectors, unwritten, site);
}
void perform_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                   const Site& site) {
  checker->perform_reads(readers, vectors, site);
}

}  // namespace check
}  // namespace host
}  // namespace convgen
