// Between the memory formats: matrices transposed at the speed of memory, for kernels that take
// contiguous tensors alone.
#ifndef CONVGEN_TRANSPOSE_CUH
#define CONVGEN_TRANSPOSE_CUH

#include "common.cuh"

namespace convgen {

constexpr int TRANSPOSE_TILE = 64, TRANSPOSE_THREADS = 256;
// Rows, or columns, of a narrow matrix, at most: of fewer than half a tile's, other kernels are
// quicker. And the elements that a block of these copies.
constexpr int NARROW = 32, NARROW_ELEMENTS = 4096;

// to[n][column][row] = from[n][row][column]. A thread block has a tile of both, by way of shared
// memory whose lines are one element longer, so that columns lie in different banks.
template <typename T>
__global__ void __launch_bounds__(TRANSPOSE_THREADS)
    transpose_kernel(T* to, const T* from, int64_t rows, int64_t columns) {
  constexpr int STEP = TRANSPOSE_THREADS / TRANSPOSE_TILE;
  __shared__ T tile[TRANSPOSE_TILE][TRANSPOSE_TILE + 1];
  const int64_t across = (columns + TRANSPOSE_TILE - 1) / TRANSPOSE_TILE;
  const int64_t row = blockIdx.x / across * TRANSPOSE_TILE;
  const int64_t column = blockIdx.x % across * TRANSPOSE_TILE;
  const int x = threadIdx.x % TRANSPOSE_TILE, y = threadIdx.x / TRANSPOSE_TILE;
  await_earlier_kernel();
  from += blockIdx.y * rows * columns, to += blockIdx.y * rows * columns;
  if (column + x < columns) {
#pragma unroll
    for (int i = 0; i < TRANSPOSE_TILE; i += STEP) {
      if (row + y + i < rows) tile[y + i][x] = from[(row + y + i) * columns + column + x];
    }
  }
  __syncthreads();
  if (row + x < rows) {
#pragma unroll
    for (int i = 0; i < TRANSPOSE_TILE; i += STEP) {
      if (column + y + i < columns) to[(column + y + i) * rows + row + x] = tile[x][y + i];
    }
  }
}

// The same of 16-bit elements and an even number of rows and columns, two of them at a time: lines
// of shared memory are an odd number of words.
template <typename T>
__global__ void __launch_bounds__(TRANSPOSE_THREADS)
    transpose_pairs_kernel(T* to, const T* from, int64_t rows, int64_t columns) {
  static_assert(sizeof(T) == 2, "two elements of a word");
  constexpr int STEP = TRANSPOSE_THREADS / 32, PITCH = TRANSPOSE_TILE + 2;
  __shared__ uint32_t tile[TRANSPOSE_TILE * PITCH / 2];
  const T* const elements = reinterpret_cast<const T*>(tile);
  const int64_t across = (columns + TRANSPOSE_TILE - 1) / TRANSPOSE_TILE;
  const int64_t row = blockIdx.x / across * TRANSPOSE_TILE;
  const int64_t column = blockIdx.x % across * TRANSPOSE_TILE;
  const int x = threadIdx.x % 32 * 2, y = threadIdx.x / 32;
  await_earlier_kernel();
  from += blockIdx.y * rows * columns, to += blockIdx.y * rows * columns;
  if (column + x < columns) {
#pragma unroll
    for (int i = 0; i < TRANSPOSE_TILE; i += STEP) {
      if (row + y + i >= rows) continue;
      const T* const at = from + (row + y + i) * columns + column + x;
      tile[((y + i) * PITCH + x) / 2] = *reinterpret_cast<const uint32_t*>(at);
    }
  }
  __syncthreads();
  if (row + x < rows) {
#pragma unroll
    for (int i = 0; i < TRANSPOSE_TILE; i += STEP) {
      if (column + y + i >= columns) continue;
      const T pair[2] = {elements[x * PITCH + y + i], elements[(x + 1) * PITCH + y + i]};
      uint32_t bits;
      memcpy(&bits, pair, 4);
      *reinterpret_cast<uint32_t*>(to + (column + y + i) * rows + row + x) = bits;
    }
  }
}

// to[n][few][long] = from[n][long][few], or back, of matrices with few columns. A thread block has
// `length` of the long axis: of one tensor what lies side by side, of the other `few` lines.
template <bool BACK, typename T>
__global__ void __launch_bounds__(TRANSPOSE_THREADS)
    transpose_narrow_kernel(T* to, const T* from, int64_t rows, Divisor few, Divisor length) {
  __shared__ T tile[NARROW_ELEMENTS + NARROW];  // lines, one element longer
  const int columns = static_cast<int>(few.divisor), longest = static_cast<int>(length.divisor);
  const int64_t first = int64_t{blockIdx.x} * longest, sample = blockIdx.y * rows * columns;
  const int there = static_cast<int>(min(int64_t{longest}, rows - first));
  const int64_t side_by_side = sample + first * columns, lines = sample + first;
  await_earlier_kernel();
  for (int stage = 0; stage < 2; ++stage) {
    const bool by_lines = (stage == 0) == BACK;
#pragma unroll 4
    for (int i = threadIdx.x; i < longest * columns; i += TRANSPOSE_THREADS) {
      int row = i, column = i;  // one of both becomes the remainder, one the quotient
      if (by_lines) {
        row = length.split(column);
      } else {
        column = few.split(row);
      }
      if (row >= there) continue;
      T& staged = tile[column * (longest + 1) + row];
      const int64_t at = by_lines ? lines + column * rows + row : side_by_side + i;
      if (stage == 0) {
        staged = from[at];
      } else {
        to[at] = staged;
      }
    }
    __syncthreads();
  }
}

template <bool BACK, typename T>
int transpose_narrow(T* to, const T* from, int64_t batch, int64_t rows, int64_t few, int device,
                     void* stream) {
  const int64_t length = NARROW_ELEMENTS / few, blocks = ceil_div(rows, length);
  return launch<transpose_narrow_kernel<BACK, T>, true>(
      dim3(blocks, batch), dim3(TRANSPOSE_THREADS), 0, device, stream, to, from, rows, Divisor(few),
      Divisor(length));
}

// (batch, rows, columns) -> (batch, columns, rows), on the current device.
template <typename T>
int transpose(T* to, const T* from, int64_t batch, int64_t rows, int64_t columns, int device,
              void* stream) {
  const int64_t tiles = ceil_div(rows, TRANSPOSE_TILE) * ceil_div(columns, TRANSPOSE_TILE);
  if (tiles > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  constexpr int64_t MOST = 65535;  // of a grid's second dimension
  for (int64_t done = 0; done < batch; done += MOST) {
    const int64_t count = batch - done < MOST ? batch - done : MOST;
    const int64_t offset = done * rows * columns;
    int error;
    if (columns <= NARROW && rows > columns) {
      error =
          transpose_narrow<false>(to + offset, from + offset, count, rows, columns, device, stream);
    } else if (rows <= NARROW) {
      error =
          transpose_narrow<true>(to + offset, from + offset, count, columns, rows, device, stream);
    } else {
      const dim3 grid(tiles, count), block(TRANSPOSE_THREADS);
      bool pairs = false;
      if constexpr (sizeof(T) == 2) {
        pairs = rows % 2 == 0 && columns % 2 == 0 &&
                (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 4 == 0;
        if (pairs) {
          error = launch<transpose_pairs_kernel<T>, true>(
              grid, block, 0, device, stream, to + offset, from + offset, rows, columns);
        }
      }
      if (!pairs) {
        error = launch<transpose_kernel<T>, true>(grid, block, 0, device, stream, to + offset,
                                                  from + offset, rows, columns);
      }
    }
    if (error) return error;
  }
  return CONVGEN_OK;
}

// The same of `coarse`, into `fine`; rows and columns are coarse_channels and fine_channels.
template <typename T>
int transpose(const ConvgenCall& call) {
  const int device = static_cast<int>(call.device);
  const DeviceScope scope(device);
  if (scope.error() != cudaSuccess) return scope.error();
  return transpose(static_cast<T*>(call.fine), static_cast<const T*>(call.coarse), call.batch,
                   call.coarse_channels, call.fine_channels, device, call.stream);
}

}  // namespace convgen

#endif  // CONVGEN_TRANSPOSE_CUH
