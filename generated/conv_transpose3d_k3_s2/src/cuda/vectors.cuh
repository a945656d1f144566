// How the producers of the mma engine's gathers stage tiles as the input lies in memory: in
// vectors of 16 bytes, which asynchronous copies take whatever the lines' lengths and strides.
//
// The pitches of the tile are congruent to distances in the input modulo a vector, so that a
// line's vectors land where they are aligned too. Lanes find elements by these pitches alone. What
// vectors hold beside a line, of other lines or before the tensor, nobody reads but for the
// columns beside the input, and the other half of the first and the last word where lanes load
// words of neighbours: these are cleared.
//
// Channels lie in blocks of eight: neighbouring ones, or those of a product whose lanes load words
// of neighbours (WordOrder). An 8-channel block begins at a vector, its first line at its place in
// one.
#pragma once

#include "staging.cuh"

namespace convgen {

template <typename T>
constexpr int VECTOR_ELEMENTS = VECTOR_BYTES / static_cast<int>(sizeof(T));  // elements

// The place within its vector of a tile's first element; `from` is the input's first channel. Low
// bits of addresses and distances suffice.
template <typename T>
__device__ __forceinline__ int tile_shift(const GatherShape& s, const T* from,
                                          const TileOrigin& origin) {
  const uint32_t first = static_cast<uint32_t>(reinterpret_cast<uint64_t>(from)) / sizeof(T);
  const uint32_t within = static_cast<uint32_t>(origin.r) * s.r.input_stride +
                          static_cast<uint32_t>(origin.y) * s.y.input_stride + origin.x;
  return static_cast<int>((first + within) % VECTOR_ELEMENTS<T>);
}

// Where the `index`-th block of a tile, which begins with `channel`, has its first element.
// `shift` is the tile's.
template <typename T>
__device__ __forceinline__ int block8_place(const GatherShape& s, int index, int channel,
                                            int shift) {
  const int distance = static_cast<int>(s.in_channel_stride) & (VECTOR_ELEMENTS<T> - 1);
  return index * s.block8_pitch + ((shift + channel * distance) & (VECTOR_ELEMENTS<T> - 1));
}

// Whether a line of the input is one of the tile's.
template <int PLANE_STEP, int LINE_STEP>
__device__ __forceinline__ bool line_inside(const GatherShape& s, const TileOrigin& origin,
                                            int plane, int row) {
  return static_cast<unsigned>(origin.r + plane * PLANE_STEP) < static_cast<unsigned>(s.r.input) &&
         static_cast<unsigned>(origin.y + row * LINE_STEP) < static_cast<unsigned>(s.y.input);
}

// A vector of a channel's lines in a tile: elements from the tile's first one, in the input
// (modulo 2^32) and in the tile. Threads find them in a table in shared memory.
struct VectorPlace {
  uint32_t from;
  int to;
  int plane, row;
};

// By all threads of a block, before they meet.
template <int PLANE_STEP, int LINE_STEP, typename T>
__device__ __forceinline__ void fill_places(const GatherShape& s, VectorPlace* places) {
  const int count = s.planes * s.rows * static_cast<int>(s.by_columns.divisor);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    VectorPlace place;
    place.plane = i;
    const int within = s.by_columns.split(place.plane) * VECTOR_ELEMENTS<T>;
    place.row = s.by_rows.split(place.plane);
    place.from =
        static_cast<uint32_t>(place.plane * PLANE_STEP) * static_cast<uint32_t>(s.r.input_stride) +
        static_cast<uint32_t>(place.row * LINE_STEP) * static_cast<uint32_t>(s.y.input_stride) +
        within;
    place.to = place.plane * s.plane_pitch + place.row * s.row_pitch + within;
    places[i] = place;
  }
}

// One tile, of elements like T (unsigned integers of their size), staged by a producer warpgroup.
// WORDS: whether lanes load words of neighbours.
template <int PLANE_STEP, int LINE_STEP, bool WORDS, typename T>
class VectorTile {
 public:
  VectorTile() = default;
  // `from` is the first of `channels` channels of the input; the tile has `blocks8` of them from
  // `first_block8` on. `tensor` is the whole one.
  __device__ __forceinline__ VectorTile(const GatherShape& s, void* tile, const T* tensor,
                                        const T* from, int channels, int first_block8, int blocks8,
                                        const TileOrigin& origin)
      : tile_(static_cast<unsigned char*>(tile)),
        tensor_(tensor),
        from_(from),
        channels_(channels),
        first_block8_(first_block8),
        blocks8_(blocks8),
        origin_(origin),
        shift_(tile_shift(s, from, origin)) {}

