// How consumer warps tell producers that a buffer may be filled again. The other way
// round, how producers tell that it is full, where no mbarrier counts what arrives.
//
// By a named barrier for each buffer, at which those that tell only arrive. racecheck of
// compute-sanitizer does not follow these: it reports that buffers are read and written without
// order. Compiled with CONVGEN_RACECHECK (sm_90 and later) there are mbarriers instead, at which
// every thread arrives, which it follows.
#pragma once

#include "common.cuh"
#include "pipeline.cuh"

namespace convgen {

#ifdef CONVGEN_RACECHECK
constexpr bool RELEASE_BY_MBARRIER = true;
#else
constexpr bool RELEASE_BY_MBARRIER = false;
#endif

// Words of shared memory for the releases of so many buffers, a multiple of 4.
template <int BUFFERS>
constexpr int RELEASE_WORDS = RELEASE_BY_MBARRIER ? (2 * BUFFERS + 3) / 4 * 4 : 0;

// All threads of a block come here first. `words` are those of shared memory, `arrivals` the
// threads that will arrive.
template <int BUFFERS>
__device__ __forceinline__ void begin_releases(uint32_t* words, int arrivals) {
  if constexpr (RELEASE_BY_MBARRIER) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < BUFFERS; ++i) {
        mbarrier_init(reinterpret_cast<uint64_t*>(words) + i, arrivals);
      }
    }
    __syncthreads();
  }
}

// A thread is done with a buffer, has read or filled its part. Named barriers are counted from
// FIRST; `meeting` threads come to each, consumers and those that fill the buffer.
template <int FIRST>
__device__ __forceinline__ void release_buffer(uint32_t* words, int buffer, int meeting) {
  if constexpr (RELEASE_BY_MBARRIER) {
    mbarrier_arrive(reinterpret_cast<uint64_t*>(words) + buffer);
  } else {
    named_barrier_arrive(FIRST + buffer, meeting);
  }
}

// Waits until all that are to arrive for a buffer have done so `times` times (once or more).
template <int FIRST>
__device__ __forceinline__ void await_release(uint32_t* words, int buffer, int times, int meeting) {
  if constexpr (RELEASE_BY_MBARRIER) {
    mbarrier_wait(reinterpret_cast<uint64_t*>(words) + buffer, (times - 1) & 1);
  } else {
    named_barrier_sync(FIRST + buffer, meeting);
  }
}

}  // namespace convgen
