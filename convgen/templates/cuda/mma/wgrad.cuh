// The part of the mma engine's wgrad that does not depend on the specification.
#pragma once

#include "mma.cuh"
#include "mma_wgrad_tiling.cuh"
#include "tf32.cuh"

namespace convgen {

// ---- Where a thread block works -------------------------------------------------------------

struct ProductBlock {
  int coarse0, fine0, group;  // first channels, within the group
  int tap_d, tap_h, tap_w;    // first taps
  int kind, split;
};

// COARSE and FINE are the channels of a unit.
template <int COARSE, int FINE, int TAPS_H, int TAPS_W>
__device__ __forceinline__ ProductBlock locate_products(const ProductShape& s, int index) {
  ProductBlock block;
  block.split = index / s.blocks;
  index -= block.split * s.blocks;
  block.kind = index;
  block.coarse0 = s.blocks_m.split(index) * s.units_m * COARSE;
  block.fine0 = s.blocks_n.split(index) * s.units_n * FINE;
  block.tap_w = s.blocks_w.split(index) * s.units_w * TAPS_W;
  block.tap_h = s.blocks_h.split(index) * s.units_h * TAPS_H;
  block.tap_d = s.blocks_d.split(index) * s.units_d;
  block.group = index;
  return block;
}

// A unit of a block: which of its tiles of channels and blocks of taps.
struct ProductUnit {
  int m, n, w, h, d;
};

__device__ __forceinline__ ProductUnit locate_unit(const ProductShape& s, int unit) {
  ProductUnit u;
  u.m = unit % s.units_m, unit /= s.units_m;
  u.n = unit % s.units_n, unit /= s.units_n;
  u.w = unit % s.units_w, unit /= s.units_w;
  u.h = unit % s.units_h;
  u.d = unit / s.units_h;
  return u;
}

struct ProductTile {
  int n, d0, h0, w0;
};

__device__ __forceinline__ ProductTile locate_product_tile(const ProductShape& s, int index) {
  ProductTile tile;
  tile.w0 = s.tiles_w.split(index) * s.tile_w;
  tile.h0 = s.tiles_h.split(index) * s.tile_h;
  tile.d0 = s.tiles_d.split(index) * s.tile_d;
  tile.n = index;
  return tile;
}

// Tiles are dealt to splits in turns, `split_turn` splits further in each: tiles at an edge take
// longer, and no split has more of them.
struct SplitTiles {
  int first, place;  // of a turn: its first tile, and this split's after that

