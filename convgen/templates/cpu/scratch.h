// Scratch: a block of a source tensor, copied so that every tap reads it at a constant offset.
//
//   source rows (one channel)            scratch, stride 2 along w
//   +--------------------------+         strip 0: 0 s0 s2 s4 s6 ...  (zero halo, even elements)
//   | s0 s1 s2 s3 s4 s5 s6 ... |   -->   strip 1: s1 s3 s5 s7 ... 0  (odd elements)
//   +--------------------------+
//
// Along each axis, position q (of a block of them) and tap j meet source element
// q * SOURCE_STRIDE + TAP[j].offset. The axis is stored as strips of consecutive positions, in one
// of two ways:
//   shared    one strip per residue of the offset modulo SOURCE_STRIDE, as long as the block and
//             its halo; taps of one residue read it at different shifts;
//   separate  one strip per distinct offset, as long as the block: no halo, but elements are
//             repeated. For blocks that are short beside the reach of the taps.
// Elements outside of the source are zeros, so that inner loops test no bounds.
#pragma once

#include "simd.h"

namespace {

// Kernel element `tap` and the source offset at which it reads.
struct AxisTap {
  int64_t tap;
  int64_t offset;
};

template <class Axis>
struct AxisLayout {
  int64_t strips = 0;
  int64_t length = 0;            // positions per strip
  int64_t origin[Axis::TAPS];    // of a strip: its first source element for block position 0
  int64_t strip_of[Axis::TAPS];  // where tap j reads ...
  int64_t shift_of[Axis::TAPS];  // ... position 0

  int64_t size() const { return strips * length; }

  static AxisLayout shared(int64_t block) {
    constexpr int64_t STRIDE = Axis::SOURCE_STRIDE;
    AxisLayout layout;
    int64_t strip_of_residue[STRIDE];
    for (int64_t& strip : strip_of_residue) strip = -1;
    int64_t first = INT64_MAX, last = INT64_MIN;
    for (const AxisTap& tap : Axis::TAP) {
      const int64_t q = floor_div(tap.offset, STRIDE);
      first = least(first, q);
      last = greatest(last, q);
    }
    for (int j = 0; j < Axis::TAPS; ++j) {
      const int64_t q = floor_div(Axis::TAP[j].offset, STRIDE);
      const int64_t residue = Axis::TAP[j].offset - q * STRIDE;
      int64_t& strip = strip_of_residue[residue];
      if (strip < 0) {
        strip = layout.strips++;
        layout.origin[strip] = first * STRIDE + residue;
      }
      layout.strip_of[j] = strip;
      layout.shift_of[j] = q - first;
    }
    layout.length = block + last - first;
    return layout;
  }

  static AxisLayout separate(int64_t block) {
    AxisLayout layout;
    for (int j = 0; j < Axis::TAPS; ++j) {
      int64_t strip = 0;
      while (strip < layout.strips && layout.origin[strip] != Axis::TAP[j].offset) ++strip;
      if (strip == layout.strips) layout.origin[layout.strips++] = Axis::TAP[j].offset;
      layout.strip_of[j] = strip;
      layout.shift_of[j] = 0;
    }
    layout.length = block;
    return layout;
  }

