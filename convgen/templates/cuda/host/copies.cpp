// Copies that each thread waits for itself, and flags.
#include <string.h>

#include "state.h"

namespace convgen {
namespace host {

void raise_flag(int* flag, Site site) {
  check::raise_flag(*worker->running, flag, site);
  __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
}

// ---- Asynchronous copies --------------------------------------------------------------------

namespace {

void require_aligned(const void* to, const void* from, int bytes, Site site) {
  const uintptr_t alignment = static_cast<uintptr_t>(bytes) - 1;
  for (const void* address : {to, from}) {
    if ((reinterpret_cast<uintptr_t>(address) & alignment) != 0) {
      worker->fault(*worker->running,
                    "unaligned " + std::string(address == to ? "destination" : "source") +
                        " of an asynchronous copy of " + std::to_string(bytes) + " bytes (" +
                        text(site) + ")");
    }
  }
}

// Zeros where `from` is null.
void issue(void* to, const void* from, int bytes, Site site, bool foreign = false) {
  Fiber& fiber = *worker->running;
  const AsyncCopy copy = {to, from, bytes, fiber.committed, foreign};
  check::issue_copy(fiber, copy, false, site);
  memset(to, 0xff, static_cast<size_t>(bytes));
  fiber.copies.push_back(copy);
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, bool valid, Site site) {
  require_aligned(to, from, bytes, site);
  issue(to, valid ? from : nullptr, bytes, site);
}

void copy_vector(void* to, const void* from, int bytes, const void* begin, Site site) {
  constexpr int SIZE = 16;
  require_aligned(to, from, SIZE, site);
  if (bytes < 0 || bytes > SIZE) {
    worker->fault(*worker->running, "an asynchronous copy of " + std::to_string(bytes) +
                                        " of 16 bytes (" + text(site) + ")");
  }
  // What lies before the tensor may be anything.
  const ptrdiff_t before = static_cast<const char*>(begin) - static_cast<const char*>(from);
  const int skipped = before > 0 && before < bytes ? static_cast<int>(before) : 0;
  char* const at = static_cast<char*>(to);
  const char* const first = static_cast<const char*>(from) + skipped;
  if (skipped > 0) issue(at, nullptr, skipped, site, true);
  if (bytes > 0) issue(at + skipped, first, bytes - skipped, site);
  if (bytes < SIZE) issue(at + bytes, nullptr, SIZE - bytes, site);
}

void copy_commit() { ++worker->running->committed; }

void copy_wait(int pending) {
  Fiber& fiber = *worker->running;
  const int limit = fiber.committed - pending;
  size_t done = 0;
  for (; done < fiber.copies.size() && fiber.copies[done].group < limit; ++done) {
    const AsyncCopy& copy = fiber.copies[done];
    check::perform_copy(fiber, copy);
    if (copy.from) {
      memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
      memset(copy.to, copy.foreign ? 0xff : 0, static_cast<size_t>(copy.bytes));
    }
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace host
}  // namespace convgen
