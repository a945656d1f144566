// Everything that a kernel of this library asks of the CUDA toolchain and hardware beyond plain
// CUDA C++: element conversions, asynchronous copies, dynamic shared memory and launches.
//
// Kernels include this header and nothing of CUDA's own, so that an environment that stands in for
// a GPU replaces one file: it defines CONVGEN_DEVICE_CUH and supplies the same names.
#ifndef CONVGEN_DEVICE_CUH
#define CONVGEN_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace convgen {

// ---- Element types ------------------------------------------------------------------------

using half = __half;
using bfloat16 = __nv_bfloat16;

__device__ __forceinline__ float widen(half x) { return __half2float(x); }
__device__ __forceinline__ float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void narrow(half& to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void narrow(bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float& to, float x) { to = x; }
__device__ __forceinline__ void narrow(double& to, double x) { to = x; }

// x, of which the compiler forgets where it came from: what is computed from it inside a loop stays
// there, instead of occupying a register for each of a hundred loop-invariant offsets.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Of an address in a tensor: offsets are then added to it, instead of to the tensor's own address.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Stores to global memory, also at addresses of which the compiler does not know that they lie
// there. Two words go to a multiple of 8 bytes: where a branch goes around it, the compiler takes a
// store of a struct, a vector or 64 bits apart.
__device__ __forceinline__ void store_global(void* to, uint16_t bits) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(to), "h"(bits));
}
__device__ __forceinline__ void store_global(void* to, uint32_t bits) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(bits));
}
__device__ __forceinline__ void store_global(void* to, uint2 bits) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y));
}

// Sets a flag that other threads may set as well.
__device__ __forceinline__ void raise_flag(int* flag) { *static_cast<volatile int*>(flag) = 1; }

// An address so many bytes further, which the compiler does not take apart again.
template <typename T>
__device__ __forceinline__ T* advance(T* at, uint64_t bytes) {
  uint64_t address = reinterpret_cast<uint64_t>(at) + bytes;
  asm volatile("" : "+l"(address));
  return reinterpret_cast<T*>(address);
}

// ---- Asynchronous copies, global to shared ------------------------------------------------

// Copies BYTES (4, 8 or 16, both addresses aligned to it), or writes zeros where `valid` is false
// (`from` is then not read, and may lie beside the tensor). Before sm_80 it is an ordinary copy.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {
    // What lies behind 16 bytes is read soon: level 2 fetches 128 at a time.
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(BYTES), "r"(bytes)
                 : "memory");
  }
#else
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "sizes that one access can have");
  if constexpr (BYTES == 16) {
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  } else if constexpr (BYTES == 8) {
    *static_cast<uint2*>(to) = valid ? *static_cast<const uint2*>(from) : make_uint2(0, 0);
  } else {
    *static_cast<uint32_t*>(to) = valid ? *static_cast<const uint32_t*>(from) : 0u;
  }
#endif
}

// The same of 16 bytes, by way of level 1: for what this multiprocessor reads again soon.
__device__ __forceinline__ void copy_async_cached(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  copy_async<16>(to, from, valid);
#endif
}

// Copies the first `bytes` of 16, both addresses multiples of 16, and writes zeros over the others
// (of which none is then read). A tensor that begins in the middle of the 16 bytes, at `begin`, has
// them all in memory, but the first are none of its: what is copied of them means nothing.
__device__ __forceinline__ void copy_vector(void* to, const void* from, int bytes,
                                            const void* /*begin*/) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
#else
  for (int i = 0; i < 16; ++i) {
    static_cast<char*>(to)[i] = i < bytes ? static_cast<const char*>(from)[i] : 0;
  }
#endif
}

// Of a kernel that may begin early (see launch): waits for the one before.
__device__ __forceinline__ void await_earlier_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, if it may, when all blocks have called this or ended.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Closes the group of copies that this thread has issued since the last call.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's newest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- Shared memory and launches -----------------------------------------------------------

