// The checks of a CONVGEN_CHECKED build: every memory access of a kernel, against what exists, what
// was written, and what other threads do without a barrier in between.
//
// Kernels are then compiled with -fsanitize=thread, which calls a hook before every load and store;
// the hooks of hooks.cpp take the place of ThreadSanitizer's library. Shared and registered global
// memory have a shadow: for each pair of bytes, who wrote and read it last, and when.
//
// "When" is a thread's clock: clocks.h tells whether a barrier lies between two accesses.
#pragma once

#include <string>
#include <vector>

#include "clocks.h"
#include "state.h"

namespace convgen {
namespace host {

constexpr size_t GRANULE = 2;  // bytes: the smallest element type
constexpr uint16_t NOBODY = 0xffff, MANY = 0xfffe;
constexpr uint32_t NO_ROW = 0xffffffffu;
constexpr unsigned ALL_BYTES = (1u << GRANULE) - 1;

// What is known of one granule of shared memory.
struct Shadow {
  uint32_t write_clock, read_clock;
  uint32_t interval;  // of the reads: the block's barrier interval
  uint32_t readers;   // which row of clocks, once MANY have read in this interval
  uint32_t fence;     // fences that its writer had passed, or FENCED
  uint16_t writer, reader;
  uint8_t written, in_flight;  // a bit per byte
};
constexpr uint32_t FENCED = 0;  // for the asynchronous proxy: it was the writer

// What asynchronous readers (TMA stores, products of a warp) do with 16 bytes of shared memory.
struct VectorShadow {
  uint32_t pending;  // readers that are under way
  uint16_t reader;   // a thread of the newest
  bool by_warps;     // whether any warp has read it: see Checker::warp_reads_
};

struct SharedRange {
  char* low;
  size_t bytes;
  size_t first;         // granule
  size_t first_vector;  // counted from the multiple of 16 bytes at or before `low`
  std::string name;
  bool is_used = false;  // a static array, by this launch
};

// What is known of one granule of global memory. Threads of different blocks are never ordered.
struct GlobalShadow {
  uint64_t write_block, read_block;  // counted over all launches; 0: none
  uint32_t write_clock, read_clock;
  uint16_t writer, reader;
  uint8_t written;
  bool is_flag;  // the write was raise_flag's
};

struct GlobalRange {
  char* low;
  size_t bytes;
  std::string name;
  bool read_only;
  std::vector<GlobalShadow> shadow;
};

// Those that the calling host thread has registered.
std::vector<GlobalRange>& global_ranges();

// How shared memory is written. What threads write by themselves, and cp.async for them, is not
// there for TMA and wgmma, the asynchronous proxy, before the writer's bulk_fence().
enum class Way : uint8_t { store, copy, bulk };

// Follows the threads of one launch.
class Checker {
 public:
  explicit Checker(Worker& worker);

  void start_block();
  void barrier();  // of the whole block

  // ---- Accesses: by the running thread, from the place in the source that `code` tells ----

  void access(const void* address, size_t bytes, bool write, const void* code);
  void aligned(const void* address, size_t alignment, bool write, const void* code);

  // ---- What the interpreter does for threads: see the namesakes of check::, in state.h ----

