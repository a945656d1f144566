// dgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"pairs": false, "row_axis": "d", "tiles": [[1, 32], [1, 24], [1, 16]], "unroll":
//   "taps", "variants": 2, "vectors": false, "warpgroups": 2}
//
//   fine[n, b, o] = bias[b] +
//       sum over a, t of coarse[n, a, (o + PADDING - t * DILATION) / STRIDE] * weight[a, b, t]
//   over the taps t for which the division is exact. Outputs o = q * STRIDE + r of one phase r
//   share their taps, each at a constant offset from q: a dense gather of the coarse grid, without
//   divisions or wasted products.
//
// On the tensor cores: positions are the rows (16) of a product, fine channels its columns (8),
// coarse channels its depth. A warp computes 16 positions of the flattened (h, w) plane
// x ROWS positions along d x VARIANTS neighbouring phases along w x CHANNELS fine
// channels in registers; a fragment of the input, loaded once, serves every tap and row that reads
// it. A thread block is `lanes` / 16 x `warps_c` such warps, which multiply, and PRODUCERS x
// PRODUCER_WARPS warps, which stage for each chunk of coarse channels in shared memory (two to
// four buffers; named barriers tell when one is full or empty)
//   the tile:    [word of channels][d][h][residue of w mod STEP_X][w / STEP_X],
//                with its halo; the pitch of a word is 8 or 24 mod 32, so that the lanes of a
//                fragment read different banks
//   the weights: fragments, packed beforehand by dgrad_pack_kernel.
// Lines that no access of several elements can copy come element by element (lines.cuh).

#include "lines.cuh"
#include "outputs.cuh"

namespace {

using namespace convgen;

using T = float;  // elements in memory
using Math = Tf32x3;
using Word = Math::Input;

// The specification, in three dimensions (D, H, W); o = i * STRIDE - PADDING + t * DILATION.
[[maybe_unused]] constexpr int KERNEL_D = 3, KERNEL_H = 3, KERNEL_W = 3;
[[maybe_unused]] constexpr int STRIDE_D = 2, STRIDE_H = 2, STRIDE_W = 2;
[[maybe_unused]] constexpr int PADDING_D = 0, PADDING_H = 0, PADDING_W = 0;
[[maybe_unused]] constexpr int DILATION_D = 1, DILATION_H = 1, DILATION_W = 1;
[[maybe_unused]] constexpr int GROUPS = 1;
[[maybe_unused]] constexpr int TAPS = KERNEL_D * KERNEL_H * KERNEL_W;
// Channel counts fixed at generation time; 0 where they are run-time values.
[[maybe_unused]] constexpr int COARSE_CHANNELS = 0;
[[maybe_unused]] constexpr int FINE_CHANNELS = 0;

// Axes of the tile: R = d, Y = h, X = w.
constexpr int STEP_R = 1, STEP_Y = 1, STEP_X = 1;  // inputs per position
constexpr int PHASES_R = 2, PHASES_Y = 2, PHASES_X = 2;
// Positions per thread, consecutive along R, where a warp has so many channels.
__host__ __device__ constexpr int rows_of(int) { return 1; }
constexpr int VARIANTS = 2;  // phases of X per thread
constexpr int GROUPS_X = 1;  // thread blocks that share the phases of X
constexpr bool SCATTERED = false;
// A tile holds the window of a whole phase: neighbouring planes and lines of the input.
constexpr int PLANE_STEP = 1, LINE_STEP = 1, ROW_STEP = STEP_R, LANE_STEP_Y = STEP_Y;
// Smallest offset of all taps along X.
constexpr int FIRST_X = -1;

// Smallest offset and number of taps of each phase along R and Y.
__device__ const int FIRST_R[] = {-1, 0};
__device__ const int FIRST_Y[] = {-1, 0};
__device__ const int COUNT_R[] = {2, 1};
__device__ const int COUNT_Y[] = {2, 1};

// Packed weights: the kernel element of each slot; the first slot of each region (what one pass
// reads); the first region of each phase.
constexpr int SLOTS = 27, REGIONS = 4;
constexpr int TAPS_PER_PASS = 12;
__device__ const int SLOT_TAP[] = {
    26, 8, 24, 25, 6, 7, 20, 2, 18, 19, 0, 1, 23, 5, 21, 22, 3, 4, 17, 15, 16, 11, 9, 10, 14, 12,
    13};
__device__ const int REGION_FIRST[] = {0, 12, 18, 24, 27};
__device__ const int PHASE_REGION[] = {0, 1, 2, 3};
// Warpgroups that multiply together, where a device has that.
constexpr int WARPGROUPS = 2;
// Shared memory of the outputs of a consumer warp.
constexpr int SCRATCH_WORDS = OUTPUT_BATCH * OUTPUT_WORDS<VARIANTS>;

// Every tap of d phase 0, h phase 0, for 8 input words.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d0_h0(
    const GatherShape& s, const Word* tile, Weights<Math, CHANNELS> weight,
    const int (&position)[2],
    float (&acc)[VARIANTS][1][CHANNELS / MMA_COLUMNS][4]) {
  constexpr int SLOT = SLOT_WORDS<Math, CHANNELS>;
  [[maybe_unused]] const int row_pitch = tile_offset<CHANNELS>(s.row_pitch);
  [[maybe_unused]] const int plane_pitch = tile_offset<CHANNELS>(s.plane_pitch);
  // Half the words of a product.
  const int quarter = tile_offset<CHANNELS>(4 * s.channel_pitch);
  {  // h -1, w -1
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(0);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 0 * SLOT);  // tap (2, 2, 2)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 1 * SLOT);  // tap (0, 2, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h -1, w +0
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(1);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 2 * SLOT);  // tap (2, 2, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 3 * SLOT);  // tap (2, 2, 1)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 4 * SLOT);  // tap (0, 2, 0)
    multiply_tap<Math, 1, ROW_STEP>(acc[1], x, weight + 5 * SLOT);  // tap (0, 2, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w -1
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(0 + 1 * row_pitch);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 6 * SLOT);  // tap (2, 0, 2)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 7 * SLOT);  // tap (0, 0, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w +0
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(1 + 1 * row_pitch);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 8 * SLOT);  // tap (2, 0, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 9 * SLOT);  // tap (2, 0, 1)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 10 * SLOT);  // tap (0, 0, 0)
    multiply_tap<Math, 1, ROW_STEP>(acc[1], x, weight + 11 * SLOT);  // tap (0, 0, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, true>();
  }
}

