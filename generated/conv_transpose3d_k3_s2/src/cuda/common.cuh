// Shared by the simt engine's kernels: fast division, staging into shared memory, the launch's
// arithmetic on the host.
#pragma once

#include "convgen_abi.h"
#include "device.cuh"

namespace convgen {

constexpr int WARP = 32;
// What an asynchronous copy, and the widest access, takes at once, at multiples of it.
constexpr int VECTOR_BYTES = 16, VECTOR_WORDS = 4;

// ---- Division by a run-time constant --------------------------------------------------------

// Quotients of 0 <= n < 2^31 by a divisor fixed at launch: one high multiplication and a shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), multiplier(0), shift(0) {
    if (d == 1) return;
    uint32_t log2 = 0;
    while ((int64_t{1} << log2) < d) ++log2;
    const uint32_t power = 31 + log2;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << power) + divisor - 1) / divisor);
    shift = power - 32;
  }

  __device__ __forceinline__ int divide(int n) const {
    if (divisor == 1) return n;
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> shift);
  }

  // Divides n in place and returns the remainder.
  __device__ __forceinline__ int split(int& n) const {
    const int quotient = divide(n);
    const int remainder = n - quotient * static_cast<int>(divisor);
    n = quotient;
    return remainder;
  }
};

// ---- Staging --------------------------------------------------------------------------------

// One element into shared memory in the accumulator's type; zero where it is not `valid`.
// Same-typed elements are copied asynchronously (see copy_wait), others converted on the way.
template <typename Acc, typename T>
__device__ __forceinline__ void stage_element(Acc* to, const T* from, bool valid) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    copy_async<sizeof(T)>(to, from, valid);
  } else {
    *to = valid ? widen(*from) : Acc(0);
  }
}

// WIDTH neighbouring elements at once; both addresses are multiples of WIDTH elements.
template <int WIDTH, typename Acc, typename T>
__device__ __forceinline__ void stage_vector(Acc* to, const T* from, bool valid) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    copy_async<WIDTH * sizeof(T)>(to, from, valid);
  } else {
    struct alignas(WIDTH * sizeof(T)) Narrow {
      T element[WIDTH];
    };
    struct alignas(WIDTH * sizeof(Acc)) Wide {
      Acc element[WIDTH];
    };
    Wide wide = {};
    if (valid) {
      const Narrow narrow = *reinterpret_cast<const Narrow*>(from);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) wide.element[i] = widen(narrow.element[i]);
    }
    *reinterpret_cast<Wide*>(to) = wide;
  }
}

// Which threads of a block do a piece of work together: by default all of them.
struct Producers {
  int thread, threads;
};

__device__ __forceinline__ Producers whole_block() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
}

// `count` accumulators (already packed as such). 16-byte copies where ALIGNED says that both sides
// and the count allow them.
template <bool ALIGNED, typename Acc>
__device__ __forceinline__ void stage_packed(const Producers& producers, Acc* to, const Acc* from,
                                             int count) {
  constexpr int WIDTH = ALIGNED ? VECTOR_BYTES / sizeof(Acc) : 1;
  for (int i = producers.thread * WIDTH; i < count; i += producers.threads * WIDTH) {
    copy_async<WIDTH * sizeof(Acc)>(to + i, from + i, true);
  }
}

// COUNT consecutive accumulators out of shared memory, 16 bytes at a time where they allow it
// (the address is then a multiple of 16 bytes).
template <int COUNT, typename Acc>
__device__ __forceinline__ void load_row(Acc (&to)[COUNT], const Acc* from) {
  constexpr int WIDTH = COUNT * sizeof(Acc) % VECTOR_BYTES == 0 ? VECTOR_BYTES / sizeof(Acc) : 1;
  struct alignas(WIDTH * sizeof(Acc)) Wide {
    Acc element[WIDTH];
  };
#pragma unroll
  for (int i = 0; i < COUNT; i += WIDTH) {
    const Wide wide = *reinterpret_cast<const Wide*>(from + i);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) to[i + j] = wide.element[j];
  }
}

