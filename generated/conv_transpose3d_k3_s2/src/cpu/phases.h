// The phases of a gather's output, and their taps.
#pragma once

#include "simd.h"

namespace {

// Output positions of one residue per axis: they meet the same taps.
struct Phase {
  int64_t residue[3];
  int64_t index, first, taps;  // among all phases; its first tap in packed order; its taps
  int first_tap[3], last_tap[3];
};

template <class AxisD, class AxisH, class AxisW>
struct Phases {
  // Calls visit(phase) for every phase, w fastest: the order of packed weights and offsets.
  template <class Visit>
  static CONVGEN_INLINE void for_phases(Visit visit) {
    Phase phase = {};
    for (int rd = 0; rd < AxisD::PHASES; ++rd)
      for (int rh = 0; rh < AxisH::PHASES; ++rh)
        for (int rw = 0; rw < AxisW::PHASES; ++rw) {
          const int first[3] = {AxisD::FIRST[rd], AxisH::FIRST[rh], AxisW::FIRST[rw]};
          const int last[3] = {AxisD::FIRST[rd + 1], AxisH::FIRST[rh + 1], AxisW::FIRST[rw + 1]};
          const int residue[3] = {rd, rh, rw};
          phase.taps = 1;
          for (int axis = 0; axis < 3; ++axis) {
            phase.residue[axis] = residue[axis];
            phase.first_tap[axis] = first[axis];
            phase.last_tap[axis] = last[axis];
            phase.taps *= last[axis] - first[axis];
          }
          visit(phase);
          phase.first += phase.taps;
          ++phase.index;
        }
  }

  // Calls visit(jd, jh, jw) for every tap of a phase, by its places in the axes' lists.
  template <class Visit>
  static CONVGEN_INLINE void for_taps(const Phase& phase, Visit visit) {
    for (int jd = phase.first_tap[0]; jd < phase.last_tap[0]; ++jd)
      for (int jh = phase.first_tap[1]; jh < phase.last_tap[1]; ++jh)
        for (int jw = phase.first_tap[2]; jw < phase.last_tap[2]; ++jw) visit(jd, jh, jw);
  }

  // The kernel element of a tap: its place in the weights of two channels.
  static CONVGEN_INLINE int64_t element(int jd, int jh, int jw) {
    return (AxisD::TAP[jd].tap * AxisH::TAPS + AxisH::TAP[jh].tap) * AxisW::TAPS +
           AxisW::TAP[jw].tap;
  }
};

}  // namespace