  // Starts copying: zeros where there is no line or channel. Threads are dealt vectors of lines.
  __device__ __forceinline__ void copy(const GatherShape& s, const Producers& producers,
                                       const VectorPlace* places) const {
    const int count = s.planes * s.rows * static_cast<int>(s.by_columns.divisor);
    const int last_r = origin_.r + (s.planes - 1) * PLANE_STEP;
    const int last_y = origin_.y + (s.rows - 1) * LINE_STEP;
    const bool all_inside =
        origin_.r >= 0 && last_r < s.r.input && origin_.y >= 0 && last_y < s.y.input;
    const int64_t lane = s.lane_channels * channel_bytes(s);
    const int64_t half = s.half_channels * channel_bytes(s) - 4 * lane;
#pragma unroll 1
    for (int index = 0; index < blocks8_; ++index) {
      const Block8 block8 = find_block8(s, index);
      // Nearly always all vectors of lines that exist lie within the input. What they hold of
      // other lines is cleared later where it matters: to tell it here would take longer than to
      // copy it.
      const int64_t lowest = element(s, block8.channel, max(origin_.r, 0), max(origin_.y, 0));
      const int64_t highest = element(s, min(block8.last, channels_ - 1),
                                      min(last_r, s.r.input - 1), min(last_y, s.y.input - 1));
      const bool whole = lowest >= VECTOR_ELEMENTS<T> &&
                         highest + s.by_columns.divisor * VECTOR_ELEMENTS<T> <= s.in_span;
      bool exists[8];
#pragma unroll
      for (int slot = 0; slot < 8; ++slot) exists[slot] = slot_channel(s, block8, slot) < channels_;
      if (!whole) {
        copy_parts(s, producers, places, count, block8);
        continue;
      }
      const int64_t first = begin() + block8.channel * channel_bytes(s);
      const uint32_t origin = origin_element(s);
#pragma unroll 1
      for (int i = producers.thread; i < count; i += producers.threads) {
        const VectorPlace place = places[i];
        const bool inside =
            all_inside || line_inside<PLANE_STEP, LINE_STEP>(s, origin_, place.plane, place.row);
        int64_t at = first + int64_t{static_cast<int>(origin + place.from)} * SIZE;
        int to = (block8.place + place.to) * SIZE;
#pragma unroll
        for (int slot = 0; slot < 8; ++slot) {
          copy_async<VECTOR_BYTES>(tile_ + (to & -VECTOR_BYTES),
                                   reinterpret_cast<const void*>(at & -VECTOR_BYTES),
                                   inside && exists[slot]);
          at += lane, to += s.lane_pitch * SIZE;
          if (slot == 3) at += half, to += (s.half_pitch - 4 * s.lane_pitch) * SIZE;
        }
      }
    }
  }

  // Whether a line of the tile has columns beside the input, which hold something else, or a word
  // may.
  __device__ __forceinline__ bool has_margins(const GatherShape& s) const {
    return origin_.x < WORDS || s.x.input - origin_.x < s.columns + WORDS;
  }

  // Clears these columns, once all copies of the warpgroup have landed. Other lines are zero
  // already.
  __device__ __forceinline__ void clear_margins(const GatherShape& s,
                                                const Producers& producers) const {
    const int left = min(max(-origin_.x, 0), s.columns);
    const int right = max(s.x.input - origin_.x, left);
    const int items = blocks8_ * 8 * s.planes * s.rows;
#pragma unroll 1
    for (int item = producers.thread; item < items; item += producers.threads) {
      int index = item / 8;
      const int slot = item % 8, row = s.by_rows.split(index), plane = s.by_planes.split(index);
      const Block8 block8 = find_block8(s, index);
      if (slot_channel(s, block8, slot) >= channels_) continue;
      if (!line_inside<PLANE_STEP, LINE_STEP>(s, origin_, plane, row)) continue;
      const int place =
          block8.place + slot_place(s, slot) + plane * s.plane_pitch + row * s.row_pitch;
      T* const at = reinterpret_cast<T*>(tile_) + place;
      // The first word's other half, and the last one's.
      const int before = WORDS && origin_.x <= 0 ? place % 2 : 0;
      const int behind = WORDS ? (place + s.columns) % 2 : 0;
#pragma unroll 1
      for (int column = -before; column < left; ++column) at[column] = 0;
#pragma unroll 1
      for (int column = right; column < s.columns + behind; ++column) at[column] = 0;
    }
  }

