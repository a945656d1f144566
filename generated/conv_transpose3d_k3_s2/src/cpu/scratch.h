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
  if constexpr (!std::is_same_v<Real, Storage>) {
    for (int64_t j = 0; j < count; ++j) even[j] = to_real(from[2 * j]);
    for (int64_t j = 0; j < count; ++j) odd[j] = to_real(from[2 * j + 1]);
  } else if (count >= V) {
    constexpr std::make_integer_sequence<int, V> LANE;
    const int64_t last = count - V;
    for (int64_t j = 0; j < last; j += V) deinterleave(from + 2 * j, even + j, odd + j, LANE);
    deinterleave(from + 2 * last, even + last, odd + last, LANE);
  } else {
#pragma GCC unroll 1
    for (int64_t j = 0; j < count; ++j) {
      put(even + j, from[2 * j]);
      put(odd + j, from[2 * j + 1]);
    }
  }
}

// The part of a strip that lies inside of the source: positions [begin, end), whose elements are
// those from `first` on.
struct Inside {
  int64_t begin, end, first;

  int64_t count() const { return end - begin; }
};

// For a strip of `length` positions that begins at source element `origin`, outside or not.
template <int STRIDE>
inline Inside inside_of(int64_t origin, int64_t extent, int64_t length) {
  const int64_t begin = least(greatest(ceil_div(-origin, STRIDE), 0), length);
  const int64_t end = least(greatest(ceil_div(extent - origin, STRIDE), begin), length);
  return {begin, end, end > begin ? origin + begin * STRIDE : 0};
}

// How source rows become strips of scratch along w.
template <int STRIDE>
struct RowCopy {
  const Inside* inside;  // of each strip
  int64_t strips;
  int64_t length;  // of a strip, and from row to row
  int64_t pitch;   // from strip to strip

  // Copies `rows` rows that are `step` elements apart. Prefetches so many bytes for each of them.
  template <class Real, class Storage>
  CONVGEN_NOINLINE void copy(Real* to, const Storage* from, int64_t step, int64_t rows,
                             int64_t prefetch_bytes) const {
    if (STRIDE == 2 && strips == 2) {
      const int even = inside[0].first < inside[1].first ? 0 : 1;
      if (inside[1 - even].first == inside[even].first + 1)
        return copy_both(to + even * pitch, to + (1 - even) * pitch, inside[even], inside[1 - even],
                         from, step, rows, prefetch_bytes);
    }
    for (int64_t row = 0; row < rows; ++row, to += length, from += step) {
      prefetch(from, prefetch_bytes);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const Inside in = inside[strip];
        Real* const line = to + strip * pitch;
        clear(line, in.begin);
        copy_strided<STRIDE>(line + in.begin, from + in.first, in.count());
        clear(line + in.end, length - in.end);
      }
    }
  }

  template <class Real>
  void clear_rows(Real* to, int64_t rows) const {
    for (int64_t strip = 0; strip < strips; ++strip) clear(to + strip * pitch, rows * length);
  }

 private:
  // Into L2: L1 can wait for fewer lines at a time than memory needs to be busy.
  template <class Storage>
  static CONVGEN_INLINE void prefetch(const Storage* row, int64_t bytes) {
    constexpr int64_t AHEAD = 4096;
    const char* const ahead = reinterpret_cast<const char*>(row) + AHEAD;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
  }

  // Strips of even and odd columns: both from one load, but for columns that only one of them has.
  template <class Real, class Storage>
  CONVGEN_INLINE void copy_both(Real* to_even, Real* to_odd, Inside even, Inside odd,
                                const Storage* from, int64_t step, int64_t rows,
                                int64_t prefetch_bytes) const {
    const int64_t pairs = least(even.count(), odd.count());
    const int64_t next = length;
    for (int64_t row = 0; row < rows; ++row, to_even += next, to_odd += next, from += step) {
      prefetch(from, prefetch_bytes);
      clear(to_even, even.begin);
      clear(to_odd, odd.begin);
      copy_pairs(to_even + even.begin, to_odd + odd.begin, from + even.first, pairs);
      for (int64_t j = pairs; j < even.count(); ++j)
        put(to_even + even.begin + j, to_real(from[even.first + 2 * j]));
      for (int64_t j = pairs; j < odd.count(); ++j)
        put(to_odd + odd.begin + j, to_real(from[odd.first + 2 * j]));
      clear(to_even + even.end, next - even.end);
      clear(to_odd + odd.end, next - odd.end);
    }
  }
};

