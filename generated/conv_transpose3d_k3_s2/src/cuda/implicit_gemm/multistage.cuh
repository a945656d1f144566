// Convolution as an implicit GEMM by cp.async, ldmatrix and mma.sync, on GPUs from sm_80 on that
// have no kernels of their own (kernel.cuh has Hopper's):
//
//   out[n, o, c] = bias[c] + sum over taps t, input channels k of
//                  in[n, o * STRIDE + t * DILATION - PADDING, k] * weight[t, c, k]
//
// A CTA has Block::POSITIONS positions, neighbours in (n, d, h, w), of Block::CHANNELS output
// channels, and each of its four warps a rectangle of these. It passes over units of K, 64 bytes of
// input channels of one tap, the taps fastest: neighbouring taps' rows are found in level 1.
//
//   stage    a row of 64 bytes for each position, then one for each output channel. The four
//   16-byte
//            vectors of row r are permuted, v ^ (r / 2 % 4), so that the eight rows of a matrix lie
//            in different banks.
//   copies   a thread has the same vector of every 32nd row, in all units. Of a position it keeps
//            where its input begins without the tap, and which taps along D, H and W are inside; of
//            the others zeros are copied.
//   barrier  one for each unit: behind it the next stage has landed, and the one before is free for
//            the unit that comes STAGES - 1 later.
#ifndef CONVGEN_IMPLICIT_GEMM_MULTISTAGE_CUH
#define CONVGEN_IMPLICIT_GEMM_MULTISTAGE_CUH

#include <type_traits>

#include "../tf32.cuh"
#include "multistage_epilogue.cuh"

namespace convgen {

// How positions, channels and K are dealt out. Vectors have 16 bytes.
struct MultistageShape {
  Places places;
  int input_extent[3];            // D, H, W
  int channel_blocks, groups;     // of the output; of both
  int output_channels;            // of a group
  int vectors;                    // of a group's input channels
  int position_vectors;           // from one position of the input to the next
  int blocks;                     // K blocks of a group's input channels
  int weight_stride, tap_stride;  // vectors from one output channel, one tap, to the next
};

// The taps that a position of the output meets inside of the input: bits of the taps along D, then
// H, then W.
template <typename Conv>
struct TapMask {
  static constexpr int TAPS = Conv::KERNEL_D + Conv::KERNEL_H + Conv::KERNEL_W;
  static constexpr bool FITS = TAPS <= 64;
  using Bits = std::conditional_t<TAPS <= 32, uint32_t, uint64_t>;

  template <int FIRST, int COUNT, typename Offset>
  static __device__ __forceinline__ Bits of_axis(int count, int at, int extent, Offset offset) {
    Bits bits = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int input = at + offset(i);
      if (i < count && input >= 0 && input < extent) bits |= Bits{1} << (FIRST + i);
    }
    return bits;
  }
  // Of an output at (d, h, w) of its phase.
  static __device__ __forceinline__ Bits of_position(const MultistageShape& s,
                                                     const TapCursor<Conv>& taps, int d, int h,
                                                     int w) {
    constexpr int D = Conv::KERNEL_D, H = Conv::KERNEL_H, W = Conv::KERNEL_W;
    constexpr int STEP_D = Steps<Conv>::INPUT[0], STEP_H = Steps<Conv>::INPUT[1],
                  STEP_W = Steps<Conv>::INPUT[2];
    TapCursor<Conv> at = taps;
    return of_axis<0, D>(at.depth(), d * STEP_D, s.input_extent[0],
                         [&](int i) { return at.d = i, at.offset_d(); }) |
           of_axis<D, H>(at.height(), h * STEP_H, s.input_extent[1],
                         [&](int i) { return at.h = i, at.offset_h(); }) |
           of_axis<D + H, W>(at.width(), w * STEP_W, s.input_extent[2],
                             [&](int i) { return at.w = i, at.offset_w(); });
  }
  static __device__ __forceinline__ Bits of_tap(const TapCursor<Conv>& tap) {
    return Bits{1} << tap.d | Bits{1} << (Conv::KERNEL_D + tap.h) |
           Bits{1} << (Conv::KERNEL_D + Conv::KERNEL_H + tap.w);
  }
};

// ---- Copies -------------------------------------------------------------------------------------

