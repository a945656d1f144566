// TF32's operands for the gradient of the weight: positions side by side, four to 16 bytes.
//
// wgmma reads operands of 32 bits K-major alone, and K are the positions: taps shift them, and a
// row of positions can begin at a multiple of 16 bytes only. So the lines of a plane are divided
// into four quarters, and a unit of 16 bytes has one position of each,
//
//   (N x residues, D, lines of a quarter, W, C, 4)
//
// which all taps shift alike: from one unit to another, never within. In one dimension it is W that
// is divided. Where taps are DILATION apart, positions of the same residue lie together, as if they
// were a sample of their own, so that neighbouring taps are neighbouring units:
//
//   coarse   position DILATION * p + r of residue r
//   fine     position DILATION * p + r * STRIDE - PADDING, which the taps of that residue meet
//
// Values are rounded to TF32, or (PARTS == 2, for 3xTF32) are the sums of two TF32 values, of which
// the lower ones are another tensor behind the first.
#ifndef CONVGEN_IMPLICIT_GEMM_QUARTERS_CUH
#define CONVGEN_IMPLICIT_GEMM_QUARTERS_CUH

#include "pack.cuh"

namespace convgen {

constexpr int QUARTERS = 4;
constexpr int UNIT_BYTES = 16;  // four positions of a channel

// Along H or W: how positions of a tensor become units.
struct QuarterAxis {
  int extent;    // of the tensor
  int count;     // units of a residue
  int residues;  // also the distance from unit to unit
  int step, padding;
  int quarter;  // positions from one quarter to the next; 0 where the axis is not divided
};

struct QuarterShape {
  QuarterAxis h, w;
  int batch, depth, channels;
  int column_tiles, channel_tiles;  // of QUARTER_TILE
  int64_t part;                     // units from a value's upper part to the lower one

  int64_t blocks() const {
    return int64_t{column_tiles} * channel_tiles * h.count * depth * batch * h.residues *
           w.residues;
  }
};

constexpr int QUARTER_TILE = 32;  // columns and channels of a thread block

__host__ __device__ constexpr int floor_mod(int a, int b) { return (a % b + b) % b; }
__host__ __device__ constexpr int floor_div(int a, int b) { return (a - floor_mod(a, b)) / b; }

// The position of the first unit of a residue. What is not divided begins inside of the tensor.
__device__ __forceinline__ int first_position(const QuarterAxis& axis, int residue) {
  const int first = residue * axis.step - axis.padding;
  return axis.quarter != 0 ? first : floor_mod(first, axis.residues);
}

// The four positions of a unit, the first of which is (h, w); zeros where the tensor has none.
// `at` is the plane of its channel, in which positions are `step` elements apart.
__device__ __forceinline__ float4 load_quarters_of(const float* at, int64_t step, int h, int w,
                                                   const QuarterShape& s) {
  float x[QUARTERS];
#pragma unroll
  for (int q = 0; q < QUARTERS; ++q) {
    const int own_h = h + q * s.h.quarter, own_w = w + q * s.w.quarter;
    const bool exists = own_h >= 0 && own_h < s.h.extent && own_w >= 0 && own_w < s.w.extent;
    x[q] = exists ? at[(int64_t{own_h} * s.w.extent + own_w) * step] : 0.0f;
  }
  return make_float4(x[0], x[1], x[2], x[3]);
}

// A thread block turns 32 columns x 32 channels of a line of units: by way of shared memory, or,
// where channels lie side by side (LAST), as they are read.
template <int PARTS, bool LAST>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_quarters_kernel(const float* __restrict__ from, float4* __restrict__ to,
                         const QuarterShape s) {
  __shared__ float4 tile[LAST ? 1 : QUARTER_TILE][QUARTER_TILE + 1];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  int index = static_cast<int>(blockIdx.x);
  const int first_column = index % s.column_tiles * QUARTER_TILE;
  index /= s.column_tiles;
  const int line = index % s.h.count;
  index /= s.h.count;
  const int d = index % s.depth;
  index /= s.depth;
  const int first_channel = index % s.channel_tiles * QUARTER_TILE;
  index /= s.channel_tiles;
  const int sample = index;  // and residue
  const int residue = sample % (s.h.residues * s.w.residues);
  const int n = sample / (s.h.residues * s.w.residues);
  const int h = line * s.h.residues + first_position(s.h, residue / s.w.residues);
  const int first_w = first_position(s.w, residue % s.w.residues);
  const int64_t plane = int64_t{s.h.extent} * s.w.extent;
  await_earlier_kernel();
  if constexpr (!LAST) {
#pragma unroll
    for (int i = 0; i < QUARTER_TILE / 8; ++i) {
      const int channel = first_channel + row + 8 * i, column = first_column + lane;
      const float* const at = from + ((int64_t{n} * s.channels + channel) * s.depth + d) * plane;
      float4& unit = tile[lane][row + 8 * i];
      unit = make_float4(0, 0, 0, 0);
      if (channel < s.channels && column < s.w.count) {
        unit = load_quarters_of(at, 1, h, column * s.w.residues + first_w, s);
      }
    }
    __syncthreads();
  }
  const int channel = first_channel + lane;
#pragma unroll
  for (int i = 0; i < QUARTER_TILE / 8; ++i) {
    const int of_tile = row + 8 * i, column = first_column + of_tile;
    if (column >= s.w.count || channel >= s.channels) continue;
    float4 x;
    if constexpr (LAST) {
      const float* const at = from + (int64_t{n} * s.depth + d) * plane * s.channels + channel;
      x = load_quarters_of(at, s.channels, h, column * s.w.residues + first_w, s);
    } else {
      x = tile[of_tile][lane];
    }
    const float4 upper =
        make_float4(as_operand(x.x), as_operand(x.y), as_operand(x.z), as_operand(x.w));
    const int64_t units = (int64_t{sample} * s.depth + d) * s.h.count + line;
    float4* const at = to + (units * s.w.count + column) * s.channels + channel;
    at[0] = upper;
    if constexpr (PARTS == 2) {
      at[s.part] = make_float4(as_operand(x.x - upper.x), as_operand(x.y - upper.y),
                               as_operand(x.z - upper.z), as_operand(x.w - upper.w));
    }
  }
}

// A packed tensor as TMA sees it: 4 x channels, columns, lines, D, samples x residues x parts.
inline TensorView quarters_view(const QuarterShape& s, int parts) {
  TensorView v = {};
  v.rank = 5;
  const uint64_t extents[5] = {uint64_t(QUARTERS) * s.channels, uint64_t(s.w.count),
                               uint64_t(s.h.count), uint64_t(s.depth),
                               uint64_t(s.batch) * s.h.residues * s.w.residues * parts};
  uint64_t stride = sizeof(float);
  for (int i = 0; i < 5; ++i) {
    v.extent[i] = extents[i], v.stride_bytes[i] = stride, v.step[i] = v.box[i] = 1;
    stride *= extents[i];
  }
  return v;
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_QUARTERS_CUH
