// Launches, threads as fibers, and everything that makes a thread wait.
#include "interpreter.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#include "state.h"

namespace convgen {
namespace host {

__thread Worker* worker;

namespace {

// The GPU that the defaults stand in for is an H200.
constexpr int MULTIPROCESSORS = 132;
constexpr int SHARED_LIMIT_BYTES = 227 * 1024;
// Dynamic shared memory begins at a multiple of 16 bytes, and at no larger one, as it does on a GPU
// behind some static shared memory.
constexpr size_t DYNAMIC_OFFSET = 16;

// Freed with the process: a thread may still be in a kernel while destructors run.
StackCache& stack_cache() {
  static StackCache* cache = new StackCache;
  return *cache;
}

thread_local std::string last_fault;

int setting(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}

// The kernel's name out of launch()'s signature: "... [with auto KERNEL = {anonymous}::k<8>; ...]".
std::string kernel_name(const char* signature) {
  std::string name = signature;
  const std::string key = "KERNEL = ";
  const size_t start = name.find(key);
  if (start != std::string::npos) name = name.substr(start + key.size());
  name = name.substr(0, name.find_first_of(";]"));
  for (const char* noise : {"{anonymous}::", "(anonymous namespace)::", "(& ", "&"}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, strlen(noise));
  }
  if (!name.empty() && name.back() == ')' && name.find('(') == std::string::npos) name.pop_back();
  return name;
}

// "thread 5" or "threads 0-31, 40".
std::string ranks(const std::vector<Fiber>& fibers,
                  const std::function<bool(const Fiber&)>& which) {
  std::string list;
  int count = 0;
  for (size_t i = 0; i < fibers.size(); ++i) {
    if (!which(fibers[i])) continue;
    size_t end = i;
    while (end + 1 < fibers.size() && which(fibers[end + 1])) ++end;
    list += (list.empty() ? "" : ", ") + std::to_string(i);
    if (end > i) list += "-" + std::to_string(end);
    count += static_cast<int>(end - i) + 1;
    i = end;
  }
  return (count == 1 ? "thread " : "threads ") + list;
}

bool same(const Site& a, const Site& b) { return a.line == b.line && !strcmp(a.file, b.file); }

}  // namespace

std::string text(const Site& site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// ---- Where a thread is ----------------------------------------------------------------------

uint3 thread_index() { return worker->running->thread; }
uint3 block_index() { return worker->block; }
dim3 block_extent() { return worker->run.launch.block; }
dim3 grid_extent() { return worker->run.launch.grid; }
unsigned lane_index() { return static_cast<unsigned>(worker->running->rank) % LANES; }
void* dynamic_shared() { return worker->dynamic; }
void await_earlier_kernel() {
  worker->running->has_awaited = true;
  check::await(*worker->running);
}

const char* where() {
  static thread_local std::string answer;
  answer = "not in a kernel";
  if (worker && worker->running) {
    answer = "kernel " + worker->run.kernel + ", block " + text(worker->block) + ", thread " +
             text(worker->running->thread);
  }
  return answer.c_str();
}

// ---- Blocks and fibers ----------------------------------------------------------------------

Worker::Worker(Run& run, Stacks& stacks) : run(run), stacks_(stacks) {
  const dim3 extent = run.launch.block;
  fibers.resize(size_t{extent.x} * extent.y * extent.z);
  for (size_t i = 0; i < fibers.size(); ++i) {
    const unsigned rank = static_cast<unsigned>(i);
    fibers[i].thread = {rank % extent.x, rank / extent.x % extent.y, rank / extent.x / extent.y};
    fibers[i].rank = static_cast<int>(i);
    fibers[i].stack_low = stacks.low(static_cast<int>(i));
    fibers[i].stack_top = stacks.top(static_cast<int>(i));
  }
  worker = this;
  check::start_launch(*this);
}

Worker::~Worker() {
  check::end_launch();
  worker = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // Threads that a fault ended left their locals' red zones behind.
  for (const Fiber& fiber : fibers) ASAN_UNPOISON_MEMORY_REGION(fiber.stack_low, Stacks::SIZE);
#endif
  free_shared();
}

void Worker::free_shared() {
#if defined(__SANITIZE_ADDRESS__)
  if (memory_) ASAN_UNPOISON_MEMORY_REGION(memory_, DYNAMIC_OFFSET);
#endif
  free(memory_);
  memory_ = nullptr;
  dynamic = nullptr;
}

void Worker::work() {
  const dim3 grid = run.launch.grid;
  for (;;) {
    const uint64_t linear = run.next_block.fetch_add(1);
    if (linear >= run.blocks || run.failed) return;
    block.x = static_cast<unsigned>(linear % grid.x);
    block.y = static_cast<unsigned>(linear / grid.x % grid.y);
    block.z = static_cast<unsigned>(linear / grid.x / grid.y);
    run_block();
  }
}

void Worker::run_block() {
  fresh_shared();
  check::start_block();
  arrived_ = ended_ = 0;
  memset(named, 0, sizeof named);
  mbarriers.clear();
  bulk_copies.clear();
  groups.assign((fibers.size() + 127) / 128, {});
  start_registers();
  drawn_ = static_cast<uint64_t>(setting("CONVGEN_INTERPRET_ORDER", 0));
  for (Fiber& fiber : fibers) {
    fiber.stack_pointer = fresh_stack(fiber.stack_top, &Worker::enter);
    fiber.has_awaited = false;
    fiber.state = State::ready;
    fiber.committed = 0;
    fiber.copies.clear();
    fiber.committed_products = 0;
    fiber.products.clear();
    fiber.has_begun_products = false;
    fiber.committed_stores = 0;
    fiber.stores.clear();
    fiber.fake_stack = nullptr;
  }
  while (ended_ < fibers.size()) {
    bool progress = false;
    const size_t first = draw(fibers.size());
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[(first + i) % fibers.size()];
      if (fiber.state != State::ready) continue;
      progress = true;
      resume(fiber);
      if (run.failed) return;
    }
    if (!progress && !land_bulk_copy()) return deadlock();
  }
  end_block();
}

// Knuth's linear congruential generator, of which the upper bits are good.
size_t Worker::draw(size_t count) {
  if (drawn_ == 0) return 0;
  drawn_ = drawn_ * 6364136223846793005u + 1442695040888963407u;
  return static_cast<size_t>((drawn_ >> 33) % count);
}

void Worker::end_block() {
  const auto waited = [](const Fiber& fiber) { return fiber.has_awaited; };
  if (run.launch.early && std::none_of(fibers.begin(), fibers.end(), waited)) {
    // Kernels behind it know that it has ended, and take it that those before it have.
    return fault(fibers.front(), "the block ended without await_earlier_kernel()");
  }
  end_registers();
  if (run.failed) return;
  if (!bulk_copies.empty()) {
    const BulkCopy& bulk = bulk_copies.front();
    return fault(*bulk.issuer, "the block ended before its copy (" + text(bulk.site) + ") landed");
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    const GroupIssues& group = groups[g];
    if (group.products.empty()) continue;
    for (size_t warp = 0; warp < 4; ++warp) {
      if (group.count[warp] == group.first + group.products.size()) continue;
      const size_t rank = std::min(128 * g + LANES * warp, fibers.size() - 1);
      const Site missed = group.products[group.count[warp] - group.first].site;
      return fault(fibers[rank], "a wgmma (" + text(missed) +
                                     ") by other warps of its group and not by its own: the block "
                                     "ended");
    }
  }
}

// Shared memory starts out as NaN (and -1), as whatever a GPU's last block left there.
void Worker::fresh_shared() {
  const size_t bytes = static_cast<size_t>(run.launch.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  // Exactly as large as asked for, so that red zones follow.
  free_shared();
#endif
  if (!dynamic) {
    const size_t beyond = check::ENABLED ? SHARED_MARGIN_BYTES : 0;
    if (posix_memalign(&memory_, 1024, DYNAMIC_OFFSET + bytes + beyond)) abort();
    dynamic = static_cast<unsigned char*>(memory_) + DYNAMIC_OFFSET;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory_, DYNAMIC_OFFSET);
#endif
  }
  memset(dynamic, 0xff, bytes);
  for (const SharedArray& array : shared_arrays()) {
    memset(shared_anchor() + array.offset, 0xff, array.bytes);
  }
}

void Worker::resume(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack_low, Stacks::SIZE);
#endif
  convgen_switch_fiber(&stack_pointer_, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  running = nullptr;
}

void Worker::suspend() {
  Fiber& fiber = *running;
#if defined(__SANITIZE_ADDRESS__)
  const bool last = fiber.state == State::done || run.failed;
  if (last) __asan_handle_no_return();  // or this frame's red zones would stay on the stack
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, stack_bottom_, stack_size_);
#endif
  convgen_switch_fiber(&fiber.stack_pointer, stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_bottom_, &stack_size_);
#endif
}

