// wgrad by wgmma (sm_90a), where it does not depend on the specification: fine channels are the
// rows of a product and come from registers, coarse channels its columns, which the tensor core
// reads from shared memory itself.
#pragma once

#include "mma_wgrad.cuh"
#include "pipeline.cuh"
#include "releases.cuh"

namespace convgen {

// Three groups of warps multiply, one stages. Together they have all registers.
constexpr int GROUP_WARPS = 4, GROUPS_OF_WARPS = 3, STAGING_WARPS = 4;
constexpr int GROUP_THREADS = (GROUPS_OF_WARPS * GROUP_WARPS + STAGING_WARPS) * WARP;
constexpr int MULTIPLYING_REGISTERS = 144, STAGING_REGISTERS = 4 * 128 - 3 * MULTIPLYING_REGISTERS;

// Chunks in a row whose products overlap with the loads of the next.
constexpr int RUN = 4;

// Whether a lane has registers for the operands of two chunks beside its sums, of TILES tiles of 16
// rows and N_BLOCKS x 8 columns each. In 16 bits there is also what operands are made of; in TF32
// neighbouring taps share it only where they are as far apart as positions.
template <class Product, int TILES, int N_BLOCKS, bool SHARED>
constexpr bool OVERLAPS = TILES * 4 *
                              (N_BLOCKS + 2 * PRODUCT_STEPS<Product>)+(Product::ELEMENTS == 2 ? 16
                                                                       : SHARED ? 0
                                                                                : 8) <=
                          120;

// Launch bound where there is wgmma, and where the kernel is empty. The host tells devices apart by
// it.
constexpr int GROUP_BOUND = HAS_WGMMA ? GROUP_THREADS : WARP;

// Named barriers of the two buffers: warps that stage arrive at FULL, those that multiply at EMPTY.
// Those that stage meet at COPIED.
constexpr int PRODUCT_FULL = 1, PRODUCT_EMPTY = PRODUCT_FULL + PRODUCT_STAGES;
constexpr int PRODUCT_COPIED = PRODUCT_EMPTY + PRODUCT_STAGES;

// Of a block's first words of shared memory: the shifts of loose lines by buffer, then releases of
// buffers to those that stage, and to those that multiply.
constexpr int EMPTIES = 4, FILLS = EMPTIES + RELEASE_WORDS<PRODUCT_STAGES>;
static_assert(FILLS + RELEASE_WORDS<PRODUCT_STAGES> <= ORIGINS_WORDS, "the room for them");

// Words of a staged chunk of N_BLOCKS x 8 coarse channels: for each product and 8 channels two
// matrices of 8 channels x 4 words, which SharedColumns describes. Word t of a channel belongs to
// quad t, in the order that Tf32Product and HalfProduct say.
constexpr int MATRIX_WORDS = PRODUCT_COLUMNS * 4, COLUMNS_WORDS = 2 * MATRIX_WORDS;
template <class Product, int N_BLOCKS>
constexpr int CHUNK_WORDS = PRODUCT_STEPS<Product> * N_BLOCKS * COLUMNS_WORDS;

// A channel's share of a chunk is a row of each of MATRICES matrices. Quads are copied into these
// rows one after the other; afterwards a thread puts the words of all into their places. The rows
// of a channel begin at row(chunk and 8 channels, channel), the i-th of them is step(i) further.
template <class Product, int N_BLOCKS>
struct CoarseRows {
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
    return step(t / PER_ROW) + t % PER_ROW * QUAD_WORDS;
  }

