// wgrad of conv_transpose3d_k3_s2, float64.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"chain_terms": 320, "coarse_bytes": 393216, "coarse_tile_bytes": 20480, "fine_block":
//   1, "fine_bytes": 196608, "partial_bytes": 67108864, "range_positions": 2048,
//   "sums_bytes": 262144, "task_terms": 4194304, "tiles": [[1, 12], [4, 6], [8, 3]],
//   "tiles_of_16": [[1, 12], [4, 3]], "unroll": "full"}
//
// Compile as C++17 with -O3 -march=native -fopenmp -ffp-contract=fast (multiply-adds are written
// as products and sums).

#include "brgemm_swapped.h"
#include "brgemm_wgrad.h"
#include "contiguous.h"
#include "reduce.h"

// The specification, in three dimensions (D, H, W); o = i * STRIDE - PADDING + t * DILATION.
[[maybe_unused]] constexpr int KERNEL_D = 3, KERNEL_H = 3, KERNEL_W = 3;
[[maybe_unused]] constexpr int STRIDE_D = 2, STRIDE_H = 2, STRIDE_W = 2;
[[maybe_unused]] constexpr int PADDING_D = 0, PADDING_H = 0, PADDING_W = 0;
[[maybe_unused]] constexpr int DILATION_D = 1, DILATION_H = 1, DILATION_W = 1;
[[maybe_unused]] constexpr int GROUPS = 1;
[[maybe_unused]] constexpr int TAPS = KERNEL_D * KERNEL_H * KERNEL_W;
// Channel counts fixed at generation time; 0 where they are run-time values.
[[maybe_unused]] constexpr int COARSE_CHANNELS = 0;
[[maybe_unused]] constexpr int FINE_CHANNELS = 0;

namespace {

// Taps along each axis: {kernel element, source offset}.
struct AxisD {
  static constexpr int SOURCE_STRIDE = STRIDE_D, TAPS = KERNEL_D;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
};
struct AxisH {
  static constexpr int SOURCE_STRIDE = STRIDE_H, TAPS = KERNEL_H;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
};
struct AxisW {
  static constexpr int SOURCE_STRIDE = STRIDE_W, TAPS = KERNEL_W;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
};

struct Problem {
  using Storage = double;
  using Real = double;
  using AxisD = ::AxisD;
  using AxisH = ::AxisH;
  using AxisW = ::AxisW;
  static constexpr int GROUPS = ::GROUPS;
  // The convolution's result is the fine tensor: the bias gradient is its sum, else coarse's.
  static constexpr bool RESULT_IS_FINE = true;
  // Register tiles: coarse channels x columns; a column is a tap of a fine channel.
  using Tiles = std::conditional_t<VECTOR_REGISTERS >= 32,
                                   TileList<Tile<1, 12>, Tile<4, 6>, Tile<8, 3>>,
                                   TileList<Tile<1, 12>, Tile<4, 3>>>;
  // Fine channels whose columns are computed together.
  static constexpr int FINE_BLOCK = 1;
  static constexpr int64_t COARSE_TILE_BYTES = 20480;
  static constexpr int64_t COARSE_BYTES = 393216;
  static constexpr int64_t FINE_BYTES = 196608;
  static constexpr int64_t SUMS_BYTES = 262144;
  static constexpr int64_t PARTIAL_BYTES = 67108864;
  static constexpr int64_t CHAIN_TERMS = 320;
  static constexpr int64_t RANGE_POSITIONS = 2048;
  static constexpr int64_t TASK_TERMS = 4194304;

