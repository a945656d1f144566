// One weight's gradient from the elements that its tap meets, and from no others.
//
// The kernels of wgrad multiply whole tiles, and put zeros where a tap meets nothing. Beside a NaN
// or an infinity these make a NaN that no element which is met accounts for. So the kernels that
// add up partial sums (reduce_kernel, sum_products_kernel) sum a weight that comes out as NaN here
// again; one that meets a NaN is done as soon as that is found.
#pragma once

#include "convgen_abi.h"
#include "device.cuh"

namespace convgen {

struct MeetingAxis {
  int coarse, fine;  // extents
  int kernel, stride, padding, dilation;
};

template <typename T>
struct Meeting {
  const T* coarse;
  const T* fine;
  const T* weight;
  int batch, coarse_channels, fine_channels, groups;  // channels of all groups
  MeetingAxis axes[3];
};

template <typename T>
Meeting<T> meeting_of(const ConvgenCall& call, int groups, const MeetingAxis (&constants)[3]) {
  Meeting<T> m;
  m.coarse = static_cast<const T*>(call.coarse), m.fine = static_cast<const T*>(call.fine);
  m.weight = static_cast<const T*>(call.weight);
  m.batch = static_cast<int>(call.batch), m.groups = groups;
  m.coarse_channels = static_cast<int>(call.coarse_channels);
  m.fine_channels = static_cast<int>(call.fine_channels);
  for (int axis = 0; axis < 3; ++axis) {
    m.axes[axis] = constants[axis];
    m.axes[axis].coarse = static_cast<int>(call.coarse_extent[axis]);
    m.axes[axis].fine = static_cast<int>(call.fine_extent[axis]);
  }
  return m;
}

// `weight` counts [coarse channel][fine channel of its group][tap]. The tensors are contiguous, but
// for those that `channels_last` names (ConvgenOperand) where ANY_LAYOUT.
template <typename Acc, bool ANY_LAYOUT = false, typename T>
__device__ __forceinline__ Acc meeting_sum(const Meeting<T>& m, int64_t weight,
                                           int64_t channels_last = 0) {
  // From one position to the next, and whether channels come behind those.
  const bool coarse_last = ANY_LAYOUT && (channels_last & CONVGEN_COARSE) != 0;
  const bool fine_last = ANY_LAYOUT && (channels_last & CONVGEN_FINE) != 0;
  const int coarse_step = coarse_last ? m.coarse_channels : 1;
  const int fine_step = fine_last ? m.fine_channels : 1;
  const MeetingAxis &d = m.axes[0], &h = m.axes[1], &w = m.axes[2];
  // Fine positions of the tap, for the coarse position 0.
  const int shift_w = static_cast<int>(weight % w.kernel) * w.dilation - w.padding;
  weight /= w.kernel;
  const int shift_h = static_cast<int>(weight % h.kernel) * h.dilation - h.padding;
  weight /= h.kernel;
  const int shift_d = static_cast<int>(weight % d.kernel) * d.dilation - d.padding;
  weight /= d.kernel;
  const int fine_of_group = m.fine_channels / m.groups;
  const int a = static_cast<int>(weight / fine_of_group);
  const int b =
      a / (m.coarse_channels / m.groups) * fine_of_group + static_cast<int>(weight % fine_of_group);
  Acc sum = 0;
#pragma unroll 1
  for (int n = 0; n < m.batch; ++n) {
#pragma unroll 1
    for (int i = 0; i < d.coarse; ++i) {
      const int z = i * d.stride + shift_d;
      if (z < 0 || z >= d.fine) continue;
#pragma unroll 1
      for (int j = 0; j < h.coarse; ++j) {
        const int y = j * h.stride + shift_h;
        if (y < 0 || y >= h.fine) continue;
        const T* coarse =
            m.coarse + ((int64_t{n} * m.coarse_channels + a) * d.coarse + i) * h.coarse * w.coarse +
            int64_t{j} * w.coarse;
        const T* fine = m.fine +
                        ((int64_t{n} * m.fine_channels + b) * d.fine + z) * h.fine * w.fine +
                        int64_t{y} * w.fine;
        if (coarse_last) {
          const int64_t line = (int64_t{n} * d.coarse + i) * h.coarse + j;
          coarse = m.coarse + line * w.coarse * m.coarse_channels + a;
        }
        if (fine_last) {
          const int64_t line = (int64_t{n} * d.fine + z) * h.fine + y;
          fine = m.fine + line * w.fine * m.fine_channels + b;
        }
        Acc line = 0;
#pragma unroll 1
        for (int k = 0; k < w.coarse; ++k) {
          const int x = k * w.stride + shift_w;
          if (x < 0 || x >= w.fine) continue;
          line += Acc(widen(coarse[int64_t{k} * coarse_step])) *
                  Acc(widen(fine[int64_t{x} * fine_step]));
        }
        sum += line;
        if (sum != sum) return sum;
      }
    }
  }
  return sum;
}

}  // namespace convgen
