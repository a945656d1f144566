// Patches: windows that neither overlap nor leave gaps (KERNEL == STRIDE, no padding), and copies
// between a fine tensor and the rows of a matrix, one for each window:
//
//   packed[n, i, k] = fine[n, c, i * KERNEL + t]    k = c * TAPS + t, or t * C + c
//
// with k in the order in which the weight lies, so that convolutions are products of this matrix
// with the weight as it is. What no window reads is neither read nor, but for zeros, written.
//
// A thread block has a tile in shared memory: windows along W, with all channels or a chunk of
// them. Both sides are met in the order in which they lie, by accesses of up to 16 bytes. From one
// window to the next lies an odd number of words, so that neighbours are in different banks.
#ifndef CONVGEN_IMPLICIT_GEMM_PATCHES_CUH
#define CONVGEN_IMPLICIT_GEMM_PATCHES_CUH

#include "pack.cuh"

namespace convgen {

constexpr int PATCH_THREADS = 256, PATCH_TILE_BYTES = 24 * 1024;

// Strides are those of fine, in elements.
struct PatchTiles {
  int channels, depth, height, width;  // of windows: all that there are
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;
  int row;             // elements from a window to the next, zeros behind the last channel included
  int chunk, windows;  // of a tile: channels, and windows along W
  int chunks, tiles_w;
  int pitch;                       // elements from a tile's window to the next
  int fine_vector, packed_vector;  // elements of an access
};

// `count` elements, 1 to 16 bytes of them.
template <typename T>
__device__ __forceinline__ void copy_elements(T* to, const T* from, int count) {
  const int bytes = count * static_cast<int>(sizeof(T));
  if (bytes == 16) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else if (bytes == 8) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
  } else if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else {
    *to = *from;
  }
}

// Where a block's tile is.
struct PatchTile {
  int first_channel, channels, windows;
  bool is_last;  // of the chunks
  int64_t fine, packed;

  template <typename Conv>
  __device__ __forceinline__ static PatchTile of(const PatchTiles& s) {
    PatchTile tile;
    int64_t index = blockIdx.x;
    const int chunk = static_cast<int>(index % s.chunks);
    index /= s.chunks;
    const int w = static_cast<int>(index % s.tiles_w) * s.windows;
    index /= s.tiles_w;
    const int64_t h = index % s.height, d = index / s.height % s.depth;
    const int64_t n = index / s.height / s.depth;
    tile.first_channel = chunk * s.chunk;
    tile.channels = min(s.chunk, s.channels - tile.first_channel);
    tile.windows = min(s.windows, s.width - w);
    tile.is_last = chunk == s.chunks - 1;
    tile.fine = n * s.stride_n + tile.first_channel * s.stride_c + d * Conv::KERNEL_D * s.stride_d +
                h * Conv::KERNEL_H * s.stride_h + int64_t{w} * Conv::KERNEL_W * s.stride_w;
    tile.packed = (((n * s.depth + d) * s.height + h) * s.width + w) * s.row;
    return tile;
  }
};

