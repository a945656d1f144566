// wgrad of conv_transpose3d_k3_s2, float64. Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"channel_block": [8, 4], "coarse_bytes": 393216, "coarse_tile_bytes": 20480, "columns": 3, "columns_of_one": 12, "fine_block": 1, "fine_bytes": 131072, "partial_bytes": 67108864, "range_positions": 2048, "sums_bytes": 262144, "task_terms": 4194304, "unroll": "full"}

//
// Compile as C++17 with -O3 -march=native -fopenmp -ffp-contract=fast (multiply-adds are written
// as products and sums).

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

// Taps along each axis: {kernel element, source offset}, by phase. Phase r holds the entries from
// FIRST[r] up to FIRST[r + 1].
struct AxisD {
  static constexpr int SOURCE_STRIDE = STRIDE_D, PHASES = 1, TAPS = KERNEL_D;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
  static constexpr int FIRST[PHASES + 1] = {0, 3};
};
struct AxisH {
  static constexpr int SOURCE_STRIDE = STRIDE_H, PHASES = 1, TAPS = KERNEL_H;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
  static constexpr int FIRST[PHASES + 1] = {0, 3};
};
struct AxisW {
  static constexpr int SOURCE_STRIDE = STRIDE_W, PHASES = 1, TAPS = KERNEL_W;
  static constexpr AxisTap TAP[TAPS] = {{0, 0}, {1, 1}, {2, 2}};
  static constexpr int FIRST[PHASES + 1] = {0, 3};
};

struct Problem {
  using Storage = double;
  using Real = double;
  using AxisD = ::AxisD;
  using AxisH = ::AxisH;
  using AxisW = ::AxisW;
  static constexpr int GROUPS = ::GROUPS;

  static constexpr bool MAYBE_ONE_COARSE = true;
  // Register tile: coarse channels x columns (below); fine channels whose columns are computed
  // together.
  static constexpr int CHANNEL_BLOCK = VECTOR_REGISTERS >= 32 ? 8 : 4;
  static constexpr int FINE_BLOCK = 1;
  static constexpr int64_t COARSE_TILE_BYTES = 20480;
  static constexpr int64_t COARSE_BYTES = 393216;
  static constexpr int64_t FINE_BYTES = 131072;
  static constexpr int64_t SUMS_BYTES = 262144;
  static constexpr int64_t PARTIAL_BYTES = 67108864;
  static constexpr int64_t RANGE_POSITIONS = 2048;
  static constexpr int64_t TASK_TERMS = 4194304;

  // All columns of a tile: the taps of each fine channel.
  template <class Tile>
  static void unrolled(const Tile& tile) {
    if constexpr (Tile::ONE) {
      tile.template correlate<9>(0);  // kernel (0, 0, 0) to (0, 2, 2)
      tile.template correlate<9>(9);  // kernel (1, 0, 0) to (1, 2, 2)
      tile.template correlate<9>(18);  // kernel (2, 0, 0) to (2, 2, 2)
    } else {
      tile.template correlate<3>(0);  // kernel (0, 0, 0) to (0, 0, 2)
      tile.template correlate<3>(3);  // kernel (0, 1, 0) to (0, 1, 2)
      tile.template correlate<3>(6);  // kernel (0, 2, 0) to (0, 2, 2)
      tile.template correlate<3>(9);  // kernel (1, 0, 0) to (1, 0, 2)
      tile.template correlate<3>(12);  // kernel (1, 1, 0) to (1, 1, 2)
      tile.template correlate<3>(15);  // kernel (1, 2, 0) to (1, 2, 2)
      tile.template correlate<3>(18);  // kernel (2, 0, 0) to (2, 0, 2)
      tile.template correlate<3>(21);  // kernel (2, 1, 0) to (2, 1, 2)
      tile.template correlate<3>(24);  // kernel (2, 2, 0) to (2, 2, 2)
    }
  }
};

Reduce<Problem> plan(const ConvgenCall& call) { return Reduce<Problem>(call); }

bool channels_valid(const ConvgenCall& call) {
  return channels_match(call.coarse_channels, COARSE_CHANNELS, GROUPS) &&
         channels_match(call.fine_channels, FINE_CHANNELS, GROUPS);
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_wgrad_f64_workspace(const ConvgenCall* call) {
  return channels_valid(*call) ? plan(*call).workspace_bytes() : 0;
}

CONVGEN_EXPORT int convgen_wgrad_f64(const ConvgenCall* call) {
  if (!channels_valid(*call)) return CONVGEN_BAD_CHANNELS;

  plan(*call).run(*call);
  return CONVGEN_OK;
}

CONVGEN_EXPORT int64_t convgen_bgrad_f64_workspace(const ConvgenCall* call) {
  return BiasGradient<Problem::Storage, Problem::Real>(*call).workspace_bytes();
}

CONVGEN_EXPORT int convgen_bgrad_f64(const ConvgenCall* call) {
  BiasGradient<Problem::Storage, Problem::Real>(*call).run(*call);
  return CONVGEN_OK;
}
