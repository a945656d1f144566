// The tiles of multistage.cuh, and how their sums leave: straight from registers, in any layout.
#ifndef CONVGEN_IMPLICIT_GEMM_MULTISTAGE_EPILOGUE_CUH
#define CONVGEN_IMPLICIT_GEMM_MULTISTAGE_EPILOGUE_CUH

#include "../common.cuh"
#include "epilogue.cuh"

namespace convgen {

constexpr int STAGES = 3;
constexpr int STAGE_ROW_BYTES = 64;  // of channels: a K block
// Whether this is code for a GPU that runs these kernels, and what says so to the host: see
// launch_bound. nvcc's pass for the host has no use for what a kernel does.
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800)
constexpr bool HAS_MULTISTAGE = false;
#else
constexpr bool HAS_MULTISTAGE = !HAS_WGMMA;
#endif
constexpr int MULTISTAGE_THREADS = 128;
constexpr int MULTISTAGE_BOUND = HAS_MULTISTAGE ? MULTISTAGE_THREADS : 32;

// A CTA's tile: its warps along positions and along channels, and of each the tiles of 16 positions
// and of 8 channels; how many CTAs a multiprocessor shall have registers for.
template <int WARPS_M_, int WARPS_N_, int TILES_M_, int TILES_N_, int CTAS_>
struct BlockTile {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, CTAS = CTAS_;
  static constexpr int TILES_M = TILES_M_, TILES_N = TILES_N_;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int POSITIONS = 16 * WARPS_M * TILES_M, CHANNELS = 8 * WARPS_N * TILES_N;
  static constexpr int STAGE_BYTES = (POSITIONS + CHANNELS) * STAGE_ROW_BYTES;
  static_assert(THREADS == MULTISTAGE_THREADS, "four warps");
  static_assert(TILES_N % 4 == 0, "four neighbouring tiles of channels leave together");
  static_assert(STAGES * STAGE_BYTES >= 16 * TILES_N * THREADS, "scratch of an epilogue");
  static_assert(STAGES * STAGE_BYTES <= 96 * 1024, "what CTAs have on every GPU since sm_80");
};

// Bytes from the beginning of a row to one of its vectors.
__device__ __forceinline__ int swizzled(int row, int vector) {
  return (vector ^ (row / 2 % 4)) * 16;
}

// Extents of an output without phases.
struct Places {
  Divisor width, height, depth;
};

// The `position`-th output of a phase; n is the batch or more behind the last.
template <typename Conv>
__device__ __forceinline__ void place_of(const Places& places, const Output& out, int position,
                                         int& n, int& d, int& h, int& w) {
  n = position;
  if constexpr (Conv::PHASES == 1) {
    w = places.width.split(n), h = places.height.split(n), d = places.depth.split(n);
  } else {
    w = n % out.width, n /= out.width;
    h = n % out.height, n /= out.height;
    d = n % out.depth, n /= out.depth;
  }
}

