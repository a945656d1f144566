// What the producer warps of wgrad by wgmma do: they copy both tensors of a tile to shared memory,
// and put the words of coarse channels in the order in which the tensor core reads them.
#pragma once

#include "mma_wgrad.cuh"

namespace convgen {

// Words of a staged chunk of N_BLOCKS x 8 coarse channels: for each product and 8 channels two
// matrices of 8 channels x 4 words, which SharedColumns describes. Word t of a channel belongs to
// quad t, in the order that Tf32Product and HalfProduct say.
constexpr int MATRIX_WORDS = PRODUCT_COLUMNS * 4, COLUMNS_WORDS = 2 * MATRIX_WORDS;
template <class Product, int N_BLOCKS>
constexpr int CHUNK_WORDS = PRODUCT_STEPS<Product> * N_BLOCKS * COLUMNS_WORDS;

// A channel's share of a chunk is a row of each of MATRICES matrices, which begin at row(chunk and
// 8 channels, channel), the i-th of them step(i) further. Words of 16-bit elements are copied to
// their places. Those of TF32 have to be rounded anyway: quads are copied into the rows one after
// the other, and afterwards a thread puts the words of all into their places.
template <class Product, int N_BLOCKS>
struct CoarseRows {
  static constexpr bool IN_PLACE = Product::ELEMENTS == 2;
  static constexpr int QUAD_WORDS = QUAD / Product::ELEMENTS;
  static constexpr int MATRICES = QUAD_WORDS;
  using Raw = typename Product::Raw;

  __device__ static __forceinline__ int row(int piece, int channel) {
    return piece / N_BLOCKS * CHUNK_WORDS<Product, N_BLOCKS> + piece % N_BLOCKS * COLUMNS_WORDS +
           channel * 4;
  }
  __device__ static __forceinline__ constexpr int step(int i) {
    return i % PRODUCT_STEPS<Product> * N_BLOCKS * COLUMNS_WORDS +
           i / PRODUCT_STEPS<Product> * MATRIX_WORDS;
  }
  // Where quad t is copied, from the channel's first row.
  __device__ static __forceinline__ int quad(int t) {
    constexpr int PER_ROW = 4 / QUAD_WORDS;  // quads
    return IN_PLACE ? t : step(t / PER_ROW) + t % PER_ROW * QUAD_WORDS;
  }

  // Copies a quad, of which the first `valid` positions exist (a multiple of ACCESS), in accesses
  // of ACCESS elements; the others are zero.
  template <int ACCESS>
  __device__ static __forceinline__ void copy(uint32_t* to, const Raw* from, int valid) {
    if constexpr (ACCESS * sizeof(Raw) >= 4) {
      constexpr int COUNT = IN_PLACE ? 2 : ACCESS;
#pragma unroll
      for (int i = 0; i < QUAD; i += COUNT) {
        copy_async<COUNT * sizeof(Raw)>(to + (IN_PLACE ? step(i / 2) : i), from + i, i < valid);
      }
    } else {
#pragma unroll
      for (int i = 0; i < QUAD_WORDS; ++i) {
        uint32_t word = 0;
        if (2 * i < valid) word = from[2 * i];
        if (2 * i + 1 < valid) word |= uint32_t{from[2 * i + 1]} << 16;
        to[step(i)] = word;
      }
    }
  }