void Worker::enter() {
  Worker& self = *worker;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.stack_bottom_, &self.stack_size_);
#endif
  self.run.launch.body(self.run.launch.arguments);
  self.end_thread();
}

void Worker::end_thread() {
  Fiber& fiber = *running;
  fiber.state = State::done;
  ++ended_;
  if (arrived_ > 0) {
    fault(fiber, "divergent barrier: it ended while " + ranks(fibers, [](const Fiber& f) {
                   return f.state == State::at_barrier;
                 }) + " wait at __syncthreads");
  }
  if (!fiber.products.empty()) {
    fault(fiber, "it ended before its products (" + text(fiber.products.front().site) +
                     ") did: wgmma_wait is missing");
  }
  end_stores(fiber);
  // Lanes that wait for this one need wait no longer.
  const size_t first = static_cast<size_t>(fiber.rank) / LANES * LANES;
  for (size_t i = first; i < std::min(first + LANES, fibers.size()); ++i) {
    if (fibers[i].state == State::in_warp) complete_warp(fibers[i]);
  }
  suspend();
}

void Worker::fault(const Fiber& fiber, const std::string& what) {
  {
    std::lock_guard<std::mutex> lock(run.mutex);
    if (run.fault.empty()) {
      run.fault = "kernel " + run.kernel + ", block " + text(block) + ", thread " +
                  text(fiber.thread) + ": " + what;
    }
  }
  if (setting("CONVGEN_INTERPRET_ABORT", 0)) {
    // For debuggers: the fiber's stack is the current one.
    fprintf(stderr, "convgen interpreter: %s\n", run.fault.c_str());
    abort();
  }
  run.failed = true;
  if (running) suspend();
}