  void access(const Fiber& fiber, const void* address, size_t bytes, bool write, const Site& site);
  void raise_flag(const Fiber& fiber, const int* flag, const Site& site);
  void issue_copy(const Fiber& fiber, const AsyncCopy& copy, bool bulk, const Site& site);
  void perform_copy(const Fiber& fiber, const AsyncCopy& copy, Way way);
  void land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier);
  void init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site);
  void use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site);
  void await(const Fiber& fiber);
  void fence(const Fiber& fiber) { ++fences_[static_cast<size_t>(fiber.rank)]; }
  void require_fence(const Fiber& fiber, const void* address, size_t bytes, const Site& site);
  void issue_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                   bool unwritten, const Site& site);
  void perform_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                     const Site& site);

  // New tensors: what the launch before did to them is not known.
  static void forget_launches() { newest_launch_ = 0; }

  Clocks clocks;

 private:
  // Calls visit(granule's shadow, mask of its bytes).
  template <typename Visit>
  void visit(const SharedRange& range, const char* low, size_t bytes, Visit visit) {
    const size_t start = static_cast<size_t>(low - range.low), end = start + bytes;
    for (size_t g = start / GRANULE; g * GRANULE < end; ++g) {
      unsigned mask = ALL_BYTES;
      if (g * GRANULE < start) mask &= ALL_BYTES << (start - g * GRANULE);
      if ((g + 1) * GRANULE > end) mask &= ALL_BYTES >> ((g + 1) * GRANULE - end);
      visit(shadow_[range.first + g], mask);
    }
  }

  const SharedRange* find_shared(const char* low, size_t bytes) const;
  void use(const Fiber& fiber, SharedRange& range, const void* code);
  size_t vector_index(const SharedRange& range, const char* at) const;
  size_t agent(const Fiber& fiber) const;  // the participant of Clocks that its warp's products are

  void access(const Fiber& fiber, const void* address, size_t bytes, bool write, const void* code,
              bool flag = false);
  void read_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                   const void* code);
  void write_shared(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes, Way way,
                    bool landing, const void* code);
  void check_pending_reads(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes,
                           const char* verb, const void* code);
  bool is_unfenced(const Shadow& s) const {
    return s.writer != NOBODY && s.fence != FENCED && s.fence == fences_[s.writer];
  }
  void access_global(const Fiber& fiber, GlobalRange& range, char* low, size_t bytes, bool write,
                     bool flag, const void* code);
  uint3 index_of(uint64_t block) const;
  bool has_awaited(uint16_t t) const;  // await_earlier_kernel(), or knows of one who has
  bool is_earlier(uint64_t block) const { return block >= earlier_launch_ && block < first_block_; }

  // ---- Reports ----

  void beyond(const Fiber& fiber, const SharedRange& range, char* low, size_t bytes, bool write,
              const void* code);
  void race(const Fiber& fiber, const SharedRange& range, const char* low, size_t bytes,
            const char* does, const char* did, uint16_t other, const void* code);
  void unfenced(const Fiber& fiber, const SharedRange& range, const char* low, size_t bytes,
                const char* does, uint16_t writer);
  void unknown(const Fiber& fiber, const char* low, size_t bytes, bool write, const void* code);
  std::string place(const SharedRange& range, const char* low, size_t bytes) const;
  void report(const Fiber& fiber, const std::string& what, const void* code);
  std::string thread(uint16_t rank) const { return text(worker_.fibers[rank].thread); }

  Worker& worker_;
  const size_t threads_, warps_;
  std::vector<SharedRange> shared_;
  std::vector<Shadow> shadow_;
  std::vector<uint32_t> readers_;  // rows of clocks, one per granule with many readers
  size_t used_readers_ = 0;
  std::vector<uint32_t> fences_;  // that each thread has passed, from 1
  std::vector<VectorShadow> vectors_;
  std::vector<uint32_t> warp_reads_;  // for each vector and warp: its clock when it read it last
  bool has_async_reads_ = false;      // in this block
  size_t static_bytes_ = 0;           // of shared arrays that the launch has used
  char *host_stack_low_ = nullptr, *host_stack_high_ = nullptr;
  const std::string* site_ = nullptr;   // of what is done for a thread
  std::vector<std::pair<uint16_t, uint32_t>> awaits_;  // threads of this block, and when
  static thread_local uint64_t block_;  // counts blocks over all launches
  static thread_local uint64_t newest_launch_;  // its first block
  const uint64_t first_block_ = block_ + 1;
  const uint64_t earlier_launch_;  // the first block of the launch before; 0: of anything before
};

extern __thread Checker* checker;

}  // namespace host
}  // namespace convgen
