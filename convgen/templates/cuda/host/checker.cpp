// Accesses of threads, and what is wrong with them (see checker.h).
#include "checker.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "places.h"

namespace convgen {
namespace host {

std::vector<GlobalRange>& global_ranges() {
  static thread_local std::vector<GlobalRange> ranges;
  return ranges;
}

thread_local uint64_t Checker::block_ = 0;
thread_local uint64_t Checker::newest_launch_ = 0;
__thread Checker* checker;

namespace {

std::string bytes_text(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

}  // namespace

Checker::Checker(Worker& worker)
    : clocks(worker.fibers.size(), (worker.fibers.size() + 31) / 32),
      worker_(worker),
      threads_(worker.fibers.size()),
      warps_((worker.fibers.size() + 31) / 32),
      fences_(worker.fibers.size()),
      earlier_launch_(newest_launch_) {
  newest_launch_ = first_block_;
  size_t granules = 0, vectors = 0;
  auto add = [&](char* low, size_t bytes, const std::string& name) {
    shared_.push_back({low, bytes, granules, vectors, name});
    granules += (bytes + GRANULE - 1) / GRANULE;
    vectors += bytes / VECTOR + 2;
  };
  // Its place is filled in for each block.
  add(nullptr, static_cast<size_t>(worker.run.launch.shared_bytes), "dynamic shared memory");
  for (const SharedArray& array : shared_arrays()) {
    add(shared_anchor() + array.offset, array.bytes, "shared array " + array.name);
  }
  shadow_.resize(granules);
  vectors_.resize(vectors);
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    void* low;
    size_t bytes;
    pthread_attr_getstack(&attributes, &low, &bytes);
    host_stack_high_ = static_cast<char*>(low) + bytes;
    pthread_attr_destroy(&attributes);
  }
  host_stack_low_ = static_cast<char*>(__builtin_frame_address(0));
}

void Checker::start_block() {
  ++block_;
  awaits_.clear();
  clocks.start_block();
  used_readers_ = 0;
  shared_[0].low = reinterpret_cast<char*>(worker_.dynamic);
  const Shadow nothing = {0, 0, 0, NO_ROW, FENCED, NOBODY, NOBODY, 0, 0};
  std::fill(shadow_.begin(), shadow_.end(), nothing);
  std::fill(fences_.begin(), fences_.end(), FENCED + 1);
  if (!has_async_reads_) return;
  has_async_reads_ = false;
  std::fill(vectors_.begin(), vectors_.end(), VectorShadow{});
}

// Who read before it need not be remembered.
void Checker::barrier() {
  clocks.barrier();
  used_readers_ = 0;
}

// ---- Accesses -------------------------------------------------------------------------------

void Checker::access(const void* address, size_t bytes, bool write, const void* code) {
  if (worker_.running) access(*worker_.running, address, bytes, write, code);
}

void Checker::access(const Fiber& fiber, const void* address, size_t bytes, bool write,
                     const void* code, bool flag) {
  char* low = static_cast<char*>(const_cast<void*>(address));
  if (fiber.stack_low <= low && low < fiber.stack_low + Stacks::SIZE) return;
  for (SharedRange& range : shared_) {
    if (range.low <= low && low < range.low + range.bytes) {
      if (!range.is_used) use(fiber, range, code);
      if (low + bytes > range.low + range.bytes) {
        return beyond(fiber, range, low, bytes, write, code);
      }
      return write ? write_shared(fiber, range, low, bytes, Way::store, false, code)
                   : read_shared(fiber, range, low, bytes, code);
    }
  }
  for (GlobalRange& range : global_ranges()) {
    if (range.low <= low && low + bytes <= range.low + range.bytes) {
      return access_global(fiber, range, low, bytes, write, flag, code);
    }
  }
  if (!write && (in_library(low) || (host_stack_low_ <= low && low < host_stack_high_))) return;
  // Callers that register no tensors get the checks of shared memory alone.
  const char* dynamic = shared_[0].low;
  const bool near_shared =
      dynamic <= low && low < dynamic + shared_[0].bytes + SHARED_MARGIN_BYTES;
  if (global_ranges().empty() && !near_shared) return;
  unknown(fiber, low, bytes, write, code);
}

// Static shared memory counts, too. A launch of more than 48 KiB opts in to all dynamic memory that
// there is beside none (see launch() in device.cuh).
void Checker::use(const Fiber& fiber, SharedRange& range, const void* code) {
  constexpr size_t WITHOUT_OPT_IN = 48 * 1024;
  range.is_used = true;
  if (&range == &shared_[0]) return;
  static_bytes_ += range.bytes;
  const size_t dynamic = shared_[0].bytes;
  if (static_bytes_ + dynamic <= WITHOUT_OPT_IN) return;
  report(fiber,
         "uses " + range.name + ", which makes " + std::to_string(static_bytes_) +
             " bytes of static shared memory beside " + std::to_string(dynamic) +
             " of dynamic: " +
             (dynamic > WITHOUT_OPT_IN ? "a launch of more than 48 KiB has none"
                                       : "more than the 48 KiB that a launch has"),
         code);
}

void Checker::aligned(const void* address, size_t alignment, bool write, const void* code) {
  if (!worker_.running || reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  report(*worker_.running,
         std::string("unaligned ") + (write ? "write" : "read") + " of " + bytes_text(alignment),
         code);
}

const SharedRange* Checker::find_shared(const char* low, size_t bytes) const {
  for (const SharedRange& range : shared_) {
    if (range.low <= low && low + bytes <= range.low + range.bytes) return &range;
  }
  return nullptr;
}

void Checker::read_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                 const void* code) {
  const uint16_t t = static_cast<uint16_t>(fiber.rank);
  const uint32_t now = clocks.now(t);
  visit(range, low, bytes, [&](Shadow& s, unsigned mask) {
    if (s.in_flight & mask) {
      report(fiber,
             "reads shared memory that an asynchronous copy of thread " +
                 thread(s.writer) +
                 " still fills: " + place(range, low, bytes),
             code);
    }
    if ((s.written & mask) != mask) {
      report(fiber, "reads shared memory that nobody wrote: " + place(range, low, bytes), code);
    }
    if (!clocks.before(s.writer, s.write_clock, t))
      race(fiber, range, low, bytes, "reads", "wrote", s.writer, code);
    if (s.interval != clocks.interval()) {
      s.interval = clocks.interval();
      s.reader = NOBODY;
      s.readers = NO_ROW;
    }
    if (s.reader == MANY) {
      readers_[s.readers * threads_ + t] = now;
    } else if (s.reader == NOBODY || clocks.before(s.reader, s.read_clock, t)) {
      s.reader = t;
      s.read_clock = now;
    } else {
      if (s.readers == NO_ROW) s.readers = static_cast<uint32_t>(used_readers_++);
      if (used_readers_ * threads_ > readers_.size()) {
        readers_.resize((2 * used_readers_ + 64) * threads_);
      }
      uint32_t* row = &readers_[s.readers * threads_];
      std::fill(row, row + threads_, 0u);
      row[s.reader] = s.read_clock;
      row[t] = now;
      s.reader = MANY;
    }
  });
}

void Checker::write_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                           Way way, bool landing, const void* code) {
  const uint16_t t = static_cast<uint16_t>(fiber.rank);
  const char* verb = landing              ? "has an asynchronous copy that fills"
                     : way == Way::bulk ? "copies into"
                                        : "writes";
  if (has_async_reads_) check_pending_reads(fiber, range, low, bytes, verb, code);
  visit(range, low, bytes, [&](Shadow& s, unsigned mask) {
    if (s.in_flight & mask) {
      report(fiber,
             std::string(verb) + " shared memory that an asynchronous copy of thread " +
                 thread(s.writer) +
                 " still fills: " + place(range, low, bytes),
             code);
    }
    if (s.writer != NOBODY && !clocks.before(s.writer, s.write_clock, t)) {
      race(fiber, range, low, bytes, verb, "wrote", s.writer, code);
    }
    if (s.interval == clocks.interval()) {
      if (s.reader == MANY) {
        const uint32_t* row = &readers_[s.readers * threads_];
        for (size_t u = 0; u < threads_; ++u) {
          if (row[u] && !clocks.before(static_cast<uint16_t>(u), row[u], t)) {
            race(fiber, range, low, bytes, verb, "read", static_cast<uint16_t>(u), code);
          }
        }
      } else if (s.reader != NOBODY && !clocks.before(s.reader, s.read_clock, t)) {
        race(fiber, range, low, bytes, verb, "read", s.reader, code);
      }
    }
    s.reader = NOBODY;
    s.writer = t;
    s.write_clock = clocks.now(t);
    s.fence = way == Way::bulk ? FENCED : fences_[t];
    s.written |= static_cast<uint8_t>(mask);
  });
}

// Flags may be raised at the same time: it is one value that is written.
void Checker::access_global(const Fiber& fiber, GlobalRange& range, char* low, size_t bytes,
                            bool write, bool flag, const void* code) {
  const uint16_t t = static_cast<uint16_t>(fiber.rank);
  const size_t start = static_cast<size_t>(low - range.low), end = start + bytes;
  auto where = [&] {
    return bytes_text(bytes) + " at offset " + std::to_string(start) + " of " + range.name;
  };
  if (write && range.read_only) report(fiber, "writes an input: " + where(), code);
  const bool is_early = worker_.run.launch.early && !has_awaited(t);
  for (size_t g = start / GRANULE; g * GRANULE < end; ++g) {
    GlobalShadow& s = range.shadow[g];
    // A range may start at an odd byte only if its elements have one byte: none do.
    if (!write && !s.written) {
      report(fiber, "reads global memory that nobody wrote: " + where(), code);
    }
    if (is_early && (is_earlier(s.write_block) || (write && is_earlier(s.read_block)))) {
      report(fiber,
             std::string(write ? "writes " : "reads ") + where() +
                 " before await_earlier_kernel(): the launch before " +
                 (is_earlier(s.write_block) ? "writes" : "reads") + " it",
             code);
    }
    auto conflict = [&](uint64_t block, uint16_t other, uint32_t clock) {
      if (block < first_block_ || other == NOBODY) return false;
      return block != block_ || !clocks.before(other, clock, t);
    };
    auto tell = [&](const char* did, uint64_t block, uint16_t other) {
      report(fiber,
             std::string("race on global memory: it ") + (write ? "writes " : "reads ") +
                 where() + ", which thread " + thread(other) +
                 (block == block_ ? "" : " of block " + text(index_of(block))) + " " + did +
                 " in the same launch" + (block == block_ ? " without a barrier between" : ""),
             code);
    };
    if (!(flag && s.is_flag) && conflict(s.write_block, s.writer, s.write_clock)) {
      tell("wrote", s.write_block, s.writer);
    }
    if (write && conflict(s.read_block, s.reader, s.read_clock)) {
      tell("read", s.read_block, s.reader);
    }
    if (write) {
      s.write_block = block_;
      s.writer = t;
      s.write_clock = clocks.now(t);
      s.written = 1;
      s.is_flag = flag;
    } else {
      s.read_block = block_;
      s.reader = t;
      s.read_clock = clocks.now(t);
    }
  }
}

void Checker::await(const Fiber& fiber) {
  const uint16_t t = static_cast<uint16_t>(fiber.rank);
  if (!has_awaited(t)) awaits_.push_back({t, clocks.now(t)});
}

// One thread waits for all that know of it.
bool Checker::has_awaited(uint16_t t) const {
  return std::any_of(awaits_.begin(), awaits_.end(), [&](const std::pair<uint16_t, uint32_t>& a) {
    return clocks.before(a.first, a.second, t);
  });
}

uint3 Checker::index_of(uint64_t block) const {
  const dim3 grid = worker_.run.launch.grid;
  const uint64_t linear = block - first_block_;
  return {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
          static_cast<unsigned>(linear / grid.x / grid.y)};
}

// ---- Reports --------------------------------------------------------------------------------

void Checker::beyond(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes, bool write,
            const void* code) {
  report(fiber,
         std::string(write ? "writes" : "reads") + " beyond the end of " + range.name + ": " +
             place(range, low, bytes),
         code);
}

void Checker::race(const Fiber& fiber, const SharedRange& range, const char* low, size_t bytes, const char* does,
          const char* did, uint16_t other, const void* code) {
  report(fiber,
         std::string("race on shared memory: it ") + does + " " + place(range, low, bytes) +
             ", which thread " + thread(other) + " " + did +
             " without a barrier between",
         code);
}

void Checker::unknown(const Fiber& fiber, const char* low, size_t bytes, bool write, const void* code) {
  const std::string verb = write ? "writes" : "reads";
  // The nearest range within reach is the one that was meant.
  ptrdiff_t best = 1 << 20;
  std::string what;
  auto consider = [&](const char* start, size_t size, const std::string& name) {
    const ptrdiff_t past = low + bytes - (start + size), short_of = start - low;
    const ptrdiff_t distance = std::max(past, short_of);
    if (!start || distance >= best) return;
    best = distance;
    what = verb + " out of bounds of " + name + ": " + bytes_text(bytes) + " at offset " +
           std::to_string(low - start) + " of " + std::to_string(size);
  };
  for (const SharedRange& range : shared_) consider(range.low, range.bytes, range.name);
  for (const GlobalRange& range : global_ranges()) consider(range.low, range.bytes, range.name);
  for (const Fiber& other : worker_.fibers) {
    if (other.stack_low <= low && low < other.stack_low + Stacks::SIZE) {
      what = verb + " a local variable of thread " + text(other.thread);
    }
  }
  if (what.empty()) {
    char buffer[32];
    snprintf(buffer, sizeof buffer, "%p", static_cast<const void*>(low));
    what = verb + " " + bytes_text(bytes) + " at " + buffer + ", far from any tensor" +
           (write && in_library(low) ? " (a global variable or constant)" : "");
  }
  report(fiber, what, code);
}

std::string Checker::place(const SharedRange& range, const char* low, size_t bytes) const {
  return bytes_text(bytes) + " at offset " + std::to_string(low - range.low) + " of " +
         range.name + " (" + bytes_text(range.bytes) + ")";
}

void Checker::report(const Fiber& fiber, const std::string& what, const void* code) {
  const std::string source = source_of(code);
  worker_.fault(fiber,
                what + (source.empty() ? "" : " (" + source + ")") + (site_ ? *site_ : ""));
}

}  // namespace host
}  // namespace convgen
