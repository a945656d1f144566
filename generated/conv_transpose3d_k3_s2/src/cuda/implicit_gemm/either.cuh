// A contraction that two kinds of kernels compute.
#ifndef CONVGEN_IMPLICIT_GEMM_EITHER_CUH
#define CONVGEN_IMPLICIT_GEMM_EITHER_CUH

#include <stdint.h>

#include <optional>
#include <type_traits>

#include "../mma.cuh"

namespace convgen {

// For each call the one that is expected to take less time, of those whose packs pay.
template <typename First, typename Second>
class Either {
 public:
  template <typename Call, typename Limits>
  Either(const Call& call, const Limits& limits)
      : first_(call, limits), second_(call, limits), takes_first_(prefers_first()) {}

  bool found() const { return first_.found() || second_.found(); }
  bool pays() const { return takes_first_ ? first_.pays() : second_.pays(); }
  static bool is_compiled(int device) {
    return First::is_compiled(device) && Second::is_compiled(device);
  }
  double expected_ms() const { return takes_first_ ? first_.expected_ms() : second_.expected_ms(); }
  int64_t workspace_bytes() const {
    return takes_first_ ? first_.workspace_bytes() : second_.workspace_bytes();
  }
  int run() { return takes_first_ ? first_.run() : second_.run(); }

 private:
  bool prefers_first() const {
    if (!first_.found() || !second_.found()) return first_.found();
    if (first_.pays() != second_.pays()) return first_.pays();
    return first_.expected_ms() <= second_.expected_ms();
  }

  First first_;
  Second second_;
  bool takes_first_;
};

// Kernels of Hopper's own where their code runs, else those of all GPUs since sm_80.
template <typename Hopper, typename Others>
class HopperOrOthers {
 public:
  template <typename Call>
  HopperOrOthers(const Call& call, const DeviceLimits& limits) {
    if (limits.capability == 90 && Hopper::is_compiled(call.device)) {
      hopper_.emplace(call, limits);
    } else {
      others_.emplace(call, limits);
    }
  }

  bool found() const { return hopper_ ? hopper_->found() : others_->found(); }
  bool pays() const { return hopper_ ? hopper_->pays() : others_->pays(); }
  static bool is_compiled(int device) {
    return Hopper::is_compiled(device) || Others::is_compiled(device);
  }
  double expected_ms() const { return hopper_ ? hopper_->expected_ms() : others_->expected_ms(); }
  int64_t workspace_bytes() const {
    return hopper_ ? hopper_->workspace_bytes() : others_->workspace_bytes();
  }
  int run() { return hopper_ ? hopper_->run() : others_->run(); }

 private:
  std::optional<Hopper> hopper_;
  std::optional<Others> others_;
};

// What nvcc compiles this unit for. Where that is Hopper alone, or where it is not among it, one of
// both is not compiled.
#ifdef __CUDA_ARCH_LIST__
constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};
#else
constexpr int ARCHITECTURES[] = {HAS_WGMMA ? 900 : 800};
#endif
constexpr bool compiles_for(bool hopper) {
  for (const int each : ARCHITECTURES) {
    if ((each == 900) == hopper) return true;
  }
  return false;
}

template <typename Hopper, typename Others>
using ByDevice = std::conditional_t<
    !compiles_for(false), Hopper,
    std::conditional_t<compiles_for(true), HopperOrOthers<Hopper, Others>, Others>>;

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_EITHER_CUH
