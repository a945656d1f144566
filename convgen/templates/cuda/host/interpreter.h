// The interpreter's inside as kernels see it: where a thread is, and what makes it wait.
//
// Every thread of a block is a fiber. It runs until it waits (a barrier, a warp collective) or
// ends; then the next one runs. A block stays on one host thread, so that `thread_local` is shared
// memory. A fault ends the block: it is described, and the launch returns cudaErrorLaunchFailure.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace convgen {
namespace host {

// ---- Where the calling thread is ------------------------------------------------------------

// Constant within one thread of the kernel, hence within every function that asks.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_extent();
__attribute__((const)) dim3 grid_extent();
__attribute__((const)) unsigned lane_index();
__attribute__((const)) void* dynamic_shared();
void await_earlier_kernel();

// A place in the source.
struct Site {
  const char* file;
  int line;
};

// ---- What makes it wait ---------------------------------------------------------------------

// __syncthreads(): every thread of the block, at the same place of the source.
void block_barrier(Site site);

// Warp collectives: wait for all lanes of `mask` that have not ended.
void warp_barrier(unsigned mask, Site site);
uint64_t warp_shuffle(unsigned mask, uint64_t value, int source_lane, Site site);
unsigned warp_ballot(unsigned mask, bool predicate, Site site);

// Sets a flag to 1, which others may do at the same time.
void raise_flag(int* flag, Site site);

// Asynchronous copies to shared memory happen as late as they may: when the issuing thread waits
// for their group. Until then the destination holds NaN.
void copy_async(void* to, const void* from, int bytes, bool valid, Site site);
void copy_vector(void* to, const void* from, int bytes, const void* begin, Site site);
void copy_commit();
void copy_wait(int pending);

// ---- Launches -------------------------------------------------------------------------------

struct Launch {
  const char* kernel;  // a signature that ends in "KERNEL = <name>]" or "; ..." (see launch())
  dim3 grid, block;
  int shared_bytes;
  bool early;  // it may begin before the kernel before it has ended
  int bound;   // threads of a block that the kernel is compiled for, or 0: those of this launch
  void (*body)(const void* arguments);  // one thread
  const void* arguments;
};

// Runs all blocks and returns cudaSuccess, or cudaErrorLaunchFailure after a fault, or what CUDA
// says to a launch that it refuses.
cudaError_t run(const Launch& launch);

// The device that the interpreter stands in for.
int multiprocessors();
int shared_limit_bytes();

// Describes the last fault for cudaErrorLaunchFailure.
const char* error_text(int code);

// Block and thread of the caller, for debuggers: `call convgen::host::where()`.
const char* where();

}  // namespace host
}  // namespace convgen
