// What comes before and after the products: operands laid out as the tensor cores read them, and
// the sums of a split K.
#ifndef CONVGEN_IMPLICIT_GEMM_PACK_CUH
#define CONVGEN_IMPLICIT_GEMM_PACK_CUH

#include "../common.cuh"
#include "kernel.cuh"

namespace convgen {

// A tensor whose channels are packed side by side: a group's `channels`, padded to `padded` with
// zeros. Strides are in elements; positions are those of all extents.
struct PackShape {
  int64_t positions, stride_n, stride_c, stride_p;
  int batch, groups, channels, padded;
};

constexpr int PACK_THREADS = 256, PACK_POSITIONS = 128;

// As cuDNN's kernels for the same architecture round, so that results differ from torch's by the
// order of sums alone. What is rounded in shared memory does not: see round_vector.
constexpr Rounding OPERAND_ROUNDING = HAS_WGMMA ? Rounding::NEAREST_EVEN : Rounding::NEAREST_AWAY;

template <typename T>
__device__ __forceinline__ T as_operand(T x) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(round_tf32<OPERAND_ROUNDING>(x));
  } else {
    return x;
  }
}

// What becomes of floats: nothing, or TF32, or two TF32 values (split.cuh), of which the lower ones
// are another tensor behind the first. Elements of 16 bits stay what they are.
enum class Form { WHOLE, ROUNDED, SPLIT };
template <int PARTS>
constexpr Form OPERAND = PARTS == 2 ? Form::SPLIT : Form::ROUNDED;

template <Form FORM, typename T>
__device__ __forceinline__ T loaded(T x) {
  if constexpr (FORM == Form::ROUNDED) return as_operand(x);
  return x;
}
// An element, and 16 bytes of them; lower parts are `part` elements further.
template <Form FORM, typename T>
__device__ __forceinline__ void store_operand(T* at, T x, int64_t part) {
  if constexpr (FORM == Form::SPLIT) {
    const SplitFloat split = split_float(x);
    at[0] = split.upper, at[part] = split.lower;
  } else {
    at[0] = loaded<FORM>(x);
  }
}
template <Form FORM, typename T>
__device__ __forceinline__ void store_loaded(T* at, uint4 x, int64_t part) {
  if constexpr (FORM == Form::SPLIT) {
    *reinterpret_cast<uint4*>(at) = split_vector(x);
    *reinterpret_cast<uint4*>(at + part) = x;
  } else {
    *reinterpret_cast<uint4*>(at) = x;
  }
}

// The 16 bytes of a position that hold the first channels in `x`.
template <typename T>
__device__ __forceinline__ uint4 vector_of(const T (&x)[VECTOR_BYTES / sizeof(T)]) {
  uint4 bits;
  memcpy(&bits, x, 16);
  return bits;
}

