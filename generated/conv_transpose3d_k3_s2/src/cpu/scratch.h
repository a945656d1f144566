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

// to[j] = from[j * STRIDE] for j < count.
template <int STRIDE, class Real, class Storage>
CONVGEN_INLINE void copy_strided(Real* __restrict to, const Storage* __restrict from,
                                 int64_t count) {
  constexpr int V = LANES<Real>;
  if constexpr (std::is_same_v<Real, Storage> && STRIDE <= 2) {
    if (count >= V) {
      // Whole vectors, the last one overlapping the one before it.
      for (int64_t j = 0;; j = least(j + V, count - V)) {
        if constexpr (STRIDE == 1)
          store(to + j, load(from + j));
        else
          store(to + j, load_even(from + 2 * j, std::make_integer_sequence<int, V>{}));
        if (j == count - V) return;
      }
    }
#pragma GCC unroll 1
    for (int64_t j = 0; j < count; ++j) to[j] = from[j * STRIDE];
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = to_real(from[j * STRIDE]);
  }
}

// Zeros, mostly one or two: volatile, because the call of memset that the compiler would make of the
// loop takes longer than the row beside it.
template <class Real>
CONVGEN_INLINE void clear(Real* to, int64_t count) {
  if (count >= LANES<Real>) {
    memset(to, 0, size_t(count) * sizeof(Real));
  } else {
    for (int64_t j = 0; j < count; ++j) *static_cast<volatile Real*>(to + j) = 0;
  }
}

// Where a block of one tensor lies in scratch, channel by channel:
// [strip d][plane][strip h][strip w][row][column].
constexpr int PREFETCH_BYTES = 4096;
template <class AxisD, class AxisH, class AxisW>
struct Scratch {
  AxisLayout<AxisD> d;
  AxisLayout<AxisH> h;
  AxisLayout<AxisW> w;

  int64_t pitch() const { return w.length; }                      // from row to row
  int64_t strip_w() const { return h.length * w.length; }
  int64_t strip_h() const { return w.strips * strip_w(); }
  int64_t plane() const { return h.strips * strip_h(); }          // from plane to plane
  int64_t channel() const { return d.size() * plane(); }

  int64_t offset(int64_t jd, int64_t jh, int64_t jw) const {
    return (d.strip_of[jd] * d.length + d.shift_of[jd]) * plane() +
           h.strip_of[jh] * strip_h() + h.shift_of[jh] * pitch() +
           w.strip_of[jw] * strip_w() + w.shift_of[jw];
  }

  // Copies the block whose first positions are q0 out of one channel (a volume of `extent`). Strips
  // change fastest, so that source rows are read in the order in which they lie in memory.
  template <class Real, class Storage>
  CONVGEN_NOINLINE void fill(Real* to, const Storage* channel, const int64_t* extent,
                             const int64_t* q0) const {
    constexpr int64_t STRIDE[3] = {AxisD::SOURCE_STRIDE, AxisH::SOURCE_STRIDE,
                                   AxisW::SOURCE_STRIDE};
    Inside inside[AxisW::TAPS];
    for (int64_t sw = 0; sw < w.strips; ++sw) {
      const int64_t x = w.origin[sw] + q0[2] * STRIDE[2];
      const int64_t begin = least(greatest(ceil_div(-x, STRIDE[2]), 0), w.length);
      const int64_t end = least(greatest(ceil_div(extent[2] - x, STRIDE[2]), begin), w.length);
      inside[sw] = {begin, end, end > begin ? x + begin * STRIDE[2] : 0};
    }
    for (int64_t pd = 0; pd < d.length; ++pd)
      for (int64_t sd = 0; sd < d.strips; ++sd)
        for (int64_t ph = 0; ph < h.length; ++ph)
          for (int64_t sh = 0; sh < h.strips; ++sh) {
            const int64_t z = d.origin[sd] + (q0[0] + pd) * STRIDE[0];
            const int64_t y = h.origin[sh] + (q0[1] + ph) * STRIDE[1];
            Real* line = to + (sd * d.length + pd) * plane() + sh * strip_h() + ph * pitch();
            if (z < 0 || z >= extent[0] || y < 0 || y >= extent[1]) {
              for (int64_t sw = 0; sw < w.strips; ++sw) clear(line + sw * strip_w(), w.length);
              continue;
            }
            const Storage* row = channel + (z * extent[1] + y) * extent[2];
            for (int64_t j = 0; j < extent[2]; j += 64 / int64_t(sizeof(Storage)))
              __builtin_prefetch(row + PREFETCH_BYTES / sizeof(Storage) + j);
            for (int64_t sw = 0; sw < w.strips; ++sw, line += strip_w()) {
              const Inside in = inside[sw];
              clear(line, in.begin);
              copy_strided<STRIDE[2]>(line + in.begin, row + in.source, in.end - in.begin);
              clear(line + in.end, w.length - in.end);
            }
          }
  }

 private:
  // Positions of a w-strip that lie inside of the source, and the source column of the first.
  struct Inside {
    int64_t begin, end, source;
  };
};

}  // namespace