 private:
  static constexpr int SIZE = sizeof(T);

  struct Block8 {
    int channel, last;  // its first channel and its last one
    int place;          // of its first element in the tile
  };

  __device__ __forceinline__ Block8 find_block8(const GatherShape& s, int index) const {
    Block8 block8;
    block8.channel = block8_channel(s.lane_channels, first_block8_ + index);
    block8.last = block8.channel + s.half_channels + 3 * s.lane_channels;
    block8.place = block8_place<T>(s, index, block8.channel, shift_);
    return block8;
  }

  // Of the slots 0 to 7 of an 8-channel block.
  __device__ __forceinline__ static int slot_channel(const GatherShape& s, const Block8& block8,
                                                     int slot) {
    return block8.channel + slot / 4 * s.half_channels + slot % 4 * s.lane_channels;
  }
  __device__ __forceinline__ static int slot_place(const GatherShape& s, int slot) {
    return slot / 4 * s.half_pitch + slot % 4 * s.lane_pitch;
  }

  // The vectors of an 8-channel block of which some lie beyond the input in part.
  __device__ __forceinline__ void copy_parts(const GatherShape& s, const Producers& producers,
                                             const VectorPlace* places, int count,
                                             const Block8& block8) const {
    const int64_t end = begin() + s.in_span * SIZE;
    const uint32_t origin = origin_element(s);
#pragma unroll 1
    for (int i = producers.thread; i < count; i += producers.threads) {
      const VectorPlace place = places[i];
      const bool inside = line_inside<PLANE_STEP, LINE_STEP>(s, origin_, place.plane, place.row);
#pragma unroll 1
      for (int slot = 0; slot < 8; ++slot) {
        const int channel = slot_channel(s, block8, slot);
        const int64_t at = begin() + channel * channel_bytes(s) +
                           int64_t{static_cast<int>(origin + place.from)} * SIZE;
        const int64_t vector = at & -VECTOR_BYTES;
        int bytes = 0;
        if (inside && channel < channels_ && vector + VECTOR_BYTES > begin() && vector < end) {
          bytes = static_cast<int>(min(end - vector, int64_t{VECTOR_BYTES}));
        }
        const int to = (block8.place + slot_place(s, slot) + place.to) * SIZE;
        copy_vector(tile_ + (to & -VECTOR_BYTES),
                    reinterpret_cast<const void*>(bytes > 0 ? vector : aligned_tensor()), bytes,
                    tensor_);
      }
    }
  }

  // The first column of a line of the tile, counted from the first channel's first element.
  __device__ __forceinline__ int64_t element(const GatherShape& s, int channel, int r,
                                             int y) const {
    return channel * s.in_channel_stride + int64_t{r} * s.r.input_stride +
           int64_t{y} * s.y.input_stride + origin_.x;
  }
  // The tile's first column in a channel, modulo 2^32: it may lie before the first line, and lines
  // that exist lie within 2^31 elements of that.
  __device__ __forceinline__ uint32_t origin_element(const GatherShape& s) const {
    return static_cast<uint32_t>(origin_.r) * static_cast<uint32_t>(s.r.input_stride) +
           static_cast<uint32_t>(origin_.y) * static_cast<uint32_t>(s.y.input_stride) +
           static_cast<uint32_t>(origin_.x);
  }
  __device__ __forceinline__ int64_t begin() const { return reinterpret_cast<int64_t>(from_); }
  __device__ __forceinline__ static int64_t channel_bytes(const GatherShape& s) {
    return s.in_channel_stride * SIZE;
  }
  __device__ __forceinline__ int64_t aligned_tensor() const {
    return reinterpret_cast<int64_t>(tensor_) & -VECTOR_BYTES;
  }

  unsigned char* tile_;
  const T *tensor_, *from_;
  int channels_, first_block8_, blocks8_;
  TileOrigin origin_;
  int shift_;
};

}  // namespace convgen
