// One weight's gradient from the elements that its tap meets, and from no others.
//
// wgrad proper multiplies whole blocks, and puts zeros where a tap meets nothing. Beside a NaN or
// an infinity these make a NaN that no element which is met accounts for. A weight that comes out
// as NaN is summed here again; one that meets a NaN is done as soon as that is found.
#pragma once

#include "layout.h"
#include "runtime.h"
#include "scratch.h"

namespace {

// Where a kernel element reads; taps are listed by rising offset.
template <class Axis>
int64_t source_offset(int64_t element) {
  for (const AxisTap& tap : Axis::TAP)
    if (tap.tap == element) return tap.offset;
  return 0;
}

// `index` counts the weights of all groups.
template <class Problem>
CONVGEN_NOINLINE double meeting_sum(const ConvgenCall& call, int64_t index) {
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  constexpr int64_t PLANE_TAPS = int64_t(AxisH::TAPS) * AxisW::TAPS;
  constexpr int64_t TAPS = AxisD::TAPS * PLANE_TAPS;
  const int64_t coarse_channels = call.coarse_channels / Problem::GROUPS;
  const int64_t fine_channels = call.fine_channels / Problem::GROUPS;
  const int64_t a = index / (TAPS * fine_channels);  // of all groups
  const int64_t b = a / coarse_channels * fine_channels + index / TAPS % fine_channels;
  const int64_t tap = index % TAPS;
  const int64_t* const coarse_extent = call.coarse_extent;
  const int64_t* const fine_extent = call.fine_extent;
  const Inside d = inside_of<AxisD::SOURCE_STRIDE>(source_offset<AxisD>(tap / PLANE_TAPS),
                                                   fine_extent[0], coarse_extent[0]);
  const Inside h = inside_of<AxisH::SOURCE_STRIDE>(
      source_offset<AxisH>(tap / AxisW::TAPS % AxisH::TAPS), fine_extent[1], coarse_extent[1]);
  const Inside w = inside_of<AxisW::SOURCE_STRIDE>(source_offset<AxisW>(tap % AxisW::TAPS),
                                                   fine_extent[2], coarse_extent[2]);
  const Pitches of_coarse(call.coarse_channels, coarse_extent, call.channels_last & CONVGEN_COARSE);
  const Pitches of_fine(call.fine_channels, fine_extent, call.channels_last & CONVGEN_FINE);
  double sum = 0;
  for (int64_t n = 0; n < call.batch; ++n)
    for (int64_t i = 0; i < d.count(); ++i)
      for (int64_t j = 0; j < h.count(); ++j) {
        const Storage* const coarse =
            static_cast<const Storage*>(call.coarse) + n * of_coarse.image + a * of_coarse.channel +
            (d.begin + i) * of_coarse.axis[0] + (h.begin + j) * of_coarse.axis[1];
        const Storage* const fine = static_cast<const Storage*>(call.fine) + n * of_fine.image +
                                    b * of_fine.channel +
                                    (d.first + i * AxisD::SOURCE_STRIDE) * of_fine.axis[0] +
                                    (h.first + j * AxisH::SOURCE_STRIDE) * of_fine.axis[1];
        for (int64_t k = 0; k < w.count(); ++k)
          sum += double(to_real(coarse[(w.begin + k) * of_coarse.axis[2]])) *
                 double(to_real(fine[(w.first + k * AxisW::SOURCE_STRIDE) * of_fine.axis[2]]));
        if (sum != sum) return sum;
      }
  return sum;
}

}  // namespace