// ---- Results --------------------------------------------------------------------------------

// Writes the VARIANTS neighbouring outputs of one position and channel.
template <int VARIANTS, typename T, typename Acc>
__device__ __forceinline__ void store_outputs(T* to, const Acc (&value)[VARIANTS], int valid,
                                              bool vector_store) {
  struct alignas(sizeof(T) * (VARIANTS == 2 || VARIANTS == 4 ? VARIANTS : 1)) Wide {
    T element[VARIANTS];
  };
  if constexpr (VARIANTS == 2 || VARIANTS == 4) {
    if (vector_store) {
      Wide wide;
#pragma unroll
      for (int v = 0; v < VARIANTS; ++v) narrow(wide.element[v], value[v]);
      *reinterpret_cast<Wide*>(to) = wide;
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < VARIANTS; ++v) {
    if (v < valid) narrow(to[v], value[v]);
  }
}

// ---- Host arithmetic ------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Offsets within one channel, and counts of tiles, are 32-bit in the kernels.
constexpr int64_t INDEX_LIMIT = (int64_t{1} << 31) - 1;

// Widest access (in elements, 4, 2 or 1) that rows of `row` elements from `base` allow, if the
// staged copy of one access takes at most 16 bytes.
template <typename T, typename Acc>
int access_width(const void* base, int64_t row) {
  for (int width = 16 / static_cast<int>(sizeof(Acc)); width > 1; width /= 2) {
    if (row % width == 0 && reinterpret_cast<uintptr_t>(base) % (width * sizeof(T)) == 0) {
      return width;
    }
  }
  return 1;
}

// Remembers how the calls that this thread made lately were cut: networks repeat their shapes, and
// a search over cuts takes tens of microseconds. `extra` is whatever else the cut depends on.
template <typename Shape>
class ShapeCache {
 public:
  // The entry for a call, and whether it holds that call's shape already.
  Shape& find(const ConvgenCall& call, int64_t extra, bool& known) {
    Key key = {{call.device, call.batch, call.coarse_channels, call.fine_channels, extra}};
    for (int i = 0; i < 3; ++i) {
      key.value[5 + i] = call.coarse_extent[i];
      key.value[8 + i] = call.fine_extent[i];
    }
    uint64_t hash = 0;
    for (const int64_t value : key.value) hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
    Entry& entry = entries_[hash >> 59];
    known = entry.used;
    for (int i = 0; known && i < KEY_LENGTH; ++i) known = entry.key.value[i] == key.value[i];
    entry.key = key;
    entry.used = true;
    return entry.shape;
  }

  // Forgets the entry that find() returned, whose shape could not be made.
  void forget(Shape& shape) { reinterpret_cast<Entry*>(&shape)->used = false; }

 private:
  static constexpr int KEY_LENGTH = 11;
  struct Key {
    int64_t value[KEY_LENGTH];
  };
  struct Entry {
    Shape shape;  // first: forget() finds the entry by it
    Key key;
    bool used = false;
  };
  Entry entries_[32];
};

inline bool volumes_fit(const ConvgenCall& call) {
  const int64_t* c = call.coarse_extent;
  const int64_t* f = call.fine_extent;
  return c[0] * c[1] * c[2] <= INDEX_LIMIT && f[0] * f[1] * f[2] <= INDEX_LIMIT;
}

}  // namespace convgen

extern "C" __attribute__((weak, visibility("default"))) const char* convgen_error_string(int code) {
  switch (code) {
    case CONVGEN_OK:
      return "no error";
    case CONVGEN_TOO_LARGE:
      return "one channel of a tensor has 2^31 elements or more, or the kernel's window does not "
             "fit into this GPU's shared memory";
    case CONVGEN_BAD_CHANNELS:
      return "the channel counts differ from those that this library was generated for";
    default:
      return convgen::error_name(code);
  }
}