// Between the tile in shared memory and fine's part of it, along fine's lines. LAST: its channels
// lie side by side. CHANNELS_FIRST: k = c * TAPS + t.
template <typename T, typename Conv, bool LAST, bool CHANNELS_FIRST, bool PACKS, typename Fine>
__device__ __forceinline__ void copy_fine(const PatchTiles& s, const PatchTile& tile, T* shared,
                                          Fine* fine) {
  constexpr int TAPS = Conv::TAPS, KERNEL_W = Conv::KERNEL_W;
  constexpr int PLANE_LINES = Conv::KERNEL_D * Conv::KERNEL_H, VECTOR = VECTOR_BYTES / sizeof(T);
  const int columns = tile.windows * KERNEL_W;
  const bool is_whole = s.chunks == 1;  // channels of neighbouring columns lie side by side, too
  const int lines = !LAST      ? tile.channels * PLANE_LINES
                    : is_whole ? PLANE_LINES
                               : PLANE_LINES * columns;
  const int length = !LAST ? columns : is_whole ? columns * tile.channels : tile.channels;
  const int vectors = length / s.fine_vector;
  for (int i = threadIdx.x; i < lines * vectors; i += PATCH_THREADS) {
    const int line = i / vectors, first = (i - line * vectors) * s.fine_vector;
    int c = first, column = first, plane_line = line;
    int64_t at = first;
    if constexpr (!LAST) {
      plane_line = line % PLANE_LINES, c = line / PLANE_LINES;
      at += c * s.stride_c;
    } else if (is_whole) {
      column = first / tile.channels, c = first % tile.channels;
    } else {
      plane_line = line / columns, column = line % columns;
      at += column * s.stride_w;
    }
    at += plane_line / Conv::KERNEL_H * s.stride_d + plane_line % Conv::KERNEL_H * s.stride_h;
    int window = column / KERNEL_W, kw = column % KERNEL_W;
    alignas(16) T x[VECTOR];
    if constexpr (PACKS) copy_elements(x, fine + at, s.fine_vector);
    const auto place = [&] {
      const int tap = plane_line * KERNEL_W + kw;
      return shared + window * s.pitch +
             (CHANNELS_FIRST ? c * TAPS + tap : tap * tile.channels + c);
    };
    // Of a line's neighbours that lie in one word of the tile, a word at a time.
    constexpr int WORD = 4 / sizeof(T);
    constexpr bool HAS_WORDS = !LAST && CHANNELS_FIRST && WORD > 1 && KERNEL_W % WORD == 0;
    if (HAS_WORDS && s.fine_vector > 1) {
#pragma unroll
      for (int q = 0; q < VECTOR; q += WORD) {
        if (q >= s.fine_vector) break;
        if constexpr (PACKS) {
          copy_elements(place(), x + q, WORD);
        } else {
          copy_elements(x + q, place(), WORD);
        }
        if ((kw += WORD) == KERNEL_W) kw = 0, ++window;
      }
    } else {
#pragma unroll
      for (int q = 0; q < VECTOR; ++q) {
        if (q >= s.fine_vector) break;
        if constexpr (PACKS) {
          *place() = loaded<Conv::PARTS == 2 ? Form::WHOLE : Form::ROUNDED>(x[q]);
        } else {
          x[q] = *place();
        }
        if (LAST && ++c < tile.channels) continue;
        if (LAST) c = 0;
        if (++kw == KERNEL_W) kw = 0, ++window;
      }
    }
    if constexpr (!PACKS) copy_elements(fine + at, x, s.fine_vector);
  }
}

// Between the tile and its part of the matrix: of each window a run of elements or, of a chunk of
// channels that come behind the taps, one for each tap.
template <typename T, typename Conv, bool CHANNELS_FIRST, bool PACKS, typename Packed>
__device__ __forceinline__ void copy_packed(const PatchTiles& s, const PatchTile& tile, T* shared,
                                            Packed* packed) {
  constexpr int TAPS = Conv::TAPS, VECTOR = VECTOR_BYTES / sizeof(T);
  const bool by_taps = !CHANNELS_FIRST && s.chunks > 1;
  const int begin = CHANNELS_FIRST ? tile.first_channel * TAPS : tile.first_channel;
  const int length = by_taps ? tile.channels : tile.is_last ? s.row - begin : tile.channels * TAPS;
  const int vectors = length / s.packed_vector;
  const int runs = tile.windows * (by_taps ? TAPS : 1);
  for (int i = threadIdx.x; i < runs * vectors; i += PATCH_THREADS) {
    const int run = i / vectors, first = (i - run * vectors) * s.packed_vector;
    const int window = by_taps ? run / TAPS : run, tap = by_taps ? run % TAPS : 0;
    T* const place = shared + window * s.pitch + tap * length + first;
    Packed* const at = packed + int64_t{window} * s.row + int64_t{tap} * s.channels + begin + first;
    if (s.packed_vector == 1) {
      if constexpr (PACKS) {
        *at = *place;
      } else {
        *place = *at;
      }
      continue;
    }
    // Windows lie at whole words.
    alignas(16) T x[VECTOR];
    if constexpr (!PACKS) copy_elements(x, at, VECTOR);
#pragma unroll
    for (int q = 0; q < VECTOR; q += 4 / sizeof(T)) {
      constexpr int WORD = 4 / sizeof(T);
      if constexpr (PACKS) {
        copy_elements(x + q, place + q, WORD);
      } else {
        copy_elements(place + q, x + q, WORD);
      }
    }
    if constexpr (PACKS) copy_elements(at, x, VECTOR);
  }
}

