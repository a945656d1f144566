// wgrad by wgmma (sm_90a), where it does not depend on the specification: fine channels are the
// rows of a product and come from registers, coarse channels its columns, which the tensor core
// reads from shared memory itself.
#pragma once

#include "mma_wgrad_producers.cuh"
#include "pipeline.cuh"
#include "releases.cuh"

namespace convgen {

// Three warpgroups multiply, others stage: four warps, or eight where few registers suffice to
// multiply (FEW): for sums, and the operands and windows of two chunks. Together they have all
// registers of the launch.
constexpr int WARPGROUP_WARPS = 4, WARPGROUPS = 3;
constexpr int FEW_CONSUMER_REGISTERS = 104;
template <bool FEW>
constexpr int PRODUCER_WARPS = FEW ? 8 : 4;
template <bool FEW>
constexpr int WARPGROUP_THREADS = (WARPGROUPS * WARPGROUP_WARPS + PRODUCER_WARPS<FEW>)*WARP;
template <bool FEW>
constexpr int CONSUMER_REGISTERS = FEW ? 120 : 144;
template <bool FEW>
constexpr int PRODUCER_REGISTERS = FEW ? 56 : 80;

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
template <bool FEW>
constexpr int WARPGROUP_BOUND = HAS_WGMMA ? WARPGROUP_THREADS<FEW> : WARP;

// Named barriers of the two buffers: producer warps arrive at FULL, consumers at EMPTY.
// Producers meet at COPIED.
constexpr int PRODUCT_FULL = 1, PRODUCT_EMPTY = PRODUCT_FULL + PRODUCT_STAGES;
constexpr int PRODUCT_COPIED = PRODUCT_EMPTY + PRODUCT_STAGES;

// Of a block's first words of shared memory: the shifts of unaligned rows by buffer, then releases
// of buffers to producers, and to consumers.
constexpr int EMPTIES = 4, FILLS = EMPTIES + RELEASE_WORDS<PRODUCT_STAGES>;
static_assert(FILLS + RELEASE_WORDS<PRODUCT_STAGES> <= ORIGINS_WORDS, "the room for them");

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

  // The same from an unaligned row, in which column SHIFT of the window lies `bytes` behind `from`.
  // Only what the TAPS taps read.
  template <class Column, int SHIFT, int TAPS, int TAP_COLUMNS, int POSITION_COLUMNS, int STEP>
  __device__ __forceinline__ void load_unaligned(const uint32_t* from, uint32_t bytes,
                                                 int half_rows) {
    using Raw = typename Product::Raw;
    constexpr int ELEMENTS = Product::ELEMENTS;
    constexpr int END = SHIFT + (QUAD - 1) * POSITION_COLUMNS + (TAPS - 1) * TAP_COLUMNS + 1;
    const int element = bytes / uint32_t{sizeof(Raw)};
    if constexpr (ELEMENTS == 2 && STEP == 1) {
      // Neighbouring pairs, of words that the window's first column may halve. Nothing is read
      // before the first column that a tap reads, nor behind the last.
      const int first = element - SHIFT, odd = first & 1;
      constexpr int BEGIN = SHIFT / 2, PAIRS = (END + 1) / 2 - BEGIN;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t* const words = from + (first - odd) / 2 + h * half_rows + BEGIN;
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
            const int at = element + h * half_rows * ELEMENTS + Column::offset(column);
            if (read) bits |= uint32_t{reinterpret_cast<const Raw*>(from)[at]} << i * 16;
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

// The same of an unaligned row of 16-bit elements, of positions an even number of columns apart:
// words as they lie there. Columns are halves of these, of a line that begins at an odd element the
// other ones, and a product's pair of columns lies in the same halves: one choice of bytes for
// each.
template <int SHIFT, int TAPS, int TAP_COLUMNS, int POSITION_COLUMNS>
struct UnalignedRows {
  static constexpr int LAST = (QUAD - 1) * POSITION_COLUMNS + (TAPS - 1) * TAP_COLUMNS;
  uint32_t word[2][(LAST + 1) / 2 + 1];
  uint32_t odd;  // whether the line begins at an odd element

  // Column SHIFT of the window, the first that is read, lies `bytes` behind `from`.
  __device__ __forceinline__ void load(const uint32_t* from, uint32_t bytes, int half_rows) {
    odd = bytes & 2;
    const uint32_t* const words =
        reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(from) + (bytes & ~3u));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i <= LAST / 2; ++i) word[h][i] = words[h * half_rows + i];
      // For those lanes alone that need it, as others' would lie in the same banks.
      if constexpr (LAST % 2 == 1) {
        word[h][LAST / 2 + 1] = 0;
        if (odd) word[h][LAST / 2 + 1] = words[h * half_rows + LAST / 2 + 1];
      }
    }
  }

  template <int STEP>
  __device__ __forceinline__ void find(uint32_t (&a)[4], int step, int first) const {
    static_assert(STEP == POSITION_COLUMNS && STEP % 2 == 0, "the same halves");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = operand(word[i % 2], first - SHIFT + (step + i / 2 * 2) * STEP);
    }
  }

 private:
  // Of columns `column` and POSITION_COLUMNS more.
  template <int WORDS>
  __device__ __forceinline__ uint32_t operand(const uint32_t (&words)[WORDS], int column) const {
    constexpr int STEP = POSITION_COLUMNS / 2, LOW = 0x5410, HIGH = 0x7632, TURNED = 0x1054;
    const int i = column / 2;
    if (column % 2 == 0) return __byte_perm(words[i], words[i + STEP], choose(LOW, HIGH));
    // Second halves of these words, or first ones of those behind them.
    if constexpr (STEP == 1) {
      return __byte_perm(odd ? words[i + 2] : words[i], words[i + 1], choose(HIGH, TURNED));
    } else {
      return __byte_perm(odd ? words[i + 1] : words[i], odd ? words[i + STEP + 1] : words[i + STEP],
                         choose(HIGH, LOW));
    }
  }
  __device__ __forceinline__ uint32_t choose(int even, int uneven) const {
    return odd ? uneven : even;
  }
};

}  // namespace convgen
