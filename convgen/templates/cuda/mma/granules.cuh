// How the producers of the mma engine's gathers stage tiles as the input lies in memory: in
// granules of 16 bytes, which asynchronous copies take whatever the lines' lengths and strides.
//
// The pitches of the tile are congruent to distances in the input modulo a granule, so that a
// line's granules land where they are aligned too. Lanes find elements by these pitches alone; what
// granules hold of other lines, nobody reads, but for the columns beside the input, which are
// cleared.
#pragma once

#include "staging.cuh"

namespace convgen {

// Where an element of the input lies in its granule, in elements.
template <typename T>
__device__ __forceinline__ int within_granule(const T* tensor, int64_t element) {
  const uint64_t at = reinterpret_cast<uint64_t>(tensor) / sizeof(T) + element;
  return static_cast<int>(at) & (GRANULE_BYTES / static_cast<int>(sizeof(T)) - 1);
}

// How many elements a tile begins behind the start of its buffer; `from` is its first channel.
template <typename T>
__device__ __forceinline__ int tile_shift(const GatherShape& s, const T* from,
                                          const TileOrigin& origin) {
  return within_granule(from, int64_t{origin.r} * s.r.input_stride +
                                  int64_t{origin.y} * s.y.input_stride + origin.x);
}

// Channels behind which a tile may have a padding: as many as lie alike in their granules.
template <typename T>
constexpr int PADDED_CHANNELS = GRANULE_BYTES / static_cast<int>(sizeof(T));

// How far a channel lies behind the first one of a tile, in elements.
template <typename T>
__device__ __forceinline__ int channel_place(const GatherShape& s, int channel) {
  return channel * s.channel_pitch + channel / PADDED_CHANNELS<T> * s.padding;
}

// The columns of a tile beside the input, which hold the ends of other lines.
struct GranuleMargins {
  unsigned char* tile;  // its first element
  TileOrigin origin;
  int channels;  // none if there are no such columns
};

// Whether a line of the input is one of the tile's.
template <int PLANE_STEP, int LINE_STEP>
__device__ __forceinline__ bool line_inside(const GatherShape& s, const TileOrigin& origin,
                                            int plane, int row) {
  return static_cast<unsigned>(origin.r + plane * PLANE_STEP) < static_cast<unsigned>(s.r.input) &&
         static_cast<unsigned>(origin.y + row * LINE_STEP) < static_cast<unsigned>(s.y.input);
}

// Clears these columns, of elements like Bits. Other lines are zero already.
template <int PLANE_STEP, int LINE_STEP, typename Bits>
__device__ __forceinline__ void clear_margins(const GatherShape& s, const Crew& crew,
                                              const GranuleMargins& margins) {
  const int left = min(max(-margins.origin.x, 0), s.columns);
  const int right = max(s.x.input - margins.origin.x, left);
  // Lines are few: half of the threads take every other channel.
  const int half = crew.threads / 2, first = crew.thread / half;
#pragma unroll 1
  for (int line = crew.thread % half; line < s.planes * s.rows; line += half) {
    int plane = line;
    const int row = s.by_rows.split(plane);
    if (!line_inside<PLANE_STEP, LINE_STEP>(s, margins.origin, plane, row)) continue;
    Bits* const line_at =
        reinterpret_cast<Bits*>(margins.tile) + plane * s.plane_pitch + row * s.row_pitch;
#pragma unroll 1
    for (int channel = first; channel < margins.channels; channel += 2) {
      Bits* const at = line_at + channel_place<Bits>(s, channel);
#pragma unroll 1
      for (int column = 0; column < left; ++column) at[column] = 0;
#pragma unroll 1
      for (int column = right; column < s.columns; ++column) at[column] = 0;
    }
  }
}

// One tile, staged by a crew whose threads are dealt granules of lines, for all channels.
template <int PLANE_STEP, int LINE_STEP, typename T>
class GranuleTile {
 public:
  // `channels` of the tile's channels exist, the first of which is `from`; `input` is the tensor.
  __device__ __forceinline__ GranuleTile(const GatherShape& s, const Crew& crew, void* tile,
                                         const T* input, const T* from, int channels,
                                         const TileOrigin& origin)
      : s_(s),
        crew_(crew),
        tile_(static_cast<unsigned char*>(tile)),
        input_(input),
        from_(from),
        channels_(channels),
        origin_(origin),
        shift_(tile_shift(s, from, origin)) {}

