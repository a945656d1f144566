// Kernels of one tap between a tensor of many channels and one of few, both channels_last: a
// network's head (32 -> 3 channels, say), its gradients, and projections of few channels.
//
// Such a layer reads and writes its tensors once, and does little else. A thread has VECTOR
// neighbouring channels of the many, 16 bytes, and their weights in registers:
//
//   thread      lane: VECTOR of the many channels, of `lanes`, a power of two     row: a position
//
// Sums over the many channels are added up by shuffles, sums over positions (wgrad) in shared
// memory, and those of blocks by reduce_splits: always in the same order.
#pragma once

#include "common.cuh"

namespace convgen {

constexpr int POINTWISE_THREADS = 256;
// Channels of the tensor with fewer, at most, and lanes of a position, whose shuffles add up.
constexpr int POINTWISE_FEW = 8, POINTWISE_LANES = 32;
// Blocks of a multiprocessor: of gathers more than it holds; of wgrad as many as it holds, since
// each adds up its threads' sums.
constexpr int POINTWISE_BLOCKS = 16, POINTWISE_WGRAD_BLOCKS = 3;
// Positions that a thread has under way, beside the weights of so many channels. And blocks that a
// multiprocessor holds, for the compiler, which else saves registers for more of them, and spills.
template <int FEW>
constexpr int POINTWISE_AT_ONCE = FEW <= 4 ? 2 : 1;
template <int FEW>
constexpr int POINTWISE_RESIDENT = FEW <= 4 ? 2 : 1;

template <typename T>
constexpr int POINTWISE_VECTOR = VECTOR_BYTES / sizeof(T);

// A call: few and many channels, and the weights' strides along them.
struct PointwiseShape {
  int64_t positions;
  int few, many, lanes, log2_lanes;
  int stride_few, stride_many;
};

template <typename T>
bool is_pointwise(const ConvgenCall& call) {
  constexpr int64_t BOTH = CONVGEN_COARSE | CONVGEN_FINE;
  const int64_t coarse = call.coarse_channels, fine = call.fine_channels;
  const int64_t few = coarse < fine ? coarse : fine, many = coarse < fine ? fine : coarse;
  for (int axis = 0; axis < 3; ++axis) {  // padding behind a tensor, or output padding
    if (call.coarse_extent[axis] != call.fine_extent[axis]) return false;
  }
  return (call.channels_last & BOTH) == BOTH && few <= POINTWISE_FEW &&
         many % POINTWISE_VECTOR<T> == 0 && many <= POINTWISE_LANES * POINTWISE_VECTOR<T>;
}

template <typename T>
PointwiseShape pointwise_shape(const ConvgenCall& call) {
  const int64_t* const e = call.coarse_extent;
  const bool few_coarse = call.coarse_channels < call.fine_channels;
  PointwiseShape s;
  s.positions = call.batch * e[0] * e[1] * e[2];
  const int coarse = static_cast<int>(call.coarse_channels);
  const int fine = static_cast<int>(call.fine_channels);
  s.few = few_coarse ? coarse : fine, s.many = few_coarse ? fine : coarse;
  s.stride_few = few_coarse ? fine : 1, s.stride_many = few_coarse ? 1 : fine;
  s.lanes = 1, s.log2_lanes = 0;
  while (s.lanes * POINTWISE_VECTOR<T> < s.many) s.lanes *= 2, ++s.log2_lanes;
  return s;
}

template <typename T>
struct alignas(16) PointwiseVector {
  T element[POINTWISE_VECTOR<T>];
};

// A thread's lane and row, and its channels; those of lanes beyond the last do not exist.
template <typename T>
struct PointwiseThread {
  int lane, row, rows, channel;
  bool exists;