  __device__ __forceinline__ explicit SplitTiles(int split) : first(0), place(split) {}
  __device__ __forceinline__ int tile() const { return first + place; }
  __device__ __forceinline__ void advance(const ProductShape& s) {
    first += s.splits, place += s.split_turn;
    if (place >= s.splits) place -= s.splits;
  }
};

// How many tiles a split has; in the last turn there may be none for it.
__device__ __forceinline__ int split_tiles(const ProductShape& s, int split) {
  const int turns = s.tiles_per_split - 1;
  const int place = static_cast<unsigned>(split + turns * s.split_turn) % s.splits;
  return turns + (turns * s.splits + place < s.tiles);
}

// ---- Staging --------------------------------------------------------------------------------

// A place of a tile: element of the channel in shared memory, and where it is in the tensor.
__device__ __forceinline__ uint2 pack_place(int element, int plane, int row, int column) {
  return make_uint2(static_cast<uint32_t>(element) | static_cast<uint32_t>(plane) << 20,
                    static_cast<uint32_t>(column) | static_cast<uint32_t>(row) << 16);
}

// windows[i] = where the window of the i-th quad of a tile's chunks starts in a staged fine
// channel; behind the last quad 0. Behind a warp's last chunk comes its first one again, that of
// the next tile. By all threads of a block, like the tables below.
template <int QUAD_PITCH>
__device__ __forceinline__ void fill_windows(const ProductShape& s, uint32_t* windows) {
  const int row_quads = s.tile_w / QUAD, quads = s.tile_d * s.tile_h * row_quads;
  for (int i = threadIdx.x; i < (s.chunks + s.parts) * CHUNK_QUADS; i += blockDim.x) {
    const int chunk = i / CHUNK_QUADS;
    const int quad = i - (chunk < s.chunks ? 0 : chunk - chunk % s.parts) * CHUNK_QUADS;
    const int row = quad / row_quads, plane = row / s.tile_h;
    const int at =
        (plane * s.position_planes * s.rows + (row - plane * s.tile_h) * s.position_rows) *
            s.row_words +
        (quad - row * row_quads) * QUAD_PITCH;
    windows[i] = quad < quads ? at : 0;
  }
}

// The places of a tile of the coarse tensor, of `width` positions each.
__device__ __forceinline__ void fill_coarse_table(const ProductShape& s, uint2* table, int width) {
  const int per_row = s.tile_w / width;
  for (int i = threadIdx.x; i < s.coarse.places; i += blockDim.x) {
    const int row = i / per_row, plane = row / s.tile_h;
    table[i] = pack_place(i * width, plane, row - plane * s.tile_h, (i - row * per_row) * width);
  }
}

template <int QUAD_COLUMNS, int QUAD_PITCH, int ELEMENTS>
__device__ __forceinline__ void fill_fine_table(const ProductShape& s, uint2* table) {
  const int per_row = s.columns / s.fine.width;
  for (int i = threadIdx.x; i < s.fine.places; i += blockDim.x) {
    const int row = i / per_row, plane = row / s.rows;
    const int column = (i - row * per_row) * s.fine.width;
    const int element =
        (row * s.row_words + column / QUAD_COLUMNS * QUAD_PITCH) * ELEMENTS + column % QUAD_COLUMNS;
    table[i] = pack_place(element, plane, row - plane * s.rows, column);
  }
}

// Where a tile's part of a tensor starts, as the copies see it.
struct ProductOrigin {
  const void* channel;  // the block's first one, of the tile's sample
  int d, h, w;          // may be negative: padding
  int channels;         // of the group, from that one on
};

// Both tensors' origins of a tile lie in shared memory, so do those of the tile after it, and last
// what all tiles' have in common. The place of the tile after these follows.
struct ProductOrigins {
  ProductOrigin coarse, fine;
};

// `whole` times COPY_CHANNELS channels at one place, from the tensor if `inside`, else zeros; after
// them `rest` channels one at a time, the first `valid` from the tensor and zeros in the others.
// Where nothing is read, `from` still lies in the tensor, and so do all whole and valid channels.
template <int ACCESS, typename Raw>
__device__ __forceinline__ void copy_channels(Raw* to, int pitch, const Raw* from,
                                              int channel_stride, bool inside, int whole, int rest,
                                              int valid) {
  const Raw* const any = from;
#pragma unroll 1
  for (; whole > 0; --whole) {
    // Known as 32 bits in here, its multiples are added in one instruction.
    const uint64_t stride = static_cast<unsigned>(opaque(channel_stride));
    if constexpr (ACCESS * sizeof(Raw) >= 4) {
#pragma unroll
      for (int i = 0; i < COPY_CHANNELS; ++i) {
        copy_async<ACCESS * sizeof(Raw)>(to + i * pitch, from + stride * i, inside);
      }
    } else {
      Raw value[COPY_CHANNELS];
#pragma unroll
      for (int i = 0; i < COPY_CHANNELS; ++i) {
        value[i] = 0;
        if (inside) value[i] = from[stride * i];
      }
#pragma unroll
      for (int i = 0; i < COPY_CHANNELS; ++i) to[i * pitch] = value[i];
    }
    to += COPY_CHANNELS * pitch, from += stride * COPY_CHANNELS;
  }
#pragma unroll 1
  for (; rest > 0; --rest, --valid) {
    const bool read = inside && valid > 0;
    if constexpr (ACCESS * sizeof(Raw) >= 4) {
      copy_async<ACCESS * sizeof(Raw)>(to, valid > 0 ? from : any, read);
    } else {
      Raw value = 0;
      if (read) value = *from;
      *to = value;
    }
    to += pitch, from += channel_stride;
  }
}

// A place of `width` elements in accesses of ACCESS: they are neighbours in the tensor too, and all
// of them inside it or none.
template <int ACCESS, typename Raw>
__device__ __forceinline__ void copy_wide(const ProductCopies& c, Raw* to, const Raw* from,
                                          int stride, bool inside, int valid) {
  const int whole = max(min(valid, c.channels), 0) / unsigned{COPY_CHANNELS};
  const int rest = c.channels - whole * COPY_CHANNELS;
  int left = c.width;
#pragma unroll 1
  do {
    // Of the pitch the compiler would keep multiples beside the sums.
    copy_channels<ACCESS>(to, opaque(c.pitch), from, stride, inside, whole, rest,
                          valid - whole * COPY_CHANNELS);
    to += ACCESS, from += ACCESS;
  } while ((left -= ACCESS) > 0);
}

// Staged columns are POSITION_COLUMNS for each position, STEP apart in the tensor, whose positions
// are STRIDE apart.
template <int POSITION_COLUMNS, int STRIDE, int STEP>
struct StagedColumn {
  // Where a staged column (0 and up) lies in the tensor.
  __device__ static __forceinline__ int offset(int column) {
    if constexpr (POSITION_COLUMNS * STEP == STRIDE) {
      return column * STEP;
    } else {
      return column / POSITION_COLUMNS * STRIDE + column % POSITION_COLUMNS * STEP;
    }
  }
};

// Copies the index-th (place, block of channels) of a tile to `to`. The tensor's planes, rows and
// columns between those of places lie `steps` apart; Column maps a staged column to the tensor's.
// No access has more than MOST elements.
template <class Column, int MOST, typename Raw>
__device__ __forceinline__ void copy_place(const ProductCopies& c, const uint2* table, Raw* to,
                                           const ProductOrigin& origin, int stride, int3 extent,
                                           int plane_step, int row_step, int index) {
  int channel = index;
  const uint2 place = table[c.by_places.split(channel)];
  channel *= c.channels;
  const int z = origin.d + static_cast<int>(place.x >> 20) * plane_step;
  const int y = origin.h + static_cast<int>(place.y >> 16) * row_step;
  const int x = origin.w + Column::offset(static_cast<int>(place.y & 0xffff));
  const int valid = origin.channels - channel;
  const bool inside = static_cast<unsigned>(z) < static_cast<unsigned>(extent.x) &&
                      static_cast<unsigned>(y) < static_cast<unsigned>(extent.y) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(extent.z);
  const unsigned within = inside ? (z * extent.y + y) * extent.z + x : 0;
  const Raw* const from =
      static_cast<const Raw*>(origin.channel) +
      uint64_t{static_cast<unsigned>(stride)} * static_cast<unsigned>(valid > 0 ? channel : 0) +
      within;
  to += (place.x & 0xfffff) + channel * c.pitch;
  if (MOST >= 8 && c.access == 8) {
    if constexpr (MOST >= 8) copy_wide<8>(c, to, from, stride, inside, valid);
  } else if (MOST >= 4 && c.access == 4) {
    if constexpr (MOST >= 4) copy_wide<4>(c, to, from, stride, inside, valid);
  } else if (MOST >= 2 && c.access == 2) {
    if constexpr (MOST >= 2) copy_wide<2>(c, to, from, stride, inside, valid);
  } else {
    copy_wide<1>(c, to, from, stride, inside, valid);
  }
}

// ---- Operands of products -------------------------------------------------------------------

// Whether a lane keeps its places in a stage in one register. On sm_90a ptxas has one for each of
// them; on others it spilled some beside most sums.
constexpr bool PACKED_OFFSETS = !HAS_WGMMA;

// A lane holds four neighbouring positions (a quad) of a chunk's sixteen: their order within a
// product's depth is free as long as both operands agree. With g = lane / 4, t = lane % 4, quad t:
//   32-bit elements: product 0 takes positions 0 and 2 of the quads, product 1 positions 1 and 3,
//   so
//     that a tap's second product reads what its right neighbour's first one does
//   16-bit elements: one product takes all four, as two words of two.

struct Tf32Product {
  using Raw = uint32_t;
  static constexpr int ELEMENTS = 1;
  static constexpr bool SPLIT = false;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) { return nearest_tf32(bits); }
  __device__ static __forceinline__ uint32_t low(uint32_t, uint32_t) { return 0; }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const uint32_t (&a)[4],
                                                        SharedColumns<1> b) {
    wgmma_tf32(d, a, b);
  }
};

