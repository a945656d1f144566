// wgrad of kernels of one element with fine channels in the lanes: for few coarse channels.
//
// Such a layer's two tensors are alike. What is transposed, and what lanes hold, may be either's:
// in channels_last the smaller one's lines are copied, and rows of the other are read as they lie.
// The gradient comes out transposed, and is small.
#pragma once

#include "brgemm_wgrad.h"
#include "layout.h"
#include "scratch.h"

namespace {

template <class Problem>
class SwappedWgrad {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using FineLines =
      Lines<typename Problem::AxisD, typename Problem::AxisH, typename Problem::AxisW>;
  static constexpr double LEAST_LANES = 0.6;  // that hold channels

  const ConvgenCall& given;
  ConvgenCall call;
  int64_t coarse_channels, fine_channels;  // of one group
  int64_t swapped_bytes;                   // of the gradient, before the workspace of the other

 public:
  explicit SwappedWgrad(const ConvgenCall& given_)
      : given(given_),
        call(given_),
        coarse_channels(given_.coarse_channels / Problem::GROUPS),
        fine_channels(given_.fine_channels / Problem::GROUPS) {
    std::swap(call.coarse, call.fine);
    std::swap(call.coarse_channels, call.fine_channels);
    for (int axis = 0; axis < 3; ++axis)
      std::swap(call.coarse_extent[axis], call.fine_extent[axis]);
    call.channels_last = (given.channels_last & CONVGEN_COARSE ? CONVGEN_FINE : 0) |
                         (given.channels_last & CONVGEN_FINE ? CONVGEN_COARSE : 0);
    swapped_bytes = round_up(given.coarse_channels * fine_channels * int64_t(sizeof(Storage)), 256);
    call.weight = given.workspace;
    call.workspace = static_cast<char*>(given.workspace) + swapped_bytes;
  }

  // Whether it is faster than what has coarse channels in the lanes, and than other kernels.
  bool suits() const {
    bool pointwise = FineLines::POINTWISE && given.channels_last & CONVGEN_FINE;
    for (int axis = 0; axis < 3; ++axis)
      pointwise = pointwise && call.coarse_extent[axis] == call.fine_extent[axis];
    return pointwise && coarse_channels < fine_channels &&
           BrgemmWgrad<Problem>(call).used_lanes() >= LEAST_LANES;
  }

  int64_t workspace_bytes() const {
    return swapped_bytes + BrgemmWgrad<Problem>(call).workspace_bytes();
  }

  void run() const {
    BrgemmWgrad<Problem>(call).run(call);
    const int64_t count = coarse_channels * fine_channels;
    for (int64_t group = 0; group < Problem::GROUPS; ++group)
      transpose<Real>(static_cast<Storage*>(given.weight) + group * count, fine_channels,
                      static_cast<const Storage*>(call.weight) + group * count, coarse_channels,
                      fine_channels, coarse_channels);
  }
};

}  // namespace
