// The state of the interpreter: threads as fibers, and a worker that runs the blocks of one host
// thread.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "interpreter.h"
#include "sm90.h"
#include "tensor_core.h"

namespace convgen {
namespace host {

constexpr int LANES = 32, WARPS = 4;  // of a warp; of a group
constexpr size_t VECTOR = 16;  // bytes that asynchronous readers take, and a swizzle moves, at a time

enum class State : uint8_t { ready, at_barrier, at_named, at_mbarrier, at_registers, in_warp, done };

enum class WarpOp : uint8_t {
  barrier,
  shuffle,
  ballot,
  // By all lanes of a warp, and the same by each:
  multiply,
  issue,
  group_multiply,
  matrices,
  load_matrices,
  transpose_matrix,
  claim,
  release,
};

// A copy that has been issued and not yet performed.
struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  int group;
  bool foreign = false;  // of what is none of the tensor's, which is 0xff then: NaN in every format
};

// A box of a tensor, and where it lies in shared memory.
struct Box {
  TensorMap map;
  int at[5];  // coordinates of its first element
  char* shared;
};

// A TMA store: its box is read as late as it may be, and written to the tensor later still.
struct BoxStore {
  Box box;
  int group;
  Site site;
  bool is_read;
  std::vector<char> contents;  // of the box, without its swizzle, once it is read
};

// One thread of a block.
struct Fiber {
  uint3 thread;
  int rank;  // in its block
  void* stack_pointer;
  char *stack_low, *stack_top;
  State state;
  Site site;        // where it waits
  void* waits_for;  // a NamedBarrier, or the address of an mbarrier (with its parity in `mask`)
  bool has_awaited;  // the kernel before, in a launch that may begin early
  // The warp collective in which it waits; `value` then receives its result.
  WarpOp op;
  unsigned mask;
  uint64_t value;
  int source;
  int committed;  // groups of copies
  std::vector<AsyncCopy> copies;
  int committed_products;  // batches of them
  std::deque<GroupProduct> products;
  bool has_begun_products;  // wgmma_begin
  int committed_stores;     // groups of them
  std::deque<BoxStore> stores;
  void* fake_stack;  // AddressSanitizer's
};

struct NamedBarrier {
  int threads, arrived;
};

// An mbarrier; it is told by its address in shared memory.
struct Mbarrier {
  int arrivals, pending;  // per phase; of the current phase
  int64_t bytes;          // expected minus landed
  unsigned phase;
  const Fiber* owner;  // who initialized it
  bool is_fenced;      // by mbarrier_fence(), for bulk copies
};

struct BulkCopy {
  AsyncCopy copy;
  uint64_t* barrier;
  Fiber* issuer;
  Site site;
  bool is_box;  // `box` instead of what the copy is from
  Box box;
};

// The wgmmas with both operands in shared memory that a warpgroup has issued, from the
// first that not all of them have.
struct GroupIssues {
  std::deque<GroupProduct> products;
  uint64_t first;
  uint64_t count[4];
};

// The setmaxnregs of a warpgroup: what a thread then has, and whether they claim that.
struct GroupTrades {
  std::vector<std::pair<int, bool>> trades;
  size_t count[4];  // of each warp
};

struct Claim {
  size_t warp;
  int count;
};

// Registers of a block, each number that of a thread.
struct Registers {
  int started;  // at the block's beginning
  int free;     // released by a warp, and claimed by none
  std::vector<int> of_warp;
  std::vector<GroupTrades> groups;
  std::deque<Claim> claims;  // that wait
};

// What the host threads of one launch share.
struct Run {
  const Launch& launch;
  std::string kernel;
  uint64_t blocks;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string fault;  // the first one

  Run(const Launch& launch, std::string kernel, uint64_t blocks)
      : launch(launch), kernel(std::move(kernel)), blocks(blocks) {}
};

// Runs blocks on one host thread.
class Worker {
 public:
  Worker(Run& run, Stacks& stacks);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Blocks of the launch, until none is left or one has failed.
  void work();

  // Back to the scheduler, from a fiber that waits.
  void suspend();

