// The register tiles of a depthwise gather: positions of a row x vectors of channels.
#pragma once

#include "chains.h"
#include "depthwise.h"

namespace {

// Products that are added up in registers: those of so many rows of taps along w.
template <class Problem>
struct DepthwiseChain {
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  static constexpr int64_t ALONG_W = most_taps<typename Problem::AxisW>();
  static constexpr int64_t ROWS = greatest(Problem::CHAIN_TERMS / greatest(ALONG_W, 1), 1);
  // Whether a phase may have more of them.
  static constexpr bool SPLIT = most_taps<AxisD>() * most_taps<AxisH>() > ROWS;
  // What no chain could hold, or no stack, is not for these kernels.
  static constexpr bool COMPILED = int64_t(Problem::GROUPS) >= LANES<typename Problem::Real> &&
                                   ALONG_W <= Problem::CHAIN_TERMS &&
                                   int64_t(AxisD::TAPS) * AxisH::TAPS <= 1024;
};

// A tap along d and h of an output row: its row of the source, its weights.
template <class Real>
struct RowTap {
  const Real* source;
  const Real* weight;
};

// Tensors whose positions, and weights whose kernel elements, are so many elements apart.
template <class Problem, int64_t SOURCE_PITCH, int64_t OUTPUT_PITCH, int64_t WEIGHT_PITCH,
          class Output>
struct DepthwiseTile {
  using Real = typename Problem::Real;
  using AxisW = typename Problem::AxisW;
  using Chain = DepthwiseChain<Problem>;
  static constexpr int64_t V = LANES<Real>;

  // P positions x VECTORS of channels over rows of taps; along w COUNT taps from FIRST on, or those
  // from `first` to `end`. `from` and `channel` are added to what the rows point at.
  template <int FIRST, int COUNT, int P, int VECTORS>
  static CONVGEN_INLINE void run(const RowTap<Real>* taps, int64_t count, int64_t from,
                                 int64_t channel, int first, int end, const Real* bias,
                                 Output* out) {
    Vector<Real> acc[P][VECTORS] = {};
    if constexpr (!Chain::SPLIT) {
      add_rows<FIRST, COUNT>(acc, taps, count, from, channel, first, end);
    } else {
      using Sums = ChainSums<Real, P, VECTORS>;
      Sums memory;
      Real* const sums = memory.at();
      int64_t done = 0, r = 0;
      for (; r + Chain::ROWS < count; r += Chain::ROWS) {
        add_rows<FIRST, COUNT>(acc, taps + r, Chain::ROWS, from, channel, first, end);
        Sums::add(sums, acc, ++done);
#pragma GCC unroll 16
        for (int i = 0; i < P * VECTORS; ++i) acc[i / VECTORS][i % VECTORS] = Vector<Real>{};
      }
      add_rows<FIRST, COUNT>(acc, taps + r, count - r, from, channel, first, end);
      if (done > 0) Sums::complete(acc, sums, done);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v)
        store_real<Real>(out + p * AxisW::PHASES * OUTPUT_PITCH + v * V,
                         acc[p][v] + load(bias + v * V));
  }

  // The products of some rows of taps.
  template <int FIRST, int COUNT, int P, int VECTORS>
  static CONVGEN_INLINE void add_rows(Vector<Real> (&acc)[P][VECTORS], const RowTap<Real>* taps,
                                      int64_t count, int64_t from, int64_t channel, int first,
                                      int end) {
    for (const RowTap<Real>* tap = taps; tap < taps + count; ++tap) {
      const Real* const x = tap->source + from;
      const Real* const weight = tap->weight + channel;
      if constexpr (COUNT > 0) {
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; ++j) add_tap(acc, x, weight, AxisW::TAP[FIRST + j]);
      } else {
#pragma GCC unroll 1
        for (int j = first; j < end; ++j) add_tap(acc, x, weight, AxisW::TAP[j]);
      }
    }
  }

  template <int P, int VECTORS>
  static CONVGEN_INLINE void add_tap(Vector<Real> (&acc)[P][VECTORS], const Real* x,
                                     const Real* weight, AxisTap at) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      Vector<Real> w = load(weight + at.tap * WEIGHT_PITCH + v * V);
      if (P > 1) keep(w);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
        acc[p][v] += w * load(x + (p * AxisW::SOURCE_STRIDE + at.offset) * SOURCE_PITCH + v * V);
    }
  }
};

}  // namespace
