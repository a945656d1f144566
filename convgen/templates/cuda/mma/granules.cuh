// How the producers of the mma engine's gathers stage tiles as the input lies in memory: in
// granules of 16 bytes, which asynchronous copies take whatever the lines' lengths and strides.
//
// The pitches of the tile are congruent to distances in the input modulo a granule, so that a
// line's granules land where they are aligned too. Lanes find elements by these pitches alone; what
// a granule holds of other lines, nobody reads, but for the columns before a line of the input,
// which are cleared.
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

  // Starts copying `count` channels: zeros where there is no input.
  __device__ __forceinline__ void copy(int count) const {
    for_each([&](Place place) {
      const int existing = place.inside ? min(count, channels_) : 0;
      int channel = 0;
      if (place.at >= place.begin + (GRANULE_BYTES - 1) && place.at + GRANULE_BYTES <= place.end) {
        // Of most, each channel's granule lies within its line.
#pragma unroll 4
        for (; channel < existing; ++channel) {
          copy_async<GRANULE_BYTES>(tile_ + (place.to & -GRANULE_BYTES),
                                    reinterpret_cast<const void*>(place.at & -GRANULE_BYTES), true);
          advance(place);
        }
      }
#pragma unroll 1
      for (; channel < count; ++channel) {
        const int64_t granule = place.at & -GRANULE_BYTES;
        int bytes = 0;
        if (channel < existing && granule + GRANULE_BYTES > place.begin && granule < place.end) {
          bytes = static_cast<int>(min(place.end - granule, int64_t{GRANULE_BYTES}));
        }
        copy_granule(tile_ + (place.to & -GRANULE_BYTES),
                     reinterpret_cast<const void*>(bytes > 0 ? granule : aligned_input()), bytes,
                     input_);
        advance(place);
      }
    });
  }

  // Clears what this thread's granules hold from before their lines, when its copies have landed.
  __device__ __forceinline__ void clear(int count) const {
    if (origin_.x >= 0) return;
    for_each([&](Place place) {
      const int existing = place.inside ? min(count, channels_) : 0;
#pragma unroll 1
      for (int channel = 0; channel < existing; ++channel) {
        const int64_t granule = place.at & -GRANULE_BYTES;
        if (granule < place.begin && place.begin < granule + GRANULE_BYTES) {
          Bits* const to = reinterpret_cast<Bits*>(tile_ + (place.to & -GRANULE_BYTES));
          const int elements = static_cast<int>(place.begin - granule) / SIZE;
#pragma unroll 1
          for (int i = 0; i < elements; ++i) to[i] = 0;
        }
        advance(place);
      }
    });
  }

 private:
  static constexpr int SIZE = sizeof(T);
  using Bits = std::conditional_t<SIZE == 4, uint32_t, uint16_t>;

  // A granule of a line of one channel. Addresses, in bytes.
  struct Place {
    int64_t at;          // in the input, not yet rounded down
    int to;              // in the tile, likewise
    int64_t begin, end;  // of the line in the input
    bool inside;         // whether there is such a line
  };

  // Goes on to the next channel.
  __device__ __forceinline__ void advance(Place& place) const {
    const int64_t stride = s_.in_channel_stride * SIZE;
    place.at += stride, place.begin += stride, place.end += stride;
    place.to += s_.channel_pitch * SIZE;
  }

  __device__ __forceinline__ int64_t aligned_input() const {
    return reinterpret_cast<int64_t>(input_) & -GRANULE_BYTES;
  }

  // Calls f for this thread's granules of the first channel.
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    const int items = s_.planes * s_.rows * static_cast<int>(s_.by_columns.divisor);
#pragma unroll 1
    for (int item = crew_.thread; item < items; item += crew_.threads) {
      int line = item;
      const int number = s_.by_columns.split(line);
      int plane = line;
      const int row = s_.by_rows.split(plane);
      const int r = origin_.r + plane * PLANE_STEP, y = origin_.y + row * LINE_STEP;
      Place place;
      place.inside = static_cast<unsigned>(r) < static_cast<unsigned>(s_.r.input) &&
                     static_cast<unsigned>(y) < static_cast<unsigned>(s_.y.input);
      const int first = place.inside ? r * s_.r.input_stride + y * s_.y.input_stride : 0;
      place.begin = reinterpret_cast<int64_t>(from_ + first);
      place.end = place.begin + int64_t{s_.x.input} * SIZE;
      place.at = place.begin + int64_t{origin_.x} * SIZE + number * GRANULE_BYTES;
      place.to = (shift_ + plane * s_.plane_pitch + row * s_.row_pitch) * SIZE +
                 number * GRANULE_BYTES;
      f(place);
    }
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