  // Describes what happened to a thread and ends the launch: does not return to a fiber.
  void fault(const Fiber& fiber, const std::string& what);

  // A number below `count`, of those that CONVGEN_INTERPRET_ORDER draws; without it always 0.
  size_t draw(size_t count);

  void arrive_at_barrier(Site site);
  uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int source, Site site);

  Run& run;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;  // null in the scheduler
  uint3 block{};
  unsigned char* dynamic = nullptr;  // shared memory of run.launch.shared_bytes
  NamedBarrier named[16];
  std::map<uint64_t*, Mbarrier> mbarriers;
  std::deque<BulkCopy> bulk_copies;
  std::vector<GroupIssues> groups;
  Registers registers;

 private:
  static void enter();  // what a fiber executes
  void run_block();
  void resume(Fiber& fiber);
  void end_thread();
  bool complete_warp(const Fiber& waiting);
  void finish_collective(std::vector<Fiber*>& lanes);
  void end_block();
  void fresh_shared();
  void free_shared();
  void deadlock();

  Stacks& stacks_;
  void* memory_ = nullptr;  // that `dynamic` lies in
  void* stack_pointer_ = nullptr;  // of the scheduler, while a fiber runs
  unsigned arrived_ = 0, ended_ = 0;
  uint64_t drawn_ = 0;
  // AddressSanitizer's view of the scheduler's stack.
  void* fake_stack_ = nullptr;
  const void* stack_bottom_ = nullptr;
  size_t stack_size_ = 0;
};

extern __thread Worker* worker;

// A bulk copy begins: the rest of what bulk_copy() and tma_load() have in common.
void require_copies_barrier(uint64_t* barrier, const char* what, Site site);
void issue_bulk(const BulkCopy& bulk);

// The oldest bulk copy under way, or any of them (see Worker::draw); false if there is none.
bool land_bulk_copy();

// What a thread at a named barrier or an mbarrier waits for.
std::string describe_wait(const Fiber& fiber);

// Whether bytes lie within dynamic shared memory or one shared array.
bool is_shared(const void* address, size_t bytes);

// "offset 8 of dynamic shared memory".
std::string shared_place(const void* address);

// mma.sync, for the lanes of a warp (see tensor_core.cpp).
void multiply_warp(const std::vector<Fiber*>& lanes);
// ldmatrix and movmatrix.
void load_matrices_by_warp(const std::vector<Fiber*>& lanes);
void transpose_by_warp(const std::vector<Fiber*>& lanes);

// What the lanes of a warp do with wgmmas whose operands lie in shared memory, and with stmatrix (see
// wgmma.cpp).
void issue_by_warp(const std::vector<Fiber*>& lanes);
void multiply_by_warp(const std::vector<Fiber*>& lanes);
void store_matrices_by_warp(const std::vector<Fiber*>& lanes);

// Registers that warps trade (see registers.cpp): at a block's beginning, by the lanes of a warp, what
// a waiting claim says, at a block's end.
void start_registers();
void trade_by_warp(const std::vector<Fiber*>& lanes);
std::string describe_claim(const Fiber& fiber);
void end_registers();

// Boxes of tensors (see tma.cpp): one that lands; what a thread has to have waited for at its end.
void fill_box(const Box& box);
void end_stores(Fiber& fiber);

// Words of reports.
const char* op_name(WarpOp op);
std::string hex(unsigned mask);
std::string text(const Site& site);
std::string text(const uint3& v);  // (x, y, z)

// ---- Static shared memory -------------------------------------------------------------------

// A `__shared__` array of the library: thread-local, at the same distance from shared_anchor() in
// every host thread.
struct SharedArray {
  ptrdiff_t offset;
  size_t bytes;
  std::string name;
};

const std::vector<SharedArray>& shared_arrays();
char* shared_anchor();

// ---- Checks ---------------------------------------------------------------------------------

// Behind dynamic shared memory, to recognize what runs over its end.
constexpr size_t SHARED_MARGIN_BYTES = 64 * 1024;