// (N, C, positions) -> (N, positions, groups x padded): a thread block transposes 128 bytes of
// channels of 128 positions in shared memory, whose 16-byte vectors are permuted by the position so
// that neither side meets a bank conflict. WIDE: four positions at a time, where all are aligned.
template <typename T, Form FORM, bool WIDE>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_positions_kernel(const T* __restrict__ from, T* __restrict__ to, const PackShape s) {
  constexpr int VECTOR = VECTOR_BYTES / sizeof(T), BLOCK_K = ROW_BYTES / sizeof(T);
  __shared__ uint4 tile[PACK_POSITIONS * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * PACK_POSITIONS, position = first + 4 * lane;
  const int row_channels = s.groups * s.padded, block = blockIdx.y * BLOCK_K;
  await_earlier_kernel();
  for (int n = blockIdx.z; n < s.batch; n += gridDim.z) {
    T x[4][VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int channel = block + warp * VECTOR + i;
      const int group = channel / s.padded, within = channel % s.padded;
      const bool exists = channel < row_channels && within < s.channels;
      const T* const line =
          from + n * s.stride_n + (group * s.channels + within) * s.stride_c + position;
      if constexpr (WIDE) {
        T four[4] = {};
        if (exists && position < s.positions) {
          if constexpr (sizeof(T) == 4) {
            const uint4 bits = *reinterpret_cast<const uint4*>(line);
            memcpy(four, &bits, 16);
          } else {
            const uint2 bits = *reinterpret_cast<const uint2*>(line);
            memcpy(four, &bits, 8);
          }
        }
#pragma unroll
        for (int q = 0; q < 4; ++q) x[q][i] = loaded<FORM>(four[q]);
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          x[q][i] = exists && position + q < s.positions ? loaded<FORM>(line[q]) : T{};
        }
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) tile[(4 * lane + q) * 8 + (warp ^ (lane % 8))] = vector_of(x[q]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PACK_POSITIONS * 8 / PACK_THREADS; ++i) {
      const int row = (i * PACK_THREADS + threadIdx.x) / 8, vector = threadIdx.x % 8;
      const int channel = block + vector * VECTOR;
      if (first + row < s.positions && channel < row_channels) {
        T* const at = to + (n * s.positions + first + row) * row_channels + channel;
        store_loaded<FORM>(at, tile[row * 8 + (vector ^ (row / 4 % 8))],
                           s.batch * s.positions * row_channels);
      }
    }
    __syncthreads();
  }
}

// (N, positions, C) -> (N, positions, groups x padded): channels that lie side by side already, but
// not in multiples of 16 bytes, or not rounded.
template <typename T, Form FORM>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_channels_kernel(const T* __restrict__ from, T* __restrict__ to, const PackShape s) {
  await_earlier_kernel();
  constexpr int VECTOR = VECTOR_BYTES / sizeof(T);   // which divides what a group is padded to
  const int vectors = s.groups * s.padded / VECTOR;  // of a position
  const int64_t count = s.batch * s.positions * vectors;
  const int64_t step = int64_t{gridDim.x} * PACK_THREADS;
  for (int64_t i = int64_t{blockIdx.x} * PACK_THREADS + threadIdx.x; i < count; i += step) {
    const int64_t row = i / vectors;
    const int channel = static_cast<int>(i - row * vectors) * VECTOR;
    const int group = channel / s.padded, within = channel - group * s.padded;
    const T* const at = from + (row * s.groups + group) * s.channels + within;
    T x[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      x[j] = within + j < s.channels ? loaded<FORM>(at[j]) : T{};
    }
    store_loaded<FORM>(to + i * VECTOR, vector_of(x), count * VECTOR);
  }
}

// The weights of one contraction. Strides are in elements.
struct WeightShape {
  int64_t stride_output, stride_input, stride_tap;
  int groups, output_channels, input_channels;  // of a group
  int padded_outputs, padded_inputs;            // as they are packed, with zeros
};

// weight[coarse][fine of the group][tap], for the output and input channel of a group.
template <bool COARSE_INPUT>
__device__ __forceinline__ int64_t weight_at(const WeightShape& s, int group, int output,
                                             int input) {
  const int64_t o = COARSE_INPUT ? output : int64_t{group} * s.output_channels + output;
  const int64_t i = COARSE_INPUT ? int64_t{group} * s.input_channels + input : input;
  return o * s.stride_output + i * s.stride_input;
}

// store(i, load(i)) of `first`, `first + step`, ... below `end`, 27 of them at a time: a thread has
// as many loads under way. Stores in between would be waited for, since both may be shared memory.
template <typename T, typename Load, typename Store>
__device__ __forceinline__ void copy_elements(int first, int end, int step, Load load,
                                              Store store) {
  constexpr int COUNT = 27;
  for (; first < end; first += COUNT * step) {
    T x[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (first + i * step < end) x[i] = load(first + i * step);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (first + i * step < end) store(first + i * step, x[i]);
    }
  }
}

// weight -> (taps, groups x output channels, padded input channels) or, MN-major, -> (taps, groups
// x padded input channels, padded output channels). For dgrad (`COARSE_INPUT`) the taps come in
// reverse: i = o + PADDING - t * DILATION. A warp has 32 columns of a row.
template <typename T, int TAPS, bool COARSE_INPUT, Major MAJOR, int PARTS>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_weights_kernel(const T* __restrict__ from, T* __restrict__ to, const WeightShape s) {
  constexpr bool K_MAJOR = MAJOR == Major::K;
  // Where columns are fine channels, those of a contiguous weight are one run with their taps.
  constexpr bool HAS_RUNS = TAPS > 1 && TAPS <= 32 && K_MAJOR != COARSE_INPUT;
  __shared__ T runs[HAS_RUNS ? PACK_THREADS * TAPS : 1];
  await_earlier_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x * 32, column = first + lane;
  const int columns = K_MAJOR ? s.padded_inputs : s.padded_outputs;
  const int existing = K_MAJOR ? s.input_channels : s.output_channels;
  const int group_rows = K_MAJOR ? s.output_channels : s.padded_inputs;
  const int rows = s.groups * group_rows;
  const bool is_run = HAS_RUNS && s.stride_tap == 1;
  for (int row = blockIdx.y * 8 + warp; row < rows; row += gridDim.y * 8) {
    const int group = row / group_rows, within = row % group_rows;
    const auto weight_of = [&](int at) {
      const int output = K_MAJOR ? within : at, input = K_MAJOR ? at : within;
      return from + weight_at<COARSE_INPUT>(s, group, output, input);
    };
    const bool has_row = within < (K_MAJOR ? s.output_channels : s.input_channels);
    const bool exists = has_row && column < existing;
    const T* weight = weight_of(column);
    if constexpr (HAS_RUNS) {
      if (is_run) {
        T* const run = runs + warp * 32 * TAPS;
        const int count = has_row ? min(32, existing - first) * TAPS : 0;
        const T* const begin = weight_of(first);
        __syncwarp();
        copy_elements<T>(
            lane, count, 32, [&](int i) { return begin[i]; }, [&](int i, T x) { run[i] = x; });
        __syncwarp();
        weight = run + lane * TAPS;
      }
    }
    if (column >= columns) continue;
    T* const at = to + int64_t{row} * columns + column;
    copy_elements<T>(
        0, TAPS, 1,
        [&](int tap) {
          const int from_tap = COARSE_INPUT ? TAPS - 1 - tap : tap;
          return exists ? weight[from_tap * s.stride_tap] : T{};
        },
        [&](int tap, T x) {
          store_operand<OPERAND<PARTS>>(at + tap * int64_t{rows} * columns, x,
                                        TAPS * int64_t{rows} * columns);
        });
  }
}

// The same of a K-major dgrad, whose columns are the coarse channels, far apart in the weight: a
// thread block has the fine channels and taps of eight rows of them, which lie side by side, in
// shared memory. All eight rows are of one group.
template <typename T, int TAPS, int PARTS>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_turned_weights_kernel(const T* __restrict__ from, T* __restrict__ to,
                               const WeightShape s) {
  constexpr int ROWS = PACK_THREADS / 32, COUNT = ROWS * TAPS;
  constexpr int PITCH = COUNT | 1;  // lanes of different columns have banks of their own
  __shared__ T staged[32 * PITCH];
  await_earlier_kernel();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * 32;
  const int64_t columns = s.padded_inputs, rows = int64_t{s.groups} * s.output_channels;
  const bool has_taps_inside = s.stride_tap == 1;
  for (int64_t row = int64_t{blockIdx.y} * ROWS; row < rows; row += int64_t{gridDim.y} * ROWS) {
    const int group = row / s.output_channels, output = row % s.output_channels;
    // In the order in which they lie.
    const auto channel_of = [&](int i) { return has_taps_inside ? i / TAPS % ROWS : i % ROWS; };
    const auto tap_of = [&](int i) { return has_taps_inside ? i % TAPS : i / ROWS % TAPS; };
    copy_elements<T>(
        threadIdx.x, 32 * COUNT, PACK_THREADS,
        [&](int i) {
          const int input = first + i / COUNT, channel = output + channel_of(i);
          if (input >= s.input_channels || channel >= s.output_channels) return T{};
          return from[weight_at<true>(s, group, channel, input) + tap_of(i) * s.stride_tap];
        },
        [&](int i, T x) { staged[i / COUNT * PITCH + channel_of(i) * TAPS + tap_of(i)] = x; });
    __syncthreads();
    if (first + lane < columns && output + warp < s.output_channels) {
      T* const at = to + (row + warp) * columns + first + lane;
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) {
        store_operand<OPERAND<PARTS>>(at + tap * rows * columns,
                                      staged[lane * PITCH + warp * TAPS + TAPS - 1 - tap],
                                      TAPS * rows * columns);
      }
    }
    __syncthreads();
  }
}