  // Starts copying `count` channels: zeros where there is no line or channel.
  __device__ __forceinline__ void copy(int count) const {
    const int existing = min(count, channels_);
    const int64_t begin = reinterpret_cast<int64_t>(from_);
    const int64_t end = begin + channels_ * channel_bytes();
    const int items = s_.planes * s_.rows * static_cast<int>(s_.by_columns.divisor);
    const int blocks = existing / BLOCK;
#pragma unroll 1
    for (int item = crew_.thread; item < items; item += crew_.threads) {
      int line = item;
      const int number = s_.by_columns.split(line);
      const Place place = locate(line);
      const int64_t at = place.at + number * GRANULE_BYTES;
      const int to = place.to + number * GRANULE_BYTES;
      // Nearly always all channels' granules lie within the input. What they hold of other lines
      // is cleared later where it matters: to tell it here would take longer than to copy it.
      if (blocks * BLOCK == count &&
          (!place.inside || ((at & -GRANULE_BYTES) >= begin &&
                             at + (existing - 1) * channel_bytes() + GRANULE_BYTES <= end))) {
        copy_blocks(to, at, blocks, place.inside);
        continue;
      }
#pragma unroll 1
      for (int channel = 0; channel < count; ++channel) {
        const int64_t granule = (at + channel * channel_bytes()) & -GRANULE_BYTES;
        int bytes = 0;
        if (place.inside && channel < existing && granule + GRANULE_BYTES > begin &&
            granule < end) {
          bytes = static_cast<int>(min(end - granule, int64_t{GRANULE_BYTES}));
        }
        copy_granule(tile_ + ((to + channel_place<T>(s_, channel) * SIZE) & -GRANULE_BYTES),
                     reinterpret_cast<const void*>(bytes > 0 ? granule : aligned_input()), bytes,
                     input_);
      }
    }
  }

  // What is to be cleared of `count` channels when all copies of the crew have landed.
  __device__ __forceinline__ GranuleMargins margins(int count) const {
    GranuleMargins margins;
    margins.tile = tile_ + shift_ * SIZE;
    margins.origin = origin_;
    const bool beside = origin_.x < 0 || s_.x.input - origin_.x < s_.columns;
    margins.channels = beside ? min(count, channels_) : 0;
    return margins;
  }

 private:
  static constexpr int SIZE = sizeof(T), BLOCK = PADDED_CHANNELS<T>;

  // The first column of a line, of the first channel: bytes.
  struct Place {
    int64_t at;   // address in the input
    int to;       // in the tile
    bool inside;  // whether there is such a line
  };

  __device__ __forceinline__ Place locate(int line) const {
    int plane = line;
    const int row = s_.by_rows.split(plane);
    Place place;
    place.inside = line_inside<PLANE_STEP, LINE_STEP>(s_, origin_, plane, row);
    const int first = place.inside ? (origin_.r + plane * PLANE_STEP) * s_.r.input_stride +
                                         (origin_.y + row * LINE_STEP) * s_.y.input_stride
                                   : 0;
    place.at = reinterpret_cast<int64_t>(from_) + (int64_t{first} + origin_.x) * SIZE;
    place.to = (shift_ + plane * s_.plane_pitch + row * s_.row_pitch) * SIZE;
    return place;
  }

  // Copies a granule of so many whole blocks of channels. What lies BLOCK channels apart lies alike
  // in its granule.
  __device__ __forceinline__ void copy_blocks(int to, int64_t at, int blocks, bool inside) const {
    const int64_t stride = BLOCK * channel_bytes();
    const int pitch = channel_place<T>(s_, BLOCK) * SIZE;
#pragma unroll 1
    for (int channel = 0; channel < BLOCK; ++channel) {
      unsigned char* word = tile_ + (to & -GRANULE_BYTES);
      int64_t granule = at & -GRANULE_BYTES;
#pragma unroll 4
      for (int block = 0; block < blocks; ++block) {
        copy_async<GRANULE_BYTES>(word, reinterpret_cast<const void*>(granule), inside);
        word += pitch, granule += stride;
      }
      to += channel_pitch(), at += channel_bytes();
    }
  }

  // From one channel to the next.
  __device__ __forceinline__ int64_t channel_bytes() const { return s_.in_channel_stride * SIZE; }
  __device__ __forceinline__ int channel_pitch() const { return s_.channel_pitch * SIZE; }

  __device__ __forceinline__ int64_t aligned_input() const {
    return reinterpret_cast<int64_t>(input_) & -GRANULE_BYTES;
  }

  const GatherShape& s_;
  const Crew& crew_;
  unsigned char* const tile_;
  const T *const input_, *const from_;
  const int channels_;
  const TileOrigin origin_;
  const int shift_;
};

}  // namespace convgen
