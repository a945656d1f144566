// CUDA's language on the host, included before every kernel source that the interpreter compiles:
//
//   c++ -std=c++17 -x c++ -include convgen_host.cuh ... kernel.cu
//
// It takes the place of device.cuh, mma.cuh, pipeline.cuh and sm90.cuh (defining their guards, it leaves
// those files empty) and of everything that nvcc knows without an include. What no kernel uses does
// not exist here and fails to compile; the commonest such names say so.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <initializer_list>

#include "half.h"
#include "interpreter.h"
#include "pipeline.h"
#include "sm90.h"
#include "tensor_core.h"
#include "types.h"

#define CONVGEN_DEVICE_CUH
#define CONVGEN_INTERPRETED 1

// ---- Keywords -------------------------------------------------------------------------------

// Kernels stay functions of their own, for breakpoints and backtraces.
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// A block runs on one host thread. The tag becomes part of the symbol's name, by which
// shared_arrays.cpp finds them.
#define __shared__ static thread_local __attribute__((abi_tag("convgen_shared")))

#define threadIdx (::convgen::host::thread_index())
#define blockIdx (::convgen::host::block_index())
#define blockDim (::convgen::host::block_extent())
#define gridDim (::convgen::host::grid_extent())
constexpr int warpSize = 32;

// Where a function was called: parameters with these defaults.
#define CONVGEN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- Synchronization ------------------------------------------------------------------------

inline void __syncthreads(CONVGEN_SITE) { convgen::host::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CONVGEN_SITE) {
  convgen::host::warp_barrier(mask, {file, line});
}

// The interpreter's memory is always consistent; ordering is the barriers' business.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Warps ----------------------------------------------------------------------------------

