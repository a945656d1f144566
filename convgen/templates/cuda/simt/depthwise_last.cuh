// Depthwise layers whose tensors have their channels side by side (channels_last), as they lie:
// fprop and dgrad, and what wgrad (depthwise_last_wgrad.cuh) shares with them.
//
// A thread has CHANNELS neighbouring channels at some positions along D, H and W, and of each line
// of its window every column once, in registers. Threads of neighbouring channels, LANES of them,
// read what lies side by side; the weights of these channels are in shared memory, by taps:
//
//   thread      lane: CHANNELS channels of LANES x CHANNELS    row: a task, a box of positions
//   taps        [tap][LANES + 1][CHANNELS]                     as the sums' type
//
// Tasks lie along H first, then D, then W: what a block's tasks share of their windows comes from
// level 1. Nothing else is staged.
//
// The specification is the class `Layer` of depthwise.cuh. CHANNELS, and a thread's positions, are
// chosen with the number of sums and columns that registers hold (engines/depthwise/common.py).
#pragma once

#include "depthwise.cuh"

namespace convgen {

constexpr int LAST_THREADS = 128;
// Blocks of a multiprocessor, for the compiler: else its loads ahead leave room for fewer.
constexpr int LAST_RESIDENT = 3;
// Vectors of channels in a block, where there are so many: 128 bytes of 16-bit elements.
constexpr int LAST_LANES = 16;
constexpr int LAST_SHARED_BYTES = 48 * 1024;  // what a block has without asking for more
// Multiply-adds of a thread up to which the lines of its window are unrolled.
constexpr int LAST_UNROLLED = 1024;
// Blocks for each multiprocessor, where tasks suffice: a few times as many as it holds.
constexpr int LAST_BLOCKS = 32;

// Neighbouring channels of a thread: at most `most`, and a power of two that divides all of them.
__host__ __device__ constexpr int channels_of_thread(int channels, int most) {
  while (channels % most != 0) most /= 2;
  return most;
}

// How the vectors of all channels are dealt to blocks, of at most `most` each.
struct LastLanes {
  int chunks, lanes;

  __host__ __device__ constexpr LastLanes(int vectors, int most)
      : chunks((vectors + most - 1) / most), lanes((vectors + chunks - 1) / chunks) {}
};

__host__ __device__ constexpr int last_lanes_that_fit(int taps, int vector_bytes) {
  const int fit = LAST_SHARED_BYTES / (taps * vector_bytes) - 1;
  return fit < 1 ? 1 : fit < LAST_LANES ? fit : LAST_LANES;
}

// A call: of wgrad, input and output are fine and coarse.
struct LastShape {
  int input[3], output[3];   // extents
  Divisor by_d, by_h, by_w;  // tasks along each axis
  int tasks, tasks_per_block;
};

// Cuts positions into tasks of `rows` along each axis, and these into `blocks` of whole steps.
inline int cut_last(LastShape& s, int64_t batch, const int64_t (&positions)[3],
                    const int (&rows)[3], int tasks_of_step, int64_t most_blocks, int& blocks) {
  int64_t parts[3], tasks = batch;
  for (int axis = 0; axis < 3; ++axis) {
    parts[axis] = ceil_div(positions[axis], rows[axis]);
    tasks *= parts[axis];
  }
  if (tasks > INDEX_LIMIT / 2) return CONVGEN_TOO_LARGE;
  s.by_d = Divisor(parts[0]), s.by_h = Divisor(parts[1]), s.by_w = Divisor(parts[2]);
  s.tasks = static_cast<int>(tasks);
  const int64_t steps = ceil_div(tasks, tasks_of_step);
  const int64_t steps_per_block = ceil_div(steps, most_blocks < 1 ? 1 : most_blocks);
  s.tasks_per_block = static_cast<int>(steps_per_block * tasks_of_step);
  blocks = static_cast<int>(ceil_div(tasks, s.tasks_per_block));
  return CONVGEN_OK;
}

// A task: its sample, and its index along each axis.
struct LastTask {
  int n, d, h, w;

  __device__ __forceinline__ LastTask(const LastShape& s, int index) {
    h = s.by_h.split(index);
    d = s.by_d.split(index);
    w = s.by_w.split(index);
    n = index;
  }
};

// A number of channels, of a group, say.
template <int COUNT>
using Count = std::integral_constant<int, COUNT>;

template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) LastVector {
  T element[COUNT];
};

template <int COUNT, typename Acc, typename T>
__device__ __forceinline__ void load_channels(Acc (&to)[COUNT], const T* from) {
  const LastVector<T, COUNT> vector = *reinterpret_cast<const LastVector<T, COUNT>*>(from);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) to[i] = widen(vector.element[i]);
}

// Whether a thread reads what lies at a place of its window along an axis.
template <class Layer>
__host__ __device__ constexpr bool reads_last(int axis, int at) {
  bool any = false;
  for (int i = 0; i < Layer::last_rows(axis) * Layer::phases(axis); ++i) {
    any |= tap_at<Layer>(axis, i / Layer::phases(axis), i % Layer::phases(axis), at) >= 0;
  }
  return any;
}

