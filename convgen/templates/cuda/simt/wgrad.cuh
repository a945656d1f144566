// The part of wgrad (and of the bias gradient) that does not depend on the specification.
#pragma once

#include "common.cuh"
#include "meeting.cuh"
#include "transpose.cuh"

namespace convgen {

// A call of wgrad, cut into thread blocks. Lengths are in elements.
struct WgradShape {
  int coarse_d, coarse_h, coarse_w;
  int fine_d, fine_h, fine_w;
  int64_t coarse_channel_stride, fine_channel_stride;
  int coarse_channels, fine_channels;  // per group
  int groups;

  // A block owns `groups_per_block` groups (or one), `fine_block` fine channels counted over them,
  // `coarse_block` coarse channels of each, and `tap_blocks` neighbouring blocks of taps. Its
  // threads are `units` = fine_block x tap_blocks lanes by `warps_a` blocks of CHANNELS.
  int groups_per_block, fine_block, coarse_block, tap_blocks, units, warps_a;
  Divisor by_fine_block, by_group_fine;
  Divisor coarse_blocks, fine_blocks, tap_parts, group_blocks;
  int blocks, threads;

  // Positions are walked in tiles of tile_h x tile_w within one plane of one sample; the tiles are
  // dealt to `splits` blocks in contiguous runs, each with a partial result of its own.
  int tile_h, tile_w;
  Divisor tiles_w, tiles_h, tiles_d;
  int tiles, splits, tiles_per_split;