// Every tap of d phase 0, h phase 1, for 8 input words.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d0_h1(
    const GatherShape& s, const Word* tile, Weights<Math, CHANNELS> weight,
    const int (&position)[2],
    float (&acc)[VARIANTS][1][CHANNELS / MMA_COLUMNS][4]) {
  constexpr int SLOT = SLOT_WORDS<Math, CHANNELS>;
  [[maybe_unused]] const int row_pitch = tile_offset<CHANNELS>(s.row_pitch);
  [[maybe_unused]] const int plane_pitch = tile_offset<CHANNELS>(s.plane_pitch);
  // Half the words of a product.
  const int quarter = tile_offset<CHANNELS>(4 * s.channel_pitch);
  {  // h +0, w -1
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(0);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 0 * SLOT);  // tap (2, 1, 2)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 1 * SLOT);  // tap (0, 1, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w +0
    Math::A x[2];
    const Word* column = tile + tile_offset<CHANNELS>(1);
    load_fragments<Math, 0x3>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 2 * SLOT);  // tap (2, 1, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 3 * SLOT);  // tap (2, 1, 1)
    multiply_tap<Math, 1, ROW_STEP>(acc[0], x, weight + 4 * SLOT);  // tap (0, 1, 0)
    multiply_tap<Math, 1, ROW_STEP>(acc[1], x, weight + 5 * SLOT);  // tap (0, 1, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, true>();
  }
}

// Every tap of d phase 1, h phase 0, for 8 input words.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d1_h0(
    const GatherShape& s, const Word* tile, Weights<Math, CHANNELS> weight,
    const int (&position)[2],
    float (&acc)[VARIANTS][1][CHANNELS / MMA_COLUMNS][4]) {
  constexpr int SLOT = SLOT_WORDS<Math, CHANNELS>;
  [[maybe_unused]] const int row_pitch = tile_offset<CHANNELS>(s.row_pitch);
  [[maybe_unused]] const int plane_pitch = tile_offset<CHANNELS>(s.plane_pitch);
  // Half the words of a product.
  const int quarter = tile_offset<CHANNELS>(4 * s.channel_pitch);
  {  // h -1, w -1
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(0);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 0 * SLOT);  // tap (1, 2, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h -1, w +0
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(1);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 1 * SLOT);  // tap (1, 2, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 2 * SLOT);  // tap (1, 2, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w -1
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(0 + 1 * row_pitch);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 3 * SLOT);  // tap (1, 0, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w +0
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(1 + 1 * row_pitch);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 4 * SLOT);  // tap (1, 0, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 5 * SLOT);  // tap (1, 0, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, true>();
  }
}

// Every tap of d phase 1, h phase 1, for 8 input words.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d1_h1(
    const GatherShape& s, const Word* tile, Weights<Math, CHANNELS> weight,
    const int (&position)[2],
    float (&acc)[VARIANTS][1][CHANNELS / MMA_COLUMNS][4]) {
  constexpr int SLOT = SLOT_WORDS<Math, CHANNELS>;
  [[maybe_unused]] const int row_pitch = tile_offset<CHANNELS>(s.row_pitch);
  [[maybe_unused]] const int plane_pitch = tile_offset<CHANNELS>(s.plane_pitch);
  // Half the words of a product.
  const int quarter = tile_offset<CHANNELS>(4 * s.channel_pitch);
  {  // h +0, w -1
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(0);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 0 * SLOT);  // tap (1, 1, 2)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, false>();
  }
  {  // h +0, w +0
    Math::A x[1];
    const Word* column = tile + tile_offset<CHANNELS>(1);
    load_fragments<Math, 0x1>(x, column, position, plane_pitch, quarter);
    begin_column<CHANNELS>();
    multiply_tap<Math, 0, ROW_STEP>(acc[0], x, weight + 1 * SLOT);  // tap (1, 1, 0)
    multiply_tap<Math, 0, ROW_STEP>(acc[1], x, weight + 2 * SLOT);  // tap (1, 1, 1)
    end_column<Math, CHANNELS, WARPGROUPS, VARIANTS, true>();
  }
}