  // All columns of some coarse channels, in register tiles.
  template <class Columns>
  static void unrolled(const Columns& columns) {
    if constexpr (Columns::WIDTH == 3) {
      columns.template correlate<3>(0);  // kernel (0, 0, 0) to (0, 0, 2)
      columns.template correlate<3>(3);  // kernel (0, 1, 0) to (0, 1, 2)
      columns.template correlate<3>(6);  // kernel (0, 2, 0) to (0, 2, 2)
      columns.template correlate<3>(9);  // kernel (1, 0, 0) to (1, 0, 2)
      columns.template correlate<3>(12);  // kernel (1, 1, 0) to (1, 1, 2)
      columns.template correlate<3>(15);  // kernel (1, 2, 0) to (1, 2, 2)
      columns.template correlate<3>(18);  // kernel (2, 0, 0) to (2, 0, 2)
      columns.template correlate<3>(21);  // kernel (2, 1, 0) to (2, 1, 2)
      columns.template correlate<3>(24);  // kernel (2, 2, 0) to (2, 2, 2)
    }
    if constexpr (Columns::WIDTH == 6) {
      columns.template correlate<5>(0);  // kernel (0, 0, 0) to (0, 1, 1)
      columns.template correlate<5>(5);  // kernel (0, 1, 2) to (1, 0, 0)
      columns.template correlate<6>(10);  // kernel (1, 0, 1) to (1, 2, 0)
      columns.template correlate<5>(16);  // kernel (1, 2, 1) to (2, 0, 2)
      columns.template correlate<6>(21);  // kernel (2, 1, 0) to (2, 2, 2)
    }
    if constexpr (Columns::WIDTH == 12) {
      columns.template correlate<9>(0);  // kernel (0, 0, 0) to (0, 2, 2)
      columns.template correlate<9>(9);  // kernel (1, 0, 0) to (1, 2, 2)
      columns.template correlate<9>(18);  // kernel (2, 0, 0) to (2, 2, 2)
    }
  }
};

using Bias = BiasGradient<Problem::Storage, Problem::Real>;

bool channels_valid(const ConvgenCall& call) {
  return channels_match(call.coarse_channels, COARSE_CHANNELS, GROUPS) &&
         channels_match(call.fine_channels, FINE_CHANNELS, GROUPS);
}

int64_t workspace_bytes(const ConvgenCall& call, bool bias) {
  if (!channels_valid(call)) return 0;
  const SwappedWgrad<Problem> swapped(call);
  const BrgemmWgrad<Problem> brgemm(call);
  if (const bool swaps = swapped.suits(); swaps || brgemm.suits()) {
    const int64_t of_bias = bias ? Bias(call, Problem::RESULT_IS_FINE).workspace_bytes() : 0;
    const int64_t of_weight = swaps ? swapped.workspace_bytes() : brgemm.workspace_bytes();
    return greatest(of_weight, of_bias);
  }
  const ContiguousCall<Problem> as(call, CONVGEN_WEIGHT);
  return as.workspace_bytes(Reduce<Problem>(as.contiguous(), bias).workspace_bytes());
}

int run(const ConvgenCall& call, bool bias) {
  if (!channels_valid(call)) return CONVGEN_BAD_CHANNELS;
  const SwappedWgrad<Problem> swapped(call);
  const BrgemmWgrad<Problem> brgemm(call);
  if (const bool swaps = swapped.suits(); swaps || brgemm.suits()) {
    if (swaps)
      swapped.run();
    else
      brgemm.run(call);
    if (bias) Bias(call, Problem::RESULT_IS_FINE).run(call.workspace, call.bias);
  } else {
    ContiguousCall<Problem>(call, CONVGEN_WEIGHT).run([bias](const ConvgenCall& as) {
      Reduce<Problem>(as, bias).run(as);
    });
  }
  return CONVGEN_OK;
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_wgrad_f64_workspace(const ConvgenCall* call) {
  return workspace_bytes(*call, false);
}

CONVGEN_EXPORT int convgen_wgrad_f64(const ConvgenCall* call) {
  return run(*call, false);
}

CONVGEN_EXPORT int64_t convgen_wbgrad_f64_workspace(const ConvgenCall* call) {
  return workspace_bytes(*call, true);
}

CONVGEN_EXPORT int convgen_wbgrad_f64(const ConvgenCall* call) {
  return run(*call, true);
}

CONVGEN_EXPORT int64_t convgen_bgrad_f64_workspace(const ConvgenCall* call) {
  return Bias(*call).workspace_bytes();
}

CONVGEN_EXPORT int convgen_bgrad_f64(const ConvgenCall* call) {
  Bias(*call).run(call->workspace, call->bias);
  return CONVGEN_OK;
}