  // Shared memory of one stage: coarse [channel][tile_h][tile_w], fine [channel][plane][row][x].
  int coarse_pitch, coarse_elements;
  int planes, rows, columns, fine_pitch, stage_elements;
  Divisor by_tile_w, by_rows, by_columns;
  int shared_bytes;
  int coarse_width;  // elements per staged access of the coarse tensor
};

struct WgradTraits {
  int kernel_d, kernel_h, kernel_w;
  int stride_h, stride_w, dilation_h, dilation_w;
  int taps_h, taps_w;          // taps per thread
  int tap_blocks_h, tap_blocks_w;
  int positions;               // positions of W per step of a thread
};

constexpr int WGRAD_MAX_THREADS = 384;
constexpr int WGRAD_STAGES = 2;
constexpr int WGRAD_MAX_SPLITS = 1024;
constexpr int64_t WGRAD_WORKSPACE_LIMIT = int64_t{256} << 20;  // bytes, unless one split needs more

// Planes of the fine tensor that a run of `count` tap blocks reads, at most.
inline int64_t wgrad_planes(int64_t count, int64_t total, int64_t per_plane) {
  int64_t most = 0;
  for (int64_t first = 0; first < total; first += count) {
    const int64_t last = (first + count < total ? first + count : total) - 1;
    const int64_t planes = last / per_plane - first / per_plane + 1;
    if (planes > most) most = planes;
  }
  return most;
}

// Chooses who computes what: of all cuts whose smallest stage fits, the one with the least work
// (multiply-adds issued, idle lanes included, plus staged elements at their cost).
inline int cut_wgrad(WgradShape& s, const WgradTraits& t, int channels, int accumulator_bytes,
                     int64_t batch, int multiprocessors, int shared_limit) {
  const int max_warps = WGRAD_MAX_THREADS / WARP;
  const int64_t per_plane = int64_t{t.tap_blocks_h} * t.tap_blocks_w;
  const int64_t tap_total = per_plane * t.kernel_d;
  const int64_t blocks_a = ceil_div(s.coarse_channels, channels);
  const int64_t stage_limit = shared_limit / WGRAD_STAGES / accumulator_bytes;

  auto fine_pitch = [&](int64_t planes, int64_t tile_h, int64_t tile_w) {
    // Overhanging taps of the last tap block are computed (and not stored): keep them in bounds.
    const int64_t rows = (tile_h - 1) * t.stride_h + int64_t{t.tap_blocks_h} * t.taps_h;
    const int64_t columns = (tile_w - 1) * t.stride_w +
                            (int64_t{t.tap_blocks_w} * t.taps_w - 1) * t.dilation_w + 1;
    return (planes * rows * columns) | 1;  // odd: lanes of different channels in different banks
  };
  auto coarse_pitch = [&](int64_t tile_h, int64_t tile_w) {
    return round_up(tile_h * tile_w, 4) + 4;  // 4 mod 32 words between groups' channels
  };

  // Lines of 64 positions, or 32, or 16 and so on; even ones, in multiples of a thread's step.
  double best = -1;
  for (int64_t line = 64; line >= 4; line /= 2) {
    const int64_t tile_w =
        round_up(ceil_div(s.coarse_w, ceil_div(s.coarse_w, line)), t.positions);
    const double padded = double(ceil_div(s.coarse_w, tile_w)) * tile_w;
    for (int64_t warps_a = 1; warps_a <= max_warps && warps_a <= blocks_a; ++warps_a) {
      const int64_t coarse_parts = ceil_div(blocks_a, warps_a);
      if (ceil_div(blocks_a, coarse_parts) != warps_a) continue;  // a smaller one is as good
      for (int64_t warps_u = 1; warps_u * warps_a <= max_warps; ++warps_u) {
        const int64_t lanes = warps_u * WARP;
        for (int64_t taps = 1; taps <= tap_total && taps <= lanes; ++taps) {
          const int64_t parts = ceil_div(tap_total, taps);
          if (ceil_div(tap_total, parts) != taps) continue;
          int64_t groups_per_block = 1, fine_block = lanes / taps;
          if (fine_block >= s.fine_channels) {
            groups_per_block = fine_block / s.fine_channels;
            if (groups_per_block > s.groups) groups_per_block = s.groups;
            fine_block = groups_per_block * s.fine_channels;
          }
          const int64_t fine_parts =
              groups_per_block > 1 ? 1 : ceil_div(s.fine_channels, fine_block);
          if (fine_parts > 1) fine_block = ceil_div(s.fine_channels, fine_parts);
          const int64_t warps = warps_a * ceil_div(fine_block * taps, WARP);
          const int64_t planes = wgrad_planes(taps, tap_total, per_plane);
          const int64_t coarse_block = warps_a * channels;
          // Two rows of positions where rows share what they stage.
          const int64_t rows = t.dilation_h == 1 && s.coarse_h > 1 ? 2 : 1;
          const int64_t fine_elements = fine_block * fine_pitch(planes, rows, tile_w);
          const int64_t coarse_elements =
              groups_per_block * coarse_block * coarse_pitch(rows, tile_w);
          const int64_t stage = round_up(fine_elements, 4) + coarse_elements;
          if (stage > stage_limit && rows == 1) continue;
          if (round_up(fine_block * fine_pitch(planes, 1, tile_w), 4) +
                  groups_per_block * coarse_block * coarse_pitch(1, tile_w) >
              stage_limit) {
            continue;
          }
          const int64_t blocks =
              coarse_parts * fine_parts * parts * ceil_div(s.groups, groups_per_block);
          // Per position of the tensor: multiply-adds issued, idle lanes included; staged elements,
          // each as dear as 12 of them. Fewer than 8 warps on a multiprocessor leave it idle.
          const double positions = double(rows) * tile_w;
          const double arithmetic = double(WARP) * warps * t.taps_h * t.taps_w * channels;
          const double staging = 12.0 * (fine_elements + coarse_elements) / positions;
          int64_t resident = stage > stage_limit ? 1 : stage_limit / stage;
          if (resident > max_warps / warps) resident = max_warps / warps;
          const double busy = resident * warps >= 8 ? 1.0 : resident * warps / 8.0;
          const double cost =
              blocks * (arithmetic + staging) / busy * padded / s.coarse_w;
          if (best >= 0 && cost >= best) continue;
          best = cost;
          s.tile_w = static_cast<int>(tile_w);
          s.warps_a = static_cast<int>(warps_a);
          s.groups_per_block = static_cast<int>(groups_per_block);
          s.fine_block = static_cast<int>(fine_block);
          s.coarse_block = static_cast<int>(coarse_block);
          s.tap_blocks = static_cast<int>(taps);
          s.planes = static_cast<int>(planes);
          s.units = static_cast<int>(fine_block * taps);
          s.threads = static_cast<int>(warps * WARP);
          s.blocks = static_cast<int>(blocks);
          s.coarse_blocks = Divisor(coarse_parts);
          s.fine_blocks = Divisor(fine_parts);
          s.tap_parts = Divisor(parts);
          s.group_blocks = Divisor(ceil_div(s.groups, groups_per_block));
        }
      }
    }
    if (tile_w <= t.positions) break;
  }
  if (best < 0) return CONVGEN_TOO_LARGE;

  // As many rows per tile as fit and help. A dilated kernel shares no rows: one at a time.
  auto stage_elements = [&](int64_t tile_h) {
    return round_up(s.fine_block * fine_pitch(s.planes, tile_h, s.tile_w), 4) +
           int64_t{s.groups_per_block} * s.coarse_block * coarse_pitch(tile_h, s.tile_w);
  };
  // Several blocks share a multiprocessor while one alone would not fill it.
  const int64_t sharers = s.threads <= max_warps * WARP / 2 ? 2 : 1;
  s.tile_h = 1;
  if (t.dilation_h == 1) {
    while (s.tile_h < s.coarse_h && (s.tile_h + 1) * s.tile_w <= 256 &&
           stage_elements(s.tile_h + 1) * sharers <= stage_limit) {
      ++s.tile_h;
    }
    s.tile_h = static_cast<int>(ceil_div(s.coarse_h, ceil_div(s.coarse_h, s.tile_h)));
  }
  s.rows = (s.tile_h - 1) * t.stride_h + t.tap_blocks_h * t.taps_h;
  s.columns = (s.tile_w - 1) * t.stride_w + (t.tap_blocks_w * t.taps_w - 1) * t.dilation_w + 1;
  s.fine_pitch = static_cast<int>(fine_pitch(s.planes, s.tile_h, s.tile_w));
  s.coarse_pitch = static_cast<int>(coarse_pitch(s.tile_h, s.tile_w));
  s.coarse_elements = s.groups_per_block * s.coarse_block * s.coarse_pitch;
  s.stage_elements = static_cast<int>(stage_elements(s.tile_h));
  s.shared_bytes = WGRAD_STAGES * s.stage_elements * accumulator_bytes;

  const int64_t tiles_w = ceil_div(s.coarse_w, s.tile_w), tiles_h = ceil_div(s.coarse_h, s.tile_h);
  const int64_t tiles = tiles_w * tiles_h * s.coarse_d * batch;
  if (tiles > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  s.tiles = static_cast<int>(tiles);
  s.tiles_w = Divisor(tiles_w);
  s.tiles_h = Divisor(tiles_h);
  s.tiles_d = Divisor(s.coarse_d);
  s.by_fine_block = Divisor(s.fine_block);
  s.by_group_fine = Divisor(s.fine_channels);
  s.by_tile_w = Divisor(s.tile_w);
  s.by_rows = Divisor(s.rows);
  s.by_columns = Divisor(s.columns);

  int64_t slots = shared_limit / s.shared_bytes;  // blocks that live on a multiprocessor at once
  if (slots > max_warps * WARP / s.threads) slots = max_warps * WARP / s.threads;
  slots *= multiprocessors;

  // Splits: the least time in waves of blocks, where a wave lasts as long as its tiles and a little
  // for the partial results; at most what the workspace may hold.
  const int64_t partial_bytes = int64_t{s.groups} * s.coarse_channels * s.fine_channels *
                                t.kernel_d * t.kernel_h * t.kernel_w * accumulator_bytes;
  int64_t most = WGRAD_WORKSPACE_LIMIT / partial_bytes;
  if (most > WGRAD_MAX_SPLITS) most = WGRAD_MAX_SPLITS;
  if (most > tiles) most = tiles;
  if (most > 4 * slots / s.blocks + 1) most = 4 * slots / s.blocks + 1;
  if (most < 1) most = 1;
  int64_t best_time = -1;
  s.splits = 1;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t time = ceil_div(splits * s.blocks, slots) *
                         (16 * ceil_div(tiles, splits) + 8) + splits;
    if (best_time >= 0 && time >= best_time) continue;
    best_time = time;
    s.splits = static_cast<int>(splits);
  }
  s.tiles_per_split = static_cast<int>(ceil_div(tiles, s.splits));
  s.splits = static_cast<int>(ceil_div(tiles, s.tiles_per_split));
  return int64_t{s.blocks} * s.splits <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

// Where a thread block works.
struct WgradBlock {
  int coarse0, fine0, tap0, group0, split;
};

__device__ __forceinline__ WgradBlock locate_wgrad_block(const WgradShape& s) {
  WgradBlock block;
  int index = blockIdx.x;
  block.coarse0 = s.coarse_blocks.split(index) * s.coarse_block;
  block.fine0 = s.fine_blocks.split(index) * s.fine_block;
  block.tap0 = s.tap_parts.split(index) * s.tap_blocks;
  block.group0 = s.group_blocks.split(index) * s.groups_per_block;
  block.split = index;
  return block;
}

// Positions of one tile.
struct WgradTile {
  int n, d, h0, w0;
};

__device__ __forceinline__ WgradTile locate_wgrad_tile(const WgradShape& s, int index) {
  WgradTile tile;
  tile.w0 = s.tiles_w.split(index) * s.tile_w;
  tile.h0 = s.tiles_h.split(index) * s.tile_h;
  tile.d = s.tiles_d.split(index);
  tile.n = index;
  return tile;
}

// Stages the coarse positions of a tile, zero outside the tensor. A thread takes WIDTH neighbouring
// positions (tile_w and the tensor's lines are multiples of it) and copies them for every channel.
template <int WIDTH, typename Acc, typename T>
__device__ __forceinline__ void stage_coarse_lines(const WgradShape& s, Acc* to, const T* coarse,
                                                   const WgradBlock& block,
                                                   const WgradTile& tile) {
  const int items = s.tile_h * s.tile_w / WIDTH;
  const int channels = min(s.coarse_block, s.coarse_channels - block.coarse0);
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    int row = item * WIDTH;
    const int column = s.by_tile_w.split(row);
    const int h = tile.h0 + row, w = tile.w0 + column;
    const bool inside = h < s.coarse_h && w < s.coarse_w;
    Acc* element = to + item * WIDTH;
    for (int slot = 0; slot < s.groups_per_block; ++slot) {
      const int group = block.group0 + slot;
      const int existing = inside && group < s.groups ? channels : 0;
      const int64_t plane =
          (int64_t{tile.n} * s.groups + group) * s.coarse_channels + block.coarse0;
      const T* from = coarse;
      if (existing) {
        from += plane * s.coarse_channel_stride + (tile.d * s.coarse_h + h) * s.coarse_w + w;
      }
#pragma unroll 4
      for (int channel = 0; channel < s.coarse_block; ++channel) {
        const bool valid = channel < existing;
        stage_vector<WIDTH>(element, valid ? from : coarse, valid);
        from += s.coarse_channel_stride;
        element += s.coarse_pitch;
      }
    }
  }
}

template <typename Acc, typename T>
__device__ __forceinline__ void stage_coarse(const WgradShape& s, Acc* to, const T* coarse,
                                             const WgradBlock& block, const WgradTile& tile) {
  if constexpr (sizeof(Acc) == 4) {
    if (s.coarse_width == 4) {
      stage_coarse_lines<4>(s, to, coarse, block, tile);
      return;
    }
  }
  if (s.coarse_width == 2) {
    stage_coarse_lines<2>(s, to, coarse, block, tile);
  } else {
    stage_coarse_lines<1>(s, to, coarse, block, tile);
  }
}

// Stages what a tile's taps read of the fine tensor: planes are kernel depths (PLANE_STEP input
// planes apart, from `d`), rows are ROW_STEP apart from `h`, columns consecutive from `w`. A thread
// takes one place and copies it for every channel.
template <int PLANE_STEP, int ROW_STEP, typename Acc, typename T>
__device__ __forceinline__ void stage_fine(const WgradShape& s, Acc* to, const T* fine,
                                           const WgradBlock& block, int n, int d, int h, int w) {
  const int first = block.group0 * s.fine_channels + block.fine0;
  // One group's block ends with the group, several groups' with the tensor.
  const int end = s.groups_per_block > 1 ? s.groups * s.fine_channels
                                         : (block.group0 + 1) * s.fine_channels;
  const int channels = min(s.fine_block, end - first);
  const T* const sample =
      fine + (int64_t{n} * s.groups * s.fine_channels + first) * s.fine_channel_stride;
  const int items = s.planes * s.rows * s.columns;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    int row = item;
    const int column = s.by_columns.split(row);
    int plane = row;
    row = s.by_rows.split(plane);
    const int at_d = d + plane * PLANE_STEP, at_h = h + row * ROW_STEP, at_w = w + column;
    const bool inside = static_cast<unsigned>(at_d) < static_cast<unsigned>(s.fine_d) &&
                        static_cast<unsigned>(at_h) < static_cast<unsigned>(s.fine_h) &&
                        static_cast<unsigned>(at_w) < static_cast<unsigned>(s.fine_w);
    const T* from = sample;
    if (inside) from += (at_d * s.fine_h + at_h) * s.fine_w + at_w;
    Acc* element = to + item;
    const int existing = inside ? channels : 0;
#pragma unroll 4
    for (int channel = 0; channel < existing; ++channel) {
      stage_element(element, from, true);
      from += s.fine_channel_stride;
      element += s.fine_pitch;
    }
    for (int channel = existing; channel < s.fine_block; ++channel) {
      stage_element(element, fine, false);
      element += s.fine_pitch;
    }
  }
}

