// wgrad of depthwise layers whose tensors have their channels side by side, as they lie.
//
// A thread has CHANNELS neighbouring pairs of channels (rows of the weight) and some taps. Of a
// task, a box of positions of the coarse tensor along H and W, it holds these and, line by line,
// the columns of the fine tensor that its taps meet, in registers. A block is
//
//   thread      lane: CHANNELS pairs of LANES x CHANNELS     row: a part of the taps, and a task
//   sums        [tap][thread][CHANNELS]    in the end, to add up the tasks'
//
// and walks over tasks of a split. reduce_splits adds up what the splits have written.
#pragma once

#include "depthwise_last.cuh"
#include "meeting.cuh"
#include "wgrad.cuh"

namespace convgen {

// Blocks for each multiprocessor: as many as it holds, since each adds up sums of its tasks.
constexpr int LAST_WGRAD_BLOCKS = 4;

// The sums are those of depthwise.cuh. A group has COARSE and FINE channels, one of them 1. Layer
// has besides: last_taps, those of a thread along an axis, and LAST_PARTS, how many such parts
// there are; last_rows, its positions along an axis at once (of D, 1); LAST_CHANNELS and CHANNELS.
template <class Layer, int COARSE, int FINE, typename Acc, typename T>
struct LastWgrad {
  static constexpr int RATIO = COARSE * FINE;
  static constexpr int PAIRS = Layer::CHANNELS * RATIO;
  static constexpr int MOST = Layer::LAST_CHANNELS < RATIO ? RATIO : Layer::LAST_CHANNELS;
  static constexpr int CHANNELS = channels_of_thread(Layer::CHANNELS, MOST / RATIO) * RATIO;
  static constexpr LastLanes DEALT = LastLanes(PAIRS / CHANNELS, LAST_LANES);
  static constexpr int LANES = DEALT.lanes, ROWS = LAST_THREADS / LANES;
  // Parts of the taps in one block, which read the same; and blocks that have all of them.
  static constexpr int PARTS = Layer::LAST_PARTS < ROWS ? Layer::LAST_PARTS : ROWS;
  static constexpr int BLOCKS = (Layer::LAST_PARTS + PARTS - 1) / PARTS;
  static constexpr int TASKS = ROWS / PARTS;  // of a step
  static constexpr int SUMS = Layer::last_taps(0) * Layer::last_taps(1) * Layer::last_taps(2);
  // Taps whose sums are added up at once.
  static constexpr int FIT = LAST_SHARED_BYTES / (LAST_THREADS * CHANNELS * int{sizeof(Acc)});
  static constexpr int AT_ONCE = SUMS < FIT ? SUMS : FIT;
};

// A pair's place among the weights, and back.
struct LastWeights {
  int taps, fine;
  bool last;  // whether elements of `fine` neighbouring kernels lie side by side, tap by tap