  // Puts the words of a channel's four quads into place, rounded.
  __device__ static __forceinline__ void arrange(uint32_t* rows) {
    uint32_t word[4 * QUAD_WORDS];  // quad after quad
#pragma unroll
    for (int i = 0; i < MATRICES; ++i) load_vector<4>(word + 4 * i, rows + step(i));
#pragma unroll
    for (int i = 0; i < MATRICES; ++i) {
      uint4 row;
      row.x = Product::high(word[i]);
      row.y = Product::high(word[i + QUAD_WORDS]);
      row.z = Product::high(word[i + 2 * QUAD_WORDS]);
      row.w = Product::high(word[i + 3 * QUAD_WORDS]);
      *reinterpret_cast<uint4*>(rows + step(i)) = row;
    }
  }
};

// The table of quads of the coarse tensor: how many elements they lie behind the tile's first one,
// and their plane, row and column. Tiles have no more than 128 quads.
__device__ __forceinline__ void fill_quad_table(const ProductShape& s, uint2* table) {
  const int per_row = s.tile_w / QUAD;
  for (int i = threadIdx.x; i < s.coarse.places; i += blockDim.x) {
    const int line = i / per_row, plane = line / s.tile_h;
    const int row = line - plane * s.tile_h, column = (i - line * per_row) * QUAD;
    table[i] = make_uint2((plane * s.coarse_h + row) * s.coarse_w + column,
                          plane << 24 | row << 16 | column);
  }
}

// What the copies of a tile have in common. It is found while those of the tile before are on their
// way.
struct StagedTile {
  ProductOrigin coarse, fine;
  const void* quads;   // its first element of the coarse tensor
  bool whole;          // whether all coarse positions and channels exist
  int lines;           // which unaligned rows do: see find_lines
  int64_t first_line;  // the address of the first one

