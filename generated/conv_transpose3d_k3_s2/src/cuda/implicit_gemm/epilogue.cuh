// How the sums of an implicit GEMM leave, in any layout. See kernel.cuh.
#ifndef CONVGEN_IMPLICIT_GEMM_EPILOGUE_CUH
#define CONVGEN_IMPLICIT_GEMM_EPILOGUE_CUH

#include "tiles.cuh"

namespace convgen {

__device__ __forceinline__ void position_of(const Tiling& t, const Tile& tile, int p, int& n,
                                            int& d, int& h, int& w) {
  w = tile.w + (p & ((1 << t.log2_w) - 1)), p >>= t.log2_w;
  h = tile.h + (p & ((1 << t.log2_h) - 1)), p >>= t.log2_h;
  d = tile.d + (p & ((1 << t.log2_d) - 1));
  n = tile.n + (p >> t.log2_d);
}

// This thread's rows of its warpgroup's products: output channels, the other eight further, and of
// a folded tile the plane.
struct Rows {
  int first, plane;
  __device__ __forceinline__ explicit Rows(const Tiling& t) {
    const int row = threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4;
    plane = t.fold == 2 ? row / (BLOCK_M / 2) : 0;
    first = row - plane * (BLOCK_M / 2);
  }
};

__device__ __forceinline__ bool is_inside(const Output& out, int n, int d, int h) {
  return n < out.batch && d < out.depth && h < out.height;
}

// Of an output whose strides are those of a phase's neighbours, and whose extents are all phases'
// together: where a tile's phase begins, in elements, and its own extents.
template <typename Conv>
__device__ __forceinline__ Output phase_of(Output out, const Tile& tile) {
  if constexpr (Conv::PHASES > 1) {
    const Phase<Conv> phase(tile.phase);
    out.first = phase.index_d * out.stride_d / Conv::STRIDE_D +
                phase.index_h * out.stride_h / Conv::STRIDE_H +
                phase.index_w * out.stride_w / Conv::STRIDE_W;
    // Where planes are samples, the stride along D is 1.
    out.depth = (out.depth - phase.index_d + Conv::STRIDE_D - 1) / Conv::STRIDE_D;
    out.height = (out.height - phase.index_h + Conv::STRIDE_H - 1) / Conv::STRIDE_H;
    out.width = (out.width - phase.index_w + Conv::STRIDE_W - 1) / Conv::STRIDE_W;
  }
  return out;
}

template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  T pair[2];
  narrow(pair[0], low), narrow(pair[1], high);
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// Stores the sums of one group of eight positions, two of this thread's channels, eight apart.
template <typename T>
__device__ __forceinline__ void store_pairs(T* to, const Output& out, const float* v,
                                            bool has_upper, bool has_lower, bool has_next) {
  T* const lower = to + 8 * out.stride_c;
  if (out.vector > 1) {
    if constexpr (sizeof(T) == 4) {
      if (has_upper) *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
      if (has_lower) *reinterpret_cast<float2*>(lower) = make_float2(v[2], v[3]);
    } else {
      if (has_upper) *reinterpret_cast<uint32_t*>(to) = narrow_pair<T>(v[0], v[1]);
      if (has_lower) *reinterpret_cast<uint32_t*>(lower) = narrow_pair<T>(v[2], v[3]);
    }
    return;
  }
  if (has_upper) {
    narrow(to[0], v[0]);
    if (has_next) narrow(to[out.stride_w], v[1]);
  }
  if (has_lower) {
    narrow(lower[0], v[2]);
    if (has_next) narrow(lower[out.stride_w], v[3]);
  }
}

// Calls visit(at, sums, has_upper, has_lower, has_next) for each group of eight positions of a tile
// of which this thread has some: two neighbours along W in two channels, eight apart, the first of
// them at `at`.
template <int LINES, typename Conv, typename Slab, typename T, typename Sums, typename Visit>
__device__ __forceinline__ void for_pairs(const Tiling& t, const Output& out, Tile tile, T* address,
                                          Sums (&sums)[4 * LINES], Visit visit) {
  const Rows rows(t);
  const int lane = threadIdx.x % 32, row = rows.first;
  tile.d += rows.plane;
  const int64_t channel = tile.group * t.output_channels + tile.channel + row;
  const bool has_upper = tile.channel + row < t.output_channels;
  const bool has_lower = tile.channel + row + 8 < t.output_channels;
  T* at = address + out.first + channel * out.stride_c;
  if constexpr (Slab::HALO) {
    // A halo's groups of eight positions lie one behind the other, along H or (LINEAR) along W.
    if (!is_inside(out, tile.n, tile.d, tile.h)) return;
    const int first = tile.w + lane % 4 * 2;
    const int64_t step = Conv::LINEAR ? 8 * out.stride_w : out.stride_h;
    const int count = Conv::LINEAR        ? (out.width - first + 7) / 8
                      : first < out.width ? out.height - tile.h
                                          : 0;
    at += tile.n * out.stride_n + tile.d * out.stride_d + tile.h * out.stride_h +
          first * out.stride_w;
#pragma unroll
    for (int j = 0; j < LINES; ++j, at += step) {
      if (j >= count) break;
      const bool has_next = first + (Conv::LINEAR ? 8 * j : 0) + 1 < out.width;
      visit(at, sums + 4 * j, has_upper, has_lower, has_next);
    }
  } else {
#pragma unroll
    for (int j = 0; j < LINES; ++j) {
      int n, d, h, w;
      // One address at a time: all of them together would take a hundred registers.
      position_of(t, tile, opaque(8 * j) + lane % 4 * 2, n, d, h, w);
      if (!is_inside(out, n, d, h) || w >= out.width) continue;
      visit(at + n * out.stride_n + d * out.stride_d + h * out.stride_h + w * out.stride_w,
            sums + 4 * j, has_upper, has_lower, w + 1 < out.width);
    }
  }
}

// Any layout, straight from registers.
template <typename T, int LINES, typename Conv, typename Slab>
__device__ __forceinline__ void store_strided(const Tiling& t, const Output& out, const Tile& tile,
                                              T* address, const float (&sums)[4 * LINES]) {
  for_pairs<LINES, Conv, Slab>(
      t, out, tile, address, sums,
      [&](T* at, const float* v, bool has_upper, bool has_lower, bool has_next) {
        store_pairs(at, out, v, has_upper, has_lower, has_next);
      });
}

// What a layer's epilogue makes of a tile's sums, in registers (../epilogue.cuh): whichever way
// they leave, what it reads and writes beside lies as the result does.
template <typename T, int LINES, typename Conv, typename Slab, typename Finish>
__device__ __forceinline__ void finish_sums(const Tiling& t, const Output& out, const Tile& tile,
                                            const Finish& finish, float (&sums)[4 * LINES]) {
  for_pairs<LINES, Conv, Slab>(
      t, out, tile, static_cast<T*>(out.address), sums,
      [&](T* at, float* v, bool has_upper, bool has_lower, bool has_next) {
        const bool exist[4] = {has_upper, has_upper && has_next, has_lower, has_lower && has_next};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float sum[1] = {v[i]};
          finish.apply(at + i / 2 * 8 * out.stride_c + i % 2 * out.stride_w, sum, exist[i]);
          v[i] = sum[0];
        }
      });
}