  __host__ __device__ int64_t place(int64_t pair, int tap) const {
    return last ? (pair / fine * taps + tap) * fine + pair % fine : pair * taps + tap;
  }
  __host__ __device__ int64_t element(int64_t place) const {
    if (!last) return place;
    return (place / (int64_t{taps} * fine) * fine + place % fine) * taps + place / fine % taps;
  }
};

template <typename T>
struct LastMeeting {
  Meeting<T> operands;
  LastWeights weights;
};

template <typename Acc, typename T>
__device__ __forceinline__ Acc meeting_sum(const LastMeeting<T>& m, int64_t place) {
  return meeting_sum<Acc, true>(m.operands, m.weights.element(place),
                                CONVGEN_COARSE | CONVGEN_FINE);
}

template <class Layer, int COARSE, int FINE, typename Acc, typename T>
__global__ void __launch_bounds__(LAST_THREADS, LAST_RESIDENT)
    depthwise_last_wgrad_kernel(const LastShape s, const T* coarse, const T* fine,
                                const LastWeights weights, Acc* partial) {
  using Cut = LastWgrad<Layer, COARSE, FINE, Acc, T>;
  constexpr int TAPS_D = Layer::last_taps(0), TAPS_H = Layer::last_taps(1);
  constexpr int TAPS_W = Layer::last_taps(2), SUMS = Cut::SUMS, COUNT = Cut::CHANNELS;
  constexpr int PARTS_H = (Layer::kernel(1) + TAPS_H - 1) / TAPS_H;
  constexpr int PARTS_W = (Layer::kernel(2) + TAPS_W - 1) / TAPS_W;
  constexpr int ROWS_H = Layer::last_rows(1), ROWS_W = Layer::last_rows(2);
  constexpr int STRIDE_W = Layer::stride(2), DILATION_W = Layer::dilation(2);
  constexpr int WINDOW_H = (ROWS_H - 1) * Layer::stride(1) + (TAPS_H - 1) * Layer::dilation(1) + 1;
  constexpr int WINDOW_W = (ROWS_W - 1) * STRIDE_W + (TAPS_W - 1) * DILATION_W + 1;
  constexpr int C_COARSE = Layer::CHANNELS * COARSE, C_FINE = Layer::CHANNELS * FINE;
  // The tap along H that a thread's position reads at a line of its window, or -1.
  auto tap_at_row = [](int row, int at) {
    const int distance = at - row * Layer::stride(1), dilation = Layer::dilation(1);
    return distance >= 0 && distance % dilation == 0 && distance / dilation < TAPS_H
               ? distance / dilation
               : -1;
  };
  auto reads_column = [](int at) {
    bool any = false;
    for (int i = 0; i < ROWS_W * TAPS_W; ++i) {
      any |= at == i / TAPS_W * STRIDE_W + i % TAPS_W * DILATION_W;
    }
    return any;
  };

  int block = blockIdx.x;
  const int first_pair = block % Cut::DEALT.chunks * Cut::LANES * COUNT;
  block /= Cut::DEALT.chunks;
  const int first_part = block % Cut::BLOCKS * Cut::PARTS, split = block / Cut::BLOCKS;
  const int lane = threadIdx.x % Cut::LANES, row = threadIdx.x / Cut::LANES;
  const int part = first_part + row % Cut::PARTS, first_row = row / Cut::PARTS;
  const int pair = first_pair + lane * COUNT;
  const int tap_w = part % PARTS_W * TAPS_W, tap_h = part / PARTS_W % PARTS_H * TAPS_H;
  const int tap_d = part / (PARTS_W * PARTS_H) * TAPS_D;
  const bool active = first_row < Cut::TASKS && part < Layer::LAST_PARTS && pair < Cut::PAIRS;
  const int first_task = split * s.tasks_per_block;
  const int end = active ? min(first_task + s.tasks_per_block, s.tasks) : 0;

  Acc acc[TAPS_D][TAPS_H][TAPS_W][COUNT] = {};
#pragma unroll 1
  for (int index = first_task + first_row; index < end; index += Cut::TASKS) {
    const LastTask task(s, index);
    const int h = task.h * ROWS_H, w = task.w * ROWS_W;
    const int d0 = task.d * Layer::stride(0) - Layer::padding(0) + tap_d * Layer::dilation(0);
    const int h0 = h * Layer::stride(1) - Layer::padding(1) + tap_h * Layer::dilation(1);
    const int w0 = w * STRIDE_W - Layer::padding(2) + tap_w * DILATION_W;
    Acc c[ROWS_H][ROWS_W][COUNT / FINE] = {};
#pragma unroll
    for (int p = 0; p < ROWS_H; ++p) {
      const int64_t plane = int64_t{task.n} * s.output[0] + task.d;
      const int64_t column = (plane * s.output[1] + h + p) * s.output[2] + w;
      const T* const from = coarse + (column * C_COARSE + pair / FINE);
#pragma unroll
      for (int q = 0; q < ROWS_W; ++q) {
        if (h + p >= s.output[1] || w + q >= s.output[2]) continue;
        load_channels(c[p][q], from + q * C_COARSE);
      }
    }
#pragma unroll
    for (int td = 0; td < TAPS_D; ++td) {
      const int z = d0 + td * Layer::dilation(0);
#pragma unroll
      for (int y = 0; y < WINDOW_H; ++y) {
        bool used = false;
#pragma unroll
        for (int p = 0; p < ROWS_H; ++p) used |= tap_at_row(p, y) >= 0;
        if (!used || !within(z, s.input[0]) || !within(h0 + y, s.input[1])) continue;
        const int64_t plane = int64_t{task.n} * s.input[0] + z;
        const int64_t column = (plane * s.input[1] + h0 + y) * s.input[2] + w0;
        const T* const from = fine + (column * C_FINE + pair / COARSE);
        Acc x[WINDOW_W][COUNT / COARSE] = {};
#pragma unroll
        for (int k = 0; k < WINDOW_W; ++k) {
          if (!reads_column(k) || !within(w0 + k, s.input[2])) continue;
          load_channels(x[k], from + k * C_FINE);
        }
#pragma unroll
        for (int p = 0; p < ROWS_H; ++p) {
          const int th = tap_at_row(p, y);
          if (th < 0) continue;
#pragma unroll
          for (int k = 0; k < TAPS_W; ++k) {
#pragma unroll
            for (int q = 0; q < ROWS_W; ++q) {
#pragma unroll
              for (int i = 0; i < COUNT; ++i) {
                const Acc met = x[q * STRIDE_W + k * DILATION_W][i / COARSE];
                acc[td][th][k][i] += c[p][q][i / FINE] * met;
              }
            }
          }
        }
      }
    }
  }

  // Sums over the tasks of a step, in an order that does not change.
  __shared__ __align__(16) Acc sums[Cut::AT_ONCE][LAST_THREADS][COUNT];
#pragma unroll
  for (int first = 0; first < SUMS; first += Cut::AT_ONCE) {
    if (first > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < Cut::AT_ONCE && first + i < SUMS; ++i) {
      const int t = first + i;
#pragma unroll
      for (int v = 0; v < COUNT; ++v) {
        sums[i][threadIdx.x][v] = acc[t / (TAPS_H * TAPS_W)][t / TAPS_W % TAPS_H][t % TAPS_W][v];
      }
    }
    __syncthreads();
    constexpr int OF_TAP = Cut::PARTS * Cut::LANES * COUNT;  // side by side among the threads
    for (int i = threadIdx.x; i < Cut::AT_ONCE * OF_TAP; i += LAST_THREADS) {
      const int t = first + i / OF_TAP, place = i % OF_TAP;
      const int of_part = first_part + place / (Cut::LANES * COUNT);
      const int of_pair = first_pair + place % (Cut::LANES * COUNT);
      const int d = of_part / (PARTS_W * PARTS_H) * TAPS_D + t / (TAPS_H * TAPS_W);
      const int h = of_part / PARTS_W % PARTS_H * TAPS_H + t / TAPS_W % TAPS_H;
      const int w = of_part % PARTS_W * TAPS_W + t % TAPS_W;
      if (t >= SUMS || of_part >= Layer::LAST_PARTS || of_pair >= Cut::PAIRS) continue;
      if (d >= Layer::kernel(0) || h >= Layer::kernel(1) || w >= Layer::kernel(2)) continue;
      const Acc* const from = &sums[i / OF_TAP][0][0] + place;
      Acc sum = 0;
#pragma unroll 4
      for (int task = 0; task < Cut::TASKS; ++task) sum += from[task * OF_TAP];
      const int tap = (d * Layer::kernel(1) + h) * Layer::kernel(2) + w;
      partial[int64_t{split} * Cut::PAIRS * weights.taps + weights.place(of_pair, tap)] = sum;
    }
  }
}

// How a call is cut: its splits are blocks that have all pairs and taps.
template <class Cut, class Layer>
int cut_last_wgrad(const ConvgenCall& call, const DeviceLimits& limits, LastShape& s, int& splits) {
  int64_t positions[3];
  for (int axis = 0; axis < 3; ++axis) {
    s.input[axis] = static_cast<int>(call.fine_extent[axis]);
    s.output[axis] = static_cast<int>(call.coarse_extent[axis]);
    positions[axis] = call.coarse_extent[axis];
  }
  const int rows[3] = {1, Layer::last_rows(1), Layer::last_rows(2)};
  constexpr int BLOCKS = Cut::DEALT.chunks * Cut::BLOCKS;
  const int64_t most = int64_t{limits.multiprocessors} * LAST_WGRAD_BLOCKS / BLOCKS;
  if (const int error = cut_last(s, call.batch, positions, rows, Cut::TASKS, most, splits)) {
    return error;
  }
  return int64_t{splits} * BLOCKS > INDEX_LIMIT ? CONVGEN_TOO_LARGE : CONVGEN_OK;
}

template <class Layer, int COARSE, int FINE, typename Acc, typename T>
int64_t last_wgrad_workspace(const ConvgenCall& call, const DeviceLimits& limits) {
  using Cut = LastWgrad<Layer, COARSE, FINE, Acc, T>;
  LastShape s;
  int splits;
  // The call itself reports the error.
  if (cut_last_wgrad<Cut, Layer>(call, limits, s, splits) != CONVGEN_OK) return 0;
  const int taps = Layer::kernel(0) * Layer::kernel(1) * Layer::kernel(2);
  return int64_t{splits} * Cut::PAIRS * taps * sizeof(Acc);
}

template <class Layer, int COARSE, int FINE, typename Acc, typename T>
int run_last_wgrad(const ConvgenCall& call, const DeviceLimits& limits,
                   const MeetingAxis (&axes)[3]) {
  using Cut = LastWgrad<Layer, COARSE, FINE, Acc, T>;
  LastShape s;
  int splits;
  if (const int error = cut_last_wgrad<Cut, Layer>(call, limits, s, splits)) return error;
  const int device = static_cast<int>(call.device);
  const int taps = Layer::kernel(0) * Layer::kernel(1) * Layer::kernel(2);
  const bool pairs_last = FINE > 1 && (call.channels_last & CONVGEN_WEIGHT) != 0;
  const LastWeights weights = {taps, FINE, pairs_last};
  Acc* const partial = static_cast<Acc*>(call.workspace);
  if (const int error = launch<depthwise_last_wgrad_kernel<Layer, COARSE, FINE, Acc, T>>(
          dim3(splits * Cut::DEALT.chunks * Cut::BLOCKS), dim3(LAST_THREADS), 0, device,
          call.stream, s, static_cast<const T*>(call.coarse), static_cast<const T*>(call.fine),
          weights, partial)) {
    return error;
  }
  const LastMeeting<T> met = {meeting_of<T>(call, Layer::CHANNELS, axes), weights};
  return reduce_splits(static_cast<T*>(call.weight), static_cast<const Acc*>(partial),
                       int64_t{Cut::PAIRS} * taps, splits, met, device, call.stream);
}

}  // namespace convgen
