// Operands of floats, for kernels of one tap: TF32 is multiplied K-major alone. What is contiguous
// is loaded so, lines of positions; what is channels_last arrives as rows of channels, and each
// block of 32 channels of 32 positions is turned where it lies, by the warps that round.
#ifndef CONVGEN_IMPLICIT_GEMM_TAP_FLOATS_CUH
#define CONVGEN_IMPLICIT_GEMM_TAP_FLOATS_CUH

#include "tap_blocks.cuh"

namespace convgen {

constexpr int ROUNDING_WARPS = 3;
// A block: 32 rows of 128 bytes, of positions first, of channels then.
constexpr int FLOAT_ROWS = ROW_BYTES / 4, FLOAT_BLOCK_BYTES = FLOAT_ROWS * ROW_BYTES;
constexpr int COARSE_FLOAT_BLOCKS = TAP_ROWS / FLOAT_ROWS;

// Blocks of a pair that have channels of its group. The others' products lead nowhere.
struct FloatBlocks {
  int coarse, fine;

  template <int COLUMNS>
  __device__ __forceinline__ FloatBlocks(const TapWgradTiling& t, const TapPair<COLUMNS>& pair) {
    const int rows = min(TAP_ROWS, t.coarse_channels - pair.coarse);
    const int columns = min(COLUMNS, t.fine_channels - pair.chunk * CHUNK_COLUMNS);
    coarse = (rows + FLOAT_ROWS - 1) / FLOAT_ROWS, fine = (columns + FLOAT_ROWS - 1) / FLOAT_ROWS;
  }
};

// Of each tensor rows of positions, one load of all its rows, or blocks of rows of channels.
template <int COLUMNS, typename Conv>
__device__ __forceinline__ void load_floats(const TapWgradTiling& t, const CoarseMaps& coarse_maps,
                                            const TensorMap& fine_map, Pipeline ring,
                                            unsigned char* stages) {
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  const int end = t.first_unit(blockIdx.x + 1);
  while (unit < end) {
    const TapPair<COLUMNS> pair(t, unit / t.positions);
    TapBlock block(t, unit % t.positions);
    const int count = min(end - unit, t.positions - unit % t.positions);
    unit += count;
    const FloatBlocks blocks(t, pair);
    const int coarse = pair.group * t.coarse_channels + pair.coarse;
    const int fine = pair.group * t.fine_channels + pair.chunk * CHUNK_COLUMNS;
    const int rows = (t.coarse_last ? blocks.coarse * t.rows : t.coarse_rows) +
                     (t.fine_last ? blocks.fine * t.rows : t.fine_rows);
#pragma unroll 1
    for (int k = 0; k < count; ++k, block.advance(t)) {
      uint64_t* const barrier = ring.producer_acquire(at, rows * ROW_BYTES);
      unsigned char* const to = stages + at.index * TAP_STAGE_BYTES<COLUMNS>;
      unsigned char* const to_fine = to + TAP_ROWS * ROW_BYTES;
      const bool last_w = block.w == t.tiles_w - 1, last_h = block.h == t.tiles_h - 1;
      const int tile_w = block.w * t.step_w, tile_h = block.h * t.step_h;
      const int w = last_w ? t.last_w : tile_w, h = last_h ? t.last_h : tile_h;
      const int d = block.d * t.step_d, n = block.n * t.step_n;
      if (t.coarse_last) {
        // The maps of last tiles begin where the tiles before end.
        const TensorMap& coarse_map = coarse_maps.of[last_w + 2 * last_h];
#pragma unroll 1
        for (int i = 0; i < blocks.coarse; ++i) {
          tma_load(to + i * FLOAT_BLOCK_BYTES, coarse_map, barrier, coarse + i * FLOAT_ROWS,
                   last_w ? w - tile_w : w, last_h ? h - tile_h : h, d, n);
        }
      } else {
        tma_load(to, coarse_maps.of[0], barrier, w, coarse, n);
      }
      if (t.fine_last) {
#pragma unroll 1
        for (int i = 0; i < blocks.fine; ++i) {
          tma_load(to_fine + i * FLOAT_BLOCK_BYTES, fine_map, barrier, fine + i * FLOAT_ROWS,
                   w * Conv::STRIDE_W - Conv::PADDING_W, h * Conv::STRIDE_H - Conv::PADDING_H,
                   d * Conv::STRIDE_D - Conv::PADDING_D, n);
        }
      } else {
        tma_load(to_fine, fine_map, barrier, w, fine, n);
      }
      at.advance(1, t.stages);
    }
  }
}

// All threads clear the blocks that the last channels leave, which are multiplied unloaded.
template <int COLUMNS>
__device__ __forceinline__ void clear_blocks(const TapWgradTiling& t, unsigned char* stages) {
  const auto clear = [&](int first, int channels, int most) {
    const int left = channels % most, blocks = left == 0 ? 0 : (most - left) / FLOAT_ROWS;
    const int vectors = blocks * (FLOAT_BLOCK_BYTES / 16);
    unsigned char* const from = stages + (first + most) * ROW_BYTES - vectors * 16;
    for (int i = threadIdx.x; i < vectors * t.stages; i += GEMM_THREADS) {
      unsigned char* const stage = from + i / vectors * TAP_STAGE_BYTES<COLUMNS>;
      reinterpret_cast<uint4*>(stage)[i % vectors] = make_uint4(0, 0, 0, 0);
    }
  };
  if (t.coarse_last || t.coarse_rows < TAP_ROWS) clear(0, t.coarse_channels, TAP_ROWS);
  if (t.fine_last || t.fine_rows < COLUMNS) clear(TAP_ROWS, t.fine_channels, COLUMNS);
  bulk_fence();
}

// Rows of positions: rounded to TF32 (to nearest, halves away from zero), by a warp.
__device__ __forceinline__ void round_block(unsigned char* block, int lane) {
  uint4* const vectors = reinterpret_cast<uint4*>(block);
#pragma unroll
  for (int v = lane; v < FLOAT_BLOCK_BYTES / 16; v += 32) vectors[v] = round_vector(vectors[v]);
}

// A value that the compiler takes for another one each time, so that what follows from it is
// computed where it is used: of a loop's addresses, registers would hold all beforehand.
__device__ __forceinline__ int renewed(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// `rows` rows of channels -> rows of positions, rounded; of what no box has filled, zeros. A lane
// has two squares of four channels of four positions; eight neighbours have channels and positions
// of their own, so that they meet different banks either way.
//
// A row's vectors are permuted, as TMA does it, by the row: its vector v is the (v ^ row % 8)th. A
// square's rows are 4 q to 4 q + 3, and row % 8 is 4 (q % 2) + i; the second square is that of
// q ^ 4. So all places of a lane follow from the first one by constants.
__device__ __forceinline__ void turn_block(unsigned char* block, int rows, int lane) {
  uint4* const vectors = reinterpret_cast<uint4*>(block);
  lane = renewed(lane);
  const int channels = lane % 8, positions = channels ^ lane / 8;  // in fours
  const int from = positions * 32 + (channels ^ positions % 2 * 4);
  const int to = channels * 32 + (positions ^ channels % 2 * 4);
  uint32_t x[2][4][4];
#pragma unroll
  for (int square = 0; square < 2; ++square) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = (positions ^ 4 * square) * 4 + i < rows;
      const uint4 bits =
          exists ? vectors[(from ^ (128 * square + i)) + 8 * i] : make_uint4(0, 0, 0, 0);
      x[square][i][0] = bits.x, x[square][i][1] = bits.y;
      x[square][i][2] = bits.z, x[square][i][3] = bits.w;
    }
  }
  __syncwarp();
#pragma unroll
  for (int square = 0; square < 2; ++square) {
    const auto& of = x[square];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      vectors[(to ^ (4 * square + i)) + 8 * i] =
          round_vector(make_uint4(of[0][i], of[1][i], of[2][i], of[3][i]));
    }
  }
}

