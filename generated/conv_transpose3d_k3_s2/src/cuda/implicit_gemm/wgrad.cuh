// Gradient of the weight as an implicit GEMM on Hopper, in 16 bits:
//
//   weight[a, b, t] = sum over n, i of coarse[n, i, a] * fine[n, i + t * DILATION - PADDING, b]
//
// Both operands lie with their channels side by side and are read as they lie (MN-major): K are the
// positions. A CTA is four warpgroups. Three consumers multiply the same 64 (32) coarse channels
// (the rows of their products) by as many fine channels of up to three neighbouring taps along W
// (their columns), each for another line of taps; a producer thread loads
//
//   coarse   8 x LINES positions of a plane, in boxes of 128 (64) bytes of channels, swizzled
//   fine     the same positions with their halo along W and H, of the plane that tap kd meets
//
// A tap is a row to begin at, and taps along W are columns whose next 64 begin a tap further.
//
// Pairs of (tap group, coarse block, fine block) x tiles of positions are dealt evenly over the
// CTAs, which leave partial sums; another kernel adds these up in order.
//
// Positions beyond the output must not meet elements of fine: zeros times infinity are NaNs. The
// last tiles of lines therefore end with the output, and what they would compute twice is loaded as
// zeros, by way of tensor maps that begin there: those zeros meet what their positions do read.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_CUH

#include "pack.cuh"

namespace convgen {

constexpr int WGRAD_CONSUMERS = 3;
constexpr int WGRAD_THREADS = (WGRAD_CONSUMERS + 1) * WARPGROUP;
constexpr int PRODUCT_TAPS = 3;  // along W, of one product

// The taps of a convolution in lines of up to PRODUCT_TAPS along W, of which consumers take one
// each.
template <typename Conv>
struct TapLines {
  static constexpr int COLUMNS = Conv::KERNEL_W < PRODUCT_TAPS ? Conv::KERNEL_W : PRODUCT_TAPS;
  static constexpr int CHUNKS = (Conv::KERNEL_W + COLUMNS - 1) / COLUMNS;  // of a line along W
  static constexpr int LINES = Conv::KERNEL_H * CHUNKS;                    // of one plane of taps
  static constexpr int GROUPS = (LINES + WGRAD_CONSUMERS - 1) / WGRAD_CONSUMERS;
};

// K blocks of all pairs of blocks (of channels and of taps), as they are dealt out to CTAs.
struct DealtUnits {
  int positions;  // K blocks of a pair
  int units;      // pairs x K blocks
  int ctas;
  int grain = 1;  // neighbours that one CTA has: all of a pair, where nobody adds its sums up

  __host__ __device__ int first_unit(int cta) const {
    return static_cast<int>(int64_t{units / grain} * cta / ctas) * grain;
  }
  // Which CTA has a unit, of a grain of one.
  __host__ __device__ int cta_of(int unit) const {
    return static_cast<int>(((int64_t{unit} + 1) * ctas - 1) / units);
  }
};

// How a call is dealt out.
struct WgradTiling : DealtUnits {
  int tiles_w, tiles_h, depth, batch;          // tiles of one pair of blocks
  int last_w, last_h;                          // where the last tiles begin
  int step_w, step_h;                          // from tile to tile
  int groups, coarse_channels, fine_channels;  // of a group
  int coarse_pitch, fine_pitch;                // channels from one group's first to the next one's
  int coarse_blocks, fine_blocks;              // of a group's channels
  int stages;
};

// A stage: the coarse box, then the fine one.
template <typename Conv, int LINES, int ROW>
struct WgradStage {
  using Halo = HaloSlab<Conv, LINES>;
  static constexpr int COARSE_BYTES = 8 * LINES * ROW;
  // Columns of taps that do not exist are read, too, and lead nowhere.
  static constexpr int FINE_ROWS =
      Halo::ROWS +
      (TapLines<Conv>::CHUNKS * TapLines<Conv>::COLUMNS - Conv::KERNEL_W) * Conv::DILATION_W;
  static constexpr int FINE_BYTES = (FINE_ROWS * ROW + ATOM_BYTES - 1) / ATOM_BYTES * ATOM_BYTES;
  static constexpr int BYTES = COARSE_BYTES + FINE_BYTES;
  static constexpr int LOADED_BYTES = COARSE_BYTES + Halo::ROWS * ROW;
  static constexpr int CHANNELS = ROW / 2;
  static constexpr int SUMS = TapLines<Conv>::COLUMNS * CHANNELS / 2;
  // Partial sums of a CTA: [consumer][tap of a product][coarse channel][fine channel].
  static constexpr int PARTIALS = WGRAD_CONSUMERS * TapLines<Conv>::COLUMNS * CHANNELS * CHANNELS;
};

struct WgradStorage {
  uint64_t full[MOST_STAGES], empty[MOST_STAGES];
};

// What one pair is: a plane of taps, a group of their lines, and blocks of channels.
struct WgradPair {
  int kd, lines, group, coarse, fine;