  // The smaller of the two; `halo_cost` weighs halo positions against repeated ones.
  static AxisLayout choose(int64_t block, int64_t halo_cost = 1) {
    const AxisLayout whole = shared(block);
    if (Axis::TAPS > 64) return whole;  // searching offsets would take quadratic time
    const AxisLayout parts = separate(block);
    const int64_t halo = whole.strips * (whole.length - block);
    return parts.size() < whole.strips * block + halo * halo_cost ? parts : whole;
  }
};

// Stores one element. Volatile, so that loops over a few elements stay what they are: the vector
// code or call of memset that compilers make of them takes longer than the row beside them.
template <class Real>
CONVGEN_INLINE void put(Real* to, Real value) {
  *static_cast<volatile Real*>(to) = value;
}

template <class Real>
CONVGEN_INLINE void clear(Real* to, int64_t count) {
  Vector<Real> zeros = {};
  keep(zeros);
  for (; count >= LANES<Real>; count -= LANES<Real>, to += LANES<Real>) store(to, zeros);
#pragma GCC unroll 1
  for (int64_t j = 0; j < count; ++j) put(to + j, Real(0));
}

// to[j] = from[j * STRIDE] for j < count.
template <int STRIDE, class Real, class Storage>
CONVGEN_INLINE void copy_strided(Real* __restrict to, const Storage* __restrict from,
                                 int64_t count) {
  if constexpr (std::is_same_v<Real, Storage> && STRIDE == 1) {
    constexpr int V = LANES<Real>;
    if (count >= V) {
      // Whole vectors, the last one overlapping the one before it.
      for (int64_t j = 0; j < count - V; j += V) store(to + j, load(from + j));
      store(to + count - V, load(from + count - V));
    } else {
#pragma GCC unroll 1
      for (int64_t j = 0; j < count; ++j) put(to + j, from[j]);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = to_real(from[j * STRIDE]);
  }
}

// even[j] = from[2 * j], odd[j] = from[2 * j + 1] for j < count.
template <class Real, class Storage>
CONVGEN_INLINE void copy_pairs(Real* __restrict even, Real* __restrict odd,
                               const Storage* __restrict from, int64_t count) {
  constexpr int V = LANES<Real>;
  if constexpr (std::is_same_v<Real, Storage>) {
    if (count >= V) {
      constexpr std::make_integer_sequence<int, V> LANE;
      for (int64_t j = 0; j < count - V; j += V)
        deinterleave(from + 2 * j, even + j, odd + j, LANE);
      const int64_t last = count - V;
      return deinterleave(from + 2 * last, even + last, odd + last, LANE);
    }
  }
#pragma GCC unroll 1
  for (int64_t j = 0; j < count; ++j) {
    put(even + j, to_real(from[2 * j]));
    put(odd + j, to_real(from[2 * j + 1]));
  }
}

// The part of a strip that lies inside of the source: positions [begin, end), whose elements are
// those from `column` on.
struct Inside {
  int64_t begin, end, column;

  int64_t count() const { return end - begin; }
};

// How one source row becomes strips of scratch. Copies are functions of their own: inlined into the
// loops over rows, they would have too few registers.
template <int STRIDE>
struct RowCopy {
  const Inside* inside;  // of each strip
  int64_t strips;
  int64_t length;  // of a strip
  int64_t pitch;   // from strip to strip
  int even;        // strip of the even columns, where the other one has the odd ones; or -1

  RowCopy(const Inside* inside, int64_t strips, int64_t length, int64_t pitch)
      : inside(inside), strips(strips), length(length), pitch(pitch), even(-1) {
    if (STRIDE == 2 && strips == 2)
      for (int strip = 0; strip < 2; ++strip)
        if (inside[1 - strip].column == inside[strip].column + 1) even = strip;
  }

  template <class Real, class Storage>
  CONVGEN_NOINLINE void copy(Real* to, const Storage* row) const {
    if (STRIDE == 2 && even >= 0) return copy_both(to + even * pitch, to + (1 - even) * pitch, row);
    for (int64_t strip = 0; strip < strips; ++strip, to += pitch) {
      const Inside in = inside[strip];
      clear(to, in.begin);
      copy_strided<STRIDE>(to + in.begin, row + in.column, in.count());
      clear(to + in.end, length - in.end);
    }
  }

  template <class Real>
  CONVGEN_NOINLINE void clear_all(Real* to) const {
    for (int64_t strip = 0; strip < strips; ++strip, to += pitch) clear(to, length);
  }

 private:
  // Both strips from one load of their elements, but for those that only one of them has.
  template <class Real, class Storage>
  CONVGEN_INLINE void copy_both(Real* to_even, Real* to_odd, const Storage* row) const {
    const Inside a = inside[even], b = inside[1 - even];
    const int64_t pairs = least(a.count(), b.count());
    clear(to_even, a.begin);
    clear(to_odd, b.begin);
    copy_pairs(to_even + a.begin, to_odd + b.begin, row + a.column, pairs);
    for (int64_t j = pairs; j < a.count(); ++j)
      put(to_even + a.begin + j, to_real(row[a.column + 2 * j]));
    for (int64_t j = pairs; j < b.count(); ++j)
      put(to_odd + b.begin + j, to_real(row[b.column + 2 * j]));
    clear(to_even + a.end, length - a.end);
    clear(to_odd + b.end, length - b.end);
  }
};

// How far ahead of the row that is copied source rows are prefetched.
constexpr int64_t PREFETCH_BYTES = 2048;

// Where a block of one tensor lies in scratch, channel by channel:
// [strip d][plane][strip h][strip w][row][column].
template <class AxisD, class AxisH, class AxisW>
struct Scratch {
  AxisLayout<AxisD> d;
  AxisLayout<AxisH> h;
  AxisLayout<AxisW> w;

  int64_t pitch() const { return w.length; }  // from row to row
  int64_t strip_w() const { return h.length * w.length; }
  int64_t strip_h() const { return w.strips * strip_w(); }
  int64_t plane() const { return h.strips * strip_h(); }  // from plane to plane
  int64_t channel() const { return d.size() * plane(); }

  // Of the element that a tap reads for the block's first position.
  int64_t offset(int64_t jd, int64_t jh, int64_t jw) const {
    return (d.strip_of[jd] * d.length + d.shift_of[jd]) * plane() + h.strip_of[jh] * strip_h() +
           h.shift_of[jh] * pitch() + w.strip_of[jw] * strip_w() + w.shift_of[jw];
  }

  // Copies the block whose first positions are q0 out of one channel (a volume of `extent`). Strips
  // change fastest, so that source rows are read in the order in which they lie in memory.
  template <class Real, class Storage>
  CONVGEN_NOINLINE void fill(Real* to, const Storage* channel, const int64_t* extent,
                             const int64_t* q0) const {
    constexpr int STRIDE = AxisW::SOURCE_STRIDE;
    Inside inside[AxisW::TAPS];
    for (int64_t sw = 0; sw < w.strips; ++sw) {
      const int64_t x = w.origin[sw] + q0[2] * STRIDE;
      const int64_t begin = least(greatest(ceil_div(-x, STRIDE), 0), w.length);
      const int64_t end = least(greatest(ceil_div(extent[2] - x, STRIDE), begin), w.length);
      inside[sw] = {begin, end, end > begin ? x + begin * STRIDE : 0};
    }
    const RowCopy<STRIDE> rows(inside, w.strips, w.length, strip_w());
    const int64_t row_bytes = extent[2] * int64_t(sizeof(Storage));
    for (int64_t pd = 0; pd < d.length; ++pd)
      for (int64_t sd = 0; sd < d.strips; ++sd) {
        const int64_t z = d.origin[sd] + (q0[0] + pd) * AxisD::SOURCE_STRIDE;
        const bool in_depth = z >= 0 && z < extent[0];
        Real* const plane_to = to + (sd * d.length + pd) * plane();
        for (int64_t ph = 0; ph < h.length; ++ph)
          for (int64_t sh = 0; sh < h.strips; ++sh) {
            const int64_t y = h.origin[sh] + (q0[1] + ph) * AxisH::SOURCE_STRIDE;
            Real* const line = plane_to + sh * strip_h() + ph * pitch();
            if (!in_depth || y < 0 || y >= extent[1]) {
              rows.clear_all(line);
              continue;
            }
            const Storage* const row = channel + (z * extent[1] + y) * extent[2];
            const char* const ahead = reinterpret_cast<const char*>(row) + PREFETCH_BYTES;
            for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(ahead + byte);
            rows.copy(line, row);
          }
      }
  }
};

}  // namespace
