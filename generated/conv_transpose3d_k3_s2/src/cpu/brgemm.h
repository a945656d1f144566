// Batch-reduce GEMM: sums over taps of products of positions x channels with channels x channels.
//
//                     w0        w1                     output channels in the lanes
//   position 0    [ lanes ] [ lanes ]    += source[0][k] (broadcast)
//   position 1    [ lanes ] [ lanes ]       * weight[tap][k][lanes], for all k of all taps
//   ..
//
// Rows of the source, of which each holds the channels of one element, are given by pointers: one
// for each tap and position. So any stride, dilation and padding are alike, and a register tile is
// full wherever its positions lie. The scheme is oneDNN's brgemm, with the pointers of an
// indirection buffer (Dukhan, "The Indirect Convolution Algorithm", 2019).
#pragma once

#include "layout.h"
#include "scratch.h"
#include "simd.h"

namespace {

// Vectors of output channels in a register tile, and positions: sums leave registers for operands.
constexpr int MOST_VECTORS = VECTOR_REGISTERS >= 32 ? 4 : 3;

template <int VECTORS>
constexpr int TILE_POSITIONS =
    VECTOR_REGISTERS >= 32 ? (VECTORS < 3 ? 12 : 24 / VECTORS) : 12 / VECTORS;

// A multiple of them for any number of vectors.
constexpr int64_t TILE_MULTIPLE = 24;

// Positions come in multiples of this, so that few sizes of register tiles do.
template <int VECTORS>
constexpr int TILE_UNIT =
    TILE_POSITIONS<VECTORS> % 3 ? TILE_POSITIONS<VECTORS> / 2 : TILE_POSITIONS<VECTORS> / 3;

// Positions along W of a block in two or three dimensions: long enough for lines to be copied well,
// short enough that a block is compact.
constexpr int64_t BLOCK_COLUMNS = 32;

// Tasks that each thread should have, so that none waits long for the last.
constexpr int64_t TASKS_PER_THREAD = 4;

constexpr int LINE_BYTES = 64;  // of a cache

// What a register tile of one vector takes beside others: it makes as many loads as multiply-adds.
constexpr double ONE_VECTOR_COST = 1.3;

// Processor clocks for an element that a copy transposes, as measured on Zen 3.
constexpr double TRANSPOSED = 2.0;

// The number of vectors that wastes least.
template <class Real>
int tile_vectors(int64_t channels) {
  int vectors = 1;
  double best = 0;
  for (int v = 1; v <= MOST_VECTORS; ++v) {
    const double cost =
        double(round_up(channels, v * LANES<Real>)) * (v == 1 ? ONE_VECTOR_COST : 1.0);
    if (v == 1 || cost <= best) best = cost, vectors = v;
  }
  return vectors;
}

// Positions of a block, side by side: from `begin`, as far as `end`.
struct Range {
  int64_t begin, end;
};

// Points at the rows of `extent` elements that a tap meets from a block of `count` positions, the
// first of them q0, or at zeros; returns what follows them in the table. `met` grows to hold the
// lines of positions that meet any.
template <int STRIDE_W, class Real>
CONVGEN_INLINE const Real** point_at(const Real** to, Range& met, const Real* first_row,
                                     const Real* zeros, const Pitches& rows, const int64_t* extent,
                                     const int64_t* stride, const AxisTap* tap, const int64_t* q0,
                                     const int64_t* count) {
  const Inside in = inside_of<STRIDE_W>(q0[2] * STRIDE_W + tap[2].offset, extent[2], count[2]);
  int64_t at = 0;
  for (int64_t d = 0; d < count[0]; ++d)
    for (int64_t h = 0; h < count[1]; ++h, to += count[2], at += count[2]) {
      const int64_t z = (q0[0] + d) * stride[0] + tap[0].offset;
      const int64_t y = (q0[1] + h) * stride[1] + tap[1].offset;
      const bool meets_any =
          z >= 0 && z < extent[0] && y >= 0 && y < extent[1] && in.begin < in.end;
      if (meets_any) met = {least(met.begin, at), greatest(met.end, at + count[2])};
      const Inside meets = meets_any ? in : Inside{count[2], count[2], 0};
      const Real* line =
          first_row + z * rows.axis[0] + y * rows.axis[1] + meets.first * rows.axis[2];
      int64_t w = 0;
      for (; w < meets.begin; ++w) to[w] = zeros;
      for (; w < meets.end; ++w, line += STRIDE_W * rows.axis[2]) to[w] = line;
      for (; w < count[2]; ++w) to[w] = zeros;
    }
  return to;
}

// One chain of products of every sum.
template <class Real>
struct Chain {
  const Real* weight;         // [tap][channel][lanes]
  const Real* const* source;  // [tap][position]: its channels
  int64_t positions;          // from tap to tap in `source`
  int64_t taps, first_channel, channels;
  Real* const* sums;  // [position]: its output channels
  int64_t first_sum;  // the first of them
  bool adds;          // to what is there
  const Real* bias;   // added in the end, if any
  bool fetches;       // each register tile's rows while the one before it is computed
};

template <int POSITIONS, int VECTORS, class Real>
CONVGEN_NOINLINE void multiply_tile(const Chain<Real>& chain, int64_t at) {
  constexpr int V = LANES<Real>;
  Vector<Real> acc[POSITIONS][VECTORS];
#pragma GCC unroll 16
  for (int p = 0; p < POSITIONS; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[p][v] = Vector<Real>{};
  const Real* weight = chain.weight;
  const Real* const* source = chain.source + at;
  for (int64_t tap = 0; tap < chain.taps; ++tap, source += chain.positions) {
    const Real* x[POSITIONS];
#pragma GCC unroll 16
    for (int p = 0; p < POSITIONS; ++p) x[p] = source[p] + chain.first_channel;
    const auto channel = [&](int64_t k) CONVGEN_INLINE_LAMBDA {
      Vector<Real> w[VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) {
        w[v] = load(weight + v * V);
        keep(w[v]);
      }
      weight += VECTORS * V;
#pragma GCC unroll 16
      for (int p = 0; p < POSITIONS; ++p) {
        const Real value = x[p][k];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) acc[p][v] += w[v] * value;
      }
    };
    int64_t k = 0;
    for (; k + 4 <= chain.channels; k += 4) {
      channel(k);
      channel(k + 1);
      channel(k + 2);
      channel(k + 3);
    }
    for (; k < chain.channels; ++k) channel(k);
  }
  Real* const* sums = chain.sums + at;
#pragma GCC unroll 16
  for (int p = 0; p < POSITIONS; ++p) {
    Real* const to = sums[p] + chain.first_sum;
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      Vector<Real> sum = acc[p][v];
      if (chain.adds) sum += load(to + v * V);
      if (chain.bias) sum += load(chain.bias + v * V);
      store(to + v * V, sum);
    }
  }
}