// fprop and dgrad, as in depthwise.cuh. A channel that is read has RATIO neighbours computed from
// it. Layer has besides: last_rows, a thread's positions along an axis; LAST_CHANNELS, its channels
// at most; and CHANNELS, how many of the tensor that is read. `weight_last`: of RATIO kernels those
// elements lie side by side that one tap has.
template <class Layer, int RATIO, typename Acc, typename T>
struct LastGather {
  static constexpr int TAPS = Layer::kernel(0) * Layer::kernel(1) * Layer::kernel(2);
  static constexpr int OUTPUTS = Layer::CHANNELS * RATIO;
  static constexpr int MOST = Layer::LAST_CHANNELS < RATIO ? RATIO : Layer::LAST_CHANNELS;
  static constexpr int READ = channels_of_thread(Layer::CHANNELS, MOST / RATIO);
  static constexpr int CHANNELS = READ * RATIO;
  static constexpr LastLanes DEALT =
      LastLanes(OUTPUTS / CHANNELS, last_lanes_that_fit(TAPS, CHANNELS * sizeof(Acc)));
  static constexpr int LANES = DEALT.lanes, ROWS = LAST_THREADS / LANES;
  static constexpr int PITCH = (LANES + 1) * CHANNELS;
};

template <class Layer, int RATIO, typename Acc, typename T, typename... Finishes>
__global__ void __launch_bounds__(LAST_THREADS, LAST_RESIDENT)
    depthwise_last_gather_kernel(const LastShape s, const T* input, const T* weight,
                                 bool weight_last, const T* bias, T* output, Finishes... finishes) {
  using Cut = LastGather<Layer, RATIO, Acc, T>;
  constexpr int TAPS = Cut::TAPS, LANES = Cut::LANES, READ = Cut::READ, COUNT = Cut::CHANNELS;
  constexpr int ROWS_D = Layer::last_rows(0), ROWS_H = Layer::last_rows(1);
  constexpr int ROWS_W = Layer::last_rows(2);
  constexpr int PHASES_D = Layer::phases(0), PHASES_H = Layer::phases(1);
  constexpr int PHASES_W = Layer::phases(2);
  constexpr int WINDOW_D = (ROWS_D - 1) * Layer::step(0) + Layer::last(0) - Layer::first(0) + 1;
  constexpr int WINDOW_H = (ROWS_H - 1) * Layer::step(1) + Layer::last(1) - Layer::first(1) + 1;
  constexpr int WINDOW_W = (ROWS_W - 1) * Layer::step(2) + Layer::last(2) - Layer::first(2) + 1;
  // Loops over planes and lines stay loops where all of them would be too much code.
  constexpr int OF_LINE = ROWS_D * ROWS_H * ROWS_W * Layer::kernel(2) * COUNT;
  constexpr int UNROLL_H = OF_LINE * Layer::kernel(1) <= LAST_UNROLLED ? WINDOW_H : 1;
  constexpr int UNROLL_D =
      OF_LINE * Layer::kernel(1) * Layer::kernel(0) <= LAST_UNROLLED ? WINDOW_D : 1;

  __shared__ __align__(16) Acc taps[TAPS * Cut::PITCH];
  const int chunk = blockIdx.x % Cut::DEALT.chunks;
  const int first_channel = chunk * LANES * COUNT;
  const int staged = min(LANES * COUNT, Cut::OUTPUTS - first_channel) * TAPS;
  for (int i = threadIdx.x; i < staged; i += LAST_THREADS) {
    const int channel = first_channel + i / TAPS, tap = i % TAPS;
    const int64_t place = weight_last
                              ? (int64_t{channel / RATIO} * TAPS + tap) * RATIO + channel % RATIO
                              : int64_t{channel} * TAPS + tap;
    taps[tap * Cut::PITCH + i / TAPS] = widen(weight[place]);
  }
  __syncthreads();
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int channel = first_channel + lane * COUNT;
  if (row >= Cut::ROWS || channel >= Cut::OUTPUTS) return;
  const Acc* const of_lane = taps + lane * COUNT;
  const int first_task = blockIdx.x / Cut::DEALT.chunks * s.tasks_per_block;
  const int end = min(first_task + s.tasks_per_block, s.tasks);

#pragma unroll 1
  for (int index = first_task + row; index < end; index += Cut::ROWS) {
    const LastTask task(s, index);
    const int d0 = task.d * ROWS_D * Layer::step(0) + Layer::first(0);
    const int h0 = task.h * ROWS_H * Layer::step(1) + Layer::first(1);
    const int w0 = task.w * ROWS_W * Layer::step(2) + Layer::first(2);
    Acc acc[ROWS_D * PHASES_D][ROWS_H * PHASES_H][ROWS_W][PHASES_W][COUNT] = {};
#pragma unroll UNROLL_D
    for (int z = 0; z < WINDOW_D; ++z) {
      if (!within(d0 + z, s.input[0]) || !reads_last<Layer>(0, z)) continue;
#pragma unroll UNROLL_H
      for (int y = 0; y < WINDOW_H; ++y) {
        if (!within(h0 + y, s.input[1]) || !reads_last<Layer>(1, y)) continue;
        const int64_t plane = int64_t{task.n} * s.input[0] + d0 + z;
        const int64_t column = (plane * s.input[1] + h0 + y) * s.input[2] + w0;
        const T* const from = input + (column * Layer::CHANNELS + channel / RATIO);
        Acc x[WINDOW_W][READ];
#pragma unroll
        for (int k = 0; k < WINDOW_W; ++k) {
#pragma unroll
          for (int c = 0; c < READ; ++c) x[k][c] = 0;
          if (!reads_last<Layer>(2, k) || !within(w0 + k, s.input[2])) continue;
          load_channels(x[k], from + k * Layer::CHANNELS);
        }
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
                of_lane +
                (plane_of_taps + Layer::tap(1, j % PHASES_H, in_h)) * Layer::kernel(2) * Cut::PITCH;
#pragma unroll
            for (int v = 0; v < PHASES_W; ++v) {
#pragma unroll
              for (int t = 0; t < Layer::count(2, v); ++t) {
                Acc of_tap[COUNT];
                load_row(of_tap, line_of_taps + Layer::tap(2, v, t) * Cut::PITCH);
#pragma unroll
                for (int p = 0; p < ROWS_W; ++p) {
#pragma unroll
                  for (int c = 0; c < COUNT; ++c) {
                    acc[i][j][p][v][c] += x[Layer::place(2, p, v, t)][c / RATIO] * of_tap[c];
                  }
                }
              }
            }
          }
        }
      }
    }

    Acc offset[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; ++c) offset[c] = bias ? widen(bias[channel + c]) : Acc(0);