  // Now, that is, and not where it is needed.
  __device__ __forceinline__ void settle() {
    coarse.channel = opaque(coarse.channel), fine.channel = opaque(fine.channel);
    quads = opaque(quads);
    first_line = reinterpret_cast<int64_t>(opaque(reinterpret_cast<const char*>(first_line)));
    coarse.d = opaque(coarse.d), coarse.h = opaque(coarse.h), coarse.w = opaque(coarse.w);
    fine.d = opaque(fine.d), fine.h = opaque(fine.h), fine.w = opaque(fine.w);
    lines = opaque(lines), whole = opaque(whole);
  }
};

// Finds a tile's coarse part.
template <class Product, int N_BLOCKS>
__device__ __forceinline__ void find_quads(const ProductShape& s, StagedTile& tile) {
  const ProductOrigin& o = tile.coarse;
  tile.quads = static_cast<const typename Product::Raw*>(o.channel) +
               static_cast<uint32_t>((o.d * s.coarse_h + o.h) * s.coarse_w + o.w);
  tile.whole = s.coarse.places == s.chunks * CHUNK_QUADS && o.d + s.tile_d <= s.coarse_d &&
               o.h + s.tile_h <= s.coarse_h && o.w + s.tile_w <= s.coarse_w &&
               o.channels >= N_BLOCKS * PRODUCT_COLUMNS;
}

// Starts copying the coarse channels of a tile: a warp takes 8 channels of a chunk at a time (a
// piece), a lane a quad of one channel. Channels and positions beyond the tensor are zero, and so
// are those behind the last quad; of a WHOLE tile there are none.
template <int WARPS, class Product, int N_BLOCKS, int ACCESS, bool WHOLE>
__device__ __forceinline__ void copy_quads(const ProductShape& s, int warp, int lane,
                                           const uint2* table, uint32_t* to,
                                           const ProductOrigin& origin, const void* first) {
  using Rows = CoarseRows<Product, N_BLOCKS>;
  using Raw = typename Product::Raw;
  const uint32_t channel = static_cast<uint32_t>(lane) / 4, t = static_cast<uint32_t>(lane) % 4;
  // Below 2^31, as all strides of channels are.
  const uint64_t stride = static_cast<uint32_t>(s.coarse_channel_stride);
  const auto* const tensor = static_cast<const Raw*>(origin.channel);
  const auto* const tile = static_cast<const Raw*>(first) + stride * channel;
  uint32_t* rows = to + Rows::row(warp * N_BLOCKS, channel) + Rows::quad(t);
#pragma unroll 1
  for (int chunk = warp; chunk < s.chunks; chunk += WARPS) {
    const int index = chunk * CHUNK_QUADS + t;
    uint32_t place = 0;
    int valid = WHOLE ? QUAD : 0;
    if constexpr (WHOLE) {
      place = table[index].x;
    } else if (index < s.coarse.places) {
      const uint2 entry = table[index];
      place = entry.x;
      if (origin.d + static_cast<int>(entry.y >> 24) < s.coarse_d &&
          origin.h + static_cast<int>(entry.y >> 16 & 0xff) < s.coarse_h) {
        valid = s.coarse_w - origin.w - static_cast<int>(entry.y & 0xffff);
      }
    }
    const Raw* from = WHOLE || valid > 0 ? tile + place : tensor;
    if (WHOLE || origin.channels >= N_BLOCKS * PRODUCT_COLUMNS) {
#pragma unroll
      for (int n = 0; n < N_BLOCKS; ++n) {
        Rows::template copy<ACCESS>(rows + n * COLUMNS_WORDS, from, valid);
        from += stride * PRODUCT_COLUMNS;
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < N_BLOCKS; ++n) {
        const bool exists = n * PRODUCT_COLUMNS + channel < origin.channels;
        Rows::template copy<ACCESS>(rows + n * COLUMNS_WORDS, exists ? from : tensor,
                                    exists ? valid : 0);
        from += stride * PRODUCT_COLUMNS;
      }
    }
    rows += WARPS * CHUNK_WORDS<Product, N_BLOCKS>;
  }
}

template <int WARPS, class Product, int N_BLOCKS, int ACCESS>
__device__ __forceinline__ void copy_coarse(const ProductShape& s, int warp, int lane,
                                            const uint2* table, uint32_t* to,
                                            const StagedTile& tile) {
  if (tile.whole) {
    copy_quads<WARPS, Product, N_BLOCKS, ACCESS, true>(s, warp, lane, table, to, tile.coarse,
                                                       tile.quads);
  } else {
    copy_quads<WARPS, Product, N_BLOCKS, ACCESS, false>(s, warp, lane, table, to, tile.coarse,
                                                        tile.quads);
  }
}

// And arranges them, once all copies of all these warps have landed.
template <int WARPS, class Product, int N_BLOCKS>
__device__ __forceinline__ void arrange_coarse(const ProductShape& s, int thread, uint32_t* to) {
  using Rows = CoarseRows<Product, N_BLOCKS>;
  const int shares = s.chunks * N_BLOCKS * PRODUCT_COLUMNS;
#pragma unroll 2
  for (int i = thread; i < shares; i += WARPS * WARP) {
    Rows::arrange(to + Rows::row(i / PRODUCT_COLUMNS, i % PRODUCT_COLUMNS));
  }
}

// ---- Unaligned rows ----------------------------------------------------------------------------
//
// Where no asynchronous copy of 4 bytes divides the lines of the fine tensor, as 16-bit elements
// may have it, these are staged as they lie in memory: every line's 16-byte vectors, the first of
// which may begin with elements of the line before. A lane adds how many; it is the same for
// channels 8 apart.

// As fill_windows, in bytes. The bits from UNALIGNED_SHIFT on hold how far within a vector the
// quad's line lies, compared with the tile's first line: modulo 16, as what overflows is lost.
constexpr int UNALIGNED_SHIFT = 28;
__device__ __forceinline__ uint32_t unaligned_shift(int64_t bytes) {
  return static_cast<uint32_t>(bytes) << UNALIGNED_SHIFT;
}
template <typename Raw, int STRIDE_D, int STRIDE_H, int STRIDE_W>
__device__ __forceinline__ void fill_unaligned_windows(const ProductShape& s, uint32_t* windows) {
  constexpr int SIZE = sizeof(Raw);
  const int row_quads = s.tile_w / QUAD, quads = s.tile_d * s.tile_h * row_quads;
  for (int i = threadIdx.x; i < (s.chunks + s.parts) * CHUNK_QUADS; i += blockDim.x) {
    const int chunk = i / CHUNK_QUADS;
    const int quad = i - (chunk < s.chunks ? 0 : chunk - chunk % s.parts) * CHUNK_QUADS;
    const int row = quad / row_quads, plane = row / s.tile_h, h = row - plane * s.tile_h;
    const int line = plane * s.position_planes * s.rows + h * s.position_rows;
    const uint32_t at = line * s.row_words * 4 + (quad - row * row_quads) * QUAD * STRIDE_W * SIZE;
    const int64_t from = (int64_t{plane} * STRIDE_D * s.fine_h + h * STRIDE_H) * s.fine_w;
    windows[i] = quad < quads ? at | unaligned_shift(from * SIZE) : 0;
  }
}

// The table of vectors: the bytes from the tile's first line to the vector's line, 16 more for
// each vector before it, and its plane and row. lay_out() sees to it that 32 bits hold them.
template <typename Raw>
__device__ __forceinline__ void fill_vector_table(const ProductShape& s, uint2* table) {
  const int per_row = s.row_words / VECTOR_WORDS;
  for (int i = threadIdx.x; i < s.fine.places; i += blockDim.x) {
    const int line = i / per_row, plane = line / s.rows, row = line - plane * s.rows;
    const int64_t from = (int64_t{plane} * s.plane_step * s.fine_h + row * s.row_step) * s.fine_w;
    table[i] = make_uint2(
        static_cast<uint32_t>(from * int64_t{sizeof(Raw)}) + (i - line * per_row) * VECTOR_BYTES,
        plane << 16 | row);
  }
}

// From channel to channel of the fine tensor, whose elements are fewer than 2^31.
template <typename Raw>
__device__ __forceinline__ uint32_t channel_bytes(const ProductShape& s) {
  return static_cast<uint32_t>(s.fine_channel_stride) * uint32_t{sizeof(Raw)};
}

// Address of column `origin.w` of a tile's first line, of its first channel.
template <typename Raw>
__device__ __forceinline__ int64_t first_address(const ProductShape& s,
                                                 const ProductOrigin& origin) {
  return reinterpret_cast<int64_t>(origin.channel) +
         ((int64_t{origin.d} * s.fine_h + origin.h) * s.fine_w + origin.w) * int64_t{sizeof(Raw)};
}

__device__ __forceinline__ bool line_inside(const ProductShape& s, const ProductOrigin& origin,
                                            const uint2& place) {
  const int d = origin.d + static_cast<int>(place.y >> 16) * s.plane_step;
  const int h = origin.h + static_cast<int>(place.y & 0xffff) * s.row_step;
  return static_cast<unsigned>(d) < static_cast<unsigned>(s.fine_d) &&
         static_cast<unsigned>(h) < static_cast<unsigned>(s.fine_h);
}

// Of 16 channels, each of WARPS that stage copies every WARPS-th: these are alike by turns, in
// where they begin in their vectors.
template <int WARPS>
constexpr int WARP_CHANNELS = PRODUCT_ROWS / WARPS;

// Starts copying the unaligned rows of a tile, whose first one begins at address `first`. All
// vectors of lines that exist lie within the tensor; of a WHOLE tile all lines and channels exist.
template <int WARPS, bool WHOLE, typename Raw>
__device__ __forceinline__ void copy_lines(const ProductShape& s, int warp, int lane,
                                           const uint2* table, uint32_t* to,
                                           const ProductOrigin& origin, int64_t first) {
  const int step = opaque(WARPS * s.fine_pitch);
  constexpr int CHANNELS = WARP_CHANNELS<WARPS>, ALIKE = 8 / WARPS;
  const int places = s.fine.places;
#pragma unroll 1
  for (int channel = warp; channel < s.fine_staged; channel += PRODUCT_ROWS) {
    // A vector's address is its channel's in here, a multiple of 16, and a 32-bit offset.
    int64_t from[CHANNELS];
    uint32_t shift[ALIKE];
    from[0] = first + uint64_t{channel_bytes<Raw>(s)} * static_cast<uint32_t>(channel);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      if (i > 0) from[i] = from[i - 1] + uint64_t{channel_bytes<Raw>(s)} * WARPS;
      if (i < ALIKE) shift[i] = static_cast<uint32_t>(from[i]) % VECTOR_BYTES;
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) from[i] -= shift[i % ALIKE];
    const int existing = origin.channels - channel;
    auto copy = [&](uint32_t* word, uint2 place) {
      const bool inside = WHOLE || line_inside(s, origin, place);
#pragma unroll
      for (int i = 0; i < CHANNELS; ++i) {
        const uint32_t offset = (place.x + shift[i % ALIKE]) & ~(VECTOR_BYTES - 1u);
        copy_async<VECTOR_BYTES>(word + i * step, reinterpret_cast<const void*>(from[i] + offset),
                                 WHOLE || (inside && i * WARPS < existing));
      }
    };
    // Two places at a time, which a thread knows before it begins to copy.
    uint32_t* word = to + channel * s.fine_pitch + lane * VECTOR_WORDS;
    const uint2* entry = table + lane;
    int left = places;
#pragma unroll 1
    for (; left >= 2 * WARP; left -= 2 * WARP) {
      const uint2 place = entry[0], other = entry[WARP];
      copy(word, place);
      copy(word + WARP * VECTOR_WORDS, other);
      entry += 2 * WARP, word += 2 * WARP * VECTOR_WORDS;
    }
#pragma unroll 1
    for (left -= lane; left > 0; left -= WARP) {
      copy(word, *entry);
      entry += WARP, word += WARP * VECTOR_WORDS;
    }
  }
}