// What a build with CONVGEN_CHECKED verifies; without it, nothing (see checker.cpp).
namespace check {

#if defined(CONVGEN_CHECKED)
void start_launch(Worker& worker);
void end_launch();
void start_block();
// All threads of the block are ordered with each other; or those listed.
void barrier();
void barrier(const std::vector<Fiber*>& fibers);
// Whoever acquires an object knows what was done before the releases of its last completed phase.
void release(const Fiber& fiber, const void* object);
void complete(const void* object);
void acquire(const Fiber& fiber, const void* object);
void init_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site);
void use_barrier(const Fiber& fiber, uint64_t* barrier, const Site& site);
// A copy under way; what has come of it, for its issuer; or for those that wait for its barrier.
void issue_copy(const Fiber& fiber, const AsyncCopy& copy, bool bulk, const Site& site);
void perform_copy(const Fiber& fiber, const AsyncCopy& copy);
void land_copy(const Fiber& issuer, const AsyncCopy& copy, const void* barrier);
// An access that the interpreter makes for a thread.
void access(const Fiber& fiber, const void* at, size_t bytes, bool write, const Site& site);
void raise_flag(const Fiber& fiber, const int* flag, const Site& site);
// await_earlier_kernel().
void await(const Fiber& fiber);
// bulk_fence(); and what the asynchronous proxy reads, behind the fences of those who wrote it.
void fence(const Fiber& fiber);
void require_fence(const Fiber& fiber, const void* at, size_t bytes, const Site& site);
// Reads of 16 bytes each by the asynchronous proxy, for one thread or a warp: it may read them at
// any time in between. What nobody wrote is a fault, or with `unwritten` NaN.
void issue_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                 bool unwritten, const Site& site);
void perform_reads(const std::vector<Fiber*>& readers, const std::vector<const char*>& vectors,
                   const Site& site);
constexpr bool ENABLED = true;
#else
inline void start_launch(Worker&) {}
inline void end_launch() {}
inline void start_block() {}
inline void barrier() {}
inline void barrier(const std::vector<Fiber*>&) {}
inline void release(const Fiber&, const void*) {}
inline void complete(const void*) {}
inline void acquire(const Fiber&, const void*) {}
inline void init_barrier(const Fiber&, uint64_t*, const Site&) {}
inline void use_barrier(const Fiber&, uint64_t*, const Site&) {}
inline void issue_copy(const Fiber&, const AsyncCopy&, bool, const Site&) {}
inline void perform_copy(const Fiber&, const AsyncCopy&) {}
inline void land_copy(const Fiber&, const AsyncCopy&, const void*) {}
inline void access(const Fiber&, const void*, size_t, bool, const Site&) {}
inline void raise_flag(const Fiber&, const int*, const Site&) {}
inline void await(const Fiber&) {}
inline void fence(const Fiber&) {}
inline void require_fence(const Fiber&, const void*, size_t, const Site&) {}
inline void issue_reads(const std::vector<Fiber*>&, const std::vector<const char*>&, bool,
                        const Site&) {}
inline void perform_reads(const std::vector<Fiber*>&, const std::vector<const char*>&,
                          const Site&) {}
constexpr bool ENABLED = false;
#endif

}  // namespace check
}  // namespace host
}  // namespace convgen

// ---- What the library's caller may call -----------------------------------------------------

// What the caller knows of a tensor's contents.
enum { CONVGEN_INTERPRET_OUTPUT = 0, CONVGEN_INTERPRET_INPUT = 1, CONVGEN_INTERPRET_INOUT = 2 };

// A tensor that the kernels of the calling thread may use, until convgen_interpret_forget(). A
// checked build then finds accesses outside of all tensors, writes to inputs, and reads of what
// no kernel wrote; other builds ignore it.
extern "C" void convgen_interpret_register(void* data, int64_t bytes, const char* name,
                                           int contents);
extern "C" void convgen_interpret_forget();
extern "C" const char* convgen_interpret_mode();   // "plain", "checked" or "address"
extern "C" const char* convgen_interpret_where();  // kernel, block and thread that runs
