// Gradient of the weight as an implicit GEMM on Hopper, in TF32 and 3xTF32:
//
//   weight[a, b, t] = sum over n, i of
//                     coarse[n, i, a] * fine[n, i * STRIDE + t * DILATION - PADDING, b]
//
// Both operands are packed into units of four positions first (quarters.cuh): K-major, without a
// swizzle. The units of eight channels are 128 bytes, those of the next position along W the next
// vectors of K. A CTA is four warpgroups. Three consumers multiply the same 64 coarse channels (the
// rows of their products) by CHANNELS fine channels of up to three neighbouring taps along W (their
// columns), each for another line of taps; a producer thread loads
//
//   coarse   8 x LINES units of each channel (of one dimension 8 * LINES x 1)
//   fine     the units that these meet by the consumers' taps, in the plane that tap kd meets
//
// A tap is a unit to begin at. Channels of a unit lie side by side, so that taps along W are
// columns that run on into the next units. Where a plane of taps has one line, consumers share
// positions instead.
//
// Pairs of (tap group, coarse block, fine block) x tiles of units are dealt evenly over the CTAs,
// which leave partial sums; another kernel adds these up in order. In 3xTF32, three products (the
// low parts' product is left out) make a stage's sums, which leave the tensor cores after each
// stage: these truncate. Long sums go to memory now and then, and begin again.
//
// Units beyond the output are zeros, which meet elements of fine that no tap should: beside an
// infinity or a NaN they make NaNs. What comes out as NaN is summed again, over what it meets
// alone.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_CUH

#include "../meeting.cuh"
#include "quarters.cuh"
#include "wgrad.cuh"

namespace convgen {

// The taps of a plane, in lines of up to PRODUCT_TAPS along W, of which consumers take one each.
template <typename Conv>
struct QuarterTaps {
  static constexpr int chunks(int columns) { return (Conv::KERNEL_W + columns - 1) / columns; }
  static constexpr bool splits(int columns) { return Conv::KERNEL_H * chunks(columns) == 1; }
  static constexpr int groups(int columns) {
    return (Conv::KERNEL_H * chunks(columns) + WGRAD_CONSUMERS - 1) / WGRAD_CONSUMERS;
  }
  // Columns of all products of a tile, and what is loaded for them.
  static constexpr int cost(int columns) {
    return groups(columns) * ((splits(columns) ? 1 : WGRAD_CONSUMERS) * columns + 1);
  }
  static constexpr int best_columns() {
    int best = Conv::KERNEL_W < PRODUCT_TAPS ? Conv::KERNEL_W : PRODUCT_TAPS;
    for (int columns = best - 1; columns > 0; --columns) {
      if (cost(columns) < cost(best)) best = columns;
    }
    return best;
  }