// The same of any tile: vectors that reach beyond the tensor's ends are copied as far as they lie
// within.
template <int WARPS, typename Raw>
__device__ __forceinline__ void copy_end_lines(const ProductShape& s, int warp, int lane,
                                               const uint2* table, uint32_t* to,
                                               const ProductOrigin& origin, int64_t first,
                                               const Raw* tensor) {
  constexpr int64_t VECTOR = VECTOR_BYTES;
  const int64_t begin = reinterpret_cast<int64_t>(tensor);
  const int64_t end = begin + s.fine_elements * int64_t{sizeof(Raw)};
#pragma unroll 1
  for (int channel = warp; channel < s.fine_staged; channel += WARPS) {
#pragma unroll 1
    for (int i = lane; i < s.fine.places; i += WARP) {
      const uint2 place = table[i];
      const int64_t vector = (first + channel * int64_t{channel_bytes<Raw>(s)} + place.x) & -VECTOR;
      int bytes = 0;
      if (channel < origin.channels && line_inside(s, origin, place) && vector + VECTOR > begin &&
          vector < end) {
        bytes = end - vector < VECTOR ? static_cast<int>(end - vector) : VECTOR_BYTES;
      }
      copy_vector(to + channel * s.fine_pitch + i * VECTOR_WORDS,
                  reinterpret_cast<const void*>(bytes > 0 ? vector : begin & -VECTOR), bytes,
                  tensor);
    }
  }
}