// The block's dynamic shared memory, 16-byte aligned.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char convgen_dynamic_shared[];
  return reinterpret_cast<T*>(convgen_dynamic_shared);
}

// What a launch needs to know of a device; read once per device and process.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // dynamic shared memory that a block can opt in to
  int capability;    // ten times the compute capability
};

constexpr int MAX_DEVICES = 64;

inline cudaError_t device_limits(int device, DeviceLimits& limits) {
  static DeviceLimits known[MAX_DEVICES];
  static bool filled[MAX_DEVICES];
  if (device < 0 || device >= MAX_DEVICES) return cudaErrorInvalidDevice;
  if (!__atomic_load_n(&filled[device], __ATOMIC_ACQUIRE)) {
    // Two threads may both read the attributes; they write the same values.
    DeviceLimits fresh;
    cudaError_t error =
        cudaDeviceGetAttribute(&fresh.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&fresh.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
    if (error != cudaSuccess) return error;
    int major, minor;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return error;
    fresh.capability = 10 * major + minor;
    known[device] = fresh;
    __atomic_store_n(&filled[device], true, __ATOMIC_RELEASE);
  }
  limits = known[device];
  return cudaSuccess;
}

// Makes `device` current for its scope; costs nothing where it already is.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// Whether the code of KERNEL that the current device, `device`, runs can wait for an earlier
// kernel. What the driver compiled from PTX for an older GPU cannot, on any. Asked once per device.
template <auto KERNEL>
cudaError_t can_await(int device, bool& can) {
  static int known[MAX_DEVICES];  // PTX versions
  int version = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (version == 0) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, KERNEL)) return error;
    version = attributes.ptxVersion;
    __atomic_store_n(&known[device], version, __ATOMIC_RELAXED);
  }
  can = version >= 90;
  return cudaSuccess;
}

// Launches KERNEL asynchronously. Above 48 KiB of dynamic shared memory a kernel must opt in, once
// per device: to the whole limit, so that later launches of other sizes need nothing.
//
// An EARLY kernel may begin before the stream's kernel before it has ended, where the GPU and the
// code can do so (compute capability 9.0): it calls await_earlier_kernel() before it touches what
// that one reads or writes. All kernels before that one have ended. In a captured graph it follows
// a kernel, too.
template <auto KERNEL, bool EARLY = false, typename... Args>
cudaError_t launch(dim3 grid, dim3 block, int shared_bytes, int device, void* stream,
                   const Args&... args) {
  static bool opted_in[MAX_DEVICES];
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(device, limits)) return error;
  if (shared_bytes > 48 * 1024 && !__atomic_load_n(&opted_in[device], __ATOMIC_ACQUIRE)) {
    const cudaError_t error = cudaFuncSetAttribute(
        KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
    if (error != cudaSuccess) return error;
    __atomic_store_n(&opted_in[device], true, __ATOMIC_RELEASE);
  }
  bool may_be_early = false;
  if (EARLY && limits.capability >= 90) {
    if (const cudaError_t error = can_await<KERNEL>(device, may_be_early)) return error;
  }
  if (may_be_early) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, KERNEL, args...);
  }
  KERNEL<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

// The most threads that a block of KERNEL may have: what the code that was compiled for `device`,
// the current one, was given as launch bounds. Asked once per device. BOUND is what the host's pass
// of the compiler sees in its place, for environments without another pass.
template <auto KERNEL, int BOUND>
cudaError_t launch_bound(int device, int& threads) {
  static int known[MAX_DEVICES];
  threads = __atomic_load_n(&known[device], __ATOMIC_RELAXED);
  if (threads != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, KERNEL);
  if (error != cudaSuccess) return error;
  threads = attributes.maxThreadsPerBlock;
  __atomic_store_n(&known[device], threads, __ATOMIC_RELAXED);
  return cudaSuccess;
}

inline const char* error_name(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace convgen

#endif  // CONVGEN_DEVICE_CUH
