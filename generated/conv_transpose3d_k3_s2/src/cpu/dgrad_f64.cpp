// dgrad of conv_transpose3d_k3_s2, float64.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"buffer_bytes": 32768, "chain_terms": 128, "scratch_bytes": 524288, "tiles": [[1, 6],
//   [4, 6], [8, 3]], "tiles_of_16": [[1, 6], [4, 3]], "unroll": "full"}
//
// Compile as C++17 with -O3 -march=native -fopenmp -ffp-contract=fast (multiply-adds are written
// as products and sums).

#include "brgemm_gather.h"
#include "brgemm_panels.h"
#include "contiguous.h"
#include "gather.h"

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
  static constexpr int SOURCE_STRIDE = 1, PHASES = STRIDE_D, TAPS = KERNEL_D;
  static constexpr AxisTap TAP[TAPS] = {{2, -1}, {0, 0}, {1, 0}};
  static constexpr int FIRST[PHASES + 1] = {0, 2, 3};
};
struct AxisH {
  static constexpr int SOURCE_STRIDE = 1, PHASES = STRIDE_H, TAPS = KERNEL_H;
  static constexpr AxisTap TAP[TAPS] = {{2, -1}, {0, 0}, {1, 0}};
  static constexpr int FIRST[PHASES + 1] = {0, 2, 3};
};
struct AxisW {
  static constexpr int SOURCE_STRIDE = 1, PHASES = STRIDE_W, TAPS = KERNEL_W;
  static constexpr AxisTap TAP[TAPS] = {{2, -1}, {0, 0}, {1, 0}};
  static constexpr int FIRST[PHASES + 1] = {0, 2, 3};
};

// Outputs at residues (0, 0, 0).
struct Phase0 {
  static constexpr int UNROLLED = 8;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (2, 2, 2) at (-1, -1, -1)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (2, 2, 0) at (-1, -1, 0)
    multiply_add(acc, x + offset[2], weight + 2 * M);  // kernel (2, 0, 2) at (-1, 0, -1)
    multiply_add(acc, x + offset[3], weight + 3 * M);  // kernel (2, 0, 0) at (-1, 0, 0)
    multiply_add(acc, x + offset[4], weight + 4 * M);  // kernel (0, 2, 2) at (0, -1, -1)
    multiply_add(acc, x + offset[5], weight + 5 * M);  // kernel (0, 2, 0) at (0, -1, 0)
    multiply_add(acc, x + offset[6], weight + 6 * M);  // kernel (0, 0, 2) at (0, 0, -1)
    multiply_add(acc, x + offset[7], weight + 7 * M);  // kernel (0, 0, 0) at (0, 0, 0)
  }
};

// Outputs at residues (0, 0, 1).
struct Phase1 {
  static constexpr int UNROLLED = 4;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (2, 2, 1) at (-1, -1, 0)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (2, 0, 1) at (-1, 0, 0)
    multiply_add(acc, x + offset[2], weight + 2 * M);  // kernel (0, 2, 1) at (0, -1, 0)
    multiply_add(acc, x + offset[3], weight + 3 * M);  // kernel (0, 0, 1) at (0, 0, 0)
  }
};

// Outputs at residues (0, 1, 0).
struct Phase2 {
  static constexpr int UNROLLED = 4;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (2, 1, 2) at (-1, 0, -1)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (2, 1, 0) at (-1, 0, 0)
    multiply_add(acc, x + offset[2], weight + 2 * M);  // kernel (0, 1, 2) at (0, 0, -1)
    multiply_add(acc, x + offset[3], weight + 3 * M);  // kernel (0, 1, 0) at (0, 0, 0)
  }
};

// Outputs at residues (0, 1, 1).
struct Phase3 {
  static constexpr int UNROLLED = 2;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (2, 1, 1) at (-1, 0, 0)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (0, 1, 1) at (0, 0, 0)
  }
};

// Outputs at residues (1, 0, 0).
struct Phase4 {
  static constexpr int UNROLLED = 4;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (1, 2, 2) at (0, -1, -1)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (1, 2, 0) at (0, -1, 0)
    multiply_add(acc, x + offset[2], weight + 2 * M);  // kernel (1, 0, 2) at (0, 0, -1)
    multiply_add(acc, x + offset[3], weight + 3 * M);  // kernel (1, 0, 0) at (0, 0, 0)
  }
};