// What one thread copies of each unit.
template <typename Conv, typename Block>
struct StageCopies {
  using Mask = TapMask<Conv>;
  static constexpr int STEP = Block::THREADS / 4;  // rows from one of a thread's to the next
  static constexpr int POSITION_ROWS = Block::POSITIONS / STEP;
  static constexpr int CHANNEL_ROWS = Block::CHANNELS / STEP;

  const uint4 *input, *weight;  // this thread's vector, of the first K block
  int offset[POSITION_ROWS];    // vectors from there to a position's
  typename Mask::Bits mask[POSITION_ROWS];
  int channels;  // of the output from this thread's first on
  int to;        // bytes from a stage's beginning to its vector
  TapCursor<Conv> tap;
  int vectors;  // of the input's channels from this thread's on

  __device__ __forceinline__ StageCopies(const MultistageShape& s, const Output& out,
                                         const Tile& tile, int first_position, const uint4* input_,
                                         const uint4* weight_)
      : tap(tile.phase, 0) {
    const int vector = threadIdx.x % 4, row = threadIdx.x / 4;
    to = row * STAGE_ROW_BYTES + swizzled(row, vector);
    input = input_ + tile.group * s.vectors + vector;
    weight = weight_ +
             int64_t{tile.group * s.output_channels + tile.channel + row} * s.weight_stride +
             vector;
    channels = s.output_channels - tile.channel - row;
    vectors = s.vectors - vector;
    constexpr int STEP_D = Steps<Conv>::INPUT[0], STEP_H = Steps<Conv>::INPUT[1],
                  STEP_W = Steps<Conv>::INPUT[2];
#pragma unroll
    for (int i = 0; i < POSITION_ROWS; ++i) {
      const int position = first_position + row + i * STEP;
      int n, d, h, w;
      place_of<Conv>(s.places, out, position, n, d, h, w);
      mask[i] = 0, offset[i] = 0;
      if (n >= out.batch) continue;
      mask[i] = Mask::of_position(s, tap, d, h, w);
      const int line = (n * s.input_extent[0] + d * STEP_D) * s.input_extent[1] + h * STEP_H;
      offset[i] = (line * s.input_extent[2] + w * STEP_W) * s.position_vectors;
    }
  }

  // The next unit into a stage.
  __device__ __forceinline__ void copy(const MultistageShape& s, unsigned char* stage) {
    const auto bits = Mask::of_tap(tap);
    const int line = tap.offset_d() * s.input_extent[1] + tap.offset_h();
    const int moved = (line * s.input_extent[2] + tap.offset_w()) * s.position_vectors;
    const bool exists = vectors > 0;
    unsigned char* at = stage + to;
#pragma unroll
    for (int i = 0; i < POSITION_ROWS; ++i, at += STEP * STAGE_ROW_BYTES) {
      copy_async_cached(at, input + (offset[i] + moved), exists && (mask[i] & bits) == bits);
    }
    const uint4* from = weight + tap.tap() * s.tap_stride;
#pragma unroll
    for (int i = 0; i < CHANNEL_ROWS; ++i, at += STEP * STAGE_ROW_BYTES) {
      copy_async<16>(at, from + i * STEP * s.weight_stride, exists && i * STEP < channels);
    }
    if (tap.advance()) input += 4, weight += 4, vectors -= 4;
  }
};

// ---- Products -----------------------------------------------------------------------------------

// The operands of a warp's products with 32 bytes of K.
template <typename Block>
struct Fragments {
  uint32_t positions[Block::TILES_M][4], channels[Block::TILES_N / 2][4];

  // `position` and `channel` are the rows whose addresses this lane has, of a stage's 32 bytes.
  template <typename T>
  __device__ __forceinline__ void load(const unsigned char* position,
                                       const unsigned char* channel) {
#pragma unroll
    for (int j = 0; j < Block::TILES_N / 2; ++j) {
      load_matrices(channels[j], channel + j * 16 * STAGE_ROW_BYTES);
    }
#pragma unroll
    for (int i = 0; i < Block::TILES_M; ++i) {
      load_matrices(positions[i], position + i * 16 * STAGE_ROW_BYTES);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          positions[i][k] = nearest_tf32(positions[i][k]);  // also what is rounded already
        }
      }
    }
  }
};