// Reads the rows of the first tap at some positions ahead of their use. (Compilers drop calls of a
// function that does nothing else.)
template <class Real>
CONVGEN_INLINE void fetch(const Chain<Real>& chain, int64_t at, int64_t end) {
  for (; at < end; ++at)
    for (int64_t k = 0; k < chain.channels; k += LINE_BYTES / int64_t(sizeof(Real)))
      __builtin_prefetch(chain.source[at] + chain.first_channel + k);
}

// Positions from `at`, as far as `end`: a multiple of TILE_UNIT.
template <int VECTORS, class Real>
CONVGEN_NOINLINE void multiply(const Chain<Real>& chain, int64_t at, int64_t end) {
  constexpr int POSITIONS = TILE_POSITIONS<VECTORS>, UNIT = TILE_UNIT<VECTORS>;
  for (; at + POSITIONS <= end; at += POSITIONS) {
    if (chain.fetches) fetch(chain, at + POSITIONS, least(at + 2 * POSITIONS, end));
    multiply_tile<POSITIONS, VECTORS>(chain, at);
  }
  if constexpr (2 * UNIT < POSITIONS)
    if (at + 2 * UNIT <= end) {
      multiply_tile<2 * UNIT, VECTORS>(chain, at);
      return;
    }
  if (at < end) multiply_tile<UNIT, VECTORS>(chain, at);
}