  static constexpr int COLUMNS = best_columns();
  static constexpr int CHUNKS = chunks(COLUMNS);         // of a line along W
  static constexpr int LINES = Conv::KERNEL_H * CHUNKS;  // of one plane of taps
  static constexpr int GROUPS = groups(COLUMNS);         // of lines
  static constexpr bool SPLITS = splits(COLUMNS);        // whether consumers share positions
  // Taps along H that a group's lines have.
  static constexpr int span() {
    if (CHUNKS == 1) return LINES < WGRAD_CONSUMERS ? LINES : WGRAD_CONSUMERS;
    return CHUNKS % WGRAD_CONSUMERS == 0 || Conv::KERNEL_H == 1 ? 1 : 2;
  }
  static constexpr int SPAN = span();
};

// How a call is dealt out.
struct QuarterTiling : DealtUnits {
  int tiles_w, tiles_h, depth, samples;        // tiles of one pair of blocks; samples x residues
  int groups, coarse_channels, fine_channels;  // of a group
  int coarse_blocks, fine_blocks;              // of a group's channels
  int stages;
};

// Partial sums of a CTA, [consumer][tap of a product][coarse channel][fine channel].
template <typename Conv, int FINE_CHANNELS>
struct QuarterSums {
  using Taps = QuarterTaps<Conv>;
  static constexpr int CHANNELS = FINE_CHANNELS;
  static constexpr int OF_CONSUMER = Taps::COLUMNS * BLOCK_M * CHANNELS;
  static constexpr int PARTIALS = WGRAD_CONSUMERS * OF_CONSUMER;
};

// A stage: the coarse boxes of all parts, then the fine ones.
template <typename Conv, int SIZE, int FINE_CHANNELS, int PARTS_OF_VALUES>
struct QuarterStage : QuarterSums<Conv, FINE_CHANNELS> {
  using Taps = QuarterTaps<Conv>;
  static constexpr int LINES = SIZE, CHANNELS = FINE_CHANNELS, PARTS = PARTS_OF_VALUES;
  static constexpr int TILE_W = Conv::LINEAR ? 8 * LINES : 8, TILE_H = Conv::LINEAR ? 1 : LINES;
  static constexpr int BOX_W = (TILE_W - 1) * Conv::STRIDE_W + Taps::CHUNKS * Taps::COLUMNS;
  static constexpr int BOX_H = Conv::LINEAR ? 1 : (TILE_H - 1) * Conv::STRIDE_H + Taps::SPAN;
  static constexpr int COARSE_PITCH = BLOCK_M * UNIT_BYTES, FINE_PITCH = CHANNELS * UNIT_BYTES;
  static constexpr int COARSE_BYTES = TILE_W * TILE_H * COARSE_PITCH;
  static constexpr int FINE_BYTES = BOX_W * BOX_H * FINE_PITCH;
  static constexpr int BYTES = PARTS * (COARSE_BYTES + FINE_BYTES);
  static constexpr int STEPS = 4 * LINES;  // products of eight positions, for each tap
  static constexpr int OWN_STEPS = Taps::SPLITS ? STEPS / WGRAD_CONSUMERS : STEPS;
  static constexpr int SUMS = Taps::COLUMNS * CHANNELS / 2;
  // Stages whose sums are added in one place, before they go to memory: see above.
  static constexpr int LONGEST = PARTS == 2 ? 128 : 4096 / OWN_STEPS;

  static constexpr bool EXISTS = BOX_W <= 256 && BOX_H <= 256 && 2 * BYTES <= 224 * 1024 &&
                                 (PARTS == 1 || SUMS <= 48) &&
                                 (!Taps::SPLITS || LINES % WGRAD_CONSUMERS == 0);
  // Bytes from the first unit of a tile to those of a product.
  static constexpr __host__ __device__ int coarse_step(int k) { return 2 * k * COARSE_PITCH; }
  static constexpr __host__ __device__ int fine_step(int k) {
    const int line = Conv::LINEAR ? 0 : k / 4, pair = Conv::LINEAR ? k : k % 4;
    return (line * Conv::STRIDE_H * BOX_W + 2 * pair * Conv::STRIDE_W) * FINE_PITCH;
  }
};

// What one pair is: a plane of taps, a group of their lines, and blocks of channels, of which the
// first is given.
struct QuarterPair {
  int kd, lines, group, coarse, fine;