  __device__ __forceinline__ explicit PointwiseThread(const PointwiseShape& s)
      : lane(threadIdx.x & (s.lanes - 1)),
        row(threadIdx.x >> s.log2_lanes),
        rows(POINTWISE_THREADS >> s.log2_lanes),
        channel(lane * POINTWISE_VECTOR<T>),
        exists(channel < s.many) {}
};

template <int FEW, typename Acc, typename T>
__device__ __forceinline__ void load_pointwise_weights(Acc (&w)[FEW][POINTWISE_VECTOR<T>],
                                                       const PointwiseShape& s,
                                                       const PointwiseThread<T>& thread,
                                                       const T* weight) {
#pragma unroll
  for (int f = 0; f < FEW; ++f) {
#pragma unroll
    for (int v = 0; v < POINTWISE_VECTOR<T>; ++v) {
      w[f][v] = 0;
      if (f >= s.few || !thread.exists) continue;
      const int64_t many = thread.channel + v;
      w[f][v] = widen(weight[f * s.stride_few + many * s.stride_many]);
    }
  }
}

// output[position][few] = bias[few] + sum over the many of input[position][many] * w[few][many]
template <int FEW, typename Acc, typename T, typename... Finishes>
__global__ void __launch_bounds__(POINTWISE_THREADS, POINTWISE_RESIDENT<FEW>)
    pointwise_reduce_kernel(const PointwiseShape s, const T* input, const T* weight, const T* bias,
                            T* output, Finishes... finishes) {
  constexpr int VECTOR = POINTWISE_VECTOR<T>, AT_ONCE = POINTWISE_AT_ONCE<FEW>;
  const PointwiseThread<T> thread(s);
  Acc w[FEW][VECTOR];
  load_pointwise_weights<FEW>(w, s, thread, weight);
  const int64_t step = int64_t{gridDim.x} * thread.rows * AT_ONCE;
  // All lanes take part in the shuffles, whether or not their position exists.
  for (int64_t first = int64_t{blockIdx.x} * thread.rows * AT_ONCE; first < s.positions;
       first += step) {
    PointwiseVector<T> x[AT_ONCE];
    Acc sums[AT_ONCE][FEW] = {};
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t position = first + i * thread.rows + thread.row;
      x[i] = {};
      if (!thread.exists || position >= s.positions) continue;
      x[i] =
          *reinterpret_cast<const PointwiseVector<T>*>(input + position * s.many + thread.channel);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) {
        const Acc value = widen(x[i].element[v]);
#pragma unroll
        for (int f = 0; f < FEW; ++f) sums[i][f] += value * w[f][v];
      }
      const int64_t position = first + i * thread.rows + thread.row;
#pragma unroll
      for (int f = 0; f < FEW; ++f) {
        if (f >= s.few) break;
        for (int other = s.lanes / 2; other > 0; other /= 2) {
          sums[i][f] += __shfl_xor_sync(0xffffffffu, sums[i][f], other);
        }
        if (thread.lane != (f & (s.lanes - 1)) || position >= s.positions) continue;
        T* const to = output + position * s.few + f;
        Acc sum[1] = {sums[i][f] + (bias ? widen(bias[f]) : Acc(0))};
        (finishes.apply(to, sum, 1), ...);
        narrow(*to, sum[0]);
      }
    }
  }
}

// output[position][many] = bias[many] + sum over the few of input[position][few] * w[few][many]
template <int FEW, typename Acc, typename T, typename... Finishes>
__global__ void __launch_bounds__(POINTWISE_THREADS, POINTWISE_RESIDENT<FEW>)
    pointwise_expand_kernel(const PointwiseShape s, const T* input, const T* weight, const T* bias,
                            T* output, Finishes... finishes) {
  constexpr int VECTOR = POINTWISE_VECTOR<T>, AT_ONCE = POINTWISE_AT_ONCE<FEW>;
  const PointwiseThread<T> thread(s);
  if (!thread.exists) return;
  Acc w[FEW][VECTOR], offset[VECTOR];
  load_pointwise_weights<FEW>(w, s, thread, weight);
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) offset[v] = bias ? widen(bias[thread.channel + v]) : Acc(0);
  const int64_t step = int64_t{gridDim.x} * thread.rows;
  int64_t position = int64_t{blockIdx.x} * thread.rows + thread.row;
#pragma unroll AT_ONCE
  for (; position < s.positions; position += step) {
    Acc sums[VECTOR] = {};
#pragma unroll
    for (int f = 0; f < FEW; ++f) {
      if (f >= s.few) break;
      const Acc value = widen(input[position * s.few + f]);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sums[v] += value * w[f][v];
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) sums[v] += offset[v];
    T* const to = output + position * s.many + thread.channel;
    (finishes.apply(to, sums, VECTOR), ...);
    PointwiseVector<T> result;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) narrow(result.element[v], sums[v]);
    *reinterpret_cast<PointwiseVector<T>*>(to) = result;
  }
}

// partial[block][few][many] = sum over the block's positions of few[position] * many[position], as
// the weights lie.
template <int FEW, typename Acc, typename T>
__global__ void __launch_bounds__(POINTWISE_THREADS, POINTWISE_RESIDENT<FEW>)
    pointwise_wgrad_kernel(const PointwiseShape s, const T* few, const T* many, Acc* partial) {
  constexpr int VECTOR = POINTWISE_VECTOR<T>, AT_ONCE = POINTWISE_AT_ONCE<FEW>;
  const PointwiseThread<T> thread(s);
  Acc sums[FEW][VECTOR] = {};
  const int64_t step = int64_t{gridDim.x} * thread.rows;
  int64_t position = int64_t{blockIdx.x} * thread.rows + thread.row;
  if (!thread.exists) position = s.positions;
#pragma unroll AT_ONCE
  for (; position < s.positions; position += step) {
    const PointwiseVector<T> x =
        *reinterpret_cast<const PointwiseVector<T>*>(many + position * s.many + thread.channel);
#pragma unroll
    for (int f = 0; f < FEW; ++f) {
      if (f >= s.few) break;
      const Acc value = widen(few[position * s.few + f]);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sums[f][v] += value * widen(x.element[v]);
    }
  }
  __shared__ Acc shared[POINTWISE_THREADS * VECTOR];
  const int of_row = s.lanes * VECTOR;  // side by side among the threads
#pragma unroll
  for (int f = 0; f < FEW; ++f) {
    if (f >= s.few) break;
    __syncthreads();
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) shared[threadIdx.x * VECTOR + v] = sums[f][v];
    __syncthreads();
    for (int c = threadIdx.x; c < s.many; c += POINTWISE_THREADS) {
      Acc sum = 0;
      for (int row = 0; row < thread.rows; ++row) sum += shared[row * of_row + c];
      const int64_t weights = int64_t{s.few} * s.many;
      partial[blockIdx.x * weights + int64_t{f} * s.stride_few + int64_t{c} * s.stride_many] = sum;
    }
  }
}