// Outputs at residues (1, 0, 1).
struct Phase5 {
  static constexpr int UNROLLED = 2;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (1, 2, 1) at (0, -1, 0)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (1, 0, 1) at (0, 0, 0)
  }
};

// Outputs at residues (1, 1, 0).
struct Phase6 {
  static constexpr int UNROLLED = 2;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (1, 1, 2) at (0, 0, -1)
    multiply_add(acc, x + offset[1], weight + 1 * M);  // kernel (1, 1, 0) at (0, 0, 0)
  }
};

// Outputs at residues (1, 1, 1).
struct Phase7 {
  static constexpr int UNROLLED = 1;

  template <int M, int VECTORS>
  static CONVGEN_INLINE void accumulate(Vector<double> (&acc)[M][VECTORS], const double* x,
                                        const double* weight, const int64_t* offset, int64_t) {
    multiply_add(acc, x + offset[0], weight + 0 * M);  // kernel (1, 1, 1) at (0, 0, 0)
  }
};

struct Problem {
  using Storage = double;
  using Real = double;
  using AxisD = ::AxisD;
  using AxisH = ::AxisH;
  using AxisW = ::AxisW;
  static constexpr int GROUPS = ::GROUPS;
  using Epilogue = NoEpilogue;
  static constexpr bool SOURCE_IS_COARSE = true;
  // Register tiles: output channels x vectors of positions.
  using Tiles = std::conditional_t<VECTOR_REGISTERS >= 32,
                                   TileList<Tile<1, 6>, Tile<4, 6>, Tile<8, 3>>,
                                   TileList<Tile<1, 6>, Tile<4, 3>>>;
  static constexpr int64_t SCRATCH_BYTES = 524288;
  static constexpr int64_t BUFFER_BYTES = 32768;
  static constexpr int64_t CHAIN_TERMS = 128;

  // Taps that are unrolled together: all of a phase.
  static constexpr int64_t taps_together(int64_t taps, int64_t) { return taps; }

  // Calls visit with the unrolled taps of a phase.
  template <class Visit>
  static void unrolled(int64_t phase, Visit visit) {
    switch (phase) {
      case 0: return visit(Phase0{});
      case 1: return visit(Phase1{});
      case 2: return visit(Phase2{});
      case 3: return visit(Phase3{});
      case 4: return visit(Phase4{});
      case 5: return visit(Phase5{});
      case 6: return visit(Phase6{});
      case 7: return visit(Phase7{});
      default: return visit(AnyTaps{});  // none
    }
  }
};

template <class Kernel>
Kernel plan(const ConvgenCall& call) {
  return Kernel(call, call.coarse_extent, call.fine_extent, call.coarse_channels,
                call.fine_channels);
}

bool channels_valid(const ConvgenCall& call) {
  return channels_match(call.coarse_channels, COARSE_CHANNELS, GROUPS) &&
         channels_match(call.fine_channels, FINE_CHANNELS, GROUPS);
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_dgrad_f64_workspace(const ConvgenCall* call) {
  if (!channels_valid(*call)) return 0;
  const auto brgemm = plan<BrgemmGather<Problem>>(*call);
  const auto panels = plan<BrgemmPanels<Problem>>(*call);
  if (panels.suits(brgemm)) return panels.workspace_bytes();
  if (brgemm.suits()) return brgemm.workspace_bytes();
  const ContiguousCall<Problem> as(*call, CONVGEN_FINE);
  return as.workspace_bytes(plan<Gather<Problem>>(as.contiguous()).workspace_bytes());
}

CONVGEN_EXPORT int convgen_dgrad_f64(const ConvgenCall* call) {
  if (!channels_valid(*call)) return CONVGEN_BAD_CHANNELS;
  const auto brgemm = plan<BrgemmGather<Problem>>(*call);
  const auto panels = plan<BrgemmPanels<Problem>>(*call);
  if (panels.suits(brgemm))
    panels.run(*call, call->coarse, call->fine);
  else if (brgemm.suits())
    brgemm.run(*call, call->coarse, call->fine);
  else
    ContiguousCall<Problem>(*call, CONVGEN_FINE).run([](const ConvgenCall& as) {
      plan<Gather<Problem>>(as).run(as, as.coarse, as.fine);
    });
  return CONVGEN_OK;
}
