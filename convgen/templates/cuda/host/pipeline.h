// Named barriers, mbarriers and bulk copies: the names of pipeline.cuh, for the host.
#pragma once

#include "interpreter.h"

#define CONVGEN_PIPELINE_CUH

namespace convgen {
namespace host {

void named_barrier(int id, int threads, bool wait, Site site);
void mbarrier_init(uint64_t* barrier, int arrivals, Site site);
void mbarrier_arrive(uint64_t* barrier, int bytes, Site site);
void mbarrier_wait(uint64_t* barrier, int parity, Site site);
void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, Site site);
void mbarrier_fence();
void bulk_fence();
void trade_registers(int count, bool claims, Site site);

}  // namespace host

#define CONVGEN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void named_barrier_sync(int id, int threads, CONVGEN_SITE) {
  host::named_barrier(id, threads, true, {file, line});
}

inline void named_barrier_arrive(int id, int threads, CONVGEN_SITE) {
  host::named_barrier(id, threads, false, {file, line});
}

inline void mbarrier_init(uint64_t* barrier, int arrivals, CONVGEN_SITE) {
  host::mbarrier_init(barrier, arrivals, {file, line});
}

inline void mbarrier_arrive(uint64_t* barrier, CONVGEN_SITE) {
  host::mbarrier_arrive(barrier, 0, {file, line});
}

inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, CONVGEN_SITE) {
  host::mbarrier_arrive(barrier, bytes, {file, line});
}

inline void mbarrier_wait(uint64_t* barrier, int parity, CONVGEN_SITE) {
  host::mbarrier_wait(barrier, parity, {file, line});
}

inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, CONVGEN_SITE) {
  host::bulk_copy(to, from, bytes, barrier, {file, line});
}

inline void mbarrier_fence() { host::mbarrier_fence(); }
inline void bulk_fence() { host::bulk_fence(); }

template <int COUNT>
inline void warpgroup_reg_dealloc(CONVGEN_SITE) {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
#if defined(CONVGEN_HOST_SM_90A)
  host::trade_registers(COUNT, false, {file, line});
#endif
}

template <int COUNT>
inline void warpgroup_reg_alloc(CONVGEN_SITE) {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
#if defined(CONVGEN_HOST_SM_90A)
  host::trade_registers(COUNT, true, {file, line});
#endif
}

#undef CONVGEN_SITE

}  // namespace convgen
