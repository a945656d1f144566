// One output of fprop from the elements that its window reads, and from no others.
//
// Where lanes load words of two neighbouring elements, the weight of a neighbour that no tap reads
// is zero. Beside a NaN or an infinity that makes a NaN which the window does not account for. An
// output that comes out as NaN is summed here again.
#pragma once

#include "meeting.cuh"

namespace convgen {

// out[a, q] = bias[a] + sum over b, t of weight[a, b, t] * input[b, q * stride - padding + t *
// dilation], of one sample and group. `coarse` of an axis is the output's extent, `fine` the
// input's.
template <typename T>
__device__ __forceinline__ float window_sum(const MeetingAxis (&axes)[3], int channels,
                                            const T* input, const T* weight,
                                            const int (&position)[3]) {
  const MeetingAxis &d = axes[0], &h = axes[1], &w = axes[2];
  float sum = 0;
#pragma unroll 1
  for (int b = 0; b < channels; ++b) {
#pragma unroll 1
    for (int t = 0; t < d.kernel * h.kernel * w.kernel; ++t) {
      const int z = position[0] * d.stride - d.padding + t / (h.kernel * w.kernel) * d.dilation;
      const int y = position[1] * h.stride - h.padding + t / w.kernel % h.kernel * h.dilation;
      const int x = position[2] * w.stride - w.padding + t % w.kernel * w.dilation;
      if (z < 0 || z >= d.fine || y < 0 || y >= h.fine || x < 0 || x >= w.fine) continue;
      const float tap = widen(weight[(int64_t{b} * d.kernel * h.kernel * w.kernel) + t]);
      sum += tap * widen(input[((int64_t{b} * d.fine + z) * h.fine + y) * w.fine + x]);
    }
    if (sum != sum) return sum;
  }
  return sum;
}

}  // namespace convgen
