// How results leave: sums, to which a layer's own contraction may do more before they are stored.
//
// The sums of a block lie in a buffer, as accumulators. There the residual is added, what then goes
// into the activation is stored where a derivative will need it, and the activation is computed.
#pragma once

#include "convgen_abi.h"
#include "elementwise.h"
#include "layout.h"

namespace {

// The phases of an output row side by side: out[q * PHASES + r] = strips[r * pitch + q].
template <int PHASES, class Storage, class Real>
CONVGEN_INLINE void interleave(Storage* __restrict out, const Real* __restrict strips,
                               int64_t pitch, int64_t count) {
  const int64_t whole = count / PHASES;
  for (int64_t q = 0; q < whole; ++q)
    for (int r = 0; r < PHASES; ++r) from_real(strips[r * pitch + q], out[q * PHASES + r]);
  for (int64_t r = 0; r < count % PHASES; ++r)
    from_real(strips[r * pitch + whole], out[whole * PHASES + r]);
}

// Contractions that are no layer's own, or a layer's without an epilogue.
struct NoEpilogue {
  static constexpr bool ACTIVE = false;
};

// What a call does with its sums; `at` and `out` are places in the result.
template <class Problem, bool = Problem::Epilogue::ACTIVE>
class Finish {
 public:
  Finish(const ConvgenCall&, const void*) {}

  template <int PHASES, class Real, class Storage>
  CONVGEN_INLINE void row(const Storage*, Real*, int64_t, int64_t) const {}

  template <class Real, class Storage>
  CONVGEN_INLINE void block(const Storage*, const Pitches&, bool, Real*, const int64_t*, int64_t,
                            const int64_t*) const {}
};

template <class Problem>
class Finish<Problem, true> {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  const Storage* result;
  const Storage* residual;
  Storage* preactivation;
  bool activates;

 public:
  Finish(const ConvgenCall& call, const void* result_)
      : result(static_cast<const Storage*>(result_)),
        residual(call.epilogue & CONVGEN_RESIDUAL ? static_cast<const Storage*>(call.residual)
                                                  : nullptr),
        preactivation(call.epilogue & CONVGEN_PREACTIVATION
                          ? static_cast<Storage*>(call.preactivation)
                          : nullptr),
        activates(call.epilogue & CONVGEN_ACTIVATE) {}

  // A row of the result, whose phases are strips (see interleave).
  template <int PHASES>
  CONVGEN_INLINE void row(const Storage* out, Real* strips, int64_t pitch, int64_t count) const {
    const int64_t at = out - result;
    if (residual)
      for (int r = 0; r < PHASES; ++r)
        for (int64_t i = r, q = r * pitch; i < count; i += PHASES, ++q)
          strips[q] += to_real(residual[at + i]);
    if (preactivation) interleave<PHASES>(preactivation + at, strips, pitch, count);
    if (activates)
      for (int r = 0; r < PHASES; ++r) activate(strips + r * pitch, ceil_div(count - r, PHASES));
  }

  // A block of the result: `sums` of its elements are rows of channels, `pitch` apart, and `last`
  // says whether the result's are, too.
  CONVGEN_INLINE void block(const Storage* out, const Pitches& of, bool last, Real* sums,
                            const int64_t* pitch, int64_t channels, const int64_t* extent) const {
    const int64_t at = out - result;
    for (int64_t d = 0; d < extent[0]; ++d)
      for (int64_t h = 0; h < extent[1]; ++h)
        line(at + d * of.axis[0] + h * of.axis[1], of, last, sums + d * pitch[0] + h * pitch[1],
             pitch[2], channels, extent[2]);
  }

 private:
  CONVGEN_NOINLINE void line(int64_t at, const Pitches& of, bool last, Real* sums, int64_t pitch,
                             int64_t channels, int64_t count) const {
    if (residual && !last) add_transposed(sums, pitch, residual + at, of.channel, channels, count);
    if (preactivation && !last)
      transpose<Real, true>(preactivation + at, of.channel, sums, pitch, count, channels);
    for (int64_t w = 0; w < count; ++w, sums += pitch, at += of.axis[2]) {
      if (residual && last)
        for (int64_t c = 0; c < channels; ++c) sums[c] += to_real(residual[at + c]);
      if (preactivation && last) convert<Real>(preactivation + at, sums, channels);
      if (activates) activate(sums, channels);
    }
  }

  static CONVGEN_NOINLINE void activate(Real* values, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = Problem::Epilogue::activation(values[i]);
  }

  // to[column * to_pitch + row] += from[row * from_pitch + column].
  static CONVGEN_NOINLINE void add_transposed(Real* to, int64_t to_pitch, const Storage* from,
                                              int64_t from_pitch, int64_t rows, int64_t columns) {
    constexpr int V = LANES<Real>;
    const int64_t whole_rows = rows / V * V, whole_columns = columns / V * V;
    for (int64_t r = 0; r < whole_rows; r += V)
      for (int64_t c = 0; c < whole_columns; c += V) {
        Vector<Real> lines[V];
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) lines[i] = load_real<Real>(from + (r + i) * from_pitch + c);
        transpose_rows<Real>(lines);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) {
          Real* const at = to + (c + i) * to_pitch + r;
          store(at, load(at) + lines[i]);
        }
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
        to[c * to_pitch + r] += to_real(from[r * from_pitch + c]);
  }
};

}  // namespace
