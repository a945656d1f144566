// The host's part of the weight's gradient of patches: a pack, and a product. See patches.cuh.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_PATCHES_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_PATCHES_HOST_CUH

#include "patches_host.cuh"
#include "wgrad_taps_host.cuh"

namespace convgen {

template <typename T, typename Conv, typename Sizes>
class PatchWgrad {
  using Matrix = PatchMatrix<T, Conv>;
  using Product = TapWgrad<T, PatchConv<Conv, true>, Sizes>;

 public:
  PatchWgrad(const ConvgenCall& call, const DeviceLimits& limits)
      : call_(call),
        limits_(limits),
        matrix_(call, round_up(call.fine_channels * Conv::TAPS, Matrix::VECTOR)),
        product_(product_of(call, matrix_, matrix_.bytes()), limits) {}

  bool found() const { return matrix_.fits() && product_.found(); }
  bool pays() const {
    double other = other_wgrad_ms<T, Conv>(call_, limits_.multiprocessors);
    if (sizeof(T) == 4) {
      // With few channels, contiguous ones too: of vit-b-patch, in TF32, an H200 took some 400 us
      // where this foresees 246.
      const double few = transposed_ms<T, Conv>(call_, limits_.multiprocessors);
      if (other < few) other = few;
    }
    return expected_ms() < other;
  }
  static bool is_compiled(int device) { return Product::is_compiled(device); }
  double expected_ms() const {
    return product_.expected_ms() +
           pack_clocks<T>(matrix_.elements(), limits_.multiprocessors) / CLOCKS_PER_MS;
  }
  int64_t workspace_bytes() const { return matrix_.bytes() + product_.workspace_bytes(); }

  int run() const {
    const int error = matrix_.pack(static_cast<T*>(call_.workspace));
    return error ? error : product_.run();
  }

 private:
  ConvgenCall call_;
  DeviceLimits limits_;
  Matrix matrix_;
  Product product_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_PATCHES_HOST_CUH
