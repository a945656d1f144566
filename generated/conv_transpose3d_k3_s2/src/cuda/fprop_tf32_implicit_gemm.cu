// fprop of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"halo_lines": [32, 24, 16, 8], "tap_lines": [32, 16, 8]}
//
// An implicit GEMM on Hopper's tensor cores, channels side by side: implicit_gemm/kernel.cuh.
// On other GPUs since sm_80: implicit_gemm/multistage.cuh.
// As a gather, o = i * STRIDE + t * DILATION - PADDING:
//
//   coarse[n, a, i] = bias[a] + sum over b, t of fine[n, b, o] * weight[a, b / groups, t]

#include "implicit_gemm/host.cuh"
#include "implicit_gemm/either.cuh"
#include "implicit_gemm/multistage_host.cuh"

namespace {

using namespace convgen;

using T = float;  // elements in memory

struct Conv {
  static constexpr int KERNEL_D = 3, KERNEL_H = 3, KERNEL_W = 3;
  static constexpr int STRIDE_D = 2, STRIDE_H = 2, STRIDE_W = 2;
  static constexpr int DILATION_D = 1, DILATION_H = 1, DILATION_W = 1;
  static constexpr int PADDING_D = 0, PADDING_H = 0, PADDING_W = 0;
  static constexpr int GROUPS = 1, TAPS = KERNEL_D * KERNEL_H * KERNEL_W;
  static constexpr int PARTS = 1;  // TF32 values of a float: 2 for the accuracy of fp32
  static constexpr bool LINEAR = false;  // one spatial dimension
  static constexpr bool HAS_EPILOGUE = false;
  static constexpr int PHASES = 1;  // of a strided dgrad
  static constexpr Major WEIGHTS = Major::K;  // as they lie
};

Operands operands_of(const ConvgenCall& call) {
  Operands o = {};
  o.call = &call;
  o.input = call.fine, o.weight = call.weight, o.bias = call.bias;
  o.output = call.coarse, o.workspace = call.workspace;
  o.device = static_cast<int>(call.device), o.stream = call.stream, o.batch = call.batch;
  o.input_channels = call.fine_channels, o.output_channels = call.coarse_channels;
  for (int i = 0; i < 3; ++i) {
    o.input_extent[i] = call.fine_extent[i], o.output_extent[i] = call.coarse_extent[i];
  }
  o.input_channels_last = call.channels_last & CONVGEN_FINE;
  o.output_channels_last = call.channels_last & CONVGEN_COARSE;
  o.weight_channels_last = call.channels_last & CONVGEN_WEIGHT;
  return o;
}

}  // namespace

// Sizes of Hopper's tiles, lines of a consumer: with a halo, of single taps.
using Hopper = ImplicitGemm<T, Conv, false, Sizes<32, 24, 16, 8>, Sizes<32, 16, 8>>;
using Gemm = ByDevice<Hopper, Multistage<T, Conv, false>>;

// Nanoseconds that the call is expected to take; -1 where it is for other kernels.
CONVGEN_EXPORT int64_t convgen_fprop_tf32_implicit_gemm_expected(const ConvgenCall* call) {
  const int device = static_cast<int>(call->device);
  convgen::DeviceScope scope(device);
  convgen::DeviceLimits limits;
  if (scope.error() != cudaSuccess || convgen::device_limits(device, limits)) return -1;
  if (limits.capability < 80 || !Gemm::is_compiled(device)) return -1;
  if (!convgen::volumes_fit(*call)) return -1;
  const Gemm gemm(operands_of(*call), limits);
  return gemm.found() && gemm.pays() ? static_cast<int64_t>(1e6 * gemm.expected_ms()) : -1;
}

CONVGEN_EXPORT int64_t convgen_fprop_tf32_implicit_gemm_workspace(const ConvgenCall* call) {
  const int device = static_cast<int>(call->device);
  convgen::DeviceScope scope(device);  // whose code the choice asks for
  convgen::DeviceLimits limits;
  if (scope.error() != cudaSuccess || convgen::device_limits(device, limits)) return 0;
  const Gemm gemm(operands_of(*call), limits);
  return gemm.found() ? gemm.workspace_bytes() : 0;
}

CONVGEN_EXPORT int convgen_fprop_tf32_implicit_gemm(const ConvgenCall* call) {
  if (!convgen::volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  convgen::DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  convgen::DeviceLimits limits;
  const int error = convgen::device_limits(static_cast<int>(call->device), limits);
  if (error) return error;
  Gemm gemm(operands_of(*call), limits);
  return gemm.found() ? gemm.run() : CONVGEN_TOO_LARGE;
}