  template <typename Conv>
  __device__ __forceinline__ static WgradPair of(const WgradTiling& t, int index) {
    WgradPair pair;
    pair.fine = index % t.fine_blocks, index /= t.fine_blocks;
    pair.coarse = index % t.coarse_blocks, index /= t.coarse_blocks;
    pair.group = index % t.groups, index /= t.groups;
    pair.lines = index % TapLines<Conv>::GROUPS;
    pair.kd = index / TapLines<Conv>::GROUPS;
    return pair;
  }
};

// Maps of coarse: whole, and with what the tiles before the last along W, or H, or both have summed
// left out.
struct CoarseMaps {
  TensorMap of[4];
};

template <typename T, int LINES, int ROW, typename Conv>
__device__ __forceinline__ void load_wgrad(const WgradTiling& t, const CoarseMaps& coarse_maps,
                                           const TensorMap& fine_map, Pipeline ring,
                                           unsigned char* stages) {
  using Stage = WgradStage<Conv, LINES, ROW>;
  using Halo = typename Stage::Halo;
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  int index = unit % t.positions, pair_index = unit / t.positions;
  int tile_w = index % t.tiles_w;
  index /= t.tiles_w;
  int tile_h = index % t.tiles_h;
  index /= t.tiles_h;
  int d = index % t.depth, n = index / t.depth;
  WgradPair pair = WgradPair::of<Conv>(t, pair_index);
  for (const int end = t.first_unit(blockIdx.x + 1); unit < end; ++unit) {
    const bool last_w = tile_w == t.tiles_w - 1, last_h = tile_h == t.tiles_h - 1;
    const int w = last_w ? t.last_w : tile_w * t.step_w;
    const int h = last_h ? t.last_h : tile_h * t.step_h;
    uint64_t* const barrier = ring.producer_acquire(at, Stage::LOADED_BYTES);
    unsigned char* const to = stages + at.index * Stage::BYTES;
    // The maps of last tiles begin where the tiles before end.
    tma_load(to, coarse_maps.of[last_w + 2 * last_h], barrier,
             pair.group * t.coarse_pitch + pair.coarse * Stage::CHANNELS,
             last_w ? w - tile_w * t.step_w : w, last_h ? h - tile_h * t.step_h : h, d, n);
#pragma unroll
    for (int load = 0; load < Halo::LOADS; ++load) {
      tma_load(to + Stage::COARSE_BYTES + load * Halo::LOAD_W * ROW, fine_map, barrier,
               pair.group * t.fine_pitch + pair.fine * Stage::CHANNELS,
               w - Conv::PADDING_W + load * Halo::LOAD_W, h - Conv::PADDING_H,
               d + pair.kd * Conv::DILATION_D - Conv::PADDING_D, n);
    }
    at.advance(1, t.stages);
    // The next tile, without a division: this thread must keep ahead of three warpgroups.
    if (++tile_w < t.tiles_w) continue;
    tile_w = 0;
    if (++tile_h < t.tiles_h) continue;
    tile_h = 0;
    if (++d < t.depth) continue;
    d = 0;
    if (++n < t.batch) continue;
    n = 0;
    pair = WgradPair::of<Conv>(t, ++pair_index);
  }
}

template <typename T, int LINES, int ROW, typename Conv>
__device__ __forceinline__ void consume_wgrad(const WgradTiling& t, Pipeline ring,
                                              const unsigned char* stages, float* partials) {
  using Stage = WgradStage<Conv, LINES, ROW>;
  using Taps = TapLines<Conv>;
  constexpr int PITCH = Stage::Halo::PITCH, CHANNELS = Stage::CHANNELS;
  const int consumer = threadIdx.x / WARPGROUP, lane = threadIdx.x % 32;
  PipelineState at;
  float sums[Stage::SUMS];
  int unit = t.first_unit(blockIdx.x);
  const int end = t.first_unit(blockIdx.x + 1);
  while (unit < end) {
    const int index = unit / t.positions;
    const WgradPair pair = WgradPair::of<Conv>(t, index);
    const int pair_end = end - index * t.positions < t.positions ? end : (index + 1) * t.positions;
    const int line = pair.lines * WGRAD_CONSUMERS + consumer;
    const int first_row = line / Taps::CHUNKS * Conv::DILATION_H * PITCH +
                          line % Taps::CHUNKS * Taps::COLUMNS * Conv::DILATION_W;
    const bool is_busy = line < Taps::LINES;
    int previous = -1, accumulates = 0;
#pragma unroll 1
    for (; unit < pair_end; ++unit) {
      ring.consumer_wait(at);
      if (is_busy) {
        const unsigned char* const stage = stages + at.index * Stage::BYTES;
        const Operand coarse(stage, 8, ROW, 8);
        const Operand fine(stage + Stage::COARSE_BYTES + first_row * ROW, PITCH, ROW,
                           Conv::DILATION_W);
        wgmma_begin();
        // 16 positions: two groups of eight.
#pragma unroll
        for (int k = 0; k < LINES / 2; ++k) {
          wgmma<T, Major::MN, Major::MN>(sums, coarse.moved(k * 2 * 8 * ROW),
                                         fine.moved(k * 2 * PITCH * ROW), k == 0 ? accumulates : 1);
        }
        wgmma_commit();
        accumulates = 1;
        wgmma_wait<1>();
      }
      if (lane == 0 && previous >= 0) ring.consumer_release(previous);
      previous = at.index;
      at.advance(1, t.stages);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < Stage::SUMS; ++i) wgmma_settle(sums[i]);
    if (lane == 0) ring.consumer_release(previous);

    // Where each CTA's sums of each pair lie: no two have the same place.
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    if (!is_busy || row >= CHANNELS) continue;
    float* const to = partials + (int64_t{blockIdx.x} + index) * Stage::PARTIALS +
                      consumer * Taps::COLUMNS * CHANNELS * CHANNELS + row * CHANNELS +
                      lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Stage::SUMS / 4; ++j) {
      float* const at_tap = to + j / (CHANNELS / 8) * CHANNELS * CHANNELS + j % (CHANNELS / 8) * 8;
      *reinterpret_cast<float2*>(at_tap) = make_float2(sums[4 * j], sums[4 * j + 1]);
      *reinterpret_cast<float2*>(at_tap + 8 * CHANNELS) =
          make_float2(sums[4 * j + 2], sums[4 * j + 3]);
    }
  }
}

