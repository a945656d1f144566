// What the kernels for depthwise layers share: groups of one channel in either tensor.
//
// Channels lie in the lanes of vectors. Positions are rows of channels, a known number of elements
// apart, so that the addresses of a register tile are constants beside one pointer. What a tap
// meets beyond the border is left out, never multiplied by zeros: no element reaches what does not
// read it, and borders take no more time than their products.
#pragma once

#include "layout.h"
#include "runtime.h"
#include "scratch.h"

namespace {

// The channels as vectors. Where the last ones do not fill a vector, it begins earlier, and
// computes some channels that the one before it computes, too: the same products, added in the same
// order.
template <class Real, int64_t CHANNELS>
struct ChannelVectors {
  static constexpr int64_t V = LANES<Real>;
  static constexpr int64_t COUNT = ceil_div(CHANNELS, V), WHOLE = CHANNELS / V;

  // The first channel of a vector.
  static constexpr int64_t at(int64_t vector) { return least(vector * V, CHANNELS - V); }

  // Calls visit(std::integral_constant<int, COUNT>, vector) for vectors from `first` to `end`,
  // MOST neighbors at a time where their channels follow each other.
  template <int MOST, class Visit>
  static CONVGEN_INLINE void visit(int64_t first, int64_t end, Visit visit) {
    int64_t vector = first;
    if constexpr (MOST > 1)
      for (; vector + MOST <= least(end, WHOLE); vector += MOST)
        visit(std::integral_constant<int, MOST>{}, vector);
    for (; vector < end; ++vector) visit(std::integral_constant<int, 1>{}, vector);
  }
};

// Taps of a phase along an axis, at most.
template <class Axis>
constexpr int64_t most_taps() {
  int64_t most = 0;
  for (int r = 0; r < Axis::PHASES; ++r) most = greatest(most, Axis::FIRST[r + 1] - Axis::FIRST[r]);
  return most;
}

// Positions of a row, [first, end), for which a tap's source position lies inside.
struct Span {
  int64_t first, end;
};

template <int STRIDE>
inline Span span_of(int64_t offset, int64_t source_extent, int64_t extent) {
  const int64_t first = least(greatest(ceil_div(-offset, STRIDE), 0), extent);
  const int64_t end = least(greatest(ceil_div(source_extent - offset, STRIDE), first), extent);
  return {first, end};
}

}  // namespace