// x = high + low to 22 bits; the sum of three products misses low * low. The mask is for the
// subtraction. Where NaN becomes a number, or the largest numbers infinite, low is NaN.
struct SplitTf32Product : Tf32Product {
  static constexpr bool SPLIT = true;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) {
    return (bits + 0x1000u) & 0xffffe000u;
  }
  __device__ static __forceinline__ uint32_t low(uint32_t bits, uint32_t high) {
    return __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
  }
};

struct HalfProduct {
  using Raw = uint16_t;
  static constexpr int ELEMENTS = 2;
  static constexpr bool SPLIT = false;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) { return bits; }
  __device__ static __forceinline__ uint32_t low(uint32_t, uint32_t) { return 0; }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const uint32_t (&a)[4],
                                                        SharedColumns<1> b) {
    wgmma_f16(d, a, b);
  }
};

struct Bfloat16Product : HalfProduct {
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const uint32_t (&a)[4],
                                                        SharedColumns<1> b) {
    wgmma_bf16(d, a, b);
  }
};

template <class Product>
constexpr int PRODUCT_STEPS = 2 / Product::ELEMENTS;  // products per chunk

// WORDS words (2 or 4, aligned) of shared memory.
template <int WORDS>
__device__ __forceinline__ void load_vector(uint32_t* to, const uint32_t* from) {
  if constexpr (WORDS == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    static_assert(WORDS == 2, "a vector of shared memory");
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  }
}

