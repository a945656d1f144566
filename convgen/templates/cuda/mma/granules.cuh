// How the producers of the mma engine's gathers stage tiles as the input lies in memory: in
// granules of 16 bytes, which asynchronous copies take whatever the lines' lengths and strides.
//
// The pitches of the tile are congruent to distances in the input modulo a granule, so that a
// line's granules land where they are aligned too. Lanes find elements by these pitches alone; what
// granules hold of other lines, nobody reads, but for the columns beside the input, which are
// cleared.
//
// Channels lie in octets: 8 neighbouring ones, or those of a product whose lanes load words of
// neighbours (WordOrder). An octet begins at a granule, its first line at its place in one.
#pragma once

#include "staging.cuh"

namespace convgen {

template <typename T>
constexpr int GRANULE = GRANULE_BYTES / static_cast<int>(sizeof(T));  // elements

// Where an element of the input lies in its granule, in elements.
template <typename T>
__device__ __forceinline__ int within_granule(const T* tensor, int64_t element) {
  const uint64_t at = reinterpret_cast<uint64_t>(tensor) / sizeof(T) + element;
  return static_cast<int>(at) & (GRANULE<T> - 1);
}

// The place within its granule of a tile's first element; `from` is the input's first channel.
template <typename T>
__device__ __forceinline__ int tile_shift(const GatherShape& s, const T* from,
                                          const TileOrigin& origin) {
  return within_granule(from, int64_t{origin.r} * s.r.input_stride +
                                  int64_t{origin.y} * s.y.input_stride + origin.x);
}

// Where the `index`-th octet of a tile, which begins with `channel`, has its first element.
// `shift` is the tile's.
template <typename T>
__device__ __forceinline__ int octet_place(const GatherShape& s, int index, int channel,
                                           int shift) {
  const int distance = static_cast<int>(s.in_channel_stride) & (GRANULE<T> - 1);
  return index * s.octet_pitch + ((shift + channel * distance) & (GRANULE<T> - 1));
}

// Whether a line of the input is one of the tile's.
template <int PLANE_STEP, int LINE_STEP>
__device__ __forceinline__ bool line_inside(const GatherShape& s, const TileOrigin& origin,
                                            int plane, int row) {
  return static_cast<unsigned>(origin.r + plane * PLANE_STEP) < static_cast<unsigned>(s.r.input) &&
         static_cast<unsigned>(origin.y + row * LINE_STEP) < static_cast<unsigned>(s.y.input);
}

// One tile, of elements like T (unsigned integers of their size), staged by a crew.
template <int PLANE_STEP, int LINE_STEP, typename T>
class GranuleTile {
 public:
  GranuleTile() = default;
  // `from` is the first of `channels` channels of the input; the tile has `octets` octets from
  // `first_octet` on. `tensor` is the whole one.
  __device__ __forceinline__ GranuleTile(const GatherShape& s, void* tile, const T* tensor,
                                         const T* from, int channels, int first_octet, int octets,
                                         const TileOrigin& origin)
      : tile_(static_cast<unsigned char*>(tile)),
        tensor_(tensor),
        from_(from),
        channels_(channels),
        first_octet_(first_octet),
        octets_(octets),
        origin_(origin),
        shift_(tile_shift(s, from, origin)) {}

