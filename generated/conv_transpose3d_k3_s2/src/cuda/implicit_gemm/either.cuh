// A contraction that two kinds of kernels compute.
#ifndef CONVGEN_IMPLICIT_GEMM_EITHER_CUH
#define CONVGEN_IMPLICIT_GEMM_EITHER_CUH

#include <stdint.h>

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

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_EITHER_CUH