template <typename T, typename Block>
__device__ __forceinline__ void multiply(float (&sums)[Block::TILES_M][Block::TILES_N][4],
                                         const Fragments<Block>& f) {
#pragma unroll
  for (int j = 0; j < Block::TILES_N; ++j) {
    const uint32_t b[2] = {f.channels[j / 2][j % 2 * 2], f.channels[j / 2][j % 2 * 2 + 1]};
#pragma unroll
    for (int i = 0; i < Block::TILES_M; ++i) {
      if constexpr (sizeof(T) == 4) {
        mma_tf32(sums[i][j], f.positions[i], b);
      } else if constexpr (std::is_same_v<T, half>) {
        mma_f16(sums[i][j], f.positions[i], b);
      } else {
        mma_bf16(sums[i][j], f.positions[i], b);
      }
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------

template <typename T, typename Conv, typename Block, typename... Finishes>
__global__ void __launch_bounds__(MULTISTAGE_BOUND, Block::CTAS)
    multistage_kernel(const MultistageShape s, const Output whole, const uint4* input,
                      const uint4* weight, Finishes... finishes) {
  await_earlier_kernel();
  if constexpr (HAS_MULTISTAGE) {
    // Channel blocks, which share positions, are fastest; then phases, then positions.
    Tile tile = {};
    int index = blockIdx.x;
    const int block = index % (s.channel_blocks * s.groups);
    index /= s.channel_blocks * s.groups;
    tile.group = block / s.channel_blocks;
    tile.channel = block % s.channel_blocks * Block::CHANNELS;
    tile.phase = index % Conv::PHASES, index /= Conv::PHASES;
    const int first_position = index * Block::POSITIONS;

    unsigned char* const stages = dynamic_shared<unsigned char>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % Block::WARPS_M * Block::TILES_M * 16;
    const int warp_n = warp / Block::WARPS_M * Block::TILES_N * 8;
    float sums[Block::TILES_M][Block::TILES_N][4] = {};
    int taps = Conv::TAPS;
    if constexpr (Conv::PHASES > 1) taps = Phase<Conv>(tile.phase).taps();
    const int units = s.blocks * taps;  // none of a phase without taps

    if (units > 0) {
      StageCopies<Conv, Block> copies(s, phase_of<Conv>(whole, tile), tile, first_position, input,
                                      weight);
#pragma unroll
      for (int i = 0; i < STAGES - 1; ++i) {
        if (i < units) copies.copy(s, stages + i * Block::STAGE_BYTES);
        copy_commit();
      }
      // Where this lane's rows of the first matrices lie in a stage, at the first 32 bytes of K.
      const int m = warp_m + lane % 16, n = warp_n + lane / 16 * 8 + lane % 8;
      const int positions_at = m * STAGE_ROW_BYTES + swizzled(m, lane / 16);
      const int channels_at = (Block::POSITIONS + n) * STAGE_ROW_BYTES + swizzled(n, lane / 8 % 2);
      Fragments<Block> fragments[2];
      int read = 0, write = STAGES - 1;  // stages
      copy_wait<STAGES - 2>();
      __syncthreads();
      fragments[0].template load<T>(stages + positions_at, stages + channels_at);
#pragma unroll 1
      for (int unit = 0; unit < units; ++unit) {
        const unsigned char* stage = stages + read * Block::STAGE_BYTES;
        fragments[1].template load<T>(stage + (positions_at ^ 32), stage + (channels_at ^ 32));
        if (unit + STAGES - 1 < units) copies.copy(s, stages + write * Block::STAGE_BYTES);
        copy_commit();
        if (++write == STAGES) write = 0;
        multiply<T>(sums, fragments[0]);
        if (++read == STAGES) read = 0;
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (unit + 1 < units) {
          stage = stages + read * Block::STAGE_BYTES;
          fragments[0].template load<T>(stage + positions_at, stage + channels_at);
        }
        multiply<T>(sums, fragments[1]);
      }
    }
    tile.phase = opaque(tile.phase);  // found again, instead of in registers meanwhile
    const Output out = phase_of<Conv>(whole, tile);
    const WarpResults<T, Conv, Block> results = {s.places,
                                                 out,
                                                 first_position + warp_m,
                                                 tile.group * s.output_channels,
                                                 tile.channel + warp_n,
                                                 s.output_channels};
    results.add_bias(sums);
    if constexpr (sizeof...(Finishes) > 0) {
      __syncthreads();  // all warps have loaded what they multiply
      (results.finish(finishes, sums, dynamic_shared<float>()), ...);
    }
    results.store(sums);
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_MULTISTAGE_CUH
