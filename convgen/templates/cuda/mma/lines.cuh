// How the producers of the mma engine's gathers stage lines of 32-bit elements that no wide access
// can copy: by asynchronous copies of one element.
//
// Warps that only stage are bound by how many instructions a copy takes. So each lane keeps its
// columns, finds out once which of them lie inside the input, and walks down the lines of a plane
// with constant steps: the copies of a line differ by offsets that are part of the instruction.
#pragma once

#include "staging.cuh"

namespace convgen {

// Copies COUNT elements STRIDE apart, `at` elements behind `from`, to places PITCH apart; zeros
// where not inside.
template <int PITCH, int STRIDE, int COUNT, typename T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, uint32_t at,
                                              const bool (&inside)[COUNT]) {
  const T* const elements = from + at;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    copy_async<sizeof(T)>(to + i * PITCH, elements + i * STRIDE, inside[i]);
  }
}

// How lanes are dealt the columns of a line: LANES neighbouring ones at a time, so that a lane's
// next column has the same residue and lies PITCH words further. Where STEP_X leaves too many lanes
// idle that way, all of them take part, and find each place anew.
template <int STEP_X>
struct ColumnDeal {
  static constexpr bool EVEN = WARP % STEP_X <= 4;
  static constexpr int LANES = EVEN ? WARP - WARP % STEP_X : WARP;
  static constexpr int PITCH = LANES / STEP_X;

  __device__ static __forceinline__ int place(const GatherShape& s, int column) {
    return STEP_X == 1 ? column : column % STEP_X * s.residue_pitch + column / STEP_X;
  }
};

// What neighbouring lines or planes, STEP apart, have in the input: those of [begin, end).
struct Inside {
  int begin, end;
};

template <int STEP>
__device__ __forceinline__ Inside find_inside(int origin, int count, int extent) {
  return {origin < 0 ? min((-origin + STEP - 1) / STEP, count) : 0,
          origin < extent ? min((extent - origin + STEP - 1) / STEP, count) : 0};
}

// The channels that a warp stages together: where a lane's first column would be in line 0 of each,
// and, if there are two, how far apart they lie in the tile.
template <typename T>
struct ChannelPair {
  const T* from[2];
  int to_next;
  bool two;
};

// Neighbouring lines or planes of a tile: how far apart in the tile and in the input. Distances
// within the input are 32-bit, so that an address is one instruction, and none waits for another.
struct Walk {
  int count;
  int to;
  uint32_t from;
};

// Stages COUNT columns of some lines (or planes).
template <class Deal, int COUNT, typename T>
__device__ __forceinline__ void copy_lines(const ChannelPair<T>& pair, T* to, uint32_t from,
                                           const Walk& lines, const bool (&inside)[COUNT]) {
  if (pair.two) {
#pragma unroll 2
    for (int line = 0; line < lines.count; ++line) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        copy_elements<Deal::PITCH, Deal::LANES>(to + i * pair.to_next, pair.from[i], from, inside);
      }
      from += lines.from;
      to += lines.to;
    }
  } else {
    // Several lines by addresses of their own: a copy keeps its address for a while.
    constexpr int TOGETHER = COUNT >= 4 ? 2 : 4;
    int line = 0;
    for (; line + TOGETHER <= lines.count; line += TOGETHER) {
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) {
        copy_elements<Deal::PITCH, Deal::LANES>(to + i * lines.to, pair.from[0],
                                                from + i * lines.from, inside);
      }
      from += TOGETHER * lines.from;
      to += TOGETHER * lines.to;
    }
#pragma unroll 1
    for (; line < lines.count; ++line) {
      copy_elements<Deal::PITCH, Deal::LANES>(to, pair.from[0], from, inside);
      from += lines.from;
      to += lines.to;
    }
  }
}