// Launches of a gather; `writes_few` says which of both it is.
template <int FEW, typename Acc, typename T, typename... Finishes>
int launch_pointwise(const ConvgenCall& call, const PointwiseShape& s, bool writes_few,
                     const T* input, T* output, const DeviceLimits& limits, Finishes... finishes) {
  const int64_t rows = (POINTWISE_THREADS >> s.log2_lanes) * POINTWISE_AT_ONCE<FEW>;
  const int64_t most = int64_t{limits.multiprocessors} * POINTWISE_BLOCKS;
  const int64_t wanted = ceil_div(s.positions, rows);
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const int device = static_cast<int>(call.device);
  const T* const weight = static_cast<const T*>(call.weight);
  const T* const bias = static_cast<const T*>(call.bias);
  if (writes_few) {
    return launch<pointwise_reduce_kernel<FEW, Acc, T, Finishes...>>(
        grid, dim3(POINTWISE_THREADS), 0, device, call.stream, s, input, weight, bias, output,
        finishes...);
  }
  return launch<pointwise_expand_kernel<FEW, Acc, T, Finishes...>>(
      grid, dim3(POINTWISE_THREADS), 0, device, call.stream, s, input, weight, bias, output,
      finishes...);
}

template <typename Acc, typename T, typename... Finishes>
int run_pointwise(const ConvgenCall& call, const void* input, void* output,
                  const DeviceLimits& limits, Finishes... finishes) {
  const PointwiseShape s = pointwise_shape<T>(call);
  const bool few_coarse = call.coarse_channels < call.fine_channels;
  const bool writes_few = (output == call.coarse) == few_coarse;
  const T* const from = static_cast<const T*>(input);
  T* const to = static_cast<T*>(output);
  return s.few <= POINTWISE_FEW / 2 ? launch_pointwise<POINTWISE_FEW / 2, Acc>(
                                          call, s, writes_few, from, to, limits, finishes...)
                                    : launch_pointwise<POINTWISE_FEW, Acc>(
                                          call, s, writes_few, from, to, limits, finishes...);
}

template <typename T>
int pointwise_splits(const PointwiseShape& s, const DeviceLimits& limits) {
  const int64_t most = int64_t{limits.multiprocessors} * POINTWISE_WGRAD_BLOCKS;
  const int64_t wanted = ceil_div(s.positions, POINTWISE_THREADS >> s.log2_lanes);
  return static_cast<int>(wanted < most ? wanted : most);
}

template <typename Acc, typename T>
int64_t pointwise_wgrad_workspace(const ConvgenCall& call, const DeviceLimits& limits) {
  const PointwiseShape s = pointwise_shape<T>(call);
  return int64_t{pointwise_splits<T>(s, limits)} * s.few * s.many * sizeof(Acc);
}

// `reduce` adds up the partial sums of so many blocks.
template <typename Acc, typename T, class Reduce>
int run_pointwise_wgrad(const ConvgenCall& call, const DeviceLimits& limits, const Reduce& reduce) {
  const PointwiseShape s = pointwise_shape<T>(call);
  const int splits = pointwise_splits<T>(s, limits), device = static_cast<int>(call.device);
  const bool few_coarse = call.coarse_channels < call.fine_channels;
  const T* const few = static_cast<const T*>(few_coarse ? call.coarse : call.fine);
  const T* const many = static_cast<const T*>(few_coarse ? call.fine : call.coarse);
  Acc* const partial = static_cast<Acc*>(call.workspace);
  const dim3 grid(static_cast<unsigned>(splits)), block(POINTWISE_THREADS);
  const int error = s.few <= POINTWISE_FEW / 2
                        ? launch<pointwise_wgrad_kernel<POINTWISE_FEW / 2, Acc, T>>(
                              grid, block, 0, device, call.stream, s, few, many, partial)
                        : launch<pointwise_wgrad_kernel<POINTWISE_FEW, Acc, T>>(
                              grid, block, 0, device, call.stream, s, few, many, partial);
  return error ? error : reduce(partial, int64_t{s.few} * s.many, splits);
}

}  // namespace convgen