// What both roles know of the tile that they work on.
struct Work {
  GatherBlock block;
  int group_x, phase_y, phase_r;
  int strip_positions;  // in the strip of columns
  int y0;               // first line of the tile
  int shift;            // columns of the tile before its window
  int passes;
};

template <int ROWS>
__device__ __forceinline__ Work locate_work(const GatherShape& s, int index) {
  const GatherBlock block =
      locate_block(s, index, s.lanes * (SCATTERED ? ROWS : 1), SCATTERED ? 1 : ROWS);
  const int group_x = block.phase % GROUPS_X;
  const int phase_y = block.phase / GROUPS_X % PHASES_Y;
  const int phase_r = PHASES_R == 1 ? 0 : block.phase / (GROUPS_X * PHASES_Y);
  const int strip_positions = s.strip_width * s.y.positions;
  const int y0 = s.by_strip_width.divide(block.flat0);
  // The tile starts at a multiple of the access width, `shift` columns before its window.
  const int shift = (block.x0 * STEP_X + FIRST_X) & (s.load_width - 1);
  const int passes = COUNT_R[phase_r] * COUNT_Y[phase_y] > 0 ? 1 : 0;
  return {block, group_x, phase_y, phase_r, strip_positions, y0, shift, passes};
}

// The region of packed weights of one of its passes, and how many slots it has.
__device__ __forceinline__ int region_of_pass(const GatherBlock& block, int pass) {
  return PHASE_REGION[block.phase] + pass;
}

__device__ __forceinline__ int taps_of_region(int region) {
  return REGION_FIRST[region + 1] - REGION_FIRST[region];
}

// Where the tile of one of its passes begins in the input.
__device__ __forceinline__ TileOrigin locate_tile(const Work& work, int pass) {
  const GatherBlock& block = work.block;
  const int phase_r = work.phase_r, phase_y = work.phase_y, y0 = work.y0;
  const int shift = work.shift;
  const int r = block.r0 * STEP_R + FIRST_R[phase_r];
  const int y = y0 * STEP_Y + FIRST_Y[phase_y];
  const int x = block.x0 * STEP_X + FIRST_X - shift;
  return {r, y, x};
}

// The first of the input channels that a tile reads.
__device__ __forceinline__ const T* locate_channels(const GatherShape& s, const GatherBlock& block,
                                                    const T* input) {
  return input + (int64_t{block.batch} * s.groups.divisor + block.group) * s.in_channels *
                     s.in_channel_stride;
}

// Which of a tile's products a consumer's thread computes.
struct Consumer {
  int lane, warp, warp_c;
  int run;  // its warp's first position

  // Position of the lane's first row of a product; its second is 8 further.
  __device__ __forceinline__ int position() const { return run + lane / 4; }
};

template <int CHANNELS>
__device__ __forceinline__ Consumer locate_consumer(const GatherShape& s, int thread) {
  constexpr int WARPS = WARPGROUP_WARPS<CHANNELS>;
  const int lane = thread % WARP;
  int warp = thread / WARP;
  // By a shuffle, which tells the compiler that lanes agree: tensor cores take addresses of weights
  // from registers that a warp has once, and what each lane finds for itself is moved there for
  // every product.
  if constexpr (WARPS > 1) warp = __shfl_sync(0xffffffffu, warp, 0);
  const int group = warp / WARPS;
  const int rows = group / s.warps_c * WARPS + warp % WARPS;
  return {lane, warp, group % s.warps_c, rows * MMA_ROWS};
}

template <int CHANNELS>
constexpr int THREADS = BLOCK_THREADS<CHANNELS, WARPGROUPS, rows_of(CHANNELS) * VARIANTS>;