// A line of fine positions: where that of each column begins, and how many they are.
template <class Real>
struct Line {
  const Real* fine;
  int64_t length;
};

// Columns of a weight gradient: a fine channel and a kernel element each. sums[column][lanes] +=
// coarse[q][lanes] * line.fine[offset[column] + q * STRIDE], over the positions q of all lines.
template <class Real>
struct Columns {
  const Real* coarse;  // [position of all lines][lanes]
  const Line<Real>* line;
  int64_t lines, chain;   // so many lines at a time are summed in registers
  const int64_t* offset;  // [column], up to a whole register tile
  int64_t count;          // of columns
  Real* sums;             // [column][lanes], up to a whole register tile
};

template <int COLUMNS, int VECTORS, int STRIDE, class Real>
CONVGEN_NOINLINE void correlate_tile(const Columns<Real>& columns, int64_t first) {
  constexpr int V = LANES<Real>;
  const Real* coarse = columns.coarse;
  const int64_t* const offset = columns.offset + first;
  for (int64_t line = 0; line < columns.lines;) {
    Vector<Real> acc[COLUMNS][VECTORS];
#pragma GCC unroll 16
    for (int p = 0; p < COLUMNS; ++p)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) acc[p][v] = Vector<Real>{};
    const int64_t end = least(line + columns.chain, columns.lines);
    for (; line < end; ++line) {
      const Real* x[COLUMNS];
#pragma GCC unroll 16
      for (int p = 0; p < COLUMNS; ++p) x[p] = columns.line[line].fine + offset[p];
      const auto position = [&](int64_t q) CONVGEN_INLINE_LAMBDA {
        Vector<Real> w[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) {
          w[v] = load(coarse + v * V);
          keep(w[v]);
        }
        coarse += VECTORS * V;
#pragma GCC unroll 16
        for (int p = 0; p < COLUMNS; ++p) {
          const Real value = x[p][q * STRIDE];
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; ++v) acc[p][v] += w[v] * value;
        }
      };
      const int64_t length = columns.line[line].length;
      int64_t q = 0;
      for (; q + 4 <= length; q += 4) {
        position(q);
        position(q + 1);
        position(q + 2);
        position(q + 3);
      }
      for (; q < length; ++q) position(q);
    }
    Real* to = columns.sums + first * VECTORS * V;
#pragma GCC unroll 16
    for (int p = 0; p < COLUMNS; ++p)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v, to += V) store(to, load(to) + acc[p][v]);
  }
}

template <int VECTORS, int STRIDE, class Real>
CONVGEN_NOINLINE void correlate(const Columns<Real>& columns) {
  constexpr int COLUMNS = TILE_POSITIONS<VECTORS>;
  for (int64_t at = 0; at < columns.count; at += COLUMNS)
    correlate_tile<COLUMNS, VECTORS, STRIDE>(columns, at);
}

// What depends on the number of vectors, so that all else is compiled once.
template <class Real>
using Multiply = void (*)(const Chain<Real>&, int64_t, int64_t);
template <class Real>
using Correlate = void (*)(const Columns<Real>&);

template <class Real>
Multiply<Real> multiply_of(int vectors) {
  constexpr Multiply<Real> OF[] = {multiply<1, Real>, multiply<2, Real>, multiply<3, Real>,
                                   multiply<MOST_VECTORS, Real>};
  return OF[vectors - 1];
}

template <int STRIDE, class Real>
Correlate<Real> correlate_of(int vectors) {
  constexpr Correlate<Real> OF[] = {correlate<1, STRIDE, Real>, correlate<2, STRIDE, Real>,
                                    correlate<3, STRIDE, Real>,
                                    correlate<MOST_VECTORS, STRIDE, Real>};
  return OF[vectors - 1];
}

inline int64_t tile_unit(int vectors) {
  constexpr int OF[] = {TILE_UNIT<1>, TILE_UNIT<2>, TILE_UNIT<3>, TILE_UNIT<MOST_VECTORS>};
  return OF[vectors - 1];
}

}  // namespace