// 16 coarse channels of a chunk. `half_rows` is 8 channels further. A product takes its four words
// from consecutive registers, loads leave them in others: `zero`, of which the compiler knows
// nothing, makes it move each 16-bit word once instead of once per product.
template <class Product>
struct CoarseFragment {
  uint32_t high[PRODUCT_STEPS<Product>][4], low[PRODUCT_STEPS<Product>][4];

  __device__ __forceinline__ void load(const uint32_t* from, int half_rows, uint32_t zero) {
    constexpr int WORDS = QUAD / Product::ELEMENTS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t quad[WORDS];
      load_vector<WORDS>(quad, from + half * half_rows);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const int step = i % PRODUCT_STEPS<Product>, at = i / PRODUCT_STEPS<Product> * 2 + half;
        high[step][at] = Product::ELEMENTS == 1 ? Product::high(quad[i]) : quad[i] | zero;
        if constexpr (Product::SPLIT) low[step][at] = Product::low(quad[i], high[step][at]);
      }
    }
  }
};

// What the taps of one row read at a lane's quad, for 8 fine channels: VECTORS x VECTOR words,
// which hold neighbouring staged columns.
template <class Product, int VECTORS, int VECTOR>
struct FineWindow {
  static constexpr int WORDS = VECTORS * VECTOR;
  uint32_t high[WORDS], low[WORDS];

  template <int QUAD_COLUMNS, int QUAD_PITCH>
  __device__ __forceinline__ void load(const uint32_t* from) {
    constexpr int ELEMENTS = Product::ELEMENTS;
    uint32_t word[WORDS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      load_vector<VECTOR>(word + v * VECTOR, from + column_word(v * VECTOR * ELEMENTS, QUAD_COLUMNS,
                                                                QUAD_PITCH, ELEMENTS));
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      high[i] = Product::high(word[i]);
      if constexpr (Product::SPLIT) low[i] = Product::low(word[i], high[i]);
    }
  }

  // Word of an operand whose first position reads column `first` and whose next one is `step` on.
  __device__ static __forceinline__ uint32_t operand(const uint32_t (&words)[WORDS], int first,
                                                     int step) {
    if constexpr (Product::ELEMENTS == 1) {
      return words[first];
    } else {
      const int second = first + step;
      if (first % 2 == 0 && step == 1) return words[first / 2];
      return __byte_perm(words[first / 2], words[second / 2],
                         (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
    }
  }

  // d[m] += a[m] * (the tap whose first position reads column `first`), for one product's depth.
  template <int M_TILES>
  __device__ __forceinline__ void multiply(float (&d)[M_TILES][4],
                                           const CoarseFragment<Product> (&a)[M_TILES], int step,
                                           int first, int position_columns) const {
    uint32_t b[2], rest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + (step + 2 * i) * position_columns;
      b[i] = operand(high, column, position_columns);
      if constexpr (Product::SPLIT) rest[i] = operand(low, column, position_columns);
    }
    if constexpr (Product::SPLIT) {
      // Small terms first.
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].low[step], b);
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].high[step], rest);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].high[step], b);
  }
};

// sum += chain, and the chain starts again.
template <int COUNT>
__device__ __forceinline__ void promote(float* sum, float* chain) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sum[i] += chain[i];
    chain[i] = 0;
  }
}

// A lane's FRAGMENTS sums go to `to`, WARP apart, or are added there if `begun`; they start again.
// A few at a time, or the compiler would load all that is there at once, and spill sums for it.
template <int FRAGMENTS>
__device__ __forceinline__ void store_sums(float4* to, float (*sum)[4], bool begun) {
  constexpr int AT_ONCE = 4;
#pragma unroll
  for (int first = 0; first < FRAGMENTS; first += AT_ONCE) {
#pragma unroll
    for (int i = first; i < FRAGMENTS && i < first + AT_ONCE; ++i) {
      float4 total = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
      if (begun) {
        const float4 before = to[i * WARP];
        total.x += before.x, total.y += before.y, total.z += before.z, total.w += before.w;
      }
      to[i * WARP] = total;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
    }
    __syncwarp();  // no access is moved across it
  }
}

}  // namespace convgen
