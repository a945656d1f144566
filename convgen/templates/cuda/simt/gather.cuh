// The part of fprop and dgrad on the device that does not depend on the specification: where a
// thread block works, how a tile is staged, how weights are packed. The rendered unit supplies the
// arithmetic.
#pragma once

#include "gather_tiling.cuh"

namespace convgen {

// Where a thread block works: block `index` of s.blocks.
struct GatherBlock {
  int channel_block, phase, group, batch;
  int r0;     // first position along R
  int x0;     // first column of the strip
  int flat0;  // first flattened position within the strip
};

__device__ __forceinline__ GatherBlock locate_block(const GatherShape& s, int index,
                                                    int flat_per_block, int rows_per_block) {
  GatherBlock block;
  block.channel_block = s.channel_blocks.split(index);
  block.phase = s.phases.split(index);
  block.r0 = s.row_tiles.split(index) * rows_per_block;
  block.flat0 = s.lane_tiles.split(index) * flat_per_block;
  block.x0 = s.strips.split(index) * s.strip_width;
  block.group = s.groups.split(index);
  block.batch = index;
  return block;
}

// Stages `count` input channels, of which `channels` exist, of a tile whose first element is input
// position (r, y, x): plane j is row r + j * PLANE_STEP of R, line j is y + j * LINE_STEP of Y, and
// columns are laid out by their residue modulo STEP_X, so that neighbouring lanes read neighbouring
// words. A thread takes WIDTH neighbouring columns of a line (`x` and the input's lines are then
// multiples of WIDTH, and STEP_X is 1), finds its place once and copies it for every channel.
// Positions outside the input and channels that do not exist are zero. BATCH channels at a time are
// copied by addresses of their own, which one instruction finds each: threads with registers to
// spare then wait for none of them.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, int WIDTH, int BATCH, typename Acc, typename T>
__device__ __forceinline__ void stage_lines(const GatherShape& s, const Producers& producers,
                                            Acc* tile, const T* input, int count, int channels,
                                            int r, int y, int x) {
  auto stage_place = [&](Acc* to, const T* from, bool inside) {
    const int existing = inside ? min(count, channels) : 0;
    int channel = 0;
    if constexpr (BATCH > 1) {
      const uint32_t stride = static_cast<uint32_t>(s.in_channel_stride);  // below 2^31
#pragma unroll 1
      for (; channel + BATCH <= existing; channel += BATCH) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          stage_vector<WIDTH>(to + i * s.channel_pitch, from + uint64_t{stride} * i, true);
        }
        from += uint64_t{stride} * BATCH;
        to += BATCH * s.channel_pitch;
      }
    }
#pragma unroll 4
    for (; channel < existing; ++channel) {
      stage_vector<WIDTH>(to, from, true);
      from += s.in_channel_stride;
      to += s.channel_pitch;
    }
    for (; channel < count; ++channel) {
      stage_vector<WIDTH>(to, input, false);
      to += s.channel_pitch;
    }
  };
  auto line_inside = [&](int line, const T*& from) {
    int plane = line;
    const int row = s.by_rows.split(plane);
    const int input_r = r + plane * PLANE_STEP, input_y = y + row * LINE_STEP;
    const bool inside = static_cast<unsigned>(input_r) < static_cast<unsigned>(s.r.input) &&
                        static_cast<unsigned>(input_y) < static_cast<unsigned>(s.y.input);
    from = input;
    if (inside) from += input_r * s.r.input_stride + input_y * s.y.input_stride;
    return inside;
  };
  if constexpr (WIDTH > 1) {
    // Short lines of wide accesses: threads are dealt places, not lines.
    const int items = s.planes * s.rows * s.by_columns.divisor;
    for (int item = producers.thread; item < items; item += producers.threads) {
      int line = item;
      const int column = s.by_columns.split(line) * WIDTH;
      const T* from;
      const bool inside = line_inside(line, from) &&
                          static_cast<unsigned>(x + column) < static_cast<unsigned>(s.x.input);
      stage_place(tile + line * s.row_pitch + column, inside ? from + (x + column) : input, inside);
    }
  } else {
    // Long lines: a line per warp at a time.
    const int lines = s.planes * s.rows, lane = producers.thread % WARP;
    for (int line = producers.thread / WARP; line < lines; line += producers.threads / WARP) {
      const T* from;
      const bool line_is_inside = line_inside(line, from);
      Acc* const to_line = tile + line * s.row_pitch;
      // Where STEP_X divides a warp, a lane's columns have one residue.
      constexpr bool ONE_RESIDUE = WARP % STEP_X == 0;
      Acc* to_lane = to_line + lane % STEP_X * s.residue_pitch + lane / STEP_X;
      for (int column = lane; column < s.row_pitch; column += WARP) {
        const bool inside =
            line_is_inside && static_cast<unsigned>(x + column) < static_cast<unsigned>(s.x.input);
        Acc* const to =
            ONE_RESIDUE ? to_lane : to_line + column % STEP_X * s.residue_pitch + column / STEP_X;
        stage_place(to, inside ? from + (x + column) : input, inside);
        to_lane += WARP / STEP_X;
      }
    }
  }
}

