// Lines of positions of a tensor, one for each channel: as they lie, or copied with zeros around
// them, so that what a tap reads lies at one distance from every position.
#pragma once

#include "layout.h"
#include "scratch.h"

namespace {

template <class AxisD, class AxisH, class AxisW>
class Lines {
  static constexpr int64_t AXIS_TAPS[3] = {AxisD::TAPS, AxisH::TAPS, AxisW::TAPS};
  static constexpr int64_t AXIS_STRIDE[3] = {AxisD::SOURCE_STRIDE, AxisH::SOURCE_STRIDE,
                                             AxisW::SOURCE_STRIDE};
  static constexpr int64_t COPIED_POSITIONS = 256;  // at once
  // Lines at multiples of this lie in few sets of the L1 cache, and drive each other out.
  static constexpr int64_t CONFLICT_BYTES = 1024, APART_BYTES = 64;
  static constexpr int64_t SLACK_BYTES = VECTOR_BYTES;  // behind the copy: may be read

  int64_t channels, extent[3];  // of the tensor
  bool last;                    // it is channels_last
  int64_t step[3];              // elements of the tensor from one of a line to the next
  int64_t begin[3], held[3];    // elements that lines hold: the first, maybe outside; so many

 public:
  // From one position to the next in a line: where W has a single tap, what it reads is copied side
  // by side.
  static constexpr int64_t STRIDE = AxisW::TAPS == 1 ? 1 : AxisW::SOURCE_STRIDE;
  // One tap, at the position itself: then all positions are one line.
  static constexpr bool POINTWISE = AXIS_TAPS[0] * AXIS_TAPS[1] * AXIS_TAPS[2] == 1 &&
                                    AXIS_STRIDE[0] * AXIS_STRIDE[1] * AXIS_STRIDE[2] == 1 &&
                                    AxisD::TAP[0].offset == 0 && AxisH::TAP[0].offset == 0 &&
                                    AxisW::TAP[0].offset == 0;

  bool copied;                       // converted, too
  int64_t image, channel, pitch[3];  // distances, in elements

  Lines() = default;

  // For positions 0 to `positions` of a tensor of so many channels in all.
  Lines(const int64_t* positions, int64_t channels_, const int64_t* extent_, bool channels_last,
        bool converts, int64_t real_bytes)
      : channels(channels_), last(channels_last) {
    copied = converts || last || STRIDE != AXIS_STRIDE[2];
    const AxisTap* const taps[3] = {AxisD::TAP, AxisH::TAP, AxisW::TAP};
    int64_t end[3];
    for (int axis = 0; axis < 3; ++axis) {
      extent[axis] = extent_[axis];
      begin[axis] = end[axis] = taps[axis][0].offset;
      for (int64_t j = 0; j < AXIS_TAPS[axis]; ++j) {
        begin[axis] = least(begin[axis], taps[axis][j].offset);
        end[axis] = greatest(end[axis], taps[axis][j].offset);
      }
      end[axis] += greatest(positions[axis] - 1, 0) * AXIS_STRIDE[axis] + 1;
      copied = copied || begin[axis] < 0 || end[axis] > extent[axis];
    }
    for (int axis = 0; axis < 3; ++axis) {
      if (!copied) begin[axis] = 0, end[axis] = extent[axis];
      step[axis] = copied && AXIS_TAPS[axis] == 1 ? AXIS_STRIDE[axis] : 1;
      held[axis] = ceil_div(end[axis] - begin[axis], step[axis]);
    }
    channel = held[0] * held[1] * held[2];
    if (copied && channel * real_bytes % CONFLICT_BYTES == 0) channel += APART_BYTES / real_bytes;
    image = channels * channel;
    pitch[2] = 1;
    pitch[1] = held[2];
    pitch[0] = held[2] * held[1];
  }

  int64_t copy_bytes(int64_t batch, int64_t real_bytes) const {
    return copied ? batch * image * real_bytes + SLACK_BYTES : 0;
  }

  // Where a position lies in the lines of its channel.
  int64_t at(int64_t d, int64_t h, int64_t w) const {
    return d * (AXIS_STRIDE[0] / step[0]) * pitch[0] + h * (AXIS_STRIDE[1] / step[1]) * pitch[1] +
           w * STRIDE;
  }

  // Calls visit(element, offset) for all taps: the kernel element, and the distance of what it
  // reads from a position.
  template <class Visit>
  CONVGEN_INLINE void for_elements(Visit visit) const {
    for (const AxisTap& d : AxisD::TAP)
      for (const AxisTap& h : AxisH::TAP)
        for (const AxisTap& w : AxisW::TAP)
          visit((d.tap * AxisH::TAPS + h.tap) * AxisW::TAPS + w.tap,
                (d.offset - begin[0]) / step[0] * pitch[0] +
                    (h.offset - begin[1]) / step[1] * pitch[1] + (w.offset - begin[2]) / step[2]);
  }

  // Copies a batch; to be called by all threads of a team.
  template <class Real, class Storage>
  void copy(Real* to, const Storage* from, int64_t batch) const {
    const Pitches at(channels, extent, last);
    const int64_t together = last ? channels : 1;  // channels copied at once
    const int64_t pieces = ceil_div(held[2], COPIED_POSITIONS);
    const int64_t planes = held[0], copies = channels / together * planes * pieces;
#pragma omp for schedule(dynamic, 16) nowait
    for (int64_t i = 0; i < batch * copies; ++i) {
      const int64_t n = i / copies, c = i / (planes * pieces) % (channels / together);
      const int64_t plane = i / pieces % planes, z = plane * step[0] + begin[0];
      const int64_t w0 = i % pieces * COPIED_POSITIONS;
      const int64_t width = least(COPIED_POSITIONS, held[2] - w0);
      // Of the piece: what lies inside of the tensor.
      const int64_t x0 = w0 * step[2] + begin[2];
      const int64_t first = least(greatest(ceil_div(-x0, step[2]), 0), width);
      const int64_t end = greatest(least(ceil_div(extent[2] - x0, step[2]), width), first);
      Real* line = to + n * image + c * channel + plane * pitch[0] + w0;
      for (int64_t row = 0; row < held[1]; ++row, line += pitch[1]) {
        const int64_t y = row * step[1] + begin[1];
        const bool inside = z >= 0 && z < extent[0] && y >= 0 && y < extent[1];
        const int64_t count = inside ? end - first : 0;
        if (count < width)
          for (int64_t k = 0; k < together; ++k) {
            clear(line + k * channel, first);
            clear(line + k * channel + first + count, width - first - count);
          }
        if (count == 0) continue;
        const Storage* const source = from + n * at.image + c * at.channel + z * at.axis[0] +
                                      y * at.axis[1] + (x0 + first * step[2]) * at.axis[2];
        if (last)
          transpose<Real, true>(line + first, channel, source, step[2] * channels, count, channels);
        else
          copy_strided<AxisW::TAPS == 1 ? AxisW::SOURCE_STRIDE : 1>(line + first, source, count);
      }
    }
  }
};

}  // namespace