// Stages the columns `column`, `column` + LANES, ... (COUNT of them) of all lines, for `channels`
// channels, which exist. Warps are dealt channels, two at a time, and where those are few, planes.
//
// SHORT: the columns from `column` on, of which there are less than LANES; an access then takes
// several lines.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, int COUNT, bool SHORT, typename T>
__device__ __forceinline__ void copy_columns(const GatherShape& s, const Producers& producers,
                                             T* tile, const T* input, int channels,
                                             const TileOrigin& origin, int column) {
  using Deal = ColumnDeal<STEP_X>;
  static_assert(COUNT == 1 || (Deal::EVEN && !SHORT), "columns at constant distances");
  const int lane = producers.thread % WARP;
  int first_line = 0, access_lines = 1;
  if constexpr (SHORT) {
    const int columns = s.row_pitch - column, log2 = 32 - __clz(columns - 1);
    first_line = lane >> log2;
    access_lines = WARP >> log2;
    const int lane_column = lane & ((1 << log2) - 1);
    if (lane_column >= columns) return;
    column += lane_column;
  } else {
    column += lane;
    if (lane >= Deal::LANES || column >= s.row_pitch) return;
  }
  bool inside[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    inside[i] = static_cast<unsigned>(origin.x + column + i * Deal::LANES) <
                static_cast<unsigned>(s.x.input);
  }
  const Inside planes = find_inside<PLANE_STEP>(origin.r, s.planes, s.r.input);
  const Inside lines = find_inside<LINE_STEP>(origin.y, s.rows, s.y.input);
  const int warp = producers.thread / WARP, warps = producers.threads / WARP;
  // log2 of the warps of a channel.
  const int share = (2 * channels <= warps) + (4 * channels <= warps);
  const int slots = warps >> share, turn = warp & ((1 << share) - 1);
  // The first plane and line that are inside, and the others.
  const uint32_t plane_stride = s.r.input_stride, line_stride = s.y.input_stride;
  const uint32_t from = (origin.r + planes.begin * PLANE_STEP) * plane_stride +
                        (origin.y + lines.begin * LINE_STEP) * line_stride;
  const int to_first = planes.begin * s.plane_pitch + lines.begin * s.row_pitch;
  const Walk walk_planes = {opaque(planes.end - planes.begin), s.plane_pitch,
                            PLANE_STEP * plane_stride};
  const Walk walk_lines = {opaque(lines.end - lines.begin), s.row_pitch, LINE_STEP * line_stride};
  for (int channel = warp >> share; channel < channels; channel += 2 * slots) {
    const T* const first = input + (origin.x + column + channel * s.in_channel_stride);
    const ChannelPair<T> pair = {{opaque(first), opaque(first + slots * s.in_channel_stride)},
                                 slots * s.channel_pitch,
                                 channel + slots < channels};
    T* const to_channel = tile + Deal::place(s, column) + channel * s.channel_pitch;
    T* const to = to_channel + to_first;
    if constexpr (SHORT) {
      for (int line = first_line + turn * access_lines; line < walk_lines.count;
           line += access_lines << share) {
        copy_lines<Deal>(pair, to + line * walk_lines.to, from + line * walk_lines.from,
                         walk_planes, inside);
      }
    } else {
      for (int plane = turn; plane < walk_planes.count; plane += 1 << share) {
        copy_lines<Deal>(pair, to + plane * walk_planes.to, from + plane * walk_planes.from,
                         walk_lines, inside);
      }
    }
    if (walk_planes.count == s.planes && walk_lines.count == s.rows) continue;
    // Lines outside of the input, which few tiles have.
    for (int plane = turn; plane < s.planes; plane += 1 << share) {
      const bool plane_inside = plane >= planes.begin && plane < planes.end;
#pragma unroll 1
      for (int line = first_line; line < s.rows; line += access_lines) {
        if (plane_inside && line >= lines.begin && line < lines.end) continue;
        T* const to_line = to_channel + plane * s.plane_pitch + line * s.row_pitch;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          to_line[i * Deal::PITCH] = 0;
          if (pair.two) to_line[i * Deal::PITCH + pair.to_next] = 0;
        }
      }
    }
  }
}

// Stages `channels` channels of a tile, which exist. Positions and layout as in stage_lines.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, typename T>
__device__ __forceinline__ void copy_tile(const GatherShape& s, const Producers& producers, T* tile,
                                          const T* input, int channels, const TileOrigin& origin) {
  using Deal = ColumnDeal<STEP_X>;
  // Less than half an access is left to the short lines.
  const int rest = s.row_pitch % Deal::LANES;
  const int columns = s.row_pitch - (rest <= Deal::LANES / 2 ? rest : 0);
  auto stage = [&](auto count, auto is_short, int column) {
    copy_columns<PLANE_STEP, LINE_STEP, STEP_X, count.value, is_short.value>(
        s, producers, tile, input, channels, origin, column);
  };
  using Long = std::false_type;
  int column = 0;
  if constexpr (Deal::EVEN) {
    for (; columns - column >= 4 * Deal::LANES; column += 4 * Deal::LANES) {
      stage(std::integral_constant<int, 4>(), Long(), column);
    }
    if (columns - column >= 2 * Deal::LANES) {
      stage(std::integral_constant<int, 2>(), Long(), column);
      column += 2 * Deal::LANES;
    }
  }
  for (; column < columns; column += Deal::LANES) {
    stage(std::integral_constant<int, 1>(), Long(), column);
  }
  if (columns < s.row_pitch) {
    stage(std::integral_constant<int, 1>(), std::true_type(), columns);
  }
}

}  // namespace convgen