  // Starts copying: zeros where there is no line or channel. Threads are dealt granules of lines.
  __device__ __forceinline__ void copy(const GatherShape& s, const Crew& crew) const {
    const int items = s.planes * s.rows * static_cast<int>(s.by_columns.divisor);
#pragma unroll 1
    for (int item = crew.thread; item < items; item += crew.threads) {
      int plane = item;
      const int number = s.by_columns.split(plane), row = s.by_rows.split(plane);
      const Line line = locate(s, plane, row);
      const int64_t of_line = line.from + number * GRANULE<T>;
#pragma unroll 1
      for (int index = 0; index < octets_; ++index) {
        const Octet octet = find_octet(s, index);
        int64_t at = address(s, of_line, octet.channel);
        int to = (octet.place + line.to + number * GRANULE<T>) * SIZE;
        // Nearly always all channels' granules lie within the input. What they hold of other lines
        // is cleared later where it matters: to tell it here would take longer than to copy it.
        const bool whole = octet.last < channels_ && (at & -GRANULE_BYTES) >= begin() &&
                           at + (octet.last - octet.channel) * channel_bytes(s) + GRANULE_BYTES <=
                               end(s);
        if (whole || !line.inside) {
          const int64_t lane = s.lane_channels * channel_bytes(s);
          const int64_t half = s.half_channels * channel_bytes(s) - 4 * lane;
#pragma unroll
          for (int slot = 0; slot < 8; ++slot) {
            copy_async<GRANULE_BYTES>(tile_ + (to & -GRANULE_BYTES),
                                      reinterpret_cast<const void*>(at & -GRANULE_BYTES),
                                      line.inside);
            at += lane, to += s.lane_pitch * SIZE;
            if (slot == 3) at += half, to += (s.half_pitch - 4 * s.lane_pitch) * SIZE;
          }
          continue;
        }
#pragma unroll 1
        for (int slot = 0; slot < 8; ++slot) {
          const int channel = slot_channel(s, octet, slot);
          const int64_t granule = address(s, of_line, channel) & -GRANULE_BYTES;
          int bytes = 0;
          if (channel < channels_ && granule + GRANULE_BYTES > begin() && granule < end(s)) {
            bytes = static_cast<int>(min(end(s) - granule, int64_t{GRANULE_BYTES}));
          }
          copy_granule(tile_ + ((to + slot_place(s, slot) * SIZE) & -GRANULE_BYTES),
                       reinterpret_cast<const void*>(bytes > 0 ? granule : aligned_tensor()), bytes,
                       tensor_);
        }
      }
    }
  }

  // The same by bulk copies, a line of a channel each, which `barrier` counts. Returns the bytes
  // that this thread has started to copy.
  __device__ __forceinline__ int copy_bulk(const GatherShape& s, const Crew& crew,
                                           uint64_t* barrier) const {
    int started = 0;
    each_line(s, crew, [&](const Line& line, int channel, int place) {
      const int64_t at = address(s, line.from, channel), first = at & -GRANULE_BYTES;
      unsigned char* const to = tile_ + (place * SIZE & -GRANULE_BYTES);
      const int bytes = ((place * SIZE & (GRANULE_BYTES - 1)) + s.columns * SIZE + GRANULE_BYTES -
                         1) & -GRANULE_BYTES;
      const bool exists = line.inside && channel < channels_;
      if (exists && first >= begin() && first + bytes <= end(s)) {
        bulk_copy(to, reinterpret_cast<const void*>(first), bytes, barrier);
        started += bytes;
      } else {
        copy_elements(s, to, first, bytes, exists);
      }
    });
    return started;
  }

  // Whether a line of the tile has columns beside the input, which hold the ends of other lines.
  __device__ __forceinline__ bool has_margins(const GatherShape& s) const {
    return origin_.x < 0 || s.x.input - origin_.x < s.columns;
  }

  // Clears these columns, once all copies of the crew have landed. Other lines are zero already.
  __device__ __forceinline__ void clear_margins(const GatherShape& s, const Crew& crew) const {
    const int left = min(max(-origin_.x, 0), s.columns);
    const int right = max(s.x.input - origin_.x, left);
    each_line(s, crew, [&](const Line& line, int channel, int place) {
      if (!line.inside || channel >= channels_) return;
      T* const at = reinterpret_cast<T*>(tile_) + place;
#pragma unroll 1
      for (int column = 0; column < left; ++column) at[column] = 0;
#pragma unroll 1
      for (int column = right; column < s.columns; ++column) at[column] = 0;
    });
  }

 private:
  static constexpr int SIZE = sizeof(T);

  // The first column of a line.
  struct Line {
    int64_t from;  // in a channel of the input; elements
    int to;        // from an octet's place in the tile
    bool inside;   // whether there is such a line
  };
  struct Octet {
    int channel, last;  // its first channel and its last one
    int place;          // of its first element in the tile
  };