// 16 bits, channels side by side: transposed into one of two buffers, which TMA copies out. A row
// is a position with 64 channels, or with 32 where there are no more; its 16-byte vectors are
// swizzled as TMA expects.
template <typename T, int LINES>
__device__ __forceinline__ void store_by_tma(const Tiling& t, const TensorMap& map,
                                             const Tile& tile, unsigned char* buffers,
                                             const float (&sums)[4 * LINES]) {
  // A group may end before a consumer's channels begin: those behind it are the next group's.
  if (tile.channel >= t.output_channels) return;
  const int thread = threadIdx.x % WARPGROUP, lane = thread % 32, warp = thread / 32;
  const int barrier = 1 + threadIdx.x / WARPGROUP;
  const bool is_narrow = t.output_channels <= BLOCK_M / 2;
#pragma unroll
  for (int first = 0; first < LINES; first += STORE_LINES) {
    unsigned char* const buffer = buffers + first / STORE_LINES % 2 * STORE_BYTES;
    if (thread == 0) tma_store_wait_read<1>();
    named_barrier_sync(barrier, WARPGROUP);
#pragma unroll
    for (int j = 0; j < STORE_LINES; ++j) {
      const float* const v = sums + 4 * (first + j);
      const int row = 8 * j + lane % 8, vector = 2 * warp + lane / 8 % 2;
      const int wide = row * 128 + ((vector ^ (row % 8)) << 4);
      const int narrow =
          warp / 2 * (STORE_BYTES / 2) + row * 64 + ((vector % 4 ^ (row / 2 % 4)) << 4);
      store_matrices<true>(buffer + (is_narrow ? narrow : wide), narrow_pair<T>(v[0], v[1]),
                           narrow_pair<T>(v[2], v[3]));
    }
    bulk_fence();
    named_barrier_sync(barrier, WARPGROUP);
    if (thread == 0) {
      int n, d, h, w;
      position_of(t, tile, 8 * first, n, d, h, w);
      const int channel = tile.group * t.output_channels + tile.channel;
      tma_store(map, buffer, channel, w, h, d, n);
      if (t.fold == 2) tma_store(map, buffer + STORE_BYTES / 2, channel, w, h, d + 1, n);
      tma_store_commit();
    }
  }
}

