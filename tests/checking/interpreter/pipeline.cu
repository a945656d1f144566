// A producer warp feeds two consumer warps through a ring of stages: full and empty mbarriers, bulk
// copies; the consumers meet at a named barrier.
#include "convgen_abi.h"
#include "pipeline.cuh"

namespace {

using namespace convgen;

constexpr int STAGES = 2, CHUNK = 64, CONSUMERS = 64;

// y[i] = sum over chunks of x[chunk][(i + 1) % CHUNK], then exchanged between the two warps.
__global__ void ring_kernel(const float* x, float* y, int chunks) {
  float* const ring = dynamic_shared<float>();
  __shared__ uint64_t full[STAGES], empty[STAGES];
  __shared__ float sums[CHUNK];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], CONSUMERS);
    }
    mbarrier_fence();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x > CONSUMERS) return;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % STAGES, round = chunk / STAGES;
      if (round > 0) mbarrier_wait(&empty[stage], (round - 1) % 2);
      mbarrier_arrive_expect(&full[stage], CHUNK * sizeof(float));
      bulk_copy(ring + stage * CHUNK, x + chunk * CHUNK, CHUNK * sizeof(float), &full[stage]);
    }
    return;
  }

  float sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % STAGES, round = chunk / STAGES;
    mbarrier_wait(&full[stage], round % 2);
    sum += ring[stage * CHUNK + (threadIdx.x + 1) % CHUNK];
    mbarrier_arrive(&empty[stage]);
  }
  sums[threadIdx.x] = sum;
  named_barrier_sync(1, CONSUMERS);
  y[threadIdx.x] = sums[threadIdx.x ^ 32];
}

// One warp hands a value to another and does not wait for it.
__global__ void handover_kernel(float* y) {
  __shared__ float box[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    box[lane] = static_cast<float>(lane);
    named_barrier_arrive(2, 64);
  } else {
    named_barrier_sync(2, 64);
    y[lane] = box[31 - lane];
  }
}

}  // namespace

CONVGEN_EXPORT int ring(const float* x, float* y, int chunks) {
  return launch<ring_kernel>(1, CONSUMERS + 32, STAGES * CHUNK * sizeof(float), 0, nullptr, x, y, chunks);
}

CONVGEN_EXPORT int handover(float* y) { return launch<handover_kernel>(1, 64, 0, 0, nullptr, y); }

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