  __device__ __forceinline__ Line locate(const GatherShape& s, int plane, int row) const {
    Line line;
    line.inside = line_inside<PLANE_STEP, LINE_STEP>(s, origin_, plane, row);
    const int first = line.inside ? (origin_.r + plane * PLANE_STEP) * s.r.input_stride +
                                        (origin_.y + row * LINE_STEP) * s.y.input_stride
                                  : 0;
    line.from = int64_t{first} + origin_.x;
    line.to = plane * s.plane_pitch + row * s.row_pitch;
    return line;
  }

  __device__ __forceinline__ Octet find_octet(const GatherShape& s, int index) const {
    Octet octet;
    octet.channel = octet_channel(s.lane_channels, first_octet_ + index);
    octet.last = octet.channel + s.half_channels + 3 * s.lane_channels;
    octet.place = octet_place<T>(s, index, octet.channel, shift_);
    return octet;
  }

  // Of the slots 0 to 7 of an octet.
  __device__ __forceinline__ static int slot_channel(const GatherShape& s, const Octet& octet,
                                                     int slot) {
    return octet.channel + slot / 4 * s.half_channels + slot % 4 * s.lane_channels;
  }
  __device__ __forceinline__ static int slot_place(const GatherShape& s, int slot) {
    return slot / 4 * s.half_pitch + slot % 4 * s.lane_pitch;
  }

  // Of all lines of all channels, dealt to the crew's threads: the line, the channel, and where its
  // first column lies in the tile.
  template <class Take>
  __device__ __forceinline__ void each_line(const GatherShape& s, const Crew& crew,
                                            Take&& take) const {
    const int items = octets_ * 8 * s.planes * s.rows;
#pragma unroll 1
    for (int item = crew.thread; item < items; item += crew.threads) {
      int plane = item / 8;
      const int slot = item % 8, row = s.by_rows.split(plane);
      int index = plane;
      plane = s.by_planes.split(index);
      const Line line = locate(s, plane, row);
      const Octet octet = find_octet(s, index);
      take(line, slot_channel(s, octet, slot), octet.place + slot_place(s, slot) + line.to);
    }
  }

  // Granules from the address `first` on, of which the input has none, if not `exists`, or some
  // only in part. Stores rather than copies: what a bulk copy would wait for.
  __device__ __forceinline__ void copy_elements(const GatherShape& s, unsigned char* to,
                                                int64_t first, int bytes, bool exists) const {
    struct alignas(GRANULE_BYTES) Granule {
      T element[GRANULE<T>];
    };
#pragma unroll 1
    for (int i = 0; i < bytes; i += GRANULE_BYTES) {
      Granule granule = {};
#pragma unroll
      for (int j = 0; j < GRANULE<T>; ++j) {
        const int64_t at = first + i + j * SIZE;
        if (exists && at >= begin() && at < end(s)) {
          granule.element[j] = *reinterpret_cast<const T*>(at);
        }
      }
      *reinterpret_cast<Granule*>(to + i) = granule;
    }
  }

  __device__ __forceinline__ int64_t address(const GatherShape& s, int64_t of_line,
                                             int channel) const {
    return begin() + of_line * SIZE + channel * channel_bytes(s);
  }
  // Of the channels in memory; from one to the next.
  __device__ __forceinline__ int64_t begin() const { return reinterpret_cast<int64_t>(from_); }
  __device__ __forceinline__ int64_t end(const GatherShape& s) const {
    return begin() + channels_ * channel_bytes(s);
  }
  __device__ __forceinline__ static int64_t channel_bytes(const GatherShape& s) {
    return s.in_channel_stride * SIZE;
  }

  __device__ __forceinline__ int64_t aligned_tensor() const {
    return reinterpret_cast<int64_t>(tensor_) & -GRANULE_BYTES;
  }

  unsigned char* tile_;
  const T *tensor_, *from_;
  int channels_, first_octet_, octets_;
  TileOrigin origin_;
  int shift_;
};

}  // namespace convgen