template <int CHANNELS>
__global__ void __launch_bounds__(THREADS<CHANNELS>, 1)
    dgrad_kernel(const GatherShape s, const T* input, const uint32_t* packed,
                 const T* bias, T* output) {
  constexpr int ROWS = rows_of(CHANNELS), BLOCKS_N = CHANNELS / MMA_COLUMNS;
  constexpr int PRODUCERS = PRODUCER_WARPGROUPS<CHANNELS, WARPGROUPS, ROWS * VARIANTS>;
  uint32_t* const shared = dynamic_shared<uint32_t>();
  // Found anew by each role, and where it is needed.
  auto find_blocks_c = [&] { return (opaque(s.out_channels) + CHANNELS - 1) / CHANNELS; };
  auto find_warp_weights = [&] {
    return opaque(s.chunk) / MMA_WORDS * TAPS_PER_PASS * SLOT_WORDS<Math, CHANNELS>;
  };
  const int consumers = blockDim.x - PRODUCERS * PRODUCER_WARPS * WARP;
  // Threads that a buffer's barriers wait for.
  const int meeting = consumers + PRODUCER_WARPS * WARP;
  // Behind the stages: the consumers' scratch, the releases of buffers, mbarriers, and the places
  // of vectors, or raw buffers.
  constexpr int SCRATCH = CONSUMER_WARPS<CHANNELS, WARPGROUPS> * SCRATCH_WORDS;
  auto find_releases = [&] { return shared + s.stages * s.stage_elements + SCRATCH; };
  auto find_fills = [&] { return find_releases() + RELEASE_WORDS<MOST_STAGES>; };
  // Of each buffer, for the bulk copies of its weights.
  auto find_landed = [&](int buffer) {
    return reinterpret_cast<uint64_t*>(find_fills() + RELEASE_WORDS<MOST_STAGES>) + buffer;
  };
  if constexpr (BULK_COPIES) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < MOST_STAGES; ++i) mbarrier_init(find_landed(i), 1);
      mbarrier_fence();
    }
  }
  __syncthreads();
  begin_releases<MOST_STAGES>(find_releases(), consumers);
  begin_releases<MOST_STAGES>(find_fills(), PRODUCER_WARPS * WARP);
  // Counts passes over all tiles of this block. Buffers take turns, round after round.
  int step = 0, buffer = 0, round = 0;
  auto next_step = [&] {
    ++step;
    if (++buffer == s.stages) buffer = 0, ++round;
  };

  if (static_cast<int>(threadIdx.x) >= consumers) {
    // Producers: the tile and the weights of every pass over every chunk, one pass ahead, across
    // tiles.
    if constexpr (BY_WARPGROUPS<CHANNELS>) warpgroup_reg_dealloc<PRODUCER_REGISTERS<WARPGROUPS>>();
    await_earlier_kernel();  // which packs what they stage
    constexpr int PRODUCER_THREADS = PRODUCER_WARPS * WARP;
    const int thread = static_cast<int>(threadIdx.x);
    constexpr bool SEVERAL = PRODUCERS > 1;
    const Producers producers = {SEVERAL ? thread % PRODUCER_THREADS : thread - consumers,
                                 PRODUCER_THREADS};
    int turn_of_warpgroup = thread / PRODUCER_THREADS % PRODUCERS;
    // By a shuffle, which tells the compiler that lanes agree: what loops count stays uniform.
    if constexpr (SEVERAL) turn_of_warpgroup = __shfl_sync(0xffffffffu, turn_of_warpgroup, 0);
    // The weights of a step: by bulk copies of one thread where there are such.
    auto stage_weights = [&](const Work& work, int pass, int first_word, int count, uint32_t* to) {
      if (BULK_COPIES && producers.thread > 0) return;
      const GatherBlock& block = work.block;
      const int region = region_of_pass(block, pass), region_taps = taps_of_region(region);
      const int blocks_c = find_blocks_c(), first_block = block.channel_block * s.warps_c;
      const int blocks = min(s.warps_c, blocks_c - first_block);
      const int group = block.group;
      const int64_t block_words =
          int64_t{SLOTS} * (opaque(s.words) / MMA_WORDS) * SLOT_WORDS<Math, CHANNELS>;
      const uint32_t* from = packed + (int64_t{group} * blocks_c + first_block) * block_words +
                             (int64_t{REGION_FIRST[region]} * (opaque(s.words) / MMA_WORDS) +
                              first_word / MMA_WORDS * region_taps) *
                                 SLOT_WORDS<Math, CHANNELS>;
      const int words = count / MMA_WORDS * region_taps * SLOT_WORDS<Math, CHANNELS>;
      const int bytes = words * static_cast<int>(sizeof(uint32_t));
      if constexpr (BULK_COPIES) mbarrier_arrive_expect(find_landed(buffer), blocks * bytes);
      for (int w = 0; w < blocks; ++w) {
        if constexpr (BULK_COPIES) {
          bulk_copy(to, from, bytes, find_landed(buffer));
        } else {
          stage_packed<true>(producers, to, from, words);
        }
        from += block_words, to += find_warp_weights();
      }
    };
    // When all but the PENDING newest batches of this thread's copies have landed, and the weights:
    // tells the consumers that a buffer is full, in this one of its rounds.
    auto announce = [&](int of_buffer, int of_round, auto pending) {
      if constexpr (BULK_COPIES) mbarrier_wait(find_landed(of_buffer), of_round & 1);
      announce_full<CHANNELS, decltype(pending)::value>(find_fills(), of_buffer, meeting);
    };
    // A single warpgroup with buffers to spare awaits copies when the next ones are on their way.
    [[maybe_unused]] const bool at_once = PRODUCERS > 1 || s.stages == GATHER_LEAST_STAGES;
    [[maybe_unused]] constexpr std::integral_constant<int, 0> ALL_LANDED;
    [[maybe_unused]] constexpr std::integral_constant<int, 1> BUT_NEWEST;
    [[maybe_unused]] auto announce_last = [&](auto pending) {
      announce(buffer == 0 ? s.stages - 1 : buffer - 1, buffer == 0 ? round - 1 : round, pending);
    };
    // Each of the warpgroup's steps: stages the weights, and whatever else `stage` does of it.
    auto produce = [&](auto&& stage) {
      for (int turn = 0; int64_t{turn} * gridDim.x < s.blocks; ++turn) {
        const int index = tile_of_turn(turn);
        if (index >= s.blocks) continue;
        const Work work = locate_work<ROWS>(s, index);
#pragma unroll 1
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
          const int first_word = chunk * s.chunk, count = min(s.chunk, s.words - first_word);
#pragma unroll 1
          for (int pass = 0; pass < work.passes; ++pass, next_step()) {
            if (PRODUCERS > 1 && step % PRODUCERS != turn_of_warpgroup) continue;
            if (step >= s.stages) {
              await_release<BARRIER_EMPTY>(find_releases(), buffer, round, meeting);
            }
            uint32_t* const tile = shared + buffer * s.stage_elements;
            stage_weights(work, pass, first_word, count, tile + s.tile_elements);
            stage(work, pass, chunk, count, reinterpret_cast<Word*>(tile));
          }
        }
      }
    };
    // As copies that land in the tile itself: `copy` is given its channels.
    auto produce_by_copies = [&](auto&& copy) {
      produce([&](const Work& work, int pass, int chunk, int count, Word* tile) {
        const int first_channel = chunk * s.chunk * Math::CHANNELS;
        copy(tile, locate_channels(s, work.block, input) + first_channel * s.in_channel_stride,
             count, s.in_channels - first_channel, locate_tile(work, pass));
        copy_commit();
        if (at_once) {
          announce(buffer, round, ALL_LANDED);
        } else if (step > 0) {
          announce_last(BUT_NEWEST);
        }
      });
      if (!at_once && step > 0) announce_last(ALL_LANDED);
    };
    auto produce_by_elements = [&] {
      produce_by_copies([&](Word* tile, const T* from, int count, int channels,
                            const TileOrigin& origin) {
        const int existing = min(count, channels);
        copy_tile<PLANE_STEP, LINE_STEP, STEP_X>(s, producers, tile,
                                                 reinterpret_cast<const Word*>(from),
                                                 existing, origin);
        clear_words(s, producers, tile, existing, count);
      });
    };
    if (s.load_width == 1) {
      produce_by_elements();
    } else {
      produce_by_copies([&](Word* tile, const T* from, int count, int channels,
                            const TileOrigin& origin) {
        stage_aligned<PLANE_STEP, LINE_STEP, Math>(s, producers, tile, from, count, channels,
                                                   origin);
      });
    }
    // Meet the consumers' last arrivals, so that every one is answered.
    for (int last = max(step - s.stages, 0); last < step; ++last) {
      if (PRODUCERS > 1 && last % PRODUCERS != turn_of_warpgroup) continue;
      await_release<BARRIER_EMPTY>(find_releases(), last % s.stages, last / s.stages + 1, meeting);
    }
    return;
  }

  if constexpr (BY_WARPGROUPS<CHANNELS>) warpgroup_reg_alloc<CONSUMER_REGISTERS<WARPGROUPS>>();
  // Consumers. What a thread knows of itself is found anew where it is needed: beside the sums no
  // registers are left to keep it.
  for (int turn = 0; int64_t{turn} * gridDim.x < s.blocks; ++turn) {
    const int index = tile_of_turn(turn);
    if (index >= s.blocks) continue;
    const Work work = locate_work<ROWS>(s, index);
    const GatherBlock& block = work.block;
    const Consumer self = locate_consumer<CHANNELS>(s, opaque(threadIdx.x));
    const bool active = block.channel_block * s.warps_c + self.warp_c < find_blocks_c();
    const int first_weight = s.tile_elements + self.warp_c * find_warp_weights();

    // Where this lane's positions lie in the tile. Lanes beyond the strip repeat its last position,
    // and store nothing.
    auto locate = [&](int flat) {
      int y = min(flat, work.strip_positions - 1);
      const int x = s.by_strip_width.split(y);
      return (y - work.y0) * LANE_STEP_Y * s.row_pitch + work.shift + x;
    };
    const int position[2] = {locate(block.flat0 + self.position()),
                             locate(block.flat0 + self.position() + 8)};

    const int region_taps = taps_of_region(region_of_pass(block, 0));

    float acc[VARIANTS][ROWS][BLOCKS_N][4] = {};
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      for (int pass = 0; pass < work.passes; ++pass, next_step()) {
        await_release<BARRIER_FULL>(find_fills(), buffer, round + 1, meeting);
        if (active) {
          const int count = min(s.chunk, s.words - chunk * s.chunk);
          const uint32_t* const staged = shared + buffer * s.stage_elements;
          const Word* tile = reinterpret_cast<const Word*>(staged) +
                             opaque(threadIdx.x) % 4 * s.channel_pitch;
          Weights<Math, CHANNELS> weight =
              find_weights<Math, CHANNELS>(staged + first_weight, opaque(threadIdx.x) % WARP);
          for (int word = 0; word < count; word += MMA_WORDS) {
            auto accumulate_words = [&](float (&sums)[VARIANTS][ROWS][BLOCKS_N][4]) {
              switch (block.phase) {
                case 0:
                  accumulate_d0_h0<CHANNELS>(s, tile, weight, position, sums);
                  break;
                case 1:
                  accumulate_d0_h1<CHANNELS>(s, tile, weight, position, sums);
                  break;
                case 2:
                  accumulate_d1_h0<CHANNELS>(s, tile, weight, position, sums);
                  break;
                case 3:
                  accumulate_d1_h1<CHANNELS>(s, tile, weight, position, sums);
                  break;
              }
            };
            if constexpr (Math::PROMOTES) {
              float part[VARIANTS][ROWS][BLOCKS_N][4] = {};
              settle(part);
              accumulate_words(part);
              end_products(part);
#pragma unroll
              for (int i = 0; i < VARIANTS * ROWS * BLOCKS_N * 4; ++i) {
                const int n = i / 4 % BLOCKS_N;
                const int m = i / 4 / BLOCKS_N % ROWS, v = i / 4 / BLOCKS_N / ROWS;
                acc[v][m][n][i % 4] += part[v][m][n][i % 4];
              }
            } else {
              accumulate_words(acc);
            }
            tile += MMA_WORDS * s.channel_pitch;
            weight += region_taps * SLOT_WORDS<Math, CHANNELS>;
          }
          if constexpr (!Math::PROMOTES) end_products(acc);
        }
        release_buffer<BARRIER_EMPTY>(find_releases(), buffer, meeting);
      }
    }

    // Epilogue: bias; then the outputs, by way of the warp's scratch, from where they leave as they
    // lie in memory. Warps that multiply alone, or in three warpgroups, have no registers to keep
    // their place.
    const bool keeps = BY_WARPGROUPS<CHANNELS> && WARPGROUPS == 2;
    const Work at = keeps ? work : locate_work<ROWS>(s, tile_of_turn(opaque(turn)));
    const Consumer me = keeps ? self : locate_consumer<CHANNELS>(s, opaque(threadIdx.x));
    const int first_out = (at.block.channel_block * s.warps_c + me.warp_c) * CHANNELS;
    if (bias) {
      const T* const of_group = bias + at.block.group * s.out_channels;
      add_bias(acc, of_group, first_out, s.out_channels, me.lane);
    }
    float* const scratch = reinterpret_cast<float*>(shared + s.stages * s.stage_elements) +
                           me.warp * SCRATCH_WORDS;
    T* const out_channels =
        output + ((int64_t{at.block.batch} * s.groups.divisor + at.block.group) * s.out_channels +
                  first_out) *
                     s.out_channel_stride;
    // ALL: whether all its channels exist, so that none need be asked for.
    auto store = [&](auto width, auto all) {
      constexpr int WIDTH = decltype(width)::value;
      constexpr bool ALL = decltype(all)::value;
      using Lanes = Storing<VARIANTS, WIDTH>;
      const bool stores = Lanes::active(me.lane);
      const int channel = stores ? Lanes::channel(me.lane) : 0;
      // Bytes from one of its channels to the next; strides of channels are below 2^31. Addresses
      // advance by it: from a count of elements, the compiler would find each address anew.
      const uint64_t step =
          uint64_t{static_cast<uint32_t>(s.out_channel_stride)} * (Lanes::CHANNELS * sizeof(T));
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        // Where this lane's outputs of the row lie in the first of its channels, and how many
        // channels there are from that one on: none for outputs that do not exist.
        T* to[Lanes::TURNS];
        int channels[Lanes::TURNS];
#pragma unroll
        for (int i = 0; i < Lanes::TURNS; ++i) {
          const int run_output = Lanes::output(me.lane, i), v = run_output % VARIANTS;
          const int flat = at.block.flat0 + me.run + run_output / VARIANTS;
          int position_y = flat;
          const int position_x = s.by_strip_width.split(position_y);
          const int at_r = (at.block.r0 + m) * PHASES_R + at.phase_r;
          const int at_y = position_y * PHASES_Y + at.phase_y;
          const int phase_x = at.group_x * VARIANTS + v;
          const int at_x = (at.block.x0 + position_x) * PHASES_X + phase_x;
          const bool inside = stores && flat < at.strip_positions && phase_x < PHASES_X &&
                              at_r < s.r.output && at_y < s.y.output && at_x < s.x.output;
          channels[i] = inside ? s.out_channels - first_out - channel : 0;
          to[i] = out_channels + channel * s.out_channel_stride + at_r * s.r.output_stride +
                  at_y * s.y.output_stride + at_x;
        }
#pragma unroll
        for (int first = 0; first < BLOCKS_N; first += OUTPUT_BATCH) {
#pragma unroll
          for (int n = first; n < min(first + OUTPUT_BATCH, BLOCKS_N); ++n) {
            float value[VARIANTS][4];
#pragma unroll
            for (int i = 0; i < VARIANTS * 4; ++i) value[i / 4][i % 4] = acc[i / 4][m][n][i % 4];
            spread_outputs<VARIANTS, false>(
                scratch + (n - first) * OUTPUT_WORDS<VARIANTS>, me.lane, value);
          }
          __syncwarp();
#pragma unroll
          for (int c = 0; c < MMA_COLUMNS * OUTPUT_BATCH; c += Lanes::CHANNELS) {
            const int from_first = first * MMA_COLUMNS + c;
            if (from_first >= CHANNELS) continue;
#pragma unroll
            for (int i = 0; i < Lanes::TURNS; ++i) {
              Run<WIDTH, T> run;
              run.load(scratch + (channel + c) * OUTPUT_PITCH<VARIANTS> +
                       Lanes::output(me.lane, i));
              if (ALL ? channels[i] > 0 : from_first < channels[i]) run.store(to[i]);
              to[i] = advance(to[i], step);
            }
          }
          __syncwarp();
        }
      }
    };
    constexpr std::integral_constant<int, 1> ALONE;
    constexpr std::integral_constant<int, 2> TOGETHER;
    if (first_out + CHANNELS > s.out_channels) {
      if (s.vector_store) {
        store(TOGETHER, std::false_type());
      } else {
        store(ALONE, std::false_type());
      }
    } else if (s.vector_store) {
      store(TOGETHER, std::true_type());
    } else {
      store(ALONE, std::true_type());
    }
  }
}

