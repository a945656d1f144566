// Where tensors lie: contiguous or channels_last, and copies from one to the other.
#pragma once

#include "convgen_abi.h"
#include "scratch.h"
#include "simd.h"

namespace {

// Distances, in elements, between neighbors of a tensor (N, C, D, H, W) along its dimensions.
struct Pitches {
  int64_t image, channel, axis[3];

  Pitches(int64_t channels, const int64_t* extent, bool channels_last) {
    const int64_t volume = extent[0] * extent[1] * extent[2];
    const int64_t position = channels_last ? channels : 1;
    image = channels * volume;
    channel = channels_last ? 1 : volume;
    axis[0] = extent[1] * extent[2] * position;
    axis[1] = extent[2] * position;
    axis[2] = position;
  }
};

// Lines and planes of a block that are whole in the tensor are joined to one line: `lines` are then
// the block's extents for loops over lines.
inline void join_lines(int64_t* lines, const int64_t* block, const int64_t* extent) {
  for (int axis = 0; axis < 3; ++axis) lines[axis] = block[axis];
  for (int axis = 2; axis > 0 && block[axis] == extent[axis]; --axis) {
    lines[2] *= lines[axis - 1];
    lines[axis - 1] = 1;
  }
}

// Elements of any type as a vector of accumulators, and back.
template <class Real, class Storage>
CONVGEN_INLINE Vector<Real> load_real(const Storage* from) {
  if constexpr (std::is_same_v<Real, Storage>) {
    return load(from);
  } else {
    alignas(VECTOR_BYTES) Real values[LANES<Real>];
    for (int i = 0; i < LANES<Real>; ++i) values[i] = to_real(from[i]);
    return load(values);
  }
}

template <class Real, class Storage>
CONVGEN_INLINE void store_real(Storage* to, Vector<Real> value) {
  if constexpr (std::is_same_v<Real, Storage>) {
    store(to, value);
  } else {
    alignas(VECTOR_BYTES) Real values[LANES<Real>];
    store(values, value);
    for (int i = 0; i < LANES<Real>; ++i) from_real(values[i], to[i]);
  }
}

// Swaps blocks of D lanes between rows i and i + D of every 2 * D rows. For D = 1, 2, 4, ... in
// turn, these are the steps of transposing V rows of V lanes.
template <int D, class Real, int... I>
CONVGEN_INLINE void swap_blocks(Vector<Real>* rows, std::integer_sequence<int, I...>) {
  constexpr int V = LANES<Real>;
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i)
    if (!(i & D)) {
      const Vector<Real> a = rows[i], b = rows[i + D];
      rows[i] = shuffle<(I & D ? V + I - D : I)...>(a, b);
      rows[i + D] = shuffle<(I & D ? V + I : I + D)...>(a, b);
    }
}

template <class Real>
CONVGEN_INLINE void transpose_rows(Vector<Real>* rows) {
  constexpr int V = LANES<Real>;
  constexpr std::make_integer_sequence<int, V> LANE;
  if constexpr (V > 8) swap_blocks<8, Real>(rows, LANE);
  if constexpr (V > 4) swap_blocks<4, Real>(rows, LANE);
  if constexpr (V > 2) swap_blocks<2, Real>(rows, LANE);
  swap_blocks<1, Real>(rows, LANE);
}

// to[column * to_pitch + row] = from[row * from_pitch + column]. BY_COLUMNS: along the rows of `to`
// first, for such as lie far apart.
template <class Real, bool BY_COLUMNS = false, class To, class From>
CONVGEN_NOINLINE void transpose(To* to, int64_t to_pitch, const From* from, int64_t from_pitch,
                                int64_t rows, int64_t columns) {
  constexpr int V = LANES<Real>;
  if (rows < V || columns < V) {
    for (int64_t c = 0; c < columns; ++c)
#pragma GCC unroll 1
      for (int64_t r = 0; r < rows; ++r) {
        const Real value = to_real(from[r * from_pitch + c]);
        from_real(value, to[c * to_pitch + r]);
      }
    return;
  }
  const auto block = [&](int64_t r, int64_t c) {
    Vector<Real> lines[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) lines[i] = load_real<Real>(from + (r + i) * from_pitch + c);
    transpose_rows<Real>(lines);
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) store_real<Real>(to + (c + i) * to_pitch + r, lines[i]);
  };
  // Whole blocks, the last ones overlapping those before them.
  const int64_t outer = BY_COLUMNS ? columns : rows, inner = BY_COLUMNS ? rows : columns;
  for (int64_t i = 0;; i = least(i + V, outer - V)) {
    for (int64_t j = 0;; j = least(j + V, inner - V)) {
      if (BY_COLUMNS)
        block(j, i);
      else
        block(i, j);
      if (j == inner - V) break;
    }
    if (i == outer - V) break;
  }
}

// `count` elements side by side, converted.
template <class Real, class To, class From>
CONVGEN_INLINE void convert(To* to, const From* from, int64_t count) {
  if constexpr (std::is_same_v<To, From> && std::is_same_v<To, Real>) {
    copy_strided<1>(to, from, count);
  } else if constexpr (std::is_same_v<To, From>) {
    memcpy(to, from, size_t(count) * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const Real value = to_real(from[i]);
      from_real(value, to[i]);
    }
  }
}

// A tensor (batch, channels, volume) as rows of channels; to be called by all threads of a team.
template <class Real, class Storage>
void to_rows(Real* to, const Storage* from, int64_t batch, int64_t channels, int64_t volume,
             bool channels_last) {
  constexpr int64_t PIECE = 256;
  const int64_t pieces = ceil_div(volume, PIECE);
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = 0; i < batch * pieces; ++i) {
    const int64_t first = i % pieces * PIECE, count = least(PIECE, volume - first);
    const int64_t image = i / pieces * channels * volume;
    Real* const rows = to + image + first * channels;
    if (channels_last)
      convert<Real>(rows, from + image + first * channels, count * channels);
    else
      transpose<Real>(rows, channels, from + image + first, volume, channels, count);
  }
}

}  // namespace