namespace convgen {
namespace host {

template <typename T>
inline T shuffle(unsigned mask, T value, int source_lane, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = warp_shuffle(mask, bits, source_lane, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// First lane of the caller's segment of `width` lanes.
inline int segment(int width) { return static_cast<int>(lane_index()) & ~(width - 1); }

}  // namespace host
}  // namespace convgen

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CONVGEN_SITE) {
  using namespace convgen::host;
  return shuffle(mask, value, segment(width) + (source & (width - 1)), {file, line});
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                        CONVGEN_SITE) {
  using namespace convgen::host;
  const int lane = static_cast<int>(lane_index()), source = lane - static_cast<int>(delta);
  return shuffle(mask, value, source < segment(width) ? lane : source, {file, line});
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                          CONVGEN_SITE) {
  using namespace convgen::host;
  const int lane = static_cast<int>(lane_index()), source = lane + static_cast<int>(delta);
  return shuffle(mask, value, source >= segment(width) + width ? lane : source, {file, line});
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                         CONVGEN_SITE) {
  using namespace convgen::host;
  const int lane = static_cast<int>(lane_index()), source = lane ^ lane_mask;
  return shuffle(mask, value, source >= segment(width) + width ? lane : source, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CONVGEN_SITE) {
  return convgen::host::warp_ballot(mask, predicate != 0, {file, line});
}

inline int __any_sync(unsigned mask, int predicate, CONVGEN_SITE) {
  return convgen::host::warp_ballot(mask, predicate != 0, {file, line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate, CONVGEN_SITE) {
  return convgen::host::warp_ballot(mask, predicate == 0, {file, line}) == 0;
}

// ---- Arithmetic -----------------------------------------------------------------------------

#define CONVGEN_MINMAX(T)                             \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
CONVGEN_MINMAX(int)
CONVGEN_MINMAX(unsigned)
CONVGEN_MINMAX(long)
CONVGEN_MINMAX(unsigned long)
CONVGEN_MINMAX(long long)
CONVGEN_MINMAX(unsigned long long)
#undef CONVGEN_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
// Exact where the exponents of a * b and c lie near each other, as in roundings.
inline float __fmaf_rz(float a, float b, float c) {
  const double sum = static_cast<double>(a) * b + c;
  const float nearest = static_cast<float>(sum);
  return fabs(static_cast<double>(nearest)) > fabs(sum) && isfinite(sum) ? nextafterf(nearest, 0.0f)
                                                                         : nearest;
}
// Bytes 0 to 3 are x's, 4 to 7 y's; the nibbles of the selector pick four.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t{y} << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return static_cast<int>(convgen::host::bits_of(x)); }
inline unsigned __float_as_uint(float x) { return convgen::host::bits_of(x); }
inline float __int_as_float(int x) { return convgen::host::float_of(static_cast<uint32_t>(x)); }
inline float __uint_as_float(unsigned x) { return convgen::host::float_of(x); }

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}

// ---- Copies of bytes ------------------------------------------------------------------------

// The compiler's hooks do not see what the C library's functions access.
#if defined(CONVGEN_CHECKED)
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);

namespace convgen {
namespace host {

__forceinline__ void* copy_bytes(void* to, const void* from, size_t bytes) {
  if (bytes > 0) __tsan_read_range(const_cast<void*>(from), bytes);
  if (bytes > 0) __tsan_write_range(to, bytes);
  return __builtin_memcpy(to, from, bytes);
}

__forceinline__ void* set_bytes(void* to, int value, size_t bytes) {
  if (bytes > 0) __tsan_write_range(to, bytes);
  return __builtin_memset(to, value, bytes);
}

}  // namespace host
}  // namespace convgen

#define memcpy(to, from, bytes) (::convgen::host::copy_bytes(to, from, bytes))
#define memset(to, value, bytes) (::convgen::host::set_bytes(to, value, bytes))
#endif

// ---- What does not exist here ---------------------------------------------------------------

#define CONVGEN_MISSING(name)                                                                 \
  template <typename... Args>                                                                 \
  __attribute__((unavailable(                                                                 \
      "not in the interpreter: add it to convgen/templates/cuda/host/convgen_host.cuh"))) int \
  name(Args...);
CONVGEN_MISSING(__activemask)
CONVGEN_MISSING(__match_any_sync)
CONVGEN_MISSING(__match_all_sync)
CONVGEN_MISSING(__reduce_add_sync)
CONVGEN_MISSING(__reduce_min_sync)
CONVGEN_MISSING(__reduce_max_sync)
CONVGEN_MISSING(__nanosleep)
CONVGEN_MISSING(__hfma2)
CONVGEN_MISSING(atomicAdd)
CONVGEN_MISSING(atomicCAS)
CONVGEN_MISSING(atomicExch)
CONVGEN_MISSING(atomicMax)
CONVGEN_MISSING(atomicMin)
#undef CONVGEN_MISSING

// ---- device.cuh -----------------------------------------------------------------------------

namespace convgen {

inline float widen(half x) { return host::half_value(x.bits); }
inline float widen(bfloat16 x) { return host::bfloat16_value(x.bits); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(half& to, float x) { to.bits = host::half_bits(x); }
inline void narrow(bfloat16& to, float x) { to.bits = host::bfloat16_bits(x); }
inline void narrow(float& to, float x) { to = x; }
inline void narrow(double& to, double x) { to = x; }

inline int opaque(int x) { return x; }
template <typename T>
inline const T* opaque(const T* x) {
  return x;
}

template <int BYTES>
inline void copy_async(void* to, const void* from, bool valid, CONVGEN_SITE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "sizes that one access can have");
  host::copy_async(to, from, BYTES, valid, {file, line});
}

inline void copy_async_cached(void* to, const void* from, bool valid, CONVGEN_SITE) {
  host::copy_async(to, from, 16, valid, {file, line});
}

inline void copy_vector(void* to, const void* from, int bytes, const void* begin, CONVGEN_SITE) {
  host::copy_vector(to, from, bytes, begin, {file, line});
}

inline void raise_flag(int* flag, CONVGEN_SITE) { host::raise_flag(flag, {file, line}); }

inline void await_earlier_kernel() { host::await_earlier_kernel(); }
inline void let_next_kernel_begin() {}

template <typename T>
inline T* advance(T* at, uint64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<uint64_t>(at) + bytes);
}

inline void store_global(void* to, uint16_t bits) { *static_cast<uint16_t*>(to) = bits; }
inline void store_global(void* to, uint32_t bits) { *static_cast<uint32_t*>(to) = bits; }
inline void store_global(void* to, uint2 bits) { *static_cast<uint2*>(to) = bits; }

inline void copy_commit() { host::copy_commit(); }

template <int PENDING>
inline void copy_wait() {
  static_assert(PENDING >= 0, "a number of groups");
  host::copy_wait(PENDING);
}

template <typename T>
inline T* dynamic_shared() {
  return static_cast<T*>(host::dynamic_shared());
}

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // dynamic shared memory that a block can opt in to
  int capability;    // ten times the compute capability
};

constexpr int MAX_DEVICES = 64;

inline cudaError_t device_limits(int device, DeviceLimits& limits) {
  if (device < 0 || device >= MAX_DEVICES) return cudaErrorInvalidDevice;
  limits = {host::multiprocessors(), host::shared_limit_bytes(), HAS_WGMMA ? 90 : 80};
  return cudaSuccess;
}

namespace host {
// Of a kernel whose launch bound was asked for; else 0.
template <auto KERNEL>
inline int known_bound = 0;
}  // namespace host

// BOUND is KERNEL's launch bound as this compiler sees it, the only one there is here.
template <auto KERNEL, int BOUND>
inline cudaError_t launch_bound(int, int& threads) {
  threads = host::known_bound<KERNEL> = BOUND;
  return cudaSuccess;
}

class DeviceScope {
 public:
  explicit DeviceScope(int device)
      : error_(device < 0 || device >= MAX_DEVICES ? cudaErrorInvalidDevice : cudaSuccess) {}
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
};

// Runs the kernel to its end before it returns. Arguments are copied, as CUDA does.
template <auto KERNEL, bool EARLY = false, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, int shared_bytes, int, void*, const Args&... args) {
  auto body = [args...] { KERNEL(args...); };
  using Body = decltype(body);
  host::Launch launch = {__PRETTY_FUNCTION__,
                         grid,
                         block,
                         shared_bytes,
                         EARLY,
                         host::known_bound<KERNEL>,
                         [](const void* self) { (*static_cast<const Body*>(self))(); },
                         &body};
  return host::run(launch);
}

inline const char* error_name(int code) { return host::error_text(code); }

}  // namespace convgen

#undef CONVGEN_SITE
