// What producers and consumers within a thread block meet at: named barriers, and the mbarriers and
// bulk copies of sm_90.
//
// An environment that stands in for a GPU replaces this file: it defines CONVGEN_PIPELINE_CUH and
// supplies the same names.
#ifndef CONVGEN_PIPELINE_CUH
#define CONVGEN_PIPELINE_CUH

#include "device.cuh"

namespace convgen {

// ---- Named barriers -------------------------------------------------------------------------

// Waits until `threads` threads (a multiple of 32) have come to barrier `id`, 1 to 15, by either
// function; those of named_barrier_arrive do not wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers: phases that end when all arrivals and all bytes are in -----------------------

// A barrier in shared memory, of phases with `arrivals` arrivals each. Other threads may use it
// after mbarrier_fence() and a __syncthreads().
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
               "r"(arrivals)
               : "memory");
}

// Makes initialized barriers visible to bulk copies.
__device__ __forceinline__ void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
               : "memory");
}

// Arrives, and lets the current phase wait for `bytes` of bulk copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the current phase if its parity (0 for the first) is `parity`; a phase of
// the other parity means that the awaited one has ended. Compiled with CONVGEN_LONGEST_WAIT, a
// number of tries that take microseconds each, a launch fails that would wait for ever.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
#ifdef CONVGEN_LONGEST_WAIT
  for (int tries = 0; tries < CONVGEN_LONGEST_WAIT; ++tries) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "r"(parity)
        : "memory");
    if (done) return;
  }
  asm volatile("trap;");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(parity)
      : "memory");
#endif
}

// ---- Bulk copies, global to shared ----------------------------------------------------------

// One thread copies `bytes`, a multiple of 16, between addresses that are; the current phase of
// `barrier` counts them.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(bytes), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
      : "memory");
}

// Orders this thread's accesses to shared memory before bulk copies that it issues, or that are
// issued after a barrier.
__device__ __forceinline__ void bulk_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Registers, traded between the warps of a block (sm_90a) --------------------------------

// All warps of a group of four come here; COUNT, a multiple of 8, is what each thread keeps. A
// claim waits until others have released enough.
template <int COUNT>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

template <int COUNT>
__device__ __forceinline__ void warpgroup_reg_alloc() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

}  // namespace convgen

#endif  // CONVGEN_PIPELINE_CUH
