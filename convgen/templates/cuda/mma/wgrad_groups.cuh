// wgrad by wgmma (sm_90a), where it does not depend on the specification: fine channels are the
// rows of a product and come from registers, coarse channels its columns, which the tensor core
// reads from shared memory itself.
#pragma once

#include "mma_wgrad.cuh"
#include "pipeline.cuh"

namespace convgen {

// Three groups of warps multiply, one stages. Together they have all registers.
constexpr int GROUP_WARPS = 4, GROUPS_OF_WARPS = 3, STAGING_WARPS = 4;
constexpr int GROUP_THREADS = (GROUPS_OF_WARPS * GROUP_WARPS + STAGING_WARPS) * WARP;
constexpr int MULTIPLYING_REGISTERS = 152, STAGING_REGISTERS = 4 * 128 - 3 * MULTIPLYING_REGISTERS;

// Launch bound where there is wgmma, and where the kernel is empty. The host tells devices apart by
// it.
constexpr int GROUP_BOUND = HAS_WGMMA ? GROUP_THREADS : WARP;

// Named barriers of the two buffers: warps that stage arrive at FULL, those that multiply at EMPTY.
constexpr int PRODUCT_FULL = 1, PRODUCT_EMPTY = PRODUCT_FULL + PRODUCT_STAGES;

// Words of a staged chunk of N_BLOCKS x 8 coarse channels: for each product and 8 channels two
// matrices of 8 channels x 4 words, which SharedColumns describes. Word t of a channel belongs to
// quad t, in the order that Tf32Product and HalfProduct say.
constexpr int COLUMNS_WORDS = 2 * PRODUCT_COLUMNS * 4;
template <class Product, int N_BLOCKS>
constexpr int CHUNK_WORDS = PRODUCT_STEPS<Product>* N_BLOCKS* COLUMNS_WORDS;

// Of the words of a quad the first, for its number within a chunk and its channel.
__device__ __forceinline__ int quad_word(int quad, int channel) {
  return channel / PRODUCT_COLUMNS * COLUMNS_WORDS + channel % PRODUCT_COLUMNS * 4 + quad;
}

// And the i-th of them from there.
template <class Product, int N_BLOCKS>
__device__ __forceinline__ constexpr int quad_step(int i) {
  return i % PRODUCT_STEPS<Product> * N_BLOCKS * COLUMNS_WORDS +
         i / PRODUCT_STEPS<Product> * (COLUMNS_WORDS / 2);
}

// Four neighbouring positions of a channel, in words as tensor cores take them.
template <class Product>
struct CoarseQuad {
  static constexpr int WORDS = QUAD / Product::ELEMENTS;
  using Raw = typename Product::Raw;
  uint32_t word[WORDS];

  // From memory in accesses of ACCESS elements; `valid` positions lie in the tensor (a multiple of
  // ACCESS, if there are any), the others are zero.
  template <int ACCESS>
  __device__ __forceinline__ void load(const Raw* from, int valid) {
    constexpr int BYTES = ACCESS * sizeof(Raw);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) word[i] = 0;
    if constexpr (BYTES == 16) {
      if (valid > 0) load_vector<4>(word, reinterpret_cast<const uint32_t*>(from));
    } else if constexpr (BYTES == 8) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 2) {
        if (i * Product::ELEMENTS < valid) {
          load_vector<2>(word + i, reinterpret_cast<const uint32_t*>(from) + i);
        }
      }
    } else if constexpr (BYTES == 4) {
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        if (i * Product::ELEMENTS < valid) word[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        if (i < valid) word[i / 2] |= uint32_t{from[i]} << i % 2 * 16;
      }
    }
  }

  template <int N_BLOCKS>
  __device__ __forceinline__ void store(uint32_t* to) const {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) to[quad_step<Product, N_BLOCKS>(i)] = Product::high(word[i]);
  }
};

// Stages the coarse channels of a tile by one group's warps: a warp takes a chunk of 8 channels, a
// lane a quad of one. Channels and positions beyond the tensor are zero.
template <class Product, int N_BLOCKS, int ACCESS>
__device__ __forceinline__ void stage_coarse(const ProductShape& s, int thread, const uint2* table,
                                             uint32_t* to, const ProductOrigin& origin) {
  constexpr int AT_ONCE = 4;  // loads on their way
  using Quad = CoarseQuad<Product>;
  const int lane = thread % WARP, channel = lane / 4, t = lane % 4;
  const int quads = s.coarse.places;
  const auto* const tensor = static_cast<const typename Product::Raw*>(origin.channel);
  const int pieces = s.chunks * N_BLOCKS;
#pragma unroll 1
  for (int first = thread / WARP; first < pieces; first += AT_ONCE * STAGING_WARPS) {
    Quad quad[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int piece = first + i * STAGING_WARPS, chunk = piece / N_BLOCKS;
      const int c = piece % N_BLOCKS * PRODUCT_COLUMNS + channel;
      const int index = chunk * CHUNK_QUADS + t;
      int valid = 0;
      const auto* from = tensor;
      if (index < quads && c < origin.channels) {
        const uint2 place = table[index];
        const int z = origin.d + static_cast<int>(place.x >> 20);
        const int y = origin.h + static_cast<int>(place.y >> 16);
        const int x = origin.w + static_cast<int>(place.y & 0xffff);
        if (z < s.coarse_d && y < s.coarse_h) valid = s.coarse_w - x;
        if (valid > 0) {
          from += s.coarse_channel_stride * c + ((z * s.coarse_h + y) * s.coarse_w + x);
        }
      }
      quad[i].template load<ACCESS>(from, valid);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int piece = first + i * STAGING_WARPS, chunk = piece / N_BLOCKS;
      if (piece < pieces) {
        quad[i].template store<N_BLOCKS>(to + chunk * CHUNK_WORDS<Product, N_BLOCKS> +
                                         quad_word(t, piece % N_BLOCKS * PRODUCT_COLUMNS + channel));
      }
    }
  }
}

// What the taps of one row read at a lane's quad, for 16 fine channels.
template <class Product, int VECTORS, int VECTOR>
struct FineRows {
  FineWindow<Product, VECTORS, VECTOR> half[2];

  template <int QUAD_COLUMNS, int QUAD_PITCH>
  __device__ __forceinline__ void load(const uint32_t* from, int half_rows) {
    half[0].template load<QUAD_COLUMNS, QUAD_PITCH>(from);
    half[1].template load<QUAD_COLUMNS, QUAD_PITCH>(from + half_rows);
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