// Source data that a later fill will read, fetched into L2 step by step while arithmetic runs. For
// layers with one channel on either side, which wait for memory more than they compute.
struct Prefetch {
  const char* next = nullptr;
  const char* end = nullptr;
  int64_t bytes_per_step = 0;

  CONVGEN_INLINE void step() {
    for (const char* stop = next + least(bytes_per_step, end - next); next < stop; next += 64)
      __builtin_prefetch(next, 0, 2);
  }
};

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

  // The source planes of a block whose first positions are q0, to be fetched in `steps`.
  template <class Storage>
  Prefetch planes_of(const Storage* channel, const int64_t* extent, const int64_t* q0,
                     int64_t steps) const {
    const int64_t first = least(q0[0] * AxisD::SOURCE_STRIDE, extent[0]);
    const int64_t last = least((q0[0] + d.length) * AxisD::SOURCE_STRIDE, extent[0]);
    const int64_t plane_bytes = extent[1] * extent[2] * int64_t(sizeof(Storage));
    const char* const begin = reinterpret_cast<const char*>(channel) + first * plane_bytes;
    const int64_t bytes = (last - first) * plane_bytes;
    return {begin, begin + bytes, round_up(ceil_div(bytes, steps), 64)};
  }

  // Copies the block whose first positions are q0 out of one channel (a volume of `extent`).
  template <class Real, class Storage>
  CONVGEN_NOINLINE void fill(Real* to, const Storage* channel, const int64_t* extent,
                             const int64_t* q0) const {
    constexpr int STRIDE_H = AxisH::SOURCE_STRIDE, STRIDE_W = AxisW::SOURCE_STRIDE;
    Inside columns[AxisW::TAPS];
    for (int64_t sw = 0; sw < w.strips; ++sw)
      columns[sw] = inside_of<STRIDE_W>(w.origin[sw] + q0[2] * STRIDE_W, extent[2], w.length);
    const RowCopy<STRIDE_W> rows = {columns, w.strips, w.length, strip_w()};
    const int64_t step = STRIDE_H * extent[2];
    // Planes in the order in which they lie in memory.
    for (int64_t pd = 0; pd < d.length; ++pd)
      for (int64_t sd = 0; sd < d.strips; ++sd) {
        const int64_t z = d.origin[sd] + (q0[0] + pd) * AxisD::SOURCE_STRIDE;
        Real* strip_to = to + (sd * d.length + pd) * plane();
        if (z < 0 || z >= extent[0]) {
          clear(strip_to, plane());
          continue;
        }
        for (int64_t sh = 0; sh < h.strips; ++sh, strip_to += strip_h()) {
          const Inside in =
              inside_of<STRIDE_H>(h.origin[sh] + q0[1] * STRIDE_H, extent[1], h.length);
          const Storage* const from = channel + (z * extent[1] + in.first) * extent[2];
          // The first strip prefetches what lies between its rows, too.
          const int64_t prefetch_bytes = sh == 0 ? step * int64_t(sizeof(Storage)) : 0;
          rows.clear_rows(strip_to, in.begin);
          rows.copy(strip_to + in.begin * pitch(), from, step, in.count(), prefetch_bytes);
          rows.clear_rows(strip_to + in.end * pitch(), h.length - in.end);
        }
      }
  }
};

}  // namespace