  template <typename Stage>
  __device__ __forceinline__ static QuarterPair of(const QuarterTiling& t, int index) {
    QuarterPair pair;
    pair.fine = index % t.fine_blocks * Stage::CHANNELS, index /= t.fine_blocks;
    pair.coarse = index % t.coarse_blocks * BLOCK_M, index /= t.coarse_blocks;
    pair.group = index % t.groups, index /= t.groups;
    pair.lines = index % Stage::Taps::GROUPS;
    pair.kd = index / Stage::Taps::GROUPS;
    return pair;
  }
};

template <typename Stage, typename Conv>
__device__ __forceinline__ void load_quarters(const QuarterTiling& t, const TensorMap& coarse_map,
                                              const TensorMap& fine_map, Pipeline ring,
                                              unsigned char* stages) {
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  int index = unit % t.positions, pair_index = unit / t.positions;
  int tile_w = index % t.tiles_w;
  index /= t.tiles_w;
  int tile_h = index % t.tiles_h;
  index /= t.tiles_h;
  int d = index % t.depth, n = index / t.depth;
  QuarterPair pair = QuarterPair::of<Stage>(t, pair_index);
  for (const int end = t.first_unit(blockIdx.x + 1); unit < end; ++unit) {
    const int kh = pair.lines * WGRAD_CONSUMERS / Stage::Taps::CHUNKS;
    // Padding along W is beside the tensor, but where W is divided it is packed.
    const int padded = n % Conv::DILATION_W * Conv::STRIDE_W - Conv::PADDING_W;
    const int lead = Conv::LINEAR ? 0 : floor_div(padded, Conv::DILATION_W);
    uint64_t* const barrier = ring.producer_acquire(at, Stage::BYTES);
    unsigned char* to = stages + at.index * Stage::BYTES;
#pragma unroll
    for (int part = 0; part < Stage::PARTS; ++part, to += Stage::COARSE_BYTES) {
      tma_load(to, coarse_map, barrier, QUARTERS * (pair.group * t.coarse_channels + pair.coarse),
               tile_w * Stage::TILE_W, tile_h * Stage::TILE_H, d, n + part * t.samples);
    }
#pragma unroll
    for (int part = 0; part < Stage::PARTS; ++part, to += Stage::FINE_BYTES) {
      tma_load(to, fine_map, barrier, QUARTERS * (pair.group * t.fine_channels + pair.fine),
               tile_w * Stage::TILE_W * Conv::STRIDE_W + lead,
               tile_h * Stage::TILE_H * Conv::STRIDE_H + kh,
               d * Conv::STRIDE_D + pair.kd * Conv::DILATION_D - Conv::PADDING_D,
               n + part * t.samples);
    }
    at.advance(1, t.stages);
    // The next tile, without a division: this thread must keep ahead of three warpgroups.
    if (++tile_w < t.tiles_w) continue;
    tile_w = 0;
    if (++tile_h < t.tiles_h) continue;
    tile_h = 0;
    if (++d < t.depth) continue;
    d = 0;
    if (++n < t.samples) continue;
    n = 0;
    pair = QuarterPair::of<Stage>(t, ++pair_index);
  }
}

// The products of a stage: `sums` begin again where `accumulates` is 0.
template <typename Stage, typename Conv>
__device__ __forceinline__ void multiply_quarters(float (&sums)[Stage::SUMS],
                                                  const unsigned char* coarse_at,
                                                  const unsigned char* fine_at, int accumulates) {
  Operand coarse[Stage::PARTS], fine[Stage::PARTS];
#pragma unroll
  for (int part = 0; part < Stage::PARTS; ++part) {
    coarse[part] = Operand::of_vectors(coarse_at + part * Stage::COARSE_BYTES, 8 * UNIT_BYTES,
                                       Stage::COARSE_PITCH);
    fine[part] = Operand::of_vectors(fine_at + part * Stage::FINE_BYTES, 8 * UNIT_BYTES,
                                     Conv::STRIDE_W * Stage::FINE_PITCH);
  }
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < Stage::OWN_STEPS; ++k) {
    const int coarse_step = Stage::coarse_step(k), fine_step = Stage::fine_step(k);
    if constexpr (Stage::PARTS == 2) {
      wgmma<float>(sums, coarse[1].moved(coarse_step), fine[0].moved(fine_step),
                   k == 0 ? accumulates : 1);
      wgmma<float>(sums, coarse[0].moved(coarse_step), fine[1].moved(fine_step), 1);
    }
    wgmma<float>(sums, coarse[0].moved(coarse_step), fine[0].moved(fine_step),
                 k == 0 && Stage::PARTS == 1 ? accumulates : 1);
  }
  wgmma_commit();
}

// A consumer's sums, to its place among the partial ones; or added to what is there.
template <typename Stage>
__device__ __forceinline__ void store_quarters(const float (&sums)[Stage::SUMS], float* to,
                                               bool adds) {
  constexpr int CHANNELS = Stage::CHANNELS;
#pragma unroll
  for (int j = 0; j < Stage::SUMS / 4; ++j) {
    float* const at = to + j / (CHANNELS / 8) * BLOCK_M * CHANNELS + j % (CHANNELS / 8) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2* const pair = reinterpret_cast<float2*>(at + half * 8 * CHANNELS);
      float2 sum = make_float2(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
      if (adds) {
        const float2 before = *pair;
        sum.x += before.x, sum.y += before.y;
      }
      *pair = sum;
    }
  }
}