// The same for folded tiles (see Tiling::fold): (KERNEL_D + 1) x taps of a plane, each with 64
// output channels, of which the second 32 are those of the plane behind, which a tap along D meets
// one plane later. Also clears `flag`.
template <typename T, int KERNEL_D, int PLANE_TAPS, bool COARSE_INPUT, Major MAJOR, int PARTS>
__global__ void __launch_bounds__(PACK_THREADS)
    pack_folded_weights_kernel(const T* __restrict__ from, T* __restrict__ to, const WeightShape s,
                               int* flag) {
  await_earlier_kernel();
  const int count = (KERNEL_D + 1) * PLANE_TAPS * BLOCK_M * s.padded_inputs;
  if (blockIdx.x == 0 && threadIdx.x == 0) *flag = 0;
  for (int i = blockIdx.x * PACK_THREADS + threadIdx.x; i < count; i += gridDim.x * PACK_THREADS) {
    const int at = i / (BLOCK_M * s.padded_inputs);
    const int input = MAJOR == Major::K ? i % s.padded_inputs : i / BLOCK_M % s.padded_inputs;
    const int row = MAJOR == Major::K ? i / s.padded_inputs % BLOCK_M : i % BLOCK_M;
    const int output = row % (BLOCK_M / 2), plane = row / (BLOCK_M / 2);
    const int kd = at / PLANE_TAPS - plane, packed_tap = kd * PLANE_TAPS + at % PLANE_TAPS;
    const int tap = COARSE_INPUT ? KERNEL_D * PLANE_TAPS - 1 - packed_tap : packed_tap;
    const bool exists =
        kd >= 0 && kd < KERNEL_D && output < s.output_channels && input < s.input_channels;
    const int64_t place = weight_at<COARSE_INPUT>(s, 0, output, input) + tap * s.stride_tap;
    store_operand<OPERAND<PARTS>>(to + i, exists ? from[place] : T{}, count);
  }
}

// The sums of all splits of K, in order, and the bias.
template <typename T, typename... Finishes>
__global__ void __launch_bounds__(PACK_THREADS)
    add_partials_kernel(const Output out, int splits, int channels, Finishes... finishes) {
  await_earlier_kernel();
  const int64_t i = int64_t{blockIdx.x} * PACK_THREADS + threadIdx.x;
  if (i >= out.elements) return;
  float sum = out.partials[i];
  for (int split = 1; split < splits; ++split) sum += out.partials[split * out.elements + i];
  if (out.bias != nullptr) {
    sum += widen(static_cast<const T*>(out.bias)[i / out.stride_c % channels]);
  }
  if constexpr (sizeof...(Finishes) > 0) {
    float sums[1] = {sum};
    (finishes.apply(static_cast<T*>(out.address) + i, sums, 1), ...);
    sum = sums[0];
  }
  narrow(static_cast<T*>(out.address)[i], sum);
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_PACK_CUH