// x[j] = from[j * PITCH] for the set bits j of USED.
template <uint64_t USED, int PITCH, int COUNT, typename Acc>
__device__ __forceinline__ void load_window(Acc (&x)[COUNT], const Acc* from) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) x[j] = from[j * PITCH];
  }
}

// One tap at POSITIONS positions: acc[c] += coarse[c][p] * x[FIRST + p * STEP].
template <int FIRST, int STEP, int CHANNELS, int POSITIONS, int COUNT, typename Acc>
__device__ __forceinline__ void multiply_add_positions(Acc (&acc)[CHANNELS],
                                                       const Acc (&coarse)[CHANNELS][POSITIONS],
                                                       const Acc (&x)[COUNT]) {
#pragma unroll
  for (int p = 0; p < POSITIONS; ++p) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) acc[c] += coarse[c][p] * x[FIRST + p * STEP];
  }
}

// ---- Reductions over splits, and the bias gradient ----------------------------------------

constexpr int REDUCE_LANES = 32, REDUCE_ROWS = 8;

// Instead of a Meeting, where sums are of single elements: a NaN is one of these.
struct NoMeeting {};

// To the compiler, which otherwise saves registers for more blocks, and spills what a NaN needs.
constexpr int REDUCE_BLOCKS = 4;

// to[e] = sum over splits of partial[split][e], in an order fixed by the number of splits.
template <typename T, typename Acc, typename Met>
__global__ void __launch_bounds__(REDUCE_LANES * REDUCE_ROWS, REDUCE_BLOCKS)
    reduce_kernel(T* to, const Acc* partial, int64_t elements, int splits, const Met met) {
  __shared__ Acc rows[REDUCE_ROWS][REDUCE_LANES];
  const int lane = threadIdx.x % REDUCE_LANES, row = threadIdx.x / REDUCE_LANES;
  const int64_t element = int64_t{blockIdx.x} * REDUCE_LANES + lane;
  Acc sum = 0;
  if (element < elements) {
#pragma unroll 4
    for (int split = row; split < splits; split += REDUCE_ROWS) {
      sum += partial[split * elements + element];
    }
  }
  rows[row][lane] = sum;
  __syncthreads();
  if (row == 0 && element < elements) {
#pragma unroll
    for (int i = 1; i < REDUCE_ROWS; ++i) sum += rows[i][lane];
    if constexpr (!std::is_same_v<Met, NoMeeting>) {
      if (sum != sum) sum = meeting_sum<Acc>(met, element);
    }
    narrow(to[element], sum);
  }
}

