// What the compiler calls in a CONVGEN_CHECKED build (see checker.h).
#include <string.h>

#include "checker.h"

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
  convgen::host::Checker::forget_launches();
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
