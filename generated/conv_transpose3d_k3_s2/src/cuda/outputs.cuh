// Results of the mma engine's gathers: by way of a warp's scratch in shared memory they leave as
// they lie in memory, neighbours side by side.
#pragma once

#include "fragments.cuh"

namespace convgen {

// Words of a warp's scratch: 8 channels of the outputs of 16 positions. The pitch lets the lanes of
// a fragment write different banks.
template <int VARIANTS>
constexpr int OUTPUT_PITCH = MMA_ROWS * VARIANTS + 4;
template <int VARIANTS>
constexpr int OUTPUT_WORDS = MMA_COLUMNS * OUTPUT_PITCH<VARIANTS>;
constexpr int OUTPUT_BATCH = 2;  // products whose outputs are in a warp's scratch at once

// Writes one product's sums of every variant into a warp's scratch, [channel][position][variant].
// PAIRED: a lane's two rows are neighbouring positions.
template <int VARIANTS, bool PAIRED>
__device__ __forceinline__ void spread_outputs(float* scratch, int lane,
                                               const float (&value)[VARIANTS][4]) {
  struct alignas(sizeof(float) * (VARIANTS == 2 || VARIANTS == 4 ? VARIANTS : 1)) Wide {
    float element[VARIANTS];
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wide wide;
#pragma unroll
    for (int v = 0; v < VARIANTS; ++v) wide.element[v] = value[v][i];
    const int position = PAIRED ? lane / 4 * 2 + i / 2 : lane / 4 + i / 2 * 8;
    float* const to = scratch + (lane % 4 * 2 + i % 2) * OUTPUT_PITCH<VARIANTS> +
                      position * VARIANTS;
    *reinterpret_cast<Wide*>(to) = wide;
  }
}

// How the lanes of a warp store 8 channels of a run of 16 positions: WIDTH neighbouring outputs at
// once, lanes side by side along a channel as far as it goes.
template <int VARIANTS, int WIDTH>
struct Storing {
  static constexpr int ACCESSES = MMA_ROWS * VARIANTS / WIDTH;  // of one channel
  // Lanes that a channel gets, whole positions; accesses of each, channels at a time.
  static constexpr int LANES = ACCESSES <= WARP ? ACCESSES : WARP / VARIANTS / 4 * 4 * VARIANTS;
  static constexpr int TURNS = ACCESSES / LANES;
  static constexpr int CHANNELS = ACCESSES <= WARP ? WARP / ACCESSES : 1;
  static_assert(ACCESSES % LANES == 0 && MMA_COLUMNS % CHANNELS == 0, "no partial accesses");

  // Of a lane: its first channel, and its outputs in a turn, counted along the run.
  __device__ static __forceinline__ int channel(int lane) { return lane / LANES; }
  __device__ static __forceinline__ int output(int lane, int turn) {
    return (lane % LANES + turn * LANES) * WIDTH;
  }
  __device__ static __forceinline__ bool active(int lane) { return lane < LANES * CHANNELS; }
};

// Adds every channel's bias to its sums. `first_out` is the first channel of the sums.
template <int VARIANTS, int ROWS, int BLOCKS_N, typename T>
__device__ __forceinline__ void add_bias(float (&acc)[VARIANTS][ROWS][BLOCKS_N][4], const T* bias,
                                         int first_out, int out_channels, int lane) {
#pragma unroll
  for (int n = 0; n < BLOCKS_N; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int out = first_out + n * MMA_COLUMNS + lane % 4 * 2 + c;
      const float offset = out < out_channels ? widen(bias[out]) : 0.0f;
#pragma unroll
      for (int v = 0; v < VARIANTS; ++v) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
          acc[v][m][n][c] += offset;
          acc[v][m][n][c + 2] += offset;
        }
      }
    }
  }
}

// WIDTH neighbouring outputs, as they are stored.
template <int WIDTH, typename T>
struct alignas(WIDTH * sizeof(T)) Run {
  T element[WIDTH];

  __device__ __forceinline__ void load(const float* from) {
    struct alignas(WIDTH * sizeof(float)) Wide {
      float element[WIDTH];
    };
    const Wide wide = *reinterpret_cast<const Wide*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) narrow(element[i], wide.element[i]);
  }

  // The same of sums of which an epilogue makes outputs, if they `exist`, at `to`.
  template <typename Finish>
  __device__ __forceinline__ void load(const float* from, const Finish& finish, const T* to,
                                       bool exist) {
    struct alignas(WIDTH * sizeof(float)) Wide {
      float element[WIDTH];
    };
    Wide wide = *reinterpret_cast<const Wide*>(from);
    finish.apply(to, wide.element, exist ? WIDTH : 0);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) narrow(element[i], wide.element[i]);
  }

  __device__ __forceinline__ void store(T* to) const {
    constexpr int BYTES = WIDTH * sizeof(T);
    using Bits = std::conditional_t<BYTES == 2, uint16_t,
                                    std::conditional_t<BYTES == 4, uint32_t, uint2>>;
    Bits bits;
    memcpy(&bits, element, sizeof(bits));
    store_global(to, bits);
  }
};

}  // namespace convgen