template <typename T, typename Acc, typename Met>
int reduce_splits(T* to, const Acc* partial, int64_t elements, int splits, const Met& met,
                  int device, void* stream) {
  return launch<reduce_kernel<T, Acc, Met>>(dim3(ceil_div(elements, REDUCE_LANES)),
                                            dim3(REDUCE_LANES * REDUCE_ROWS), 0, device, stream,
                                            to, partial, elements, splits, met);
}

constexpr int BIAS_THREADS = 256;
// Elements of a channel that one block sums: of one channel, or of 32 that lie side by side.
constexpr int64_t BIAS_PART = 16384, BIAS_PART_LAST = 2048;

// partial[n * parts + part][channel] = sum over one part of one sample's channel.
template <typename T, typename Acc>
__global__ void __launch_bounds__(BIAS_THREADS)
    bias_kernel(Acc* partial, const T* tensor, int channels, int parts, int64_t volume) {
  __shared__ Acc sums[BIAS_THREADS];
  int64_t index = blockIdx.x;
  const int part = static_cast<int>(index % parts);
  index /= parts;  // sample and channel
  const int64_t end = min(volume, (part + 1) * BIAS_PART);
  const T* from = tensor + index * volume;
  Acc sum = 0;
#pragma unroll 8
  for (int64_t i = part * BIAS_PART + threadIdx.x; i < end; i += BIAS_THREADS) {
    sum += widen(from[i]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (int half = BIAS_THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    partial[(index / channels * parts + part) * channels + index % channels] = sums[0];
  }
}

// The same of a tensor whose channels lie side by side: a warp has 32 of them.
template <typename T, typename Acc>
__global__ void __launch_bounds__(BIAS_THREADS)
    bias_last_kernel(Acc* partial, const T* tensor, int channels, int parts, int64_t volume) {
  __shared__ Acc sums[BIAS_THREADS];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int channel = blockIdx.y * 32 + lane;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int64_t end = min(volume, (part + 1) * BIAS_PART_LAST);
  const T* from = tensor + blockIdx.x / parts * volume * channels + channel;
  Acc sum = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t i = part * BIAS_PART_LAST + row; i < end; i += BIAS_THREADS / 32) {
      sum += widen(from[i * channels]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (row > 0 || channel >= channels) return;
  for (int other = 1; other < BIAS_THREADS / 32; ++other) sum += sums[other * 32 + lane];
  partial[int64_t{blockIdx.x} * channels + channel] = sum;
}

inline int64_t bias_parts(const ConvgenCall& call) {
  const int64_t* e = call.coarse_extent;
  const bool last = call.channels_last & CONVGEN_COARSE;
  return ceil_div(e[0] * e[1] * e[2], last ? BIAS_PART_LAST : BIAS_PART);
}

template <typename T, typename Acc>
int bias_gradient(const ConvgenCall& call) {
  const int64_t* e = call.coarse_extent;
  const int64_t parts = bias_parts(call), splits = call.batch * parts;
  const int64_t blocks = splits * call.coarse_channels;
  if (blocks > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  const int device = static_cast<int>(call.device);
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  Acc* const partial = static_cast<Acc*>(call.workspace);
  const T* const tensor = static_cast<const T*>(call.coarse);
  const int channels = static_cast<int>(call.coarse_channels);
  const int64_t volume = e[0] * e[1] * e[2];
  const int error =
      call.channels_last & CONVGEN_COARSE
          ? launch<bias_last_kernel<T, Acc>>(dim3(splits, ceil_div(channels, 32)),
                                             dim3(BIAS_THREADS), 0, device, call.stream, partial,
                                             tensor, channels, static_cast<int>(parts), volume)
          : launch<bias_kernel<T, Acc>>(dim3(blocks), dim3(BIAS_THREADS), 0, device, call.stream,
                                        partial, tensor, channels, static_cast<int>(parts), volume);
  if (error) return error;
  return reduce_splits(static_cast<T*>(call.bias), static_cast<const Acc*>(partial),
                       call.coarse_channels, static_cast<int>(splits), NoMeeting(), device,
                       call.stream);
}

}  // namespace convgen