// PACKS: from fine, rounded to TF32 where elements are floats and not split later; else back.
template <typename T, typename Conv, bool LAST, bool CHANNELS_FIRST, bool PACKS>
__global__ void __launch_bounds__(PATCH_THREADS)
    patches_kernel(const T* __restrict__ from, T* __restrict__ to, const PatchTiles s) {
  __shared__ uint4 storage[PATCH_TILE_BYTES / 16];
  T* const shared = reinterpret_cast<T*>(storage);
  const PatchTile tile = PatchTile::of<Conv>(s);
  await_earlier_kernel();
  if constexpr (PACKS) {
    copy_fine<T, Conv, LAST, CHANNELS_FIRST, true>(s, tile, shared, from + tile.fine);
    const int filled = s.channels * Conv::TAPS, padding = tile.is_last ? s.row - filled : 0;
    const bool by_taps = !CHANNELS_FIRST && s.chunks > 1;
    for (int i = threadIdx.x; i < tile.windows * padding; i += PATCH_THREADS) {
      const int window = i / padding, behind = i % padding;
      if (by_taps) {
        to[tile.packed + int64_t{window} * s.row + filled + behind] = T{};
      } else {
        shared[window * s.pitch + tile.channels * Conv::TAPS + behind] = T{};
      }
    }
    __syncthreads();
    copy_packed<T, Conv, CHANNELS_FIRST, true>(s, tile, shared, to + tile.packed);
  } else {
    copy_packed<T, Conv, CHANNELS_FIRST, false>(s, tile, shared, from + tile.packed);
    __syncthreads();
    copy_fine<T, Conv, LAST, CHANNELS_FIRST, false>(s, tile, shared, to + tile.fine);
  }
}

// Bias, or zeros, to the elements of fine that lie in no window. A warp has a line: columns of a
// channel or, LAST, with their channels.
template <typename T, typename Conv, bool LAST>
__global__ void __launch_bounds__(PATCH_THREADS)
    clear_rest_kernel(T* __restrict__ fine, const T* __restrict__ bias, const PatchTiles s,
                      int64_t lines, int depth, int height, int width) {
  await_earlier_kernel();
  const int columns = LAST ? s.channels : 1;
  const int64_t step = int64_t{gridDim.x} * (PATCH_THREADS / 32);
  int64_t line = int64_t{blockIdx.x} * (PATCH_THREADS / 32) + threadIdx.x / 32;
  for (; line < lines; line += step) {
    const int64_t h = line % height, d = line / height % depth;
    const int channel = LAST ? 0 : static_cast<int>(line / height / depth % s.channels);
    const bool is_met =
        h < int64_t{s.height} * Conv::KERNEL_H && d < int64_t{s.depth} * Conv::KERNEL_D;
    const int64_t first = is_met ? int64_t{s.width} * Conv::KERNEL_W * columns : 0;
    const int64_t length = int64_t{width} * columns;
    for (int64_t i = first + threadIdx.x % 32; i < length; i += 32) {
      fine[line * length + i] = bias == nullptr ? T{} : bias[LAST ? i % columns : channel];
    }
  }
}

// The bias of each column of the matrix.
template <typename T, int TAPS, bool CHANNELS_FIRST>
__global__ void __launch_bounds__(PATCH_THREADS)
    spread_bias_kernel(const T* __restrict__ from, T* __restrict__ to, int channels) {
  await_earlier_kernel();
  const int64_t k = int64_t{blockIdx.x} * PATCH_THREADS + threadIdx.x;
  if (k < int64_t{channels} * TAPS) to[k] = from[CHANNELS_FIRST ? k / TAPS : k % channels];
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_PATCHES_CUH
