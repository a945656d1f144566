// How a gather adds up: in chains of multiply-adds, whose sums are added up in turn.
//
// In a long chain of terms of one sign, every term is rounded to the last place of what has grown
// before, and mostly in the same direction. So the registers hold short chains; RADIX of these are
// added up in memory, then RADIX of such sums, and so on.
#pragma once

#include "simd.h"

namespace {

// The chains of one output: each of some source channels with all taps, or of one channel with some
// of many taps.
struct Chains {
  int64_t channels, taps, count;

  // Of `sources` channels and `taps` taps, so many of which are unrolled `together`.
  static Chains choose(int64_t sources, int64_t taps, int64_t together, int64_t most) {
    // Chains of long sums are longer, so that adding them up takes little of the time; what fits in
    // a chain is not cut. Where a channel's taps are few to a chain, whole channels come closest.
    constexpr int64_t PARTS = 12;
    const int64_t all = sources * taps, terms = least(greatest(all / PARTS, most / 2), most);
    if (taps <= most) {
      const int64_t channels =
          all <= most ? greatest(sources, 1) : greatest((terms + taps / 2) / greatest(taps, 1), 1);
      return {channels, taps, ceil_div(sources, channels)};
    }
    const int64_t part = ceil_div(ceil_div(taps, ceil_div(taps, most)), together) * together;
    return {1, part, sources * ceil_div(taps, part)};
  }
};

// Sums of a register tile in memory: of the last chains, of RADIX chains each, of RADIX^2 each.
// Reached through a pointer of which compilers know nothing: they would keep some of them in
// registers, and move the sums of the inner loop about to make room.
template <class Real, int M, int VECTORS>
struct ChainSums {
  static constexpr int64_t RADIX = 16;
  static constexpr int V = LANES<Real>;
  static constexpr int64_t LEVEL = M * VECTORS * V;
  alignas(VECTOR_BYTES) Real values[3 * LEVEL];

  CONVGEN_INLINE Real* at() {
    Real* pointer = values;
    keep(pointer);
    return pointer;
  }

  // Adds the chain that is the `done`-th of its output.
  static CONVGEN_INLINE void add(Real* sums, const Vector<Real> (&acc)[M][VECTORS], int64_t done) {
    if (done % RADIX == 1) {
#pragma GCC unroll 64
      for (int i = 0; i < M * VECTORS; ++i) store(sums + i * V, acc[i / VECTORS][i % VECTORS]);
      return;
    }
#pragma GCC unroll 64
    for (int i = 0; i < M * VECTORS; ++i)
      store(sums + i * V, load(sums + i * V) + acc[i / VECTORS][i % VECTORS]);
    if (done % RADIX == 0) carry(sums, done / RADIX);
  }

  // Adds the sums of a full level to the next one's.
  static CONVGEN_NOINLINE void carry(Real* sums, int64_t done) {
    Real* const next = sums + LEVEL;
    for (int i = 0; i < LEVEL; ++i) next[i] = done % RADIX == 1 ? sums[i] : next[i] + sums[i];
    if (done % RADIX == 0)
      for (int i = 0; i < LEVEL; ++i)
        next[LEVEL + i] = done == RADIX ? next[i] : next[LEVEL + i] + next[i];
  }

  // The last chain, plus the sums of the `done` ones before it.
  static CONVGEN_INLINE void complete(Vector<Real> (&acc)[M][VECTORS], const Real* sums,
                                      int64_t done) {
    const bool present[] = {done % RADIX > 0, done / RADIX % RADIX > 0, done >= RADIX * RADIX};
    for (int level = 0; level < 3; ++level, sums += LEVEL)
      if (present[level])
#pragma GCC unroll 64
        for (int i = 0; i < M * VECTORS; ++i) acc[i / VECTORS][i % VECTORS] += load(sums + i * V);
  }
};

}  // namespace