// Three warps have stages of floats as the tensor cores take them, a block at a time.
template <int COLUMNS>
__device__ __forceinline__ void round_stages(const TapWgradTiling& t, Pipeline ring,
                                             uint64_t* rounded, unsigned char* stages, int warp,
                                             int lane) {
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  const int end = t.first_unit(blockIdx.x + 1);
  while (unit < end) {
    const FloatBlocks blocks(t, TapPair<COLUMNS>(t, unit / t.positions));
    const int pair_end = min(end, unit - unit % t.positions + t.positions);
#pragma unroll 1
    for (; unit < pair_end; ++unit) {
      ring.consumer_wait(at);
      unsigned char* const stage = stages + at.index * TAP_STAGE_BYTES<COLUMNS>;
#pragma unroll 1
      for (int i = warp; i < blocks.coarse + blocks.fine; i += ROUNDING_WARPS) {
        const bool is_coarse = i < blocks.coarse;
        const int index = is_coarse ? i : COARSE_FLOAT_BLOCKS + i - blocks.coarse;
        unsigned char* const block = stage + index * FLOAT_BLOCK_BYTES;
        if (is_coarse ? t.coarse_last : t.fine_last) {
          turn_block(block, t.rows, lane);
        } else {
          round_block(block, lane);
        }
      }
      bulk_fence();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&rounded[at.index]);
      at.advance(1, t.stages);
    }
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_TAP_FLOATS_CUH