template <int CHANNELS>
__global__ void dgrad_pack_kernel(uint32_t* packed, const T* weight, int steps, int in_channels,
                                  int out_channels, int64_t words) {
  let_next_kernel_begin();
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= words) return;
  auto value_of = [&](int slot, int step, int word, int channel) {
    return PackedValue{(step * MMA_WORDS + word) * Math::CHANNELS + channel, SLOT_TAP[slot]};
  };
  constexpr bool OUTPUT_IS_COARSE = false;
  pack_fragments<Math, CHANNELS, OUTPUT_IS_COARSE>(
      packed, weight, REGION_FIRST, REGIONS, TAPS, SLOTS, steps, in_channels,
      out_channels, index, value_of);
}

// Words of 8 input words' products that a call's reduction over channels has.
int64_t product_steps(const ConvgenCall& call) {
  return ceil_div(call.coarse_channels / GROUPS, MMA_WORDS * Math::CHANNELS);
}

int64_t packed_words(const ConvgenCall& call, int64_t channels) {
  const int64_t out_blocks = ceil_div(call.fine_channels / GROUPS, channels);
  return GROUPS * out_blocks * channels / MMA_COLUMNS * SLOTS * product_steps(call) * WARP *
         Math::PACKED;
}

// Cuts a call into tiles, which are expected to take so many clocks.
int cut(const ConvgenCall& call, const DeviceLimits& limits, const Roles& roles, int channels,
        GatherShape& s, double& clocks) {
  const int64_t* in = call.coarse_extent;
  const int64_t* out = call.fine_extent;
  const int64_t in_stride[3] = {in[1] * in[2], in[2], 1};
  const int64_t out_stride[3] = {out[1] * out[2], out[2], 1};
  auto axis = [&](int i, int phases) {
    GatherAxis a;
    a.input = static_cast<int>(in[i]);
    a.output = static_cast<int>(out[i]);
    a.positions = static_cast<int>(ceil_div(out[i], phases));
    a.input_stride = static_cast<int>(in_stride[i]);
    a.output_stride = static_cast<int>(out_stride[i]);
    return a;
  };
  s.r = axis(0, PHASES_R);
  s.y = axis(1, PHASES_Y);
  s.x = axis(2, PHASES_X);
  s.in_channels = static_cast<int>(call.coarse_channels / GROUPS);
  s.out_channels = static_cast<int>(call.fine_channels / GROUPS);
  s.in_channel_stride = in[0] * in[1] * in[2];
  s.out_channel_stride = out[0] * out[1] * out[2];
  const int64_t batch = call.batch;
  s.in_span = (s.in_channels - 1) * s.in_channel_stride +
              int64_t{s.r.input - 1} * s.r.input_stride +
              int64_t{s.y.input - 1} * s.y.input_stride + s.x.input;

  const GpuRates rates = gpu_rates(limits.capability);
  GatherTraits traits;
  traits.phases = PHASES_R * PHASES_Y * GROUPS_X;
  traits.step_r = ROW_STEP;
  traits.step_y = LANE_STEP_Y;
  traits.step_x = STEP_X;
  traits.span_r = 1;
  traits.span_y = 1;
  traits.span_x = 1;
  traits.scattered = SCATTERED;
  traits.taps_per_pass = TAPS_PER_PASS;
  traits.slots = SLOTS, traits.regions = REGIONS;
  traits.variants = VARIANTS, traits.phases_x = PHASES_X;
  traits.rows_per_thread = rows_of(channels);
  traits.max_warps = roles.warpgroups;
  traits.max_warps_c = roles.max_warpgroups_c;
  traits.warp_threads = roles.warpgroup_warps * WARP;
  traits.extra_threads = roles.producers * PRODUCER_WARPS * WARP;
  traits.lanes_per_warp = roles.warpgroup_warps * MMA_ROWS;
  traits.most_stages = MOST_STAGES;
  traits.stage_step = roles.producers;
  traits.scratch_bytes = roles.consumer_warps() * SCRATCH_WORDS * sizeof(float) +
                         (2 * RELEASE_WORDS<MOST_STAGES> + LANDED_WORDS) * sizeof(uint32_t);
  traits.channels_per_warp = channels;
  traits.packed_per_slot = channels / MMA_COLUMNS * WARP * Math::PACKED / MMA_WORDS;
  traits.word_bytes = sizeof(Word);
  traits.words = static_cast<int>(product_steps(call) * MMA_WORDS);
  traits.chunk_step = MMA_WORDS;
  traits.max_chunk = 4 * MMA_WORDS;
  traits.pitch_residue = 8;  // modulo 16: 8 or 24 modulo the 32 banks
  traits.raw_buffers = 0;
  traits.raw_channels = Math::CHANNELS;
  traits.element_bytes = sizeof(T);
  // A product's clocks, of one warp or of a warpgroup.
  traits.slot_clocks = rows_of(channels) * channels / MMA_COLUMNS * (Math::PROMOTES ? 3 : 1) *
                       (roles.warpgroup_warps == 1
                            ? rates.product_clocks
                            : roles.warpgroup_warps * rates.warpgroup_product_clocks);

  return cut_gather(s, traits, batch, GROUPS, limits, rates, clocks);
}

