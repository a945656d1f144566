// What windows meet of the fine tensor where strides and dilations have common divisors: every
// step-th position from an offset on, along each axis. These are packed first, side by side and in
// lines that are multiples of 16 bytes. The kernels then are those of the divided strides and
// dilations, and stage nothing that no tap reads.
#pragma once

#include "common.cuh"

namespace convgen {

constexpr int COMPACTION_LINE_BYTES = VECTOR_BYTES, COMPACTION_ACCESS_BYTES = 8;
constexpr int COMPACTION_THREADS = 256, COMPACTION_CHANNELS = 4;  // of a thread block; of a thread
constexpr int COMPACTION_BLOCKS = 1 << 30;                        // at most

struct Compaction {
  int step[3], offset[3];

  // The call of the layer on the compacted tensor; its `fine` and `workspace` are still to be
  // given.
  template <typename T>
  ConvgenCall packed(const ConvgenCall& call) const {
    constexpr int64_t MULTIPLE = COMPACTION_LINE_BYTES / sizeof(T);
    ConvgenCall packed = call;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t met = ceil_div(call.fine_extent[axis] - offset[axis], step[axis]);
      packed.fine_extent[axis] = met > 1 ? met : 1;
    }
    packed.fine_extent[2] = round_up(packed.fine_extent[2], MULTIPLE);
    return packed;
  }
};

// Of the packed tensor, in whole steps of a workspace's alignment.
template <typename T>
int64_t compaction_bytes(const ConvgenCall& packed) {
  const int64_t* const extent = packed.fine_extent;
  return round_up(
      packed.batch * packed.fine_channels * extent[0] * extent[1] * extent[2] * int64_t{sizeof(T)},
      256);
}

struct CompactionShape {
  Compaction compaction;
  int d, h, w;                    // extents of the fine tensor
  int accesses;                   // of a packed channel
  Divisor by_line, by_plane;      // accesses of a packed line, lines of a plane
  int64_t channels;               // of all samples
  int64_t stride, packed_stride;  // of a channel, in elements
};

// Packs an access of the channels first_channel, first_channel + channels_step, and so on.
// Positions beside the tensor are zero. `Bits` is an element.
template <typename Bits>
__device__ __forceinline__ void pack_access(const CompactionShape& s, int access,
                                            int64_t first_channel, int channels_step,
                                            const Bits* fine, Bits* packed) {
  constexpr int COUNT = COMPACTION_ACCESS_BYTES / sizeof(Bits);
  struct alignas(COMPACTION_ACCESS_BYTES) Access {
    Bits element[COUNT];
  };
  if (access >= s.accesses) return;
  int row = access;
  const int column = s.by_line.split(row) * COUNT;
  int plane = row;
  row = s.by_plane.split(plane);
  const int z = s.compaction.offset[0] + plane * s.compaction.step[0];
  const int y = s.compaction.offset[1] + row * s.compaction.step[1];
  const int x = s.compaction.offset[2] + column * s.compaction.step[2];
  const int existing = z < s.d && y < s.h && x < s.w ? (s.w - x - 1) / s.compaction.step[2] + 1 : 0;
  const Bits* const from = fine + (existing > 0 ? (z * s.h + y) * s.w + x : 0);
#pragma unroll 4
  for (int64_t channel = first_channel; channel < s.channels; channel += channels_step) {
    Access met;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      met.element[i] = i < existing ? from[channel * s.stride + i * s.compaction.step[2]] : Bits(0);
    }
    *reinterpret_cast<Access*>(packed + channel * s.packed_stride + access * COUNT) = met;
  }
}

template <typename T>
using CompactionBits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// A launch that packs the fine tensor of `call` into that of `packed`: the accesses of a channel
// are the first dimension of a grid, channels the second.
template <typename T>
CompactionShape compaction_shape(const Compaction& compaction, const ConvgenCall& call,
                                 const ConvgenCall& packed, dim3& grid) {
  const int64_t* const from = call.fine_extent;
  const int64_t* const to = packed.fine_extent;
  const int64_t line = to[2] * int64_t{sizeof(T)} / COMPACTION_ACCESS_BYTES;
  CompactionShape s;
  s.compaction = compaction;
  s.d = static_cast<int>(from[0]), s.h = static_cast<int>(from[1]), s.w = static_cast<int>(from[2]);
  s.by_line = Divisor(line), s.by_plane = Divisor(to[1]);
  s.accesses = static_cast<int>(to[0] * to[1] * line);
  s.channels = call.batch * call.fine_channels;
  s.stride = from[0] * from[1] * from[2], s.packed_stride = to[0] * to[1] * to[2];
  const int64_t columns = ceil_div(s.accesses, COMPACTION_THREADS);
  const int64_t rows = ceil_div(s.channels, COMPACTION_CHANNELS);
  const int64_t most = COMPACTION_BLOCKS / columns < 65535 ? COMPACTION_BLOCKS / columns : 65535;
  grid = dim3(columns, rows < most ? rows : most);
  return s;
}

}  // namespace convgen