  // Copies a quad, of which the first `valid` positions exist (a multiple of ACCESS), in accesses
  // of ACCESS elements; the others are zero.
  template <int ACCESS>
  __device__ static __forceinline__ void copy(uint32_t* to, const Raw* from, int valid) {
    constexpr int BYTES = ACCESS * sizeof(Raw);
    if constexpr (BYTES >= 4) {
#pragma unroll
      for (int i = 0; i < QUAD; i += ACCESS) {
        copy_async<BYTES>(to + i / Product::ELEMENTS, from + i, i < valid);
      }
    } else {
#pragma unroll
      for (int i = 0; i < QUAD_WORDS; ++i) {
        uint32_t word = 0;
        if (2 * i < valid) word = from[2 * i];
        if (2 * i + 1 < valid) word |= uint32_t{from[2 * i + 1]} << 16;
        to[i] = word;
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

// Starts copying the coarse channels of a tile: a warp takes 8 channels of a chunk at a time (a
// piece), a lane a quad of one channel. Channels and positions beyond the tensor are zero.
template <class Product, int N_BLOCKS, int ACCESS>
__device__ __forceinline__ void copy_coarse(const ProductShape& s, int thread, const uint2* table,
                                            uint32_t* to, const ProductOrigin& origin) {
  using Rows = CoarseRows<Product, N_BLOCKS>;
  const int lane = thread % WARP, channel = lane / 4, t = lane % 4;
  const auto* const tensor = static_cast<const typename Product::Raw*>(origin.channel);
#pragma unroll 1
  for (int chunk = thread / WARP; chunk < s.chunks; chunk += STAGING_WARPS) {
    const int index = chunk * CHUNK_QUADS + t;
    int valid = 0;
    const auto* from = tensor;
    if (index < s.coarse.places) {
      const uint2 place = table[index];
      const int z = origin.d + static_cast<int>(place.x >> 20);
      const int y = origin.h + static_cast<int>(place.y >> 16);
      const int x = origin.w + static_cast<int>(place.y & 0xffff);
      if (z < s.coarse_d && y < s.coarse_h) valid = s.coarse_w - x;
      if (valid > 0) from += (z * s.coarse_h + y) * s.coarse_w + x;
    }
    uint32_t* const rows = to + Rows::row(chunk * N_BLOCKS, channel) + Rows::quad(t);
    from += s.coarse_channel_stride * channel;
    // Below 2^31, as all strides of channels are.
    const uint64_t stride =
        uint64_t{static_cast<uint32_t>(s.coarse_channel_stride)} * PRODUCT_COLUMNS;
    if (origin.channels >= N_BLOCKS * PRODUCT_COLUMNS) {
#pragma unroll
      for (int n = 0; n < N_BLOCKS; ++n) {
        Rows::template copy<ACCESS>(rows + n * COLUMNS_WORDS, from, valid);
        from += stride;
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < N_BLOCKS; ++n) {
        const bool exists = n * PRODUCT_COLUMNS + channel < origin.channels;
        Rows::template copy<ACCESS>(rows + n * COLUMNS_WORDS, exists ? from : tensor,
                                    exists ? valid : 0);
        from += stride;
      }
    }
  }
}

// And arranges them, once all copies of all these warps have landed.
template <class Product, int N_BLOCKS>
__device__ __forceinline__ void arrange_coarse(const ProductShape& s, int thread, uint32_t* to) {
  using Rows = CoarseRows<Product, N_BLOCKS>;
  const int shares = s.chunks * N_BLOCKS * PRODUCT_COLUMNS;
#pragma unroll 2
  for (int i = thread; i < shares; i += STAGING_WARPS * WARP) {
    Rows::arrange(to + Rows::row(i / PRODUCT_COLUMNS, i % PRODUCT_COLUMNS));
  }
}

// ---- Loose lines ----------------------------------------------------------------------------
//
// Where no asynchronous copy of 4 bytes divides the lines of the fine tensor, as 16-bit elements
// may have it, these are staged as they lie in memory: every line's 16-byte granules, the first of
// which may begin with elements of the line before. A lane adds how many; it is the same for
// channels 8 apart.

// How many elements after a multiple of 16 bytes an element lies.
template <typename Raw>
__device__ __forceinline__ int within_granule(int64_t element) {
  return static_cast<int>(element) & (GRANULE_BYTES / static_cast<int>(sizeof(Raw)) - 1);
}

// As fill_windows, in elements. The bits from LOOSE_SHIFT on hold how far within a granule the
// quad's line lies, compared with the tile's first line.
constexpr int LOOSE_SHIFT = 24;
template <typename Raw, int STRIDE_D, int STRIDE_H, int STRIDE_W>
__device__ __forceinline__ void fill_loose_windows(const ProductShape& s, uint32_t* windows) {
  constexpr int ELEMENTS = 4 / sizeof(Raw);
  const int row_quads = s.tile_w / QUAD, quads = s.tile_d * s.tile_h * row_quads;
  for (int i = threadIdx.x; i < (s.chunks + s.parts) * CHUNK_QUADS; i += blockDim.x) {
    const int chunk = i / CHUNK_QUADS;
    const int quad = i - (chunk < s.chunks ? 0 : chunk - chunk % s.parts) * CHUNK_QUADS;
    const int row = quad / row_quads, plane = row / s.tile_h, h = row - plane * s.tile_h;
    const int line = plane * s.position_planes * s.rows + h * s.position_rows;
    const int at = line * s.row_words * ELEMENTS + (quad - row * row_quads) * QUAD * STRIDE_W;
    const int64_t from = (int64_t{plane} * STRIDE_D * s.fine_h + h * STRIDE_H) * s.fine_w;
    windows[i] = quad < quads ? at | within_granule<Raw>(from) << LOOSE_SHIFT : 0;
  }
}

// The table of granules: their word in a channel, plane, row, and number within the line.
__device__ __forceinline__ void fill_granule_table(const ProductShape& s, uint2* table) {
  const int per_row = s.row_words / GRANULE_WORDS;
  for (int i = threadIdx.x; i < s.fine.places; i += blockDim.x) {
    const int row = i / per_row, plane = row / s.rows;
    table[i] = pack_place(i * GRANULE_WORDS, plane, row - plane * s.rows, i - row * per_row);
  }
}

// An element of the fine tensor: column `origin.w` of a staged line, of the tile's first channel.
__device__ __forceinline__ int64_t loose_element(const ProductShape& s, const ProductOrigin& origin,
                                                 int plane, int row) {
  return (int64_t{origin.d + plane * s.plane_step} * s.fine_h + origin.h + row * s.row_step) *
             s.fine_w +
         origin.w;
}

__device__ __forceinline__ bool line_inside(const ProductShape& s, const ProductOrigin& origin,
                                            int plane, int row) {
  return static_cast<unsigned>(origin.d + plane * s.plane_step) < static_cast<unsigned>(s.fine_d) &&
         static_cast<unsigned>(origin.h + row * s.row_step) < static_cast<unsigned>(s.fine_h);
}

// Starts copying all loose lines of a tile to `to`. `tensor` is the whole one.
template <typename Raw>
__device__ __forceinline__ void copy_granules(const ProductShape& s, int thread, const uint2* table,
                                              uint32_t* to, const ProductOrigin& origin,
                                              const Raw* tensor) {
  constexpr int64_t GRANULE = GRANULE_BYTES;
  const Raw* const first = static_cast<const Raw*>(origin.channel);
  const int64_t begin = reinterpret_cast<int64_t>(tensor);
  const int64_t end = begin + s.fine_elements * int64_t{sizeof(Raw)};
  const int64_t stride = s.fine_channel_stride * int64_t{sizeof(Raw)};
#pragma unroll 1
  for (int copy = thread; copy < s.fine.total; copy += STAGING_WARPS * WARP) {
    int channel = copy;
    const uint2 place = table[s.fine.by_places.split(channel)];
    channel *= s.fine.channels;
    const int plane = static_cast<int>(place.x >> 20), row = static_cast<int>(place.y >> 16);
    const int number = static_cast<int>(place.y & 0xffff);
    const int existing = line_inside(s, origin, plane, row)
                             ? min(max(origin.channels - channel, 0), s.fine.channels)
                             : 0;
    uint32_t* word = to + (place.x & 0xfffff) + channel * s.fine_pitch;
    int64_t at = reinterpret_cast<int64_t>(first) + channel * stride +
                 loose_element(s, origin, plane, row) * int64_t{sizeof(Raw)} + number * GRANULE;
    const int64_t last = at + (s.fine.channels - 1) * stride;
    if (existing == s.fine.channels && at >= begin + GRANULE && last + GRANULE <= end) {
      // Nearly all of them: every granule lies within the tensor.
#pragma unroll 1
      for (int i = 0; i < s.fine.channels; i += COPY_CHANNELS) {
#pragma unroll
        for (int j = 0; j < COPY_CHANNELS; ++j) {
          copy_async<GRANULE_BYTES>(word, reinterpret_cast<const void*>(at & -GRANULE), true);
          at += stride;
          word += s.fine_pitch;
        }
      }
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < s.fine.channels; ++i) {
      const int64_t granule = at & -GRANULE;
      int bytes = 0;
      if (i < existing && granule + GRANULE > begin && granule < end) {
        bytes = end - granule < GRANULE ? static_cast<int>(end - granule) : GRANULE_BYTES;
      }
      copy_granule(word, reinterpret_cast<const void*>(bytes > 0 ? granule : begin & -GRANULE),
                   bytes, tensor);
      at += stride;
      word += s.fine_pitch;
    }
  }
}

// Writes zeros over what was copied from beside the lines' ends, when all copies have landed.
template <typename Raw>
__device__ __forceinline__ void clear_beside_lines(const ProductShape& s, int thread, uint32_t* to,
                                                   const ProductOrigin& origin) {
  const int left = min(-origin.w, s.line), right = max(s.fine_w - origin.w, 0);
  if (left <= 0 && right >= s.line) return;
  const int lines = s.planes * s.rows;
  const int channels = s.fine.total / s.fine.places * s.fine.channels;
  const int base = within_granule<Raw>(reinterpret_cast<int64_t>(origin.channel) / sizeof(Raw));
#pragma unroll 1
  for (int i = thread; i < lines * channels; i += STAGING_WARPS * WARP) {
    const int channel = i / lines, line = i - channel * lines;
    const int plane = line / s.rows, row = line - plane * s.rows;
    const int shift = within_granule<Raw>(base + s.fine_channel_stride * channel +
                                          loose_element(s, origin, plane, row));
    Raw* const at =
        reinterpret_cast<Raw*>(to + channel * s.fine_pitch + line * s.row_words) + shift;
#pragma unroll 1
    for (int column = 0; column < left; ++column) at[column] = 0;
#pragma unroll 1
    for (int column = right; column < s.line; ++column) at[column] = 0;
  }
}

// ---- Operands -------------------------------------------------------------------------------

// What the taps of one row read at a lane's quad, for 16 fine channels.
template <class Product, int VECTORS, int VECTOR>
struct FineRows {
  FineWindow<Product, VECTORS, VECTOR> half[2];

  template <int QUAD_COLUMNS, int QUAD_PITCH>
  __device__ __forceinline__ void load(const uint32_t* from, int half_rows) {
    half[0].template load<QUAD_COLUMNS, QUAD_PITCH>(from);
    half[1].template load<QUAD_COLUMNS, QUAD_PITCH>(from + half_rows);
  }

  // The same from a loose line, whose `element` is column SHIFT of the window; `from` is where a
  // word begins. Only what the TAPS taps read.
  template <class Column, int SHIFT, int TAPS, int TAP_COLUMNS, int POSITION_COLUMNS, int STEP>
  __device__ __forceinline__ void load_loose(const typename Product::Raw* from, int element,
                                             int half_rows) {
    using Raw = typename Product::Raw;
    constexpr int ELEMENTS = Product::ELEMENTS;
    constexpr int END = SHIFT + (QUAD - 1) * POSITION_COLUMNS + (TAPS - 1) * TAP_COLUMNS + 1;
    if constexpr (ELEMENTS == 2 && STEP == 1) {
      // Neighbouring pairs, of words that the window's first column may halve. Nothing is read
      // before the first column that a tap reads, nor behind the last.
      const int first = element - SHIFT, odd = first & 1;
      constexpr int BEGIN = SHIFT / 2, PAIRS = (END + 1) / 2 - BEGIN;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t* const words =
            reinterpret_cast<const uint32_t*>(from + (first - odd) + h * half_rows) + BEGIN;
        uint32_t word[PAIRS + 1] = {};
        // Words that only some lanes need are for these alone: half of the channels, as a rule,
        // where all others' words would lie in the same banks.
        if (SHIFT % 2 == 0 || !odd) word[0] = words[0];
#pragma unroll
        for (int i = 1; i < PAIRS; ++i) word[i] = words[i];
        if (END % 2 == 0 && odd) word[PAIRS] = words[PAIRS];
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
          half[h].high[BEGIN + i] = __funnelshift_r(word[i], word[i + 1], odd * 16);
        }
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int word = 0; word < VECTORS * VECTOR; ++word) {
          uint32_t bits = 0;
#pragma unroll
          for (int i = 0; i < ELEMENTS; ++i) {
            const int column = word * ELEMENTS + i - SHIFT;
            bool read = false;
#pragma unroll
            for (int position = 0; position < QUAD; ++position) {
#pragma unroll
              for (int tap = 0; tap < TAPS; ++tap) {
                read |= column == position * POSITION_COLUMNS + tap * TAP_COLUMNS;
              }
            }
            const int at = element + h * half_rows + Column::offset(column);
            if (read) bits |= uint32_t{from[at]} << i * 16;
          }
          half[h].high[word] = Product::high(bits);
        }
      }
    }
  }

  // The operand of the tap whose first position reads column `first`, for one product's depth.
  template <int POSITION_COLUMNS>
  __device__ __forceinline__ void find(uint32_t (&a)[4], int step, int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = half[i % 2].operand(half[i % 2].high, first + (step + i / 2 * 2) * POSITION_COLUMNS,
                                 POSITION_COLUMNS);
    }
  }
};

}  // namespace convgen