#pragma unroll
    for (int i = 0; i < ROWS_D * PHASES_D; ++i) {
      const int at_d = (task.d * ROWS_D + i / PHASES_D) * PHASES_D + i % PHASES_D;
#pragma unroll
      for (int j = 0; j < ROWS_H * PHASES_H; ++j) {
        const int at_h = (task.h * ROWS_H + j / PHASES_H) * PHASES_H + j % PHASES_H;
        if (at_d >= s.output[0] || at_h >= s.output[1]) continue;
        const int64_t plane = int64_t{task.n} * s.output[0] + at_d;
        const int64_t line = (plane * s.output[1] + at_h) * s.output[2];
#pragma unroll
        for (int p = 0; p < ROWS_W * PHASES_W; ++p) {
          const int at_w = task.w * ROWS_W * PHASES_W + p;
          if (at_w >= s.output[2]) continue;
          Acc(&sums)[COUNT] = acc[i][j][p / PHASES_W][p % PHASES_W];
#pragma unroll
          for (int c = 0; c < COUNT; ++c) sums[c] += offset[c];
          T* const to = output + ((line + at_w) * Cut::OUTPUTS + channel);
          (finishes.apply(to, sums, COUNT), ...);
          store_outputs<COUNT>(to, sums, COUNT, true);
        }
      }
    }
  }
}

template <class Layer, int RATIO, typename Acc, typename T, typename... Finishes>
int run_last_gather(const ConvgenCall& call, const int64_t (&in)[3], const int64_t (&out)[3],
                    const void* input, void* output, const DeviceLimits& limits,
                    Finishes... finishes) {
  using Cut = LastGather<Layer, RATIO, Acc, T>;
  LastShape s;
  int64_t positions[3];
  for (int axis = 0; axis < 3; ++axis) {
    s.input[axis] = static_cast<int>(in[axis]), s.output[axis] = static_cast<int>(out[axis]);
    positions[axis] = ceil_div(out[axis], Layer::phases(axis));
  }
  const int rows[3] = {Layer::last_rows(0), Layer::last_rows(1), Layer::last_rows(2)};
  const int64_t most = ceil_div(int64_t{limits.multiprocessors} * LAST_BLOCKS, Cut::DEALT.chunks);
  int blocks;
  if (const int error = cut_last(s, call.batch, positions, rows, Cut::ROWS, most, blocks)) {
    return error;
  }
  if (int64_t{blocks} * Cut::DEALT.chunks > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  const bool weight_last = Layer::WRITES_FINE && (call.channels_last & CONVGEN_WEIGHT) != 0;
  return launch<depthwise_last_gather_kernel<Layer, RATIO, Acc, T, Finishes...>>(
      dim3(blocks * Cut::DEALT.chunks), dim3(LAST_THREADS), 0, static_cast<int>(call.device),
      call.stream, s, static_cast<const T*>(input), static_cast<const T*>(call.weight), weight_last,
      static_cast<const T*>(call.bias), static_cast<T*>(output), finishes...);
}

}  // namespace convgen
