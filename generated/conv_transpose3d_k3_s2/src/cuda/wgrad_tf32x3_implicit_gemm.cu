// wgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"lines": [1]}
//
// The gradient of the weight as an implicit GEMM on Hopper's tensor cores, in 3xTF32
// (implicit_gemm/wgrad_quarters.cuh):
//
//   weight[a, b / groups, t] = sum over n, i of
//                              coarse[n, a, i] * fine[n, b, i * STRIDE + t * DILATION - PADDING]

#include "implicit_gemm/wgrad_quarters_host.cuh"

namespace {

using namespace convgen;

struct Conv {
  static constexpr int KERNEL_D = 3, KERNEL_H = 3, KERNEL_W = 3;
  static constexpr int STRIDE_D = 2, STRIDE_H = 2, STRIDE_W = 2;
  static constexpr int DILATION_D = 1, DILATION_H = 1, DILATION_W = 1;
  static constexpr int PADDING_D = 0, PADDING_H = 0, PADDING_W = 0;
  static constexpr int GROUPS = 1, TAPS = KERNEL_D * KERNEL_H * KERNEL_W;
  static constexpr int PARTS = 2;  // TF32 values of a float: 2 for the accuracy of fp32
  static constexpr bool LINEAR = false;  // one spatial dimension
};

}  // namespace

using Gemm = QuarterWgrad<Conv, Conv::PARTS, Sizes<1>>;

// Nanoseconds that the call is expected to take; -1 where it is for other kernels.
CONVGEN_EXPORT int64_t convgen_wgrad_tf32x3_implicit_gemm_expected(const ConvgenCall* call) {
  const int device = static_cast<int>(call->device);
  convgen::DeviceScope scope(device);
  convgen::DeviceLimits limits;
  if (scope.error() != cudaSuccess || convgen::device_limits(device, limits)) return -1;
  if (limits.capability != 90 || !Gemm::is_compiled(device)) return -1;
  if (!convgen::volumes_fit(*call)) return -1;
  const Gemm gemm(*call, limits);
  return gemm.found() && gemm.pays() ? static_cast<int64_t>(1e6 * gemm.expected_ms()) : -1;
}

CONVGEN_EXPORT int64_t convgen_wgrad_tf32x3_implicit_gemm_workspace(const ConvgenCall* call) {
  const int device = static_cast<int>(call->device);
  convgen::DeviceScope scope(device);  // whose code the choice asks for
  convgen::DeviceLimits limits;
  if (scope.error() != cudaSuccess || convgen::device_limits(device, limits)) return 0;
  const Gemm gemm(*call, limits);
  return gemm.found() ? gemm.workspace_bytes() : 0;
}

CONVGEN_EXPORT int convgen_wgrad_tf32x3_implicit_gemm(const ConvgenCall* call) {
  if (!convgen::volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  convgen::DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  convgen::DeviceLimits limits;
  const int error = convgen::device_limits(static_cast<int>(call->device), limits);
  if (error) return error;
  Gemm gemm(*call, limits);
  return gemm.found() ? gemm.run() : CONVGEN_TOO_LARGE;
}
