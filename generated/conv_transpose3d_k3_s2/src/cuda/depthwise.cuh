// Depthwise layers: groups of which one channel is read for each that is computed.
//
// Such a layer has little arithmetic for its bytes, and no channels to share a staged tile among.
// So warps work alone, without shared memory for the tensors: lanes run along the columns of all
// samples, W fastest, and a thread computes some positions along D and H there. What neighbouring
// positions and lanes read of the same elements comes from the level 1 cache, which the warps of a
// block share: they work side by side along D.
//
// The specification is a class `Layer` that the rendered unit supplies. Axes are 0 (D), 1 (H) and
// 2 (W).
#pragma once

#include "common.cuh"

namespace convgen {

constexpr int DEPTHWISE_WARPS = 4;
// Channels of a group that a single one of the other tensor may meet: each of them reads it anew.
constexpr int DEPTHWISE_RATIO = 2;
// Columns of a window up to which each lane remembers which of them lie within the input.
constexpr int DEPTHWISE_LINE = 8;
// Blocks that a call is cut into for each multiprocessor: several times as many as it holds, so
// that those that end last matter little.
constexpr int DEPTHWISE_BLOCKS = 96;

// A call. Positions are what a step's threads are dealt: of the outputs of a gather those of one
// phase, of wgrad those of the coarse tensor.
struct DepthwiseShape {
  int input[3], output[3];  // extents: of what is read and computed, of wgrad fine and coarse
  int64_t input_volume, output_volume;
  int input_channels, output_channels;  // of the tensors
  // Pairs of channels, the rows of the weight: so many neighbours share a channel that is read, or
  // one that is computed (of wgrad, a coarse one). One of the two is 1.
  int pairs;
  Divisor by_input, by_output;