template <int CHANNELS>
int run(const ConvgenCall& call, const GatherShape& s, int multiprocessors) {
  const int device = static_cast<int>(call.device);
  uint32_t* const packed = static_cast<uint32_t*>(call.workspace);
  const int64_t words = packed_words(call, CHANNELS);
  constexpr int PACK_THREADS = 256;
  if (const int error = launch<dgrad_pack_kernel<CHANNELS>>(
          dim3(ceil_div(words, PACK_THREADS)), dim3(PACK_THREADS), 0, device, call.stream,
          packed, static_cast<const T*>(call.weight), s.words / MMA_WORDS, s.in_channels,
          s.out_channels, words)) {
    return error;
  }
  // Blocks stay and take tile after tile: the next one's copies overlap this one's stores.
  const int64_t grid = s.blocks < multiprocessors ? s.blocks : multiprocessors;
  return launch<dgrad_kernel<CHANNELS>, true>(
      dim3(grid), dim3(s.threads), s.shared_bytes, device, call.stream, s,
      static_cast<const T*>(call.coarse), static_cast<const uint32_t*>(packed),
      static_cast<const T*>(call.bias), static_cast<T*>(call.fine));
}

// The compiled channels per warp, and the tiles that go with them.
struct Choice {
  int channels;
  GatherShape shape;
};

