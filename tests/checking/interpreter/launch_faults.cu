// One kernel for each way of hanging or failing that lies in how a launch is made: registers, kernels
// that begin early, shared memory. Every one is wrong.
#include "convgen_abi.h"
#include "pipeline.cuh"

namespace {

using namespace convgen;

constexpr int THREADS = 384;  // three warpgroups, with 168 registers each

__device__ int group() { return static_cast<int>(threadIdx.x) / 128; }

// 64 + 2 * 224 registers are more than 3 * 168.
__global__ void claim_of_more_than_there_is(float*) {
  if (group() == 0) {
    warpgroup_reg_dealloc<64>();
  } else {
    warpgroup_reg_alloc<224>();
  }
}

// The release comes behind a barrier that those who claim never reach.
__global__ void release_behind_a_claim(float*) {
  if (group() > 0) warpgroup_reg_alloc<224>();
  __syncthreads();
  if (group() == 0) warpgroup_reg_dealloc<56>();
}

__global__ void release_of_more_than_there_is(float*) { warpgroup_reg_dealloc<176>(); }

__global__ void claim_of_less(float*) { warpgroup_reg_alloc<160>(); }

__global__ void claim_by_three_warps(float*) {
  if (threadIdx.x < 96) warpgroup_reg_dealloc<152>();
}

__global__ void groups_of_two_minds(float*) {
  if (threadIdx.x < 64) {
    warpgroup_reg_dealloc<152>();
  } else {
    warpgroup_reg_dealloc<144>();
  }
}

__global__ void claim_by_half_a_warp(float*) {
  if (threadIdx.x % 32 < 16) return;
  warpgroup_reg_dealloc<152>();
}

__global__ void reads_before_it_waits(float* out) {
  const float x = out[threadIdx.x % 4];
  await_earlier_kernel();
  out[blockIdx.x * THREADS + threadIdx.x] = x;
}

// Whoever waits has told this thread nothing.
__global__ void waits_in_another_thread(float* out) {
  if (threadIdx.x == 1) await_earlier_kernel();
  if (threadIdx.x == 2) out[blockIdx.x] = 1;
}

__global__ void never_waits(float*) {}

__global__ void arrays_beside_much_dynamic_memory(float* out) {
  __shared__ float small[1];
  if (threadIdx.x == 0) small[0] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = small[0];
}

__global__ void arrays_beside_little_dynamic_memory(float* out) {
  __shared__ float large[11000];
  large[threadIdx.x] = 1;
  out[blockIdx.x * THREADS + threadIdx.x] = large[threadIdx.x];
}

__global__ void barrier_of_too_many(float*) {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 1 << 20);
}

__global__ void barrier_beyond_the_last(float*) { named_barrier_sync(16, THREADS); }

__global__ void fills(float* out) { out[threadIdx.x] = 0; }

// Right: one thread waits for all, and the others touch what was there before the launch before.
__global__ void fair_trade(const float* x, float* out) {
  const float before = x[0];
  if (threadIdx.x == 0) await_earlier_kernel();
  __syncthreads();
  if (group() == 0) {
    warpgroup_reg_dealloc<56>();
  } else {
    warpgroup_reg_alloc<224>();
  }
  out[blockIdx.x * THREADS + threadIdx.x] = before + 1;
}

}  // namespace

#define FAULT(name, shared_bytes, early)                                                  \
  CONVGEN_EXPORT int fault_##name(float* out) {                                           \
    return launch<name, early>(dim3(2), dim3(THREADS), shared_bytes, 0, nullptr, out);    \
  }
FAULT(claim_of_more_than_there_is, 0, false)
FAULT(release_behind_a_claim, 0, false)
FAULT(release_of_more_than_there_is, 0, false)
FAULT(claim_of_less, 0, false)
FAULT(claim_by_three_warps, 0, false)
FAULT(groups_of_two_minds, 0, false)
FAULT(claim_by_half_a_warp, 0, false)
FAULT(reads_before_it_waits, 0, true)
FAULT(waits_in_another_thread, 0, true)
FAULT(never_waits, 0, true)
FAULT(arrays_beside_much_dynamic_memory, 49 * 1024, false)
FAULT(arrays_beside_little_dynamic_memory, 6 * 1024, false)
FAULT(barrier_of_too_many, 0, false)
FAULT(barrier_beyond_the_last, 0, false)

CONVGEN_EXPORT int trade(const float* x, float* out) {
  const int error = launch<fills>(dim3(1), dim3(THREADS), 0, 0, nullptr, out);
  return error ? error : launch<fair_trade, true>(dim3(2), dim3(THREADS), 0, 0, nullptr, x, out);
}

// Launches of any size.
CONVGEN_EXPORT int grid(int x, int y, int z) {
  return launch<never_waits>(dim3(x, y, z), dim3(32), 0, 0, nullptr, static_cast<float*>(nullptr));
}

CONVGEN_EXPORT int shared(int bytes) {
  return launch<never_waits>(dim3(1), dim3(32), bytes, 0, nullptr, static_cast<float*>(nullptr));
}

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
