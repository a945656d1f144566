// A one-dimensional convolution through a shared tile, as small as a kernel can be that has all
// that tests of the interpreter break: a halo, a barrier, a tap offset, an exact tile.
#include "convgen_abi.h"
#include "device.cuh"

namespace {

using namespace convgen;

constexpr int TAPS = 3, THREADS = 64, TILE = THREADS + TAPS - 1;

__global__ void __launch_bounds__(THREADS) tile_kernel(const float* x, const float* w, float* y, int n) {
  __shared__ float tile[TILE];
  const int first = blockIdx.x * THREADS;
  for (int i = threadIdx.x; i < TILE; i += blockDim.x) {
    tile[i] = first + i < n + TAPS - 1 ? x[first + i] : 0.0f;
  }
  __syncthreads();
  const int o = first + threadIdx.x;
  if (o >= n) return;
  float sum = 0;
#pragma unroll
  for (int t = 0; t < TAPS; ++t) sum += tile[threadIdx.x + t] * w[t];
  y[o] = sum;
}

}  // namespace

CONVGEN_EXPORT int tile(const float* x, const float* w, float* y, int n) {
  return launch<tile_kernel>(dim3((n + THREADS - 1) / THREADS), dim3(THREADS), 0, 0, nullptr, x, w, y, n);
}

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
