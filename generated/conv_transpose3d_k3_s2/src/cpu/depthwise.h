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

// What the taps of all phases reach: from the least offset on, so many elements.
template <class Axis>
constexpr int64_t least_offset() {
  int64_t offset = Axis::TAP[0].offset;
  for (const AxisTap& tap : Axis::TAP) offset = least(offset, tap.offset);
  return offset;
}

template <class Axis>
constexpr int64_t reach() {
  int64_t offset = Axis::TAP[0].offset;
  for (const AxisTap& tap : Axis::TAP) offset = greatest(offset, tap.offset);
  return offset - least_offset<Axis>() + 1;
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

// Rows of a tensor, `columns` long, to scratch: for each vector of channels [row][column][lanes],
// `step` elements apart. `from` is the first element of the first channel; rows that are `whole`
// follow each other in memory.
template <class Vectors, class Real, class Storage>
CONVGEN_INLINE void stage_rows(Real* to, int64_t step, const Storage* from, const Pitches& pitch,
                               int64_t rows, int64_t columns, bool whole, Span vectors) {
  constexpr int64_t V = LANES<Real>;
  const int64_t lines = whole ? 1 : rows, length = whole ? rows * columns : columns;
  for (int64_t vector = vectors.first; vector < vectors.end; ++vector, to += step)
    for (int64_t line = 0; line < lines; ++line) {
      const Storage* const x = from + Vectors::at(vector) * pitch.channel + line * pitch.axis[1];
      Real* const out = to + line * length * V;
      if (pitch.channel == 1)
        for (int64_t i = 0; i < length; ++i)
          store(out + i * V, load_real<Real>(x + i * pitch.axis[2]));
      else
        transpose<Real>(out, V, x, pitch.channel, V, length);
    }
}

// Weights as [kernel element][channel], PITCH elements from element to element, and the bias, or
// zeros; to be called by all threads of a team.
template <class Problem, int64_t PITCH, class Real>
void pack_depthwise(const ConvgenCall& call, Real* weights, Real* bias) {
  using Storage = typename Problem::Storage;
  constexpr int64_t PIECE = 64, CHANNELS = Problem::GROUPS;
  constexpr int64_t TAPS =
      int64_t(Problem::AxisD::TAPS) * Problem::AxisH::TAPS * Problem::AxisW::TAPS;
  const Storage* const from = static_cast<const Storage*>(call.weight);
#pragma omp for schedule(static)
  for (int64_t c = 0; c < CHANNELS; c += PIECE) {
    const int64_t count = least(PIECE, CHANNELS - c);
    transpose<Real>(weights + c, PITCH, from + c * TAPS, TAPS, count, TAPS);
    if (call.bias)
      convert<Real>(bias + c, static_cast<const Storage*>(call.bias) + c, count);
    else
      memset(bias + c, 0, size_t(count) * sizeof(Real));
  }
}

}  // namespace