// Time of a call's output channels in warps of `channels`: few channels share each fragment.
int64_t channels_cost(int64_t out_channels, int channels) {
  return round_up(out_channels, channels) * (channels <= 8 ? 25 : channels <= 16 ? 17 : 15);
}

// Launch bound of the kernel for a number of channels per warp.
int compiled_bound(const ConvgenCall& call, int channels, int& bound) {
  const int device = static_cast<int>(call.device);
  switch (channels) {
    case 32:
      return launch_bound<dgrad_kernel<32>, THREADS<32>>(device, bound);
    case 24:
      return launch_bound<dgrad_kernel<24>, THREADS<24>>(device, bound);
    default:
      return launch_bound<dgrad_kernel<16>, THREADS<16>>(device, bound);
  }
}

// Of the compiled sizes, the best whose tiles fit into shared memory.
int choose(const ConvgenCall& call, const DeviceLimits& limits, Choice& choice) {
  const int64_t line = call.coarse_extent[2];
  const int load_width = STEP_X == 1 ? access_width<T, float>(call.coarse, line) : 1;
  thread_local ShapeCache<Choice> cache;
  bool known;
  Choice& cached = cache.find(call, load_width, known);
  if (!known) {
    BestCut<Choice> cuts;
    for (const int channels : {32, 24, 16}) {
      int bound = 0;
      if (const int error = compiled_bound(call, channels, bound)) {
        cache.forget(cached);
        return error;
      }
      const Roles roles = roles_of(bound, channels, WARPGROUPS);
      Choice candidate;
      candidate.channels = channels;
      candidate.shape.load_width = load_width;
      double clocks;
      if (cut(call, limits, roles, channels, candidate.shape, clocks)) continue;
      cuts.offer(candidate, channels_cost(call.fine_channels / GROUPS, channels), clocks);
    }
    if (!cuts.found()) {
      cache.forget(cached);
      return CONVGEN_TOO_LARGE;
    }
    cached = cuts.best();
  }
  choice = cached;
  // Pairs of outputs leave together where they lie together and whole lines of them are aligned.
  GatherShape& s = choice.shape;
  s.vector_store = VARIANTS == PHASES_X && s.x.output % 2 == 0 &&
                   s.strip_width * VARIANTS % 2 == 0 &&
                   reinterpret_cast<uintptr_t>(call.fine) % (2 * sizeof(T)) == 0;
  return CONVGEN_OK;
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_dgrad_tf32x3_workspace(const ConvgenCall* call) {
  // Enough for whichever size a call will choose.
  int64_t most = 0;
  most = packed_words(*call, 32) > most ? packed_words(*call, 32) : most;
  most = packed_words(*call, 24) > most ? packed_words(*call, 24) : most;
  most = packed_words(*call, 16) > most ? packed_words(*call, 16) : most;
  return most * sizeof(uint32_t);
}

CONVGEN_EXPORT int convgen_dgrad_tf32x3(const ConvgenCall* call) {
  if ((COARSE_CHANNELS && call->coarse_channels != COARSE_CHANNELS) ||
      (FINE_CHANNELS && call->fine_channels != FINE_CHANNELS)) {
    return CONVGEN_BAD_CHANNELS;
  }
  if (!volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  const DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(static_cast<int>(call->device), limits)) return error;
  Choice choice;
  if (const int error = choose(*call, limits, choice)) return error;
  switch (choice.channels) {
    case 32:
      return run<32>(*call, choice.shape, limits.multiprocessors);
    case 24:
      return run<24>(*call, choice.shape, limits.multiprocessors);
    default:
      return run<16>(*call, choice.shape, limits.multiprocessors);
  }
}
