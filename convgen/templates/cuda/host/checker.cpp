// The checks of a CONVGEN_CHECKED build: every memory access of a kernel, against what exists, what
// was written, and what other threads do without a barrier in between.
//
// Kernels are then compiled with -fsanitize=thread, which calls a hook before every load and store;
// the hooks below take the place of ThreadSanitizer's library. Shared and registered global
// memory have a shadow: for each pair of bytes, who wrote and read it last, and when.
//
// "When" is a thread's clock: clocks.h tells whether a barrier lies between two accesses.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "clocks.h"
#include "places.h"
#include "state.h"

namespace convgen {
namespace host {

namespace {

constexpr size_t GRANULE = 2;  // bytes: the smallest element type
constexpr uint16_t NOBODY = 0xffff, MANY = 0xfffe;
constexpr uint32_t NO_ROW = 0xffffffffu;
constexpr unsigned ALL_BYTES = (1u << GRANULE) - 1;

// What is known of one granule of shared memory.
struct Shadow {
  uint32_t write_clock, read_clock;
  uint16_t writer, reader;
  uint8_t written, in_flight;  // a bit per byte
  uint32_t interval;           // of the reads: the block's barrier interval
  uint32_t readers;            // which row of clocks, once MANY have read in this interval
};

struct SharedRange {
  char* low;
  size_t bytes;
  size_t first;  // granule
  std::string name;
};

// What is known of one granule of global memory. Threads of different blocks are never ordered.
struct GlobalShadow {
  uint64_t write_block, read_block;  // counted over all launches; 0: none
  uint32_t write_clock, read_clock;
  uint16_t writer, reader;
  uint8_t written;
};

struct GlobalRange {
  char* low;
  size_t bytes;
  std::string name;
  bool read_only;
  std::vector<GlobalShadow> shadow;
};

std::vector<GlobalRange>& global_ranges() {
  static thread_local std::vector<GlobalRange> ranges;
  return ranges;
}

std::string bytes_text(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

}  // namespace

// Follows the threads of one launch.
class Checker {
 public:
  explicit Checker(Worker& worker)
      : clocks(worker.fibers.size()), worker_(worker), threads_(worker.fibers.size()) {
    size_t granules = 0;
    auto add = [&](char* low, size_t bytes, const std::string& name) {
      shared_.push_back({low, bytes, granules, name});
      granules += (bytes + GRANULE - 1) / GRANULE;
    };
    // Its place is filled in for each block.
    add(nullptr, static_cast<size_t>(worker.run.launch.shared_bytes), "dynamic shared memory");
    for (const SharedArray& array : shared_arrays()) {
      add(shared_anchor() + array.offset, array.bytes, "shared array " + array.name);
    }
    shadow_.resize(granules);
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

  void start_block() {
    ++block_;
    clocks.start_block();
    used_readers_ = 0;
    shared_[0].low = reinterpret_cast<char*>(worker_.dynamic);
    const Shadow nothing = {0, 0, NOBODY, NOBODY, 0, 0, 0, NO_ROW};
    std::fill(shadow_.begin(), shadow_.end(), nothing);
  }

  // Of the whole block: who read before it need not be remembered.
  void barrier() {
    clocks.barrier();
    used_readers_ = 0;
  }

  // ---- Accesses ----

  void access(const void* address, size_t bytes, bool write, const void* code) {
    if (!worker_.running) return;
    const Fiber& fiber = *worker_.running;
    char* low = static_cast<char*>(const_cast<void*>(address));
    if (fiber.stack_low <= low && low < fiber.stack_low + Stacks::SIZE) return;
    for (const SharedRange& range : shared_) {
      if (range.low <= low && low < range.low + range.bytes) {
        if (low + bytes > range.low + range.bytes) {
          return beyond(fiber, range, low, bytes, write, code);
        }
        return write ? write_shared(fiber, range, low, bytes, false, code)
                     : read_shared(fiber, range, low, bytes, code);
      }
    }
    for (GlobalRange& range : global_ranges()) {
      if (range.low <= low && low + bytes <= range.low + range.bytes) {
        return access_global(fiber, range, low, bytes, write, code);
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

  void aligned(const void* address, size_t alignment, bool write, const void* code) {
    if (!worker_.running || reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
    report(*worker_.running,
           std::string("unaligned ") + (write ? "write" : "read") + " of " + bytes_text(alignment),
           code);
  }

  void issue_copy(const Fiber& fiber, const AsyncCopy& copy, const Site& site) {
    const std::string at = " (" + text(site) + ")";
    site_ = &at;
    const size_t bytes = static_cast<size_t>(copy.bytes);
    if (copy.from) access(copy.from, bytes, false, nullptr);
    char* low = static_cast<char*>(copy.to);
    const SharedRange* range = find_shared(low, bytes);
    if (!range) {
      unknown(fiber, low, bytes, true, nullptr);
    } else {
      write_shared(fiber, *range, low, bytes, false, nullptr);
      visit(*range, low, bytes,
            [](Shadow& s, unsigned mask) { s.in_flight |= static_cast<uint8_t>(mask); });
    }
    site_ = nullptr;
  }

  // A write of the issuer's, at a time of its own that only the barrier's phase makes known.
  void land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier) {
    perform_copy(issuer, copy);
    clocks.release(issuer, barrier);
  }

  void init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
    const std::string at = " (" + text(site) + ")";
    site_ = &at;
    access(barrier, sizeof *barrier, true, nullptr);
    site_ = nullptr;
    clocks.forget(barrier);
    (void)fiber;
  }

  // Whoever uses a barrier must know that it is initialized.
  void use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
    const SharedRange* range = find_shared(reinterpret_cast<char*>(barrier), sizeof *barrier);
    if (!range) return;
    visit(*range, reinterpret_cast<char*>(barrier), sizeof *barrier, [&](Shadow& s, unsigned) {
      if (clocks.before(s.writer, s.write_clock, static_cast<size_t>(fiber.rank))) return;
      report(fiber,
             "uses the mbarrier at " + shared_place(barrier) + " (" + text(site) +
                 "), which thread " + text(worker_.fibers[s.writer].thread) +
                 " initialized without a barrier between",
             nullptr);
    });
  }

  void perform_copy(const Fiber& fiber, const AsyncCopy& copy) {
    char* low = static_cast<char*>(copy.to);
    const size_t bytes = static_cast<size_t>(copy.bytes);
    const SharedRange* range = find_shared(low, bytes);
    if (!range) return;
    visit(*range, low, bytes,
          [](Shadow& s, unsigned mask) { s.in_flight &= static_cast<uint8_t>(~mask); });
    write_shared(fiber, *range, low, bytes, true, nullptr);
  }

  Clocks clocks;

 private:
  template <typename Visit>
  void visit(const SharedRange& range, char* low, size_t bytes, Visit visit) {
    const size_t start = static_cast<size_t>(low - range.low), end = start + bytes;
    for (size_t g = start / GRANULE; g * GRANULE < end; ++g) {
      unsigned mask = ALL_BYTES;
      if (g * GRANULE < start) mask &= ALL_BYTES << (start - g * GRANULE);
      if ((g + 1) * GRANULE > end) mask &= ALL_BYTES >> ((g + 1) * GRANULE - end);
      visit(shadow_[range.first + g], mask);
    }
  }

  const SharedRange* find_shared(const char* low, size_t bytes) const {
    for (const SharedRange& range : shared_) {
      if (range.low <= low && low + bytes <= range.low + range.bytes) return &range;
    }
    return nullptr;
  }

  void read_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                   const void* code) {
    const uint16_t t = static_cast<uint16_t>(fiber.rank);
    const uint32_t now = clocks.now(t);
    visit(range, low, bytes, [&](Shadow& s, unsigned mask) {
      if (s.in_flight & mask) {
        report(fiber,
               "reads shared memory that an asynchronous copy of thread " +
                   text(worker_.fibers[s.writer].thread) +
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

  void write_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                    bool landing, const void* code) {
    const uint16_t t = static_cast<uint16_t>(fiber.rank);
    const char* verb = landing ? "has an asynchronous copy that fills" : "writes";
    visit(range, low, bytes, [&](Shadow& s, unsigned mask) {
      if (s.in_flight & mask) {
        report(fiber,
               std::string(verb) + " shared memory that an asynchronous copy of thread " +
                   text(worker_.fibers[s.writer].thread) +
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
      s.written |= static_cast<uint8_t>(mask);
    });
  }

  void access_global(const Fiber& fiber, GlobalRange& range, char* low, size_t bytes, bool write,
                     const void* code) {
    const uint16_t t = static_cast<uint16_t>(fiber.rank);
    const size_t start = static_cast<size_t>(low - range.low), end = start + bytes;
    auto where = [&] {
      return bytes_text(bytes) + " at offset " + std::to_string(start) + " of " + range.name;
    };
    if (write && range.read_only) report(fiber, "writes an input: " + where(), code);
    for (size_t g = start / GRANULE; g * GRANULE < end; ++g) {
      GlobalShadow& s = range.shadow[g];
      // A range may start at an odd byte only if its elements have one byte: none do.
      if (!write && !s.written) {
        report(fiber, "reads global memory that nobody wrote: " + where(), code);
      }
      auto conflict = [&](uint64_t block, uint16_t other, uint32_t clock) {
        if (block < first_block_ || other == NOBODY) return false;
        return block != block_ || !clocks.before(other, clock, t);
      };
      auto tell = [&](const char* did, uint64_t block, uint16_t other) {
        report(fiber,
               std::string("race on global memory: it ") + (write ? "writes " : "reads ") +
                   where() + ", which thread " + text(worker_.fibers[other].thread) +
                   (block == block_ ? "" : " of block " + text(index_of(block))) + " " + did +
                   " in the same launch" + (block == block_ ? " without a barrier between" : ""),
               code);
      };
      if (conflict(s.write_block, s.writer, s.write_clock)) tell("wrote", s.write_block, s.writer);
      if (write && conflict(s.read_block, s.reader, s.read_clock)) {
        tell("read", s.read_block, s.reader);
      }
      if (write) {
        s.write_block = block_;
        s.writer = t;
        s.write_clock = clocks.now(t);
        s.written = 1;
      } else {
        s.read_block = block_;
        s.reader = t;
        s.read_clock = clocks.now(t);
      }
    }
  }

  uint3 index_of(uint64_t block) const {
    const dim3 grid = worker_.run.launch.grid;
    const uint64_t linear = block - first_block_;
    return {static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
            static_cast<unsigned>(linear / grid.x / grid.y)};
  }

  // ---- Reports ----

  void beyond(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes, bool write,
              const void* code) {
    report(fiber,
           std::string(write ? "writes" : "reads") + " beyond the end of " + range.name + ": " +
               place(range, low, bytes),
           code);
  }

  void race(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes, const char* does,
            const char* did, uint16_t other, const void* code) {
    report(fiber,
           std::string("race on shared memory: it ") + does + " " + place(range, low, bytes) +
               ", which thread " + text(worker_.fibers[other].thread) + " " + did +
               " without a barrier between",
           code);
  }

  void unknown(const Fiber& fiber, char* low, size_t bytes, bool write, const void* code) {
    const std::string verb = write ? "writes" : "reads";
    // The nearest range within reach is the one that was meant.
    ptrdiff_t best = 1 << 20;
    std::string what;
    auto consider = [&](char* start, size_t size, const std::string& name) {
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
      snprintf(buffer, sizeof buffer, "%p", static_cast<void*>(low));
      what = verb + " " + bytes_text(bytes) + " at " + buffer + ", far from any tensor" +
             (write && in_library(low) ? " (a global variable or constant)" : "");
    }
    report(fiber, what, code);
  }

  std::string place(const SharedRange& range, const char* low, size_t bytes) const {
    return bytes_text(bytes) + " at offset " + std::to_string(low - range.low) + " of " +
           range.name + " (" + bytes_text(range.bytes) + ")";
  }

  void report(const Fiber& fiber, const std::string& what, const void* code) {
    const std::string source = source_of(code);
    worker_.fault(fiber,
                  what + (source.empty() ? "" : " (" + source + ")") + (site_ ? *site_ : ""));
  }

  Worker& worker_;
  const size_t threads_;
  std::vector<SharedRange> shared_;
  std::vector<Shadow> shadow_;
  std::vector<uint32_t> readers_;  // rows of clocks, one per granule with many readers
  size_t used_readers_ = 0;
  char *host_stack_low_ = nullptr, *host_stack_high_ = nullptr;
  const std::string* site_ = nullptr;   // of an asynchronous copy being issued
  static thread_local uint64_t block_;  // counts blocks over all launches
  const uint64_t first_block_ = block_ + 1;
};

thread_local uint64_t Checker::block_ = 0;

namespace {
__thread Checker* checker;
}

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
void init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  checker->init_barrier(fiber, barrier, site);
}
void use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site) {
  checker->use_barrier(fiber, barrier, site);
}
void land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier) {
  checker->land_copy(issuer, copy, barrier);
}
void issue_copy(const Fiber& fiber, const AsyncCopy& copy, const Site& site) {
  checker->issue_copy(fiber, copy, site);
}
void perform_copy(const Fiber& fiber, const AsyncCopy& copy) { checker->perform_copy(fiber, copy); }

}  // namespace check
}  // namespace host
}  // namespace convgen

// ---- What the compiler calls ----------------------------------------------------------------

using convgen::host::checker;

extern "C" __attribute__((visibility("default"))) void convgen_interpret_register(void* data,
                                                                                  int64_t bytes,
                                                                                  const char* name,
                                                                                  int contents) {
  using namespace convgen::host;
  GlobalRange range;
  range.low = static_cast<char*>(data);
  range.bytes = static_cast<size_t>(bytes);
  range.name = name;
  range.read_only = contents == CONVGEN_INTERPRET_INPUT;
  GlobalShadow shadow = {};
  shadow.writer = shadow.reader = NOBODY;
  shadow.written = contents == CONVGEN_INTERPRET_OUTPUT ? 0 : 1;
  range.shadow.assign((range.bytes + GRANULE - 1) / GRANULE, shadow);
  global_ranges().push_back(std::move(range));
}

extern "C" __attribute__((visibility("default"))) void convgen_interpret_forget() {
  convgen::host::global_ranges().clear();
}

#define CONVGEN_ACCESS(kind, size, write)                                            \
  extern "C" void __tsan_##kind##size(void* address) {                               \
    if (!checker) return;                                                            \
    const void* code = __builtin_return_address(0);                                  \
    checker->aligned(address, size, write, code);                                    \
    checker->access(address, size, write, code);                                     \
  }                                                                                  \
  extern "C" void __tsan_unaligned_##kind##size(void* address) {                     \
    if (checker) checker->access(address, size, write, __builtin_return_address(0)); \
  }                                                                                  \
  extern "C" void __tsan_volatile_##kind##size(void* address) {                      \
    if (checker) checker->access(address, size, write, __builtin_return_address(0)); \
  }
#define CONVGEN_ACCESSES(size)      \
  CONVGEN_ACCESS(read, size, false) \
  CONVGEN_ACCESS(write, size, true)
CONVGEN_ACCESSES(1)
CONVGEN_ACCESSES(2)
CONVGEN_ACCESSES(4)
CONVGEN_ACCESSES(8)
CONVGEN_ACCESSES(16)

extern "C" {

void __tsan_read_range(void* address, unsigned long bytes) {
  if (checker) checker->access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  if (checker) checker->access(address, bytes, true, __builtin_return_address(0));
}
// clang calls these for what the language copies.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  if (checker && bytes) checker->access(from, bytes, false, __builtin_return_address(0));
  if (checker && bytes) checker->access(to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  if (checker && bytes) checker->access(from, bytes, false, __builtin_return_address(0));
  if (checker && bytes) checker->access(to, bytes, true, __builtin_return_address(0));
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  if (checker && bytes) checker->access(to, bytes, true, __builtin_return_address(0));
  return memset(to, value, bytes);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
