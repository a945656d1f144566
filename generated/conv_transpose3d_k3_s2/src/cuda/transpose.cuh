// Between the memory formats: matrices transposed at the speed of memory, for kernels that take
// contiguous tensors alone.
#ifndef CONVGEN_TRANSPOSE_CUH
#define CONVGEN_TRANSPOSE_CUH

#include "common.cuh"

namespace convgen {

constexpr int TRANSPOSE_TILE = 64, TRANSPOSE_THREADS = 256;

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
    if (const int error = launch<transpose_kernel<T>, true>(
            dim3(tiles, count), dim3(TRANSPOSE_THREADS), 0, device, stream, to + offset,
            from + offset, rows, columns)) {
      return error;
    }
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