constexpr int WGRAD_PRODUCER_REGISTERS = 32, WGRAD_CONSUMER_REGISTERS = 160;
static_assert(WGRAD_PRODUCER_REGISTERS + WGRAD_CONSUMERS * WGRAD_CONSUMER_REGISTERS <=
                  (WGRAD_CONSUMERS + 1) * (65536 / WGRAD_THREADS / 8 * 8),
              "registers that a CTA has");

template <typename T, int LINES, int ROW, typename Conv>
__global__ void __launch_bounds__(COMPILED_THREADS<WGRAD_THREADS>, 1)
    wgrad_kernel(const __grid_constant__ CoarseMaps coarse_maps,
                 const __grid_constant__ TensorMap fine_map, const WgradTiling t, float* partials) {
  if constexpr (HAS_WGMMA) {
    unsigned char* const dynamic = dynamic_shared<unsigned char>();
    WgradStorage& shared = *reinterpret_cast<WgradStorage*>(dynamic);
    unsigned char* const stages = dynamic + aligned_offset(dynamic, sizeof(WgradStorage));
    if (threadIdx.x == 32) prefetch_map(coarse_maps.of[0]), prefetch_map(fine_map);
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
        load_wgrad<T, LINES, ROW, Conv>(t, coarse_maps, fine_map, ring, stages);
      }
    } else {
      warpgroup_reg_alloc<WGRAD_CONSUMER_REGISTERS>();
      consume_wgrad<T, LINES, ROW, Conv>(t, ring, stages, partials);
    }
  }
}

// Where a weight's gradient goes. Strides are in elements.
struct WeightOutput {
  void* address;
  int64_t stride_coarse, stride_fine, stride_tap;
  int vector;  // fine channels that one access may have, where they lie side by side
};

constexpr int ADD_TAPS = 32;

// How the partial sums of a call are added up, by a thread block for each coarse channel, block of
// fine channels and some taps.
struct Adding {
  WeightOutput out = {};
  int taps;  // of a thread block: fewer where there are few channels
  dim3 grid;

  template <typename Tiling>
  Adding(const ConvgenCall& call, const Tiling& t, int all_taps, int multiprocessors)
      : taps(all_taps < ADD_TAPS ? all_taps : ADD_TAPS) {
    out.address = call.weight;
    const bool last = call.channels_last & CONVGEN_WEIGHT;
    out.stride_coarse = int64_t{t.fine_channels} * all_taps;
    out.stride_fine = last ? 1 : all_taps, out.stride_tap = last ? t.fine_channels : 1;
    const int64_t blocks = int64_t{t.fine_blocks} * t.groups * t.coarse_channels;
    while (taps > 1 && blocks * ceil_div(all_taps, taps) < 4 * multiprocessors) {
      taps = (taps + 1) / 2;
    }
    grid = dim3(t.fine_blocks * t.groups, t.coarse_channels,
                static_cast<unsigned>(ceil_div(all_taps, taps)));
  }
};

