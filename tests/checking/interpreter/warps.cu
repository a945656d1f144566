// Warp collectives, votes and copies in flight: what the interpreter must get right.
#include "convgen_abi.h"
#include "device.cuh"

namespace {

using namespace convgen;

constexpr unsigned ALL = 0xffffffffu;

// One sum per block, by shuffles within warps and through shared memory between them.
__global__ void reduce_kernel(const double* x, double* sums, int per_block) {
  __shared__ double partial[32];
  double sum = 0;
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) sum += x[blockIdx.x * per_block + i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(ALL, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

// Each lane's view of every collective, in widths of 8.
__global__ void lanes_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* row = out + threadIdx.x * 8;
  row[0] = __shfl_sync(ALL, lane, lane + 1, 8);
  row[1] = __shfl_up_sync(ALL, lane, 3, 8);
  row[2] = __shfl_down_sync(ALL, lane, 3, 8);
  row[3] = __shfl_xor_sync(ALL, lane, 5);
  row[4] = static_cast<int>(__ballot_sync(ALL, lane % 3 == 0));
  row[5] = __any_sync(ALL, lane == 7);
  row[6] = __all_sync(ALL, lane < 31);
  row[7] = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 15) : __shfl_sync(0xffff0000u, lane, 16);
}

// Lanes exchange through shared memory, with __syncwarp alone.
__global__ void exchange_kernel(int* out) {
  __shared__ int box[64];
  for (int round = 0; round < 3; ++round) {
    box[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
    __syncwarp();
    out[threadIdx.x] = box[threadIdx.x ^ 1];
    __syncwarp();
  }
}

// y[i] = sum of all x, by two buffers that are filled while the other is read.
__global__ void pipeline_kernel(const float* x, float* y, int chunks) {
  float* buffers = dynamic_shared<float>();
  const int threads = static_cast<int>(blockDim.x);
  auto stage = [&](int chunk) {
    if (chunk < chunks) {
      copy_async<4>(buffers + chunk % 2 * threads + threadIdx.x, x + chunk * threads + threadIdx.x,
                    chunk != 1);
    }
    copy_commit();
  };
  float sum = 0;
  stage(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    stage(chunk + 1);
    copy_wait<1>();
    __syncthreads();
    for (int i = 0; i < threads; ++i) sum += buffers[chunk % 2 * threads + i];
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}

// Each thread's vector of x, of which the first `begin` elements are not read: as many bytes as its
// rank.
__global__ void vectors_kernel(const float* x, float* y, int begin) {
  float* vectors = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x);
  copy_vector(vectors + 4 * i, x + 4 * i, i, x + begin);
  copy_commit();
  copy_wait<0>();
  for (int j = 0; j < 4; ++j) y[4 * i + j] = vectors[4 * i + j];
}

template <typename T>
__global__ void convert_kernel(const float* x, T* narrowed, float* widened, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  T value;
  narrow(value, x[i]);
  narrowed[i] = value;
  widened[i] = widen(value);
}

__global__ void where_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] = block * 1000 + thread;
}

}  // namespace

CONVGEN_EXPORT int reduce(const double* x, double* sums, int per_block, int blocks) {
  return launch<reduce_kernel>(dim3(blocks), dim3(96), 0, 0, nullptr, x, sums, per_block);
}

CONVGEN_EXPORT int lanes(int* out) { return launch<lanes_kernel>(1, 64, 0, 0, nullptr, out); }

CONVGEN_EXPORT int exchange(int* out) { return launch<exchange_kernel>(1, 64, 0, 0, nullptr, out); }

CONVGEN_EXPORT int pipeline(const float* x, float* y, int chunks) {
  return launch<pipeline_kernel>(1, 64, 2 * 64 * sizeof(float), 0, nullptr, x, y, chunks);
}

CONVGEN_EXPORT int vectors(const float* x, float* y, int begin) {
  return launch<vectors_kernel>(1, 17, 17 * 16, 0, nullptr, x, y, begin);
}

CONVGEN_EXPORT int convert_half(const float* x, void* narrowed, float* widened, int n) {
  return launch<convert_kernel<half>>(dim3((n + 255) / 256), 256, 0, 0, nullptr, x, static_cast<half*>(narrowed),
                                      widened, n);
}

CONVGEN_EXPORT int convert_bfloat16(const float* x, void* narrowed, float* widened, int n) {
  return launch<convert_kernel<bfloat16>>(dim3((n + 255) / 256), 256, 0, 0, nullptr, x,
                                          static_cast<bfloat16*>(narrowed), widened, n);
}

CONVGEN_EXPORT int where(unsigned* out) {
  return launch<where_kernel>(dim3(3, 2, 2), dim3(5, 4, 2), 0, 0, nullptr, out);
}

CONVGEN_EXPORT int oversized(int threads, int shared_bytes) {
  return launch<exchange_kernel>(1, threads, shared_bytes, 0, nullptr, static_cast<int*>(nullptr));
}

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
