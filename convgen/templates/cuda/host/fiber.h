// Fibers: stacks with guard pages, and the switch between them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the caller's registers on its stack and its stack pointer in *from, and resumes at `to`.
extern "C" void convgen_switch_fiber(void** from, void* to) __asm__("convgen_switch_fiber");

#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".type convgen_switch_fiber, @function\n"
    "convgen_switch_fiber:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size convgen_switch_fiber, . - convgen_switch_fiber\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n"
    ".type convgen_switch_fiber, %function\n"
    "convgen_switch_fiber:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n"
    ".size convgen_switch_fiber, . - convgen_switch_fiber\n");
#else
#error "the interpreter's fibers are written for x86-64 and aarch64"
#endif

namespace convgen {
namespace host {

// A stack pointer from which the switch starts `entry` at the top of a stack.
inline void* fresh_stack(char* top, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
#if defined(__x86_64__)
  *--sp = nullptr;  // entry's return address: backtraces end here
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
#else
  for (int i = 0; i < 20; ++i) *--sp = nullptr;
  sp[11] = reinterpret_cast<void*>(entry);  // x30
#endif
  return sp;
}

// Stacks for the fibers of one host thread, each above a page that faults.
class Stacks {
 public:
  explicit Stacks(int count) : count_(count), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, count * (SIZE + page_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * (SIZE + page_), page_, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, count_ * (SIZE + page_)); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  int count() const { return count_; }
  char* low(int i) const { return memory_ + i * (SIZE + page_) + page_; }
  // Staggered, lest the hot ends of all stacks share the few cache sets of one page offset.
  char* top(int i) const { return low(i) + SIZE - i % 32 * 128; }

  static constexpr size_t SIZE = 256 * 1024;

 private:
  int count_;
  size_t page_;
  char* memory_;
};

// A few stacks outlive a launch: mapping them takes longer than a small kernel. Not many: each takes
// two of the process's mappings (65530 by Linux's default), and every library keeps its own.
class StackCache {
 public:
  Stacks* take(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i]->count() >= count) {
        Stacks* found = free_[i];
        free_.erase(free_.begin() + static_cast<ptrdiff_t>(i));
        return found;
      }
    }
    return new Stacks(count);
  }
  void give_back(Stacks* stacks) {
    std::lock_guard<std::mutex> lock(mutex_);
    int kept = stacks->count();
    for (const Stacks* each : free_) kept += each->count();
    if (kept > MOST) {
      delete stacks;
    } else {
      free_.push_back(stacks);
    }
  }
  ~StackCache() {
    for (Stacks* stacks : free_) delete stacks;
  }

 private:
  static constexpr int MOST = 128;  // kept stacks: two mappings each, of 65530 in a process
  std::mutex mutex_;
  std::vector<Stacks*> free_;
};

}  // namespace host
}  // namespace convgen