// 16 bits, W side by side: the whole tile into shared memory, from where copy_out takes it.
template <typename T, int LINES>
__device__ __forceinline__ void stage_output(unsigned char* staged,
                                             const float (&sums)[4 * LINES]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;
  unsigned char* const row = staged + (16 * warp + lane % 16) * STAGED_PITCH<LINES> * 16;
#pragma unroll
  for (int j = 0; j < LINES; ++j) {
    store_matrices<false>(row + 16 * j, narrow_pair<T>(sums[4 * j], sums[4 * j + 1]),
                          narrow_pair<T>(sums[4 * j + 2], sums[4 * j + 3]));
  }
}

// Eight neighbours along W, of which `count` exist.
template <typename T>
__device__ __forceinline__ void store_eight(T* to, uint4 x, int count, int vector) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  if (vector == 8) {
    *reinterpret_cast<uint4*>(to) = x;
  } else if (vector == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(x.x, x.y);
    if (count > 4) *reinterpret_cast<uint2*>(to + 4) = make_uint2(x.z, x.w);
  } else {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (vector == 2) {
        if (2 * q < count) *reinterpret_cast<uint32_t*>(to + 2 * q) = words[q];
      } else {
        uint16_t* const each = reinterpret_cast<uint16_t*>(to + 2 * q);
        if (2 * q < count) each[0] = static_cast<uint16_t>(words[q]);
        if (2 * q + 1 < count) each[1] = static_cast<uint16_t>(words[q] >> 16);
      }
    }
  }
}

// One warp copies the staged tiles of consumer `consumer` to memory, while that goes on.
template <typename T, int LINES, typename Conv, typename Slab>
__device__ __forceinline__ void copy_out(const Tiling& t, const Output& out, SharedStorage& shared,
                                         const unsigned char* staged, int consumer) {
  const int lane = threadIdx.x % 32;
  const bool splits_positions = t.position_groups == 2;
  uint32_t phase = 0;
  for (int index = blockIdx.x; index < t.tiles; index += gridDim.x, phase ^= 1) {
    const Tile tile = Tile::of<Slab, Conv::PHASES>(t, index, splits_positions ? consumer : 0,
                                                   splits_positions ? 0 : consumer);
    const int rows = t.fold == 2 ? BLOCK_M : min(BLOCK_M, t.output_channels - tile.channel);
    T* const first = static_cast<T*>(out.address) +
                     (int64_t{tile.group} * t.output_channels + tile.channel) * out.stride_c;
    mbarrier_wait(&shared.staged_full[consumer], phase);
    const auto eight = [&](int channel, int line) {
      return *reinterpret_cast<const uint4*>(staged + (channel * STAGED_PITCH<LINES> + line) * 16);
    };
    if constexpr (Slab::HALO && !Conv::LINEAR) {
      // A lane has a channel: from line to line it adds a stride.
      const int lines = min(LINES, out.height - tile.h), count = out.width - tile.w;
      for (int row = lane; row < rows; row += 32) {
        const int plane = t.fold == 2 ? row / (BLOCK_M / 2) : 0;
        const int channel = row - plane * (BLOCK_M / 2), d = tile.d + plane;
        if (channel >= t.output_channels || !is_inside(out, tile.n, d, tile.h)) continue;
        T* to = first + channel * out.stride_c + tile.n * out.stride_n + d * out.stride_d +
                tile.h * out.stride_h + tile.w;
#pragma unroll 4
        for (int line = 0; line < lines; ++line, to += out.stride_h) {
          store_eight(to, eight(row, line), count, out.vector);
        }
      }
    } else if constexpr (32 % LINES == 0) {
      // A lane has a group of eight positions, and one channel after the other: from one to the
      // next it adds a stride.
      constexpr int STEP = 32 / LINES;
      int n, d, h, w;
      position_of(t, tile, 8 * (lane % LINES), n, d, h, w);
      if (is_inside(out, n, d, h) && w < out.width) {
        const int64_t step = STEP * out.stride_c;
        T* to = first + lane / LINES * out.stride_c + n * out.stride_n + d * out.stride_d +
                h * out.stride_h + w;
#pragma unroll 4
        for (int row = lane / LINES; row < rows; row += STEP, to += step) {
          store_eight(to, eight(row, lane % LINES), out.width - w, out.vector);
        }
      }
    } else {
      // Neighbouring lanes have neighbouring groups of eight positions.
      for (int i = lane; i < rows * LINES; i += 32) {
        int n, d, h, w;
        position_of(t, tile, 8 * (i % LINES), n, d, h, w);
        if (!is_inside(out, n, d, h) || w >= out.width) continue;
        store_eight(first + i / LINES * out.stride_c + n * out.stride_n + d * out.stride_d +
                        h * out.stride_h + w,
                    eight(i / LINES, i % LINES), out.width - w, out.vector);
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.staged_empty[consumer]);
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_EPILOGUE_CUH