  int columns;       // of all samples
  Divisor by_width;  // positions along W
  // Steps of a channel: along D fastest, then along H, then from columns to columns. Blocks of a
  // channel have some each.
  Divisor by_d, by_h;
  int steps, steps_per_block;
  Divisor blocks_of_channel;
};

// Cuts `channels` channels (or parts of them) of so many positions into blocks. A step takes rows_d
// and rows_h positions along D and H and `blocks_w` warps of columns; a block `least` steps or more
// for each of its warps.
inline int cut_depthwise(DepthwiseShape& s, int64_t batch, const int64_t (&positions)[3],
                         int rows_d, int rows_h, int blocks_w, int64_t channels, int least,
                         int multiprocessors) {
  const int64_t columns = batch * positions[2];
  const int64_t parts_d = ceil_div(positions[0], rows_d), parts_h = ceil_div(positions[1], rows_h);
  const int64_t steps = ceil_div(columns, int64_t{blocks_w} * WARP) * parts_d * parts_h;
  if (columns > INDEX_LIMIT - 4 * WARP || steps > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  s.columns = static_cast<int>(columns);
  s.by_width = Divisor(positions[2]);
  s.by_d = Divisor(parts_d);
  s.by_h = Divisor(parts_h);
  s.steps = static_cast<int>(steps);
  const int64_t wanted = int64_t{multiprocessors} * DEPTHWISE_BLOCKS;
  int64_t blocks = ceil_div(wanted, channels);
  const int64_t most = ceil_div(steps, int64_t{least} * DEPTHWISE_WARPS);
  if (blocks > most) blocks = most;
  s.steps_per_block = static_cast<int>(round_up(ceil_div(steps, blocks), DEPTHWISE_WARPS));
  blocks = ceil_div(steps, s.steps_per_block);
  s.blocks_of_channel = Divisor(blocks);
  return blocks * channels <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

// A step of a channel.
struct DepthwiseStep {
  int d, h;     // first positions
  int columns;  // index of its warp of columns

  __device__ __forceinline__ DepthwiseStep(const DepthwiseShape& s, int index, int rows_d,
                                           int rows_h) {
    d = s.by_d.split(index) * rows_d;
    h = s.by_h.split(index) * rows_h;
    columns = index;
  }
};

// So many bytes further. Found step by step: else the compiler keeps the distance of each line.
template <typename T>
__device__ __forceinline__ const T* further(const T* from, uint64_t bytes) {
  return opaque(reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes));
}

__device__ __forceinline__ bool within(int at, int extent) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(extent);
}

// The tap of a phase by which a thread's position `row` reads a place of its window along an axis,
// or -1.
template <class Layer>
__host__ __device__ constexpr int tap_at(int axis, int row, int phase, int at) {
  const int distance = at - Layer::place(axis, row, phase, 0), delta = Layer::delta(axis);
  return distance >= 0 && distance % delta == 0 && distance / delta < Layer::count(axis, phase)
             ? distance / delta
             : -1;
}

// Whether a thread reads what lies at a place of its window along an axis.
template <class Layer>
__host__ __device__ constexpr bool reads(int axis, int at) {
  bool any = false;
  for (int i = 0; i < (axis == 2 ? 1 : Layer::rows(axis)) * Layer::phases(axis); ++i) {
    any |= tap_at<Layer>(axis, i / Layer::phases(axis), i % Layer::phases(axis), at) >= 0;
  }
  return any;
}

// output[n, b, o] = sum over the taps of o's phases of
//     input[n, b's group, q * step + offset] * weight[b, tap],   o = q * phases + phase
//
// for fprop and dgrad. The bias comes last: no term is rounded to the last place of a large one.
// Layer has of an axis: kernel; step, the inputs from position to position; phases; first and last,
// the least and the greatest offset; rows, the positions of a thread (of W, warps of columns);
// delta, the distance between taps. Of a phase: count; of its taps: tap, the index, and place, in
// the window. Of a layer with an epilogue, one Finish says what it does (epilogue.cuh).
template <class Layer, typename Acc, typename T, typename... Finishes>
__global__ void __launch_bounds__(DEPTHWISE_WARPS * WARP)
    depthwise_gather_kernel(const DepthwiseShape s, const T* input, const T* weight, const T* bias,
                            T* output, bool vector_store, Finishes... finishes) {
  constexpr int TAPS = Layer::kernel(0) * Layer::kernel(1) * Layer::kernel(2);
  constexpr int ROWS_D = Layer::rows(0), ROWS_H = Layer::rows(1), BLOCKS_W = Layer::rows(2);
  constexpr int PHASES_D = Layer::phases(0), PHASES_H = Layer::phases(1);
  constexpr int PHASES_W = Layer::phases(2);
  // What a thread reads along each axis.
  constexpr int WINDOW_D = (ROWS_D - 1) * Layer::step(0) + Layer::last(0) - Layer::first(0) + 1;
  constexpr int WINDOW_H = (ROWS_H - 1) * Layer::step(1) + Layer::last(1) - Layer::first(1) + 1;
  constexpr int WINDOW_W = Layer::last(2) - Layer::first(2) + 1;
  constexpr bool LONG = WINDOW_W > DEPTHWISE_LINE;
  const uint64_t line_bytes = uint64_t{sizeof(T)} * s.input[2];
  const uint64_t plane_bytes = line_bytes * s.input[1];

  __shared__ Acc taps[TAPS];
  int part = blockIdx.x;
  const int first_step = s.blocks_of_channel.split(part) * s.steps_per_block;
  const int channel = part;
  for (int i = threadIdx.x; i < TAPS; i += blockDim.x) {
    taps[i] = widen(weight[int64_t{channel} * TAPS + i]);
  }
  __syncthreads();
  const int lane = threadIdx.x % WARP;
  const int end = min(first_step + s.steps_per_block, s.steps);
  const Acc offset = bias ? widen(bias[channel]) : Acc(0);

#pragma unroll 1
  for (int index = first_step + static_cast<int>(threadIdx.x) / WARP; index < end;
       index += DEPTHWISE_WARPS) {
    const DepthwiseStep step(s, index, ROWS_D, ROWS_H);
    const int d0 = step.d * Layer::step(0) + Layer::first(0);
    const int h0 = step.h * Layer::step(1) + Layer::first(1);
    Acc acc[BLOCKS_W][ROWS_D * PHASES_D][ROWS_H * PHASES_H][PHASES_W];
#pragma unroll
    for (int c = 0; c < BLOCKS_W; ++c) {
      int sample = (step.columns * BLOCKS_W + c) * WARP + lane;
      const bool exists = sample < s.columns;
      const int position = s.by_width.split(sample);
      const int w0 = position * Layer::step(2) + Layer::first(2);
      const T* const from =
          input + (int64_t{exists ? sample : 0} * s.input_channels + s.by_input.divide(channel)) *
                      s.input_volume;
      bool inside_w[WINDOW_W];
#pragma unroll
      for (int x = 0; x < WINDOW_W; ++x) inside_w[x] = exists && within(w0 + x, s.input[2]);
#pragma unroll
      for (int i = 0; i < ROWS_D * PHASES_D; ++i) {
#pragma unroll
        for (int j = 0; j < ROWS_H * PHASES_H; ++j) {
#pragma unroll
          for (int v = 0; v < PHASES_W; ++v) acc[c][i][j][v] = 0;
        }
      }
      // Of most steps all lines lie within the input, and where windows are long, all columns.
      const bool all_columns = within(w0, s.input[2]) && within(w0 + WINDOW_W - 1, s.input[2]);
      auto accumulate = [&](auto all_inside) {
        constexpr bool ALL = decltype(all_inside)::value;
        const T* plane = from + ((d0 * s.input[1] + h0) * s.input[2] + w0);
#pragma unroll
        for (int z = 0; z < WINDOW_D; ++z) {
          const T* line = plane;
          plane = further(plane, plane_bytes);
#pragma unroll
          for (int y = 0; y < WINDOW_H; ++y) {
            if (y > 0) line = further(line, line_bytes);
            if (!reads<Layer>(0, z) || !reads<Layer>(1, y)) continue;
            const bool inside =
                ALL || (within(d0 + z, s.input[0]) && within(h0 + y, s.input[1]));
            Acc x[WINDOW_W];
#pragma unroll
            for (int k = 0; k < WINDOW_W; ++k) {
              x[k] = 0;
              if (!reads<Layer>(2, k)) continue;
              const bool valid =
                  LONG ? ALL || (exists && within(w0 + k, s.input[2])) : inside_w[k];
              if (inside && valid) x[k] = widen(line[k]);
            }
            // What follows is decided by the compiler: which outputs have a tap here.
#pragma unroll
            for (int i = 0; i < ROWS_D * PHASES_D; ++i) {
              const int in_d = tap_at<Layer>(0, i / PHASES_D, i % PHASES_D, z);
              if (in_d < 0) continue;
              const int plane_of_taps = Layer::tap(0, i % PHASES_D, in_d) * Layer::kernel(1);
#pragma unroll
              for (int j = 0; j < ROWS_H * PHASES_H; ++j) {
                const int in_h = tap_at<Layer>(1, j / PHASES_H, j % PHASES_H, y);
                if (in_h < 0) continue;
                const Acc* const line_of_taps =
                    taps + (plane_of_taps + Layer::tap(1, j % PHASES_H, in_h)) * Layer::kernel(2);
#pragma unroll
                for (int v = 0; v < PHASES_W; ++v) {
#pragma unroll
                  for (int t = 0; t < Layer::count(2, v); ++t) {
                    acc[c][i][j][v] +=
                        x[Layer::place(2, 0, v, t)] * line_of_taps[Layer::tap(2, v, t)];
                  }
                }
              }
            }
          }
        }
      };
      const bool all_lines =
          d0 >= 0 && d0 + WINDOW_D <= s.input[0] && h0 >= 0 && h0 + WINDOW_H <= s.input[1];
      if (all_lines && (!LONG || __all_sync(0xffffffffu, exists && all_columns))) {
        accumulate(std::true_type());
      } else {
        accumulate(std::false_type());
      }

      if (!exists) continue;
      T* const of_channel =
          output + (int64_t{sample} * s.output_channels + channel) * s.output_volume;
      const int at_w = position * PHASES_W, valid = s.output[2] - at_w;
#pragma unroll
      for (int i = 0; i < ROWS_D * PHASES_D; ++i) {
        const int at_d = (step.d + i / PHASES_D) * PHASES_D + i % PHASES_D;
#pragma unroll
        for (int j = 0; j < ROWS_H * PHASES_H; ++j) {
          const int at_h = (step.h + j / PHASES_H) * PHASES_H + j % PHASES_H;
          if (at_d >= s.output[0] || at_h >= s.output[1]) continue;
#pragma unroll
          for (int v = 0; v < PHASES_W; ++v) acc[c][i][j][v] += offset;
          T* const to = of_channel + ((at_d * s.output[1] + at_h) * s.output[2] + at_w);
          (finishes.apply(to, acc[c][i][j], valid), ...);
          store_outputs<PHASES_W>(to, acc[c][i][j], valid, vector_store);
        }
      }
    }
  }
}

// partial[part][a, b, t] = sum over a part of n, i of
//     coarse[n, a, i] * fine[n, b, i * stride - padding + t * dilation]
//
// Layer has of an axis: kernel, stride, padding, dilation, and taps, those of one thread, of which
// there are PARTS; ROWS, its positions along H, and BLOCKS_W, warps of columns. A block has one
// pair of channels, and one part of the taps.
template <class Layer, typename Acc, typename T>
__global__ void __launch_bounds__(DEPTHWISE_WARPS * WARP)
    depthwise_wgrad_kernel(const DepthwiseShape s, const T* coarse, const T* fine, Acc* partial) {
  constexpr int TAPS_D = Layer::taps(0), TAPS_H = Layer::taps(1), TAPS_W = Layer::taps(2);
  constexpr int PARTS_H = (Layer::kernel(1) + TAPS_H - 1) / TAPS_H;
  constexpr int PARTS_W = (Layer::kernel(2) + TAPS_W - 1) / TAPS_W;
  constexpr int ROWS = Layer::ROWS;
  constexpr int WINDOW_H = (ROWS - 1) * Layer::stride(1) + (TAPS_H - 1) * Layer::dilation(1) + 1;
  constexpr int SUMS = TAPS_D * TAPS_H * TAPS_W;
  constexpr bool LONG = TAPS_W > DEPTHWISE_LINE;
  const uint64_t line_bytes = uint64_t{sizeof(T)} * s.input[2];
  const uint64_t plane_bytes = line_bytes * s.input[1];
  // The tap along H that a thread's position reads at a line of its window, or -1.
  auto tap_at_row = [](int row, int at) {
    const int distance = at - row * Layer::stride(1), dilation = Layer::dilation(1);
    return distance >= 0 && distance % dilation == 0 && distance / dilation < TAPS_H
               ? distance / dilation
               : -1;
  };

  int pair = blockIdx.x;
  const int split = s.blocks_of_channel.split(pair);
  const int part = pair % Layer::PARTS;
  pair /= Layer::PARTS;
  const int tap_w = part % PARTS_W * TAPS_W, tap_h = part / PARTS_W % PARTS_H * TAPS_H;
  const int tap_d = part / (PARTS_W * PARTS_H) * TAPS_D;
  const int coarse_channel = s.by_output.divide(pair), fine_channel = s.by_input.divide(pair);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int first_step = split * s.steps_per_block;
  const int end = min(first_step + s.steps_per_block, s.steps);

  Acc acc[TAPS_D][TAPS_H][TAPS_W];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) acc[i / (TAPS_H * TAPS_W)][i / TAPS_W % TAPS_H][i % TAPS_W] = 0;

#pragma unroll 1
  for (int index = first_step + warp; index < end; index += DEPTHWISE_WARPS) {
    const DepthwiseStep step(s, index, 1, ROWS);
#pragma unroll
    for (int block = 0; block < Layer::BLOCKS_W; ++block) {
      int sample = (step.columns * Layer::BLOCKS_W + block) * WARP + lane;
      const bool exists = sample < s.columns;
      const int w = s.by_width.split(sample);
      if (!exists) sample = 0;
      const int w0 = w * Layer::stride(2) - Layer::padding(2) + tap_w * Layer::dilation(2);
      const int h0 = step.h * Layer::stride(1) - Layer::padding(1) + tap_h * Layer::dilation(1);
      const int d0 = step.d * Layer::stride(0) - Layer::padding(0) + tap_d * Layer::dilation(0);
      const T* const from_coarse =
          coarse + (int64_t{sample} * s.output_channels + coarse_channel) * s.output_volume +
          ((step.d * s.output[1] + step.h) * s.output[2] + w);
      const T* const from_fine =
          fine + (int64_t{sample} * s.input_channels + fine_channel) * s.input_volume;
      Acc c[ROWS];
#pragma unroll
      for (int p = 0; p < ROWS; ++p) {
        c[p] = 0;
        if (exists && step.h + p < s.output[1]) c[p] = widen(from_coarse[p * s.output[2]]);
      }
      bool inside_w[TAPS_W];
#pragma unroll
      for (int k = 0; k < TAPS_W; ++k) {
        inside_w[k] = exists && within(w0 + k * Layer::dilation(2), s.input[2]);
      }
      const bool all_columns =
          within(w0, s.input[2]) && within(w0 + (TAPS_W - 1) * Layer::dilation(2), s.input[2]);
      auto accumulate = [&](auto all_inside) {
        constexpr bool ALL = decltype(all_inside)::value;
        const T* plane = from_fine + ((d0 * s.input[1] + h0) * s.input[2] + w0);
#pragma unroll
        for (int td = 0; td < TAPS_D; ++td) {
          const int z = td * Layer::dilation(0);
          const T* line = plane;
          plane = further(plane, Layer::dilation(0) * plane_bytes);
#pragma unroll
          for (int y = 0; y < WINDOW_H; ++y) {
            if (y > 0) line = further(line, line_bytes);
            bool used = false;
#pragma unroll
            for (int p = 0; p < ROWS; ++p) used |= tap_at_row(p, y) >= 0;
            if (!used) continue;
            const bool inside =
                ALL || (within(d0 + z, s.input[0]) && within(h0 + y, s.input[1]));
            Acc x[TAPS_W];
#pragma unroll
            for (int k = 0; k < TAPS_W; ++k) {
              const int column = k * Layer::dilation(2);
              const bool valid =
                  LONG ? ALL || (exists && within(w0 + column, s.input[2])) : inside_w[k];
              x[k] = 0;
              if (inside && valid) x[k] = widen(line[column]);
            }
#pragma unroll
            for (int p = 0; p < ROWS; ++p) {
              const int th = tap_at_row(p, y);
              if (th < 0) continue;
#pragma unroll
              for (int k = 0; k < TAPS_W; ++k) acc[td][th][k] += c[p] * x[k];
            }
          }
        }
      };
      constexpr int REACH_D = (TAPS_D - 1) * Layer::dilation(0) + 1;
      const bool all_lines =
          d0 >= 0 && d0 + REACH_D <= s.input[0] && h0 >= 0 && h0 + WINDOW_H <= s.input[1];
      if (all_lines && (!LONG || __all_sync(0xffffffffu, exists && all_columns))) {
        accumulate(std::true_type());
      } else {
        accumulate(std::false_type());
      }
    }
  }

  // Sums over the lanes, then over the warps, in an order that does not change.
  __shared__ Acc sums[SUMS][DEPTHWISE_WARPS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    Acc sum = acc[i / (TAPS_H * TAPS_W)][i / TAPS_W % TAPS_H][i % TAPS_W];
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
    }
    if (lane == 0) sums[i][warp] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SUMS; i += blockDim.x) {
    const int d = tap_d + i / (TAPS_H * TAPS_W), h = tap_h + i / TAPS_W % TAPS_H;
    const int w = tap_w + i % TAPS_W;
    if (d >= Layer::kernel(0) || h >= Layer::kernel(1) || w >= Layer::kernel(2)) continue;
    Acc sum = 0;
#pragma unroll
    for (int other = 0; other < DEPTHWISE_WARPS; ++other) sum += sums[i][other];
    const int64_t row = int64_t{split} * s.pairs + pair;
    partial[(row * Layer::kernel(0) + d) * (Layer::kernel(1) * Layer::kernel(2)) +
            h * Layer::kernel(2) + w] = sum;
  }
}

}  // namespace convgen
