// What every unit needs around its kernel: the C boundary's checks, threads, workspace.
#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "convgen_abi.h"
#include "simd.h"

// One definition per library: the units' weak ones merge.
CONVGEN_EXPORT __attribute__((weak)) const char* convgen_error_string(int code) {
  switch (code) {
    case CONVGEN_OK: return "no error";
    case CONVGEN_TOO_LARGE: return "the tensors are too large for this kernel";
    case CONVGEN_BAD_CHANNELS: return "channel counts differ from those the library was built for";
    default: return "unknown error";
  }
}

namespace {

// A register tile: CHANNELS x WIDTH sums, each a vector.
struct TileSize {
  int channels, width;
};

template <int CHANNELS_, int WIDTH_>
struct Tile {
  static constexpr int CHANNELS = CHANNELS_, WIDTH = WIDTH_;
};

// The tiles that a kernel is compiled for, by rising number of channels.
template <class... Tiles>
struct TileList {
  static constexpr TileSize SIZES[] = {{Tiles::CHANNELS, Tiles::WIDTH}...};

  // The first tile that holds all channels of a group, else the last.
  static TileSize choose(int64_t channels) {
    const TileSize* size = SIZES;
    while (size->channels < channels && size != SIZES + sizeof...(Tiles) - 1) ++size;
    return *size;
  }

  // Whether a tile has unrolled code: the one for one channel and the one for many.
  static constexpr bool unrolled(int channels) {
    return channels == 1 || channels == SIZES[sizeof...(Tiles) - 1].channels;
  }

  template <class Visit>
  static void visit(int64_t channels, Visit visit) {
    ((Tiles::CHANNELS == channels ? visit(Tiles{}) : void()), ...);
  }
};

// Hands out 64-byte aligned parts of the workspace; counts them where there is none yet.
struct Workspace {
  int64_t bytes = 0;

  int64_t take(int64_t part) {
    const int64_t at = bytes;
    bytes += round_up(part, 64);
    return at;
  }
};

// Below this many multiply-adds, starting threads costs more than they save.
constexpr double SERIAL_TERMS = 2e5;

inline int thread_count(int64_t wanted, double terms) {
  return terms < SERIAL_TERMS ? 1 : int(greatest(1, least(wanted, 1024)));
}

// Large outputs mostly lie on pages that are not mapped yet, and mapping 4 KB at a time takes
// longer than a memory-bound kernel. Asks for huge pages where only the output lies; a hint, so
// that it may fail.
inline void advise_output(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + uintptr_t(bytes)) & ~(HUGE_PAGE - 1);
  if (bytes >= 4 << 20 && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output;
  (void)bytes;
#endif
}

// False where channels differ from the constants, or groups do not divide them.
inline bool channels_match(int64_t channels, int64_t constant, int64_t groups) {
  return channels >= groups && channels % groups == 0 && (!constant || channels == constant);
}

}  // namespace
