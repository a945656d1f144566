// One kernel for each fault that the interpreter finds. Every one of them is wrong.
#include "convgen_abi.h"
#include "device.cuh"

namespace {

using namespace convgen;

constexpr unsigned ALL = 0xffffffffu;

__global__ void ended_before_barrier(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void deadlocked(float* out) {
  if (threadIdx.x != 5) __syncwarp();
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void diverged_warp(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(ALL, 1.0f, 0) : static_cast<float>(__any_sync(ALL, 1));
}

__global__ void absent_lane(float* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, static_cast<int>(threadIdx.x) + 1);
}

__global__ void unwritten_shared(float* out) {
  __shared__ float box[64];
  if (threadIdx.x != 9) box[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}

__global__ void unwritten_dynamic(float* out) {
  float* box = dynamic_shared<float>();
  if (threadIdx.x < 60) box[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];
}

__global__ void past_dynamic(float* out) {
  float* box = dynamic_shared<float>();
  box[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void unaligned_vector(float* out) {
  float* box = dynamic_shared<float>();
  box[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x < 8) {
    const float4 v = *reinterpret_cast<const float4*>(box + 4 * threadIdx.x + threadIdx.x / 7);
    out[threadIdx.x] = v.x + v.y + v.z + v.w;
  }
}

__global__ void unaligned_copy(float* out) {
  copy_async<16>(dynamic_shared<float>(), out + 1, threadIdx.x == 0);
  copy_wait<0>();
}

__global__ void vector_past_tensor(float* out) {
  if (threadIdx.x >= 16) return;
  copy_vector(dynamic_shared<float>() + 4 * threadIdx.x, out + 128, threadIdx.x < 15 ? 0 : 3, out);
  copy_wait<0>();
}

__global__ void no_barrier(float* out) {
  __shared__ float box[64];
  box[threadIdx.x] = 1;
  out[threadIdx.x] = box[threadIdx.x ^ 32];
}

__global__ void overwritten_too_early(float* out) {
  __shared__ float box[64];
  box[threadIdx.x] = 1;
  __syncthreads();
  const float got = box[threadIdx.x ^ 32];
  box[threadIdx.x] = got;
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];
}

__global__ void warp_race(float* out) {
  __shared__ float box[64];
  box[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = box[(threadIdx.x + 1) % 64];  // thread 31 reads another warp's
}

__global__ void copy_not_waited_for(float* out) {
  float* box = dynamic_shared<float>();
  copy_async<4>(box + threadIdx.x, out + threadIdx.x, true);
  copy_commit();
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}

__global__ void copy_of_another_thread(float* out) {
  float* box = dynamic_shared<float>();
  copy_async<4>(box + threadIdx.x, out + threadIdx.x, true);
  copy_commit();
  copy_wait<0>();
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}

__global__ void copy_group_too_new(float* out) {
  float* box = dynamic_shared<float>();
  for (int group = 0; group < 1; ++group) {
    copy_async<4>(box + threadIdx.x, out + threadIdx.x, true);
    copy_commit();
  }
  copy_wait<1>();
  __syncthreads();
  out[threadIdx.x] = box[threadIdx.x];
}

__global__ void past_tensor(float* out) { out[blockIdx.x * 64 + threadIdx.x + 1] = 0; }

__global__ void before_tensor(float* out) { out[threadIdx.x] = out[static_cast<int>(threadIdx.x) - 3]; }

__global__ void two_blocks_write(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void overflows(float* out) {
  int n = 0x7fffffff - 10;
  n += static_cast<int>(threadIdx.x);
  out[threadIdx.x] = static_cast<float>(n);
}

__global__ void past_registers(float* out) {
  float sums[4] = {0, 1, 2, 3};
  out[threadIdx.x] = sums[threadIdx.x / 12];
}

}  // namespace

#define FAULT(name)                                                              \
  CONVGEN_EXPORT int fault_##name(float* out) {                                  \
    return launch<name>(dim3(2), dim3(64), 64 * sizeof(float), 0, nullptr, out); \
  }
FAULT(ended_before_barrier)
FAULT(two_barriers)
FAULT(deadlocked)
FAULT(diverged_warp)
FAULT(absent_lane)
FAULT(unwritten_shared)
FAULT(unwritten_dynamic)
FAULT(past_dynamic)
FAULT(unaligned_vector)
FAULT(unaligned_copy)
FAULT(vector_past_tensor)
FAULT(no_barrier)
FAULT(overwritten_too_early)
FAULT(warp_race)
FAULT(copy_not_waited_for)
FAULT(copy_of_another_thread)
FAULT(copy_group_too_new)
FAULT(past_tensor)
FAULT(before_tensor)
FAULT(two_blocks_write)
FAULT(overflows)
FAULT(past_registers)

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