template <typename Stage, typename Conv>
__device__ __forceinline__ void consume_quarters(const QuarterTiling& t, Pipeline ring,
                                                 const unsigned char* stages, float* partials) {
  using Taps = typename Stage::Taps;
  const int consumer = threadIdx.x / WARPGROUP, lane = threadIdx.x % 32;
  // Where a consumer's positions begin, if they are its own.
  const int first_step = Taps::SPLITS ? consumer * Stage::OWN_STEPS : 0;
  PipelineState at;
  float sums[Stage::SUMS];
  const int first = t.first_unit(blockIdx.x), end = t.first_unit(blockIdx.x + 1);
  for (int unit = first; unit < end;) {
    const int index = unit / t.positions, pair_begin = index * t.positions;
    const QuarterPair pair = QuarterPair::of<Stage>(t, index);
    const int line = Taps::SPLITS ? 0 : pair.lines * WGRAD_CONSUMERS + consumer;
    const bool is_busy = line < Taps::LINES;
    const int kh = line / Taps::CHUNKS - pair.lines * WGRAD_CONSUMERS / Taps::CHUNKS;
    const int first_tap = kh * Stage::BOX_W + line % Taps::CHUNKS * Taps::COLUMNS;
    const bool adds = unit > first && unit > pair_begin;
    int last = end - pair_begin < t.positions ? end : pair_begin + t.positions;
    if (last - unit > Stage::LONGEST) last = unit + Stage::LONGEST;
    // What leaves the tensor cores after each stage.
    [[maybe_unused]] float totals[Stage::PARTS == 2 ? Stage::SUMS : 1] = {};
    int previous = -1, accumulates = 0;
#pragma unroll 1
    for (; unit < last; ++unit) {
      ring.consumer_wait(at);
      if (is_busy) {
        const unsigned char* const stage = stages + at.index * Stage::BYTES;
        multiply_quarters<Stage, Conv>(sums, stage + Stage::coarse_step(first_step),
                                       stage + Stage::PARTS * Stage::COARSE_BYTES +
                                           first_tap * Stage::FINE_PITCH +
                                           Stage::fine_step(first_step),
                                       accumulates);
      }
      if constexpr (Stage::PARTS == 2) {
        wgmma_wait<0>();
        if (is_busy) {
#pragma unroll
          for (int i = 0; i < Stage::SUMS; ++i) {
            wgmma_settle(sums[i]);
            totals[i] += sums[i];
          }
        }
        if (lane == 0) ring.consumer_release(at.index);
      } else {
        accumulates = 1;
        wgmma_wait<1>();
        if (lane == 0 && previous >= 0) ring.consumer_release(previous);
        previous = at.index;
      }
      at.advance(1, t.stages);
    }
    if constexpr (Stage::PARTS == 1) {
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < Stage::SUMS; ++i) wgmma_settle(sums[i]);
      if (lane == 0) ring.consumer_release(previous);
    }
    if (!is_busy) continue;
    // Where each CTA's sums of each pair lie: no two have the same place.
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    float* const to = partials + (int64_t{blockIdx.x} + index) * Stage::PARTIALS +
                      consumer * Stage::OF_CONSUMER + row * Stage::CHANNELS + lane % 4 * 2;
    if constexpr (Stage::PARTS == 2) {
      store_quarters<Stage>(totals, to, adds);
    } else {
      store_quarters<Stage>(sums, to, adds);
    }
  }
}