// Of four words of each of four neighbouring lanes, lane i gets every one's i-th.
__device__ __forceinline__ uint4 exchange_words(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool is_upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t sent = is_upper ? words[i] : words[i + distance];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, sent, distance);
      if (is_upper) {
        words[i] = received;
      } else {
        words[i + distance] = received;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// What a warp does with its sums. Of the 16 x 8 sums of tiles i and j a lane has those of positions
// 16 i + lane / 4, and eight further, in channels 8 j + 2 (lane % 4) and the next.
template <typename T, typename Conv, typename Block>
struct WarpResults {
  using Sums = float[Block::TILES_M][Block::TILES_N][4];

  const Places& places;
  const Output& out;  // of a phase
  int position;       // the warp's first
  int group_channel;  // the group's first
  int channel;        // the warp's first of the group's
  int channels;       // of the group

  __device__ __forceinline__ int pair() const { return channel + threadIdx.x % 4 * 2; }

  __device__ __forceinline__ void add_bias(Sums& sums) const {
    if (out.bias == nullptr) return;
    const T* const bias = static_cast<const T*>(out.bias) + group_channel;
#pragma unroll
    for (int j = 0; j < Block::TILES_N; ++j) {
      const int c = pair() + 8 * j;
      const float first = c < channels ? widen(bias[c]) : 0.0f;
      const float second = c + 1 < channels ? widen(bias[c + 1]) : 0.0f;
#pragma unroll
      for (int i = 0; i < Block::TILES_M; ++i) {
        sums[i][j][0] += first, sums[i][j][1] += second;
        sums[i][j][2] += first, sums[i][j][3] += second;
      }
    }
  }

  // What a layer's epilogue makes of them (../epilogue.cuh). A tile of 16 positions after the other
  // goes through shared memory, each thread's by itself, so that a loop finds its sums: the code
  // for all of them at once would take half a minute to compile.
  template <typename Finish>
  __device__ __forceinline__ void finish(const Finish& finish, Sums& sums, float* scratch) const {
    scratch += threadIdx.x;
#pragma unroll
    for (int i = 0; i < Block::TILES_M; ++i) {
#pragma unroll
      for (int k = 0; k < 4 * Block::TILES_N; ++k) {
        scratch[k * Block::THREADS] = sums[i][k / 4][k % 4];
      }
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        int64_t offset;
        if (!find(position + 16 * i + 8 * half + threadIdx.x % 32 / 4, offset)) continue;
        const T* const at = static_cast<const T*>(out.address) + offset;
#pragma unroll 1
        for (int k = 0; k < 2 * Block::TILES_N; ++k) {
          const int c = pair() + k / 2 * 8 + k % 2;
          float* const sum = scratch + (k / 2 * 4 + half * 2 + k % 2) * Block::THREADS;
          float each[1] = {*sum};
          finish.apply(at + (group_channel + c) * out.stride_c, each, c < channels);
          *sum = each[0];
        }
      }
#pragma unroll
      for (int k = 0; k < 4 * Block::TILES_N; ++k) {
        sums[i][k / 4][k % 4] = scratch[k * Block::THREADS];
      }
    }
  }

  __device__ __forceinline__ void store(Sums& sums) const {
    if constexpr (sizeof(T) == 2) {
      if (out.vector == 8) {
        if (out.stride_c == 1) {
          store_channels(sums);
        } else {
          store_positions(sums);
        }
        return;
      }
    }
    for_pairs(sums, [&](T* at, float* v, bool has_first, bool has_second) {
      if (sizeof(T) == 4 && out.vector == 2) {
        if (has_first) *reinterpret_cast<float2*>(at) = make_float2(v[0], v[1]);
      } else {
        if (has_first) narrow(at[0], v[0]);
        if (has_second) narrow(at[out.stride_c], v[1]);
      }
    });
  }

 private:
  // Calls visit(at, sums, has_first, has_second) for each two channels of a position of this lane.
  template <typename Visit>
  __device__ __forceinline__ void for_pairs(Sums& sums, Visit visit) const {
#pragma unroll
    for (int row = 0; row < 2 * Block::TILES_M; ++row) {
      int64_t offset;
      if (!find(position + 8 * row + threadIdx.x % 32 / 4, offset)) continue;
      T* const at = static_cast<T*>(out.address) + offset;
#pragma unroll
      for (int j = 0; j < Block::TILES_N; ++j) {
        const int c = pair() + 8 * j;
        visit(at + (group_channel + c) * out.stride_c, &sums[row / 2][j][row % 2 * 2], c < channels,
              c + 1 < channels);
      }
    }
  }

  // Elements from the result's beginning to a position; false if it does not exist.
  __device__ __forceinline__ bool find(int at, int64_t& offset) const {
    int n, d, h, w;
    place_of<Conv>(places, out, at, n, d, h, w);
    offset = out.first + n * out.stride_n + d * out.stride_d + h * out.stride_h + w * out.stride_w;
    return n < out.batch;
  }

  // 16 bits, channels side by side: four lanes have 32 of a position, which leave as 16 bytes each.
  __device__ __forceinline__ void store_channels(const Sums& sums) const {
#pragma unroll
    for (int row = 0; row < 2 * Block::TILES_M; ++row) {
      int64_t offset;
      const bool exists = find(position + 8 * row + threadIdx.x % 32 / 4, offset);
      T* const at = static_cast<T*>(out.address) + offset + group_channel;
#pragma unroll
      for (int j = 0; j < Block::TILES_N; j += 4) {
        uint32_t words[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* const v = &sums[row / 2][j + q][row % 2 * 2];
          words[q] = narrow_pair<T>(v[0], v[1]);
        }
        const uint4 eight = exchange_words(words);
        const int c = channel + 8 * (j + threadIdx.x % 4);
        if (exists && c < channels) *reinterpret_cast<uint4*>(at + c) = eight;
      }
    }
  }

  // 16 bits, positions side by side, in whole eights: matrices of eight positions are transposed,
  // and four lanes have 32 positions of a channel, which leave as 16 bytes each.
  __device__ __forceinline__ void store_positions(const Sums& sums) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int row = 0; row < 2 * Block::TILES_M; row += 4) {
      int64_t offset;
      const bool exists = find(position + 8 * (row + lane % 4), offset);
      T* const at = static_cast<T*>(out.address) + offset;
#pragma unroll
      for (int j = 0; j < Block::TILES_N; ++j) {
        uint32_t words[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float* const v = &sums[(row + q) / 2][j][(row + q) % 2 * 2];
          words[q] = transpose_matrix(narrow_pair<T>(v[0], v[1]));
        }
        const uint4 eight = exchange_words(words);
        const int c = channel + 8 * j + lane / 4;
        if (exists && c < channels) {
          *reinterpret_cast<uint4*>(at + (group_channel + c) * out.stride_c) = eight;
        }
      }
    }
  }
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_MULTISTAGE_EPILOGUE_CUH