// Stages a tile by the widest accesses that the call allows.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, typename Acc, typename T>
__device__ __forceinline__ void stage_tile(const GatherShape& s, const Producers& producers,
                                           Acc* tile, const T* input, int count, int channels,
                                           int r, int y, int x) {
  if constexpr (STEP_X == 1) {
    if constexpr (sizeof(Acc) == 4) {
      if (s.load_width == 4) {
        stage_lines<PLANE_STEP, LINE_STEP, 1, 4, 1>(s, producers, tile, input, count, channels, r,
                                                    y, x);
        return;
      }
    }
    if (s.load_width == 2) {
      stage_lines<PLANE_STEP, LINE_STEP, 1, 2, 1>(s, producers, tile, input, count, channels, r, y,
                                                  x);
      return;
    }
  }
  stage_lines<PLANE_STEP, LINE_STEP, STEP_X, 1, 1>(s, producers, tile, input, count, channels, r, y,
                                                   x);
}

// x[j] = row j of a column of the tile, for the set bits j of USED.
template <uint64_t USED, int COUNT, typename Acc>
__device__ __forceinline__ void load_column(Acc (&x)[COUNT], const Acc* column, int pitch) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) x[j] = column[j * pitch];
  }
}

// x[m] = this thread's m-th position, where positions are scattered over the plane.
template <int COUNT, typename Acc>
__device__ __forceinline__ void load_scattered(Acc (&x)[COUNT], const Acc* column,
                                               const int (&position)[COUNT]) {
#pragma unroll
  for (int m = 0; m < COUNT; ++m) x[m] = column[position[m]];
}

// One tap: acc[m][c] += x[FIRST + m * STEP] * weight[c].
template <int FIRST, int STEP, int ROWS, int CHANNELS, int COUNT, typename Acc>
__device__ __forceinline__ void multiply_add(Acc (&acc)[ROWS][CHANNELS], const Acc (&x)[COUNT],
                                             const Acc* weight) {
  Acc w[CHANNELS];
  load_row(w, weight);
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) acc[m][c] += x[FIRST + m * STEP] * w[c];
  }
}

// The region of packed weights that holds element `at`, if each slot has `slot_elements`.
__device__ __forceinline__ int find_region(const int* region_first, int regions,
                                           int64_t slot_elements, int64_t at) {
  int low = 0, high = regions;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (region_first[middle] * slot_elements <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Weights (coarse, fine / groups, taps) -> [group][block of CHANNELS outputs][region]
// [input channel][slot of the region][CHANNELS], in the accumulator's type, zero beyond the last
// output channel. A region is the set of weight slots that one pass reads; slot_tap[slot] is the
// kernel element of a slot, or -1 for none.
template <int CHANNELS, bool OUTPUT_IS_COARSE, typename Acc, typename T>
__device__ __forceinline__ void pack_weight(Acc* packed, const T* weight, const int* slot_tap,
                                            const int* region_first, int regions, int taps,
                                            int slots, int in_channels, int out_channels,
                                            int64_t index) {
  const int blocks = (out_channels + CHANNELS - 1) / CHANNELS;
  // `index` counts packed elements: undo the layout from the outside in.
  const int64_t block_elements = int64_t{slots} * in_channels * CHANNELS;
  const int64_t outer = index / block_elements;
  int64_t rest = index % block_elements;
  const int group = static_cast<int>(outer / blocks);
  const int block = static_cast<int>(outer % blocks);
  const int64_t slot_elements = int64_t{in_channels} * CHANNELS;
  const int region = find_region(region_first, regions, slot_elements, rest);
  rest -= region_first[region] * slot_elements;
  const int region_slots = region_first[region + 1] - region_first[region];
  const int c = static_cast<int>(rest % CHANNELS);
  rest /= CHANNELS;
  const int slot = region_first[region] + static_cast<int>(rest % region_slots);
  const int in = static_cast<int>(rest / region_slots);
  const int out = block * CHANNELS + c;
  const int tap = slot_tap[slot];
  Acc value = 0;
  if (out < out_channels && tap >= 0) {
    const int64_t coarse = int64_t{group} * (OUTPUT_IS_COARSE ? out_channels : in_channels) +
                           (OUTPUT_IS_COARSE ? out : in);
    const int64_t fine = OUTPUT_IS_COARSE ? in : out;
    const int64_t fine_channels = OUTPUT_IS_COARSE ? in_channels : out_channels;
    value = widen(weight[(coarse * fine_channels + fine) * taps + tap]);
  }
  packed[index] = value;
}

}  // namespace convgen