void Worker::deadlock() {
  std::string what = "deadlock: no thread can go on";
  std::vector<bool> told(fibers.size());
  const Fiber* first = nullptr;
  for (size_t i = 0; i < fibers.size(); ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state == State::done || told[i]) continue;
    if (!first) first = &fiber;
    auto alike = [&](const Fiber& f) {
      if (f.state != fiber.state || !same(f.site, fiber.site)) return false;
      if (f.state == State::at_barrier) return true;
      if (f.state == State::in_warp) return f.op == fiber.op && f.mask == fiber.mask;
      return f.waits_for == fiber.waits_for && f.mask == fiber.mask;
    };
    what += "; " + ranks(fibers, alike) + " at ";
    if (fiber.state == State::at_barrier) {
      what += "__syncthreads";
    } else if (fiber.state == State::in_warp) {
      what += std::string(op_name(fiber.op)) + " with mask " + hex(fiber.mask);
    } else {
      what += fiber.state == State::at_registers ? describe_claim(fiber) : describe_wait(fiber);
    }
    what += " (" + text(fiber.site) + ")";
    for (size_t j = i; j < fibers.size(); ++j) told[j] = told[j] || alike(fibers[j]);
  }
  if (ended_ > 0) {
    what += "; " + ranks(fibers, [](const Fiber& f) { return f.state == State::done; }) + " ended";
  }
  fault(*first, what);
}