template <typename Stage, typename Conv>
__global__ void __launch_bounds__(COMPILED_THREADS<WGRAD_THREADS>, 1)
    quarter_wgrad_kernel(const __grid_constant__ TensorMap coarse_map,
                         const __grid_constant__ TensorMap fine_map, const QuarterTiling t,
                         float* partials) {
  if constexpr (HAS_WGMMA) {
    unsigned char* const dynamic = dynamic_shared<unsigned char>();
    WgradStorage& shared = *reinterpret_cast<WgradStorage*>(dynamic);
    unsigned char* const stages = dynamic + aligned_offset(dynamic, sizeof(WgradStorage));
    if (threadIdx.x == 0) {
      for (int i = 0; i < t.stages; ++i) {
        mbarrier_init(&shared.full[i], 1);
        mbarrier_init(&shared.empty[i], 4 * WGRAD_CONSUMERS);
      }
      mbarrier_fence();
    }
    __syncthreads();
    await_earlier_kernel();
    const Pipeline ring = {shared.full, shared.empty};
    if (threadIdx.x >= WGRAD_CONSUMERS * WARPGROUP) {
      warpgroup_reg_dealloc<WGRAD_PRODUCER_REGISTERS>();
      if (threadIdx.x == WGRAD_CONSUMERS * WARPGROUP) {
        load_quarters<Stage, Conv>(t, coarse_map, fine_map, ring, stages);
      }
    } else {
      warpgroup_reg_alloc<WGRAD_CONSUMER_REGISTERS>();
      consume_quarters<Stage, Conv>(t, ring, stages, partials);
    }
  }
}

// Adds up the partial sums: a thread block has one coarse channel, a block of fine channels and up
// to ADD_TAPS taps.
template <int CHANNELS, typename Conv>
__global__ void __launch_bounds__(PACK_THREADS)
    add_quarters_kernel(const QuarterTiling t, const float* __restrict__ partials,
                        const WeightOutput out, int taps_of_block, const Meeting<float> met,
                        int64_t channels_last) {
  using Taps = QuarterTaps<Conv>;
  using Sums = QuarterSums<Conv, CHANNELS>;
  __shared__ float tile[CHANNELS * (ADD_TAPS + 1)];
  await_earlier_kernel();
  const int fine_block = blockIdx.x % t.fine_blocks, group = blockIdx.x / t.fine_blocks;
  const int coarse = blockIdx.y, first_tap = blockIdx.z * taps_of_block;
  const int taps = min(taps_of_block, Conv::TAPS - first_tap);
  add_taps<Conv, Taps, BLOCK_M, CHANNELS, Sums::PARTIALS>(
      t, partials, tile, fine_block, group, coarse, first_tap, taps,
      [](const float* from, int count) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int more = 0; more < count; ++more) {
#pragma unroll
          for (int part = 0; part < (Taps::SPLITS ? WGRAD_CONSUMERS : 1); ++part) {
            const float4 x = *reinterpret_cast<const float4*>(
                from + more * int64_t{Sums::PARTIALS} + part * Sums::OF_CONSUMER);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
          }
        }
        return sum;
      });
  const int count = min(CHANNELS, t.fine_channels - fine_block * CHANNELS);
  const int64_t row = int64_t{group} * t.coarse_channels + coarse;
  float* const to = static_cast<float*>(out.address) + row * out.stride_coarse +
                    int64_t{fine_block} * CHANNELS * out.stride_fine;
  // Neighbouring threads write neighbouring elements.
  const bool tap_first = out.stride_tap == 1;
  bool is_number = true;
  for (int i = threadIdx.x; i < taps * count; i += PACK_THREADS) {
    const int fine = tap_first ? i / taps : i % count, tap = tap_first ? i % taps : i / count;
    const float sum = tile[fine * (ADD_TAPS + 1) + tap];
    is_number = is_number && sum == sum;
    to[fine * out.stride_fine + (first_tap + tap) * out.stride_tap] = sum;
  }
  if (is_number) return;
  // Places are found anew, so that no register keeps them.
#pragma unroll 1
  for (int i = opaque(threadIdx.x); i < taps * count; i += PACK_THREADS) {
    const int fine = tap_first ? i / taps : i % count, tap = tap_first ? i % taps : i / count;
    if (tile[fine * (ADD_TAPS + 1) + tap] == tile[fine * (ADD_TAPS + 1) + tap]) continue;
    const int64_t channel = row * t.fine_channels + fine_block * CHANNELS + fine;
    to[fine * out.stride_fine + (first_tap + tap) * out.stride_tap] =
        meeting_sum<float, true>(met, channel * Conv::TAPS + first_tap + tap, channels_last);
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_CUH