// Of a tile's unaligned rows all exist, so that vectors have no conditions; or some do; or some of
// their vectors reach beyond the tensor's ends.
constexpr int ALL_LINES = 0, SOME_LINES = 1, END_LINES = 2;

// Finds a tile's unaligned rows. `tensor` is the whole one.
template <typename Raw>
__device__ __forceinline__ void find_lines(const ProductShape& s, StagedTile& tile,
                                           const Raw* tensor) {
  const ProductOrigin& origin = tile.fine;
  const int last_d = origin.d + (s.planes - 1) * s.plane_step;
  const int last_h = origin.h + (s.rows - 1) * s.row_step;
  const int existing = min(origin.channels, s.fine_staged);
  const int64_t begin = reinterpret_cast<int64_t>(tensor);
  const int64_t first = first_address<Raw>(s, origin);
  // All vectors of lines that exist lie between these addresses; where none does, it does not
  // matter.
  auto line_bytes = [&](int d, int h) {
    const uint32_t line = static_cast<uint32_t>(d - origin.d) * static_cast<uint32_t>(s.fine_h) +
                          static_cast<uint32_t>(h - origin.h);
    return line * static_cast<uint32_t>(s.fine_w) * uint32_t{sizeof(Raw)};
  };
  const int64_t low = first + line_bytes(max(origin.d, 0), max(origin.h, 0)) - (VECTOR_BYTES - 1);
  const int64_t high = first + line_bytes(min(last_d, s.fine_d - 1), min(last_h, s.fine_h - 1)) +
                       uint64_t{channel_bytes<Raw>(s)} * static_cast<uint32_t>(existing - 1) +
                       s.row_words * 4;
  const bool within = low >= begin && high <= begin + s.fine_elements * int64_t{sizeof(Raw)};
  const bool all = origin.d >= 0 && origin.h >= 0 && last_d < s.fine_d && last_h < s.fine_h &&
                   existing == s.fine_staged;
  tile.first_line = first;
  tile.lines = !within ? END_LINES : all ? ALL_LINES : SOME_LINES;
}