// ---- Barriers -------------------------------------------------------------------------------

void Worker::arrive_at_barrier(Site site) {
  Fiber& fiber = *running;
  fiber.site = site;
  if (ended_ > 0) {
    fault(fiber, "divergent barrier: it waits at __syncthreads (" + text(site) + "), but " +
                     ranks(fibers, [](const Fiber& f) { return f.state == State::done; }) +
                     " ended without");
  }
  for (const Fiber& other : fibers) {
    // One comparison with any that waits: those before were compared with each other.
    if (arrived_ == 0) break;
    if (other.state != State::at_barrier) continue;
    if (!same(other.site, site)) {
      fault(fiber, "divergent barrier: it waits at __syncthreads (" + text(site) +
                       "), but thread " + text(other.thread) + " waits at another one (" +
                       text(other.site) + ")");
    }
    break;
  }
  fiber.state = State::at_barrier;
  if (++arrived_ < fibers.size()) return suspend();
  arrived_ = 0;
  for (Fiber& f : fibers) f.state = State::ready;
  check::barrier();
}

void block_barrier(Site site) { worker->arrive_at_barrier(site); }

// ---- Launches -------------------------------------------------------------------------------

int multiprocessors() {
  return std::max(1, setting("CONVGEN_INTERPRET_MULTIPROCESSORS", MULTIPROCESSORS));
}

int shared_limit_bytes() { return setting("CONVGEN_INTERPRET_SHARED_BYTES", SHARED_LIMIT_BYTES); }

cudaError_t run(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      !block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes < 0 || launch.shared_bytes > shared_limit_bytes()) {
    return cudaErrorInvalidValue;
  }
  if (launch.bound > 0 && block.x * block.y * block.z > static_cast<unsigned>(launch.bound)) {
    return cudaErrorInvalidValue;
  }
  Run run(launch, kernel_name(launch.kernel), uint64_t{grid.x} * grid.y * grid.z);
  const int threads = static_cast<int>(block.x * block.y * block.z);
  int hosts =
      setting("CONVGEN_INTERPRET_THREADS", static_cast<int>(std::thread::hardware_concurrency()));
  if (check::ENABLED) hosts = 1;  // the checks follow one block after the other
  // Where there is no memory for one more thread's stacks, or no thread, the others do its part.
  std::atomic<int> workers{0};
  auto work = [&] {
    Stacks* stacks;
    try {
      stacks = stack_cache().take(threads);
    } catch (const std::bad_alloc&) {
      return;
    }
    ++workers;
    Worker(run, *stacks).work();
    stack_cache().give_back(stacks);
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < hosts && static_cast<uint64_t>(i) < run.blocks; ++i) {
      others.emplace_back(work);
    }
  } catch (const std::system_error&) {
  }
  work();
  for (std::thread& other : others) other.join();
  if (workers == 0) return cudaErrorMemoryAllocation;
  if (!run.failed) return cudaSuccess;
  last_fault = run.fault;
  return cudaErrorLaunchFailure;
}

const char* error_text(int code) {
  switch (code) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return last_fault.empty() ? "unspecified launch failure" : last_fault.c_str();
    default:
      return "unknown error";
  }
}

}  // namespace host
}  // namespace convgen

extern "C" __attribute__((visibility("default"))) const char* convgen_interpret_mode() {
#if defined(CONVGEN_CHECKED)
  return "checked";
#elif defined(__SANITIZE_ADDRESS__)
  return "address";
#else
  return "plain";
#endif
}

#if !defined(CONVGEN_CHECKED)
extern "C"
    __attribute__((visibility("default"))) void convgen_interpret_register(void*, int64_t,
                                                                           const char*, int) {}
extern "C" __attribute__((visibility("default"))) void convgen_interpret_forget() {}
#endif

extern "C" __attribute__((visibility("default"))) const char* convgen_interpret_where() {
  return convgen::host::where();
}