// Adds `taps` taps' partial sums from `first_tap` on, of one coarse channel and a block of CHANNELS
// fine ones, into `tile`, [fine channel][ADD_TAPS + 1]. A pair of blocks has ROWS coarse channels
// and PARTIALS sums; `add` adds up an element's, from an address on, over so many CTAs.
template <typename Conv, typename Taps, int ROWS, int CHANNELS, int64_t PARTIALS, typename Tiling,
          typename Add>
__device__ __forceinline__ void add_taps(const Tiling& t, const float* __restrict__ partials,
                                         float* tile, int fine_block, int group, int coarse,
                                         int first_tap, int taps, Add add) {
  constexpr int TAP_GROUPS = Conv::KERNEL_D * Taps::GROUPS;
  __shared__ int first_cta[TAP_GROUPS], last_cta[TAP_GROUPS];
  // As WgradPair::of and QuarterPair::of take it apart.
  const auto pair_of = [&](int tap_group) {
    return ((tap_group * t.groups + group) * t.coarse_blocks + coarse / ROWS) * t.fine_blocks +
           fine_block;
  };
  for (int i = threadIdx.x; i < TAP_GROUPS; i += PACK_THREADS) {
    // The CTAs that had units of the pair.
    const int first = pair_of(i) * t.positions;
    first_cta[i] = t.cta_of(first), last_cta[i] = t.cta_of(first + t.positions - 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < taps * CHANNELS / 4; i += PACK_THREADS) {
    const int fine = i % (CHANNELS / 4) * 4, tap = i / (CHANNELS / 4), t_all = first_tap + tap;
    const int kw = t_all % Conv::KERNEL_W, kh = t_all / Conv::KERNEL_W % Conv::KERNEL_H;
    const int kd = t_all / (Conv::KERNEL_W * Conv::KERNEL_H);
    const int line = kh * Taps::CHUNKS + kw / Taps::COLUMNS;
    const int tap_group = kd * Taps::GROUPS + line / WGRAD_CONSUMERS;
    const int within =
        ((line % WGRAD_CONSUMERS * Taps::COLUMNS + kw % Taps::COLUMNS) * ROWS + coarse % ROWS) *
            CHANNELS +
        fine;
    const int cta = first_cta[tap_group], count = last_cta[tap_group] - cta + 1;
    const float4 sum =
        add(partials + (int64_t{cta} + pair_of(tap_group)) * PARTIALS + within, count);
    float* const to = tile + fine * (ADD_TAPS + 1) + tap;
    to[0] = sum.x, to[ADD_TAPS + 1] = sum.y;
    to[2 * (ADD_TAPS + 1)] = sum.z, to[3 * (ADD_TAPS + 1)] = sum.w;
  }
  __syncthreads();
}

// Adds up the partial sums: a thread block has one coarse channel, a block of fine channels and up
// to ADD_TAPS taps.
template <typename T, int ROW, typename Conv>
__global__ void __launch_bounds__(PACK_THREADS)
    add_wgrad_kernel(const WgradTiling t, const float* __restrict__ partials,
                     const WeightOutput out, int taps_of_block) {
  constexpr int CHANNELS = ROW / 2, TAPS = Conv::TAPS;
  constexpr int64_t PARTIALS = WgradStage<Conv, 8, ROW>::PARTIALS;
  __shared__ float tile[CHANNELS * (ADD_TAPS + 1)];
  await_earlier_kernel();
  const int fine_block = blockIdx.x % t.fine_blocks, group = blockIdx.x / t.fine_blocks;
  const int coarse = blockIdx.y, first_tap = blockIdx.z * taps_of_block;
  const int taps = min(taps_of_block, TAPS - first_tap);
  add_taps<Conv, TapLines<Conv>, CHANNELS, CHANNELS, PARTIALS>(
      t, partials, tile, fine_block, group, coarse, first_tap, taps,
      [](const float* from, int count) {
        float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 8
        for (int more = 1; more < count; ++more) {
          const float4 x = *reinterpret_cast<const float4*>(from + more * PARTIALS);
          sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        return sum;
      });
  const int count = min(CHANNELS, t.fine_channels - fine_block * CHANNELS);
  T* const to = static_cast<T*>(out.address) +
                (int64_t{group} * t.coarse_channels + coarse) * out.stride_coarse +
                int64_t{fine_block} * CHANNELS * out.stride_fine;
  // Neighbouring threads write neighbouring elements.
  for (int i = threadIdx.x; i < taps * count; i += PACK_THREADS) {
    const bool tap_first = out.stride_tap == 1;
    const int fine = tap_first ? i / taps : i % count, tap = tap_first ? i % taps : i / count;
    narrow(to[fine * out.stride_fine + (first_tap + tap) * out.stride_tap],
           tile[fine * (ADD_TAPS + 1) + tap]);
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_CUH