// Starts copying all unaligned rows of a tile to `to`.
template <int WARPS, typename Raw>
__device__ __forceinline__ void copy_vectors(const ProductShape& s, int warp, int lane,
                                             const uint2* table, uint32_t* to,
                                             const StagedTile& tile, const Raw* tensor) {
  if (tile.lines == ALL_LINES) {
    copy_lines<WARPS, true, Raw>(s, warp, lane, table, to, tile.fine, tile.first_line);
  } else if (tile.lines == SOME_LINES) {
    copy_lines<WARPS, false, Raw>(s, warp, lane, table, to, tile.fine, tile.first_line);
  } else {
    copy_end_lines<WARPS>(s, warp, lane, table, to, tile.fine, tile.first_line, tensor);
  }
}

// Whether vectors hold something from beside the lines' ends.
__device__ __forceinline__ bool reaches_beside(const ProductShape& s, const ProductOrigin& origin) {
  return origin.w < 0 || s.fine_w - origin.w < s.line;
}

// Writes zeros over it, when all copies have landed.
template <int WARPS, typename Raw>
__device__ __forceinline__ void clear_beside_lines(const ProductShape& s, int thread,
                                                   const uint2* table, uint32_t* to,
                                                   const ProductOrigin& origin, int64_t first) {
  const int lines = s.planes * s.rows, vectors = s.row_words / VECTOR_WORDS;
  // A thread has channels 8 apart, which begin alike in their vectors.
  const int channel = static_cast<unsigned>(thread) % 8, pairs = s.fine_staged / PRODUCT_ROWS;
  const int step = 8 * s.fine.pitch;  // elements
  const uint32_t begin = static_cast<uint32_t>(first) + channel_bytes<Raw>(s) * channel;
  auto clear = [&](int column, int count) {
    if (count <= 0) return;
#pragma unroll 1
    for (int line = static_cast<unsigned>(thread) / 8; line < lines; line += WARPS * WARP / 8) {
      const uint32_t within = (begin + table[line * vectors].x) % VECTOR_BYTES;
      Raw* at = reinterpret_cast<Raw*>(to + channel * s.fine_pitch + line * s.row_words) +
                within / uint32_t{sizeof(Raw)} + column;
#pragma unroll 1
      for (int i = 0; i < pairs; ++i) {
#pragma unroll 1
        for (int j = 0; j < count; ++j) at[j] = at[j + step] = 0;
        at += 2 * step;
      }
    }
  };
  clear(0, min(-origin.w, s.line));
  const int right = max(s.fine_w - origin.w, 0);
  clear(right, s.line - right);
}

}  // namespace convgen
