// One 16 x 8 product per warp, laid out as mma.sync wants it.
#include "convgen_abi.h"
#include "mma.cuh"

namespace {

using namespace convgen;

// c = c + a b: a is 16 x 8 and b 8 x 8, row by row; words are TF32 values or 16-bit pairs.
template <void (*MULTIPLY)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t x[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const uint32_t y[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  MULTIPLY(d, x, y);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__device__ void tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(d, a, b); }
__device__ void bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
__device__ void f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b); }

__global__ void round_kernel(const float* x, uint32_t* away, uint32_t* even, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    away[i] = round_tf32<Rounding::NEAREST_AWAY>(x[i]);
    even[i] = round_tf32<Rounding::NEAREST_EVEN>(x[i]);
  }
}

__global__ void lonely_kernel() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 31) mma_tf32(d, a, b);
}

// Four matrices of 8 rows of `pitch` bytes, and each of them transposed.
__global__ void matrices_kernel(const uint32_t* from, uint32_t* to, int pitch) {
  __shared__ __align__(16) unsigned char rows[32 * 32];
  for (int i = threadIdx.x; i < 128; i += 32) {
    *reinterpret_cast<uint32_t*>(rows + i / 4 * 32 + i % 4 * 4) = from[i];
  }
  __syncwarp();
  uint32_t words[4];
  load_matrices(words, rows + threadIdx.x * pitch);
  for (int i = 0; i < 4; ++i) {
    to[i * 32 + threadIdx.x] = words[i];
    to[(4 + i) * 32 + threadIdx.x] = transpose_matrix(words[i]);
  }
}

}  // namespace

CONVGEN_EXPORT int matrices(const uint32_t* from, uint32_t* to, int pitch) {
  return launch<matrices_kernel>(1, 32, 0, 0, nullptr, from, to, pitch);
}

CONVGEN_EXPORT int product_tf32(const uint32_t* a, const uint32_t* b, float* c) {
  return launch<product_kernel<tf32>>(1, 32, 0, 0, nullptr, a, b, c);
}

CONVGEN_EXPORT int product_bf16(const uint32_t* a, const uint32_t* b, float* c) {
  return launch<product_kernel<bf16>>(1, 32, 0, 0, nullptr, a, b, c);
}

CONVGEN_EXPORT int product_f16(const uint32_t* a, const uint32_t* b, float* c) {
  return launch<product_kernel<f16>>(1, 32, 0, 0, nullptr, a, b, c);
}

CONVGEN_EXPORT int rounded(const float* x, uint32_t* away, uint32_t* even, int n) {
  return launch<round_kernel>(1, 32, 0, 0, nullptr, x, away, even, n);
}

CONVGEN_EXPORT int lonely(int threads) { return launch<lonely_kernel>(1, threads, 0, 0, nullptr); }

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
