// Phases of a strided dgrad: outputs o = STRIDE * j + phase of each axis meet the same taps t,
// those with o + PADDING - t * DILATION a multiple of STRIDE, at the inputs
//
//   i = (o + PADDING - t * DILATION) / STRIDE = j + offset - m * STEP    for the m-th of them
//
// so that each phase is a gather of stride 1. All of them are tiles of one launch.
#ifndef CONVGEN_IMPLICIT_GEMM_PHASES_CUH
#define CONVGEN_IMPLICIT_GEMM_PHASES_CUH

#include "sm90.cuh"

namespace convgen {

constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

// The taps of one axis' phase.
template <int KERNEL, int STRIDE, int DILATION, int PADDING>
struct AxisPhase {
  static constexpr int NEXT_TAP = STRIDE / greatest_divisor(STRIDE, DILATION);
  static constexpr int STEP = NEXT_TAP * DILATION / STRIDE;        // of inputs, from tap to tap
  static constexpr int MOST = (KERNEL + NEXT_TAP - 1) / NEXT_TAP;  // taps of any phase
  static constexpr int REACH = (MOST - 1) * STEP;                  // of inputs, theirs
  int count, first_tap, offset;

  __host__ __device__ __forceinline__ explicit AxisPhase(int phase)
      : count(0), first_tap(0), offset(0) {
#pragma unroll
    for (int tap = KERNEL - 1; tap >= 0; --tap) {
      const int distance = phase + PADDING - tap * DILATION;
      if (distance % STRIDE != 0) continue;
      ++count, first_tap = tap, offset = distance / STRIDE;
    }
  }
};

// The taps of a phase, innermost axis fastest.
template <typename Conv>
struct Phase {
  int index_d, index_h, index_w;  // of each axis' phases
  AxisPhase<Conv::KERNEL_D, Conv::STRIDE_D, Conv::DILATION_D, Conv::PADDING_D> d;
  AxisPhase<Conv::KERNEL_H, Conv::STRIDE_H, Conv::DILATION_H, Conv::PADDING_H> h;
  AxisPhase<Conv::KERNEL_W, Conv::STRIDE_W, Conv::DILATION_W, Conv::PADDING_W> w;

  __host__ __device__ __forceinline__ explicit Phase(int index)
      : index_d(index / (Conv::STRIDE_H * Conv::STRIDE_W)),
        index_h(index / Conv::STRIDE_W % Conv::STRIDE_H),
        index_w(index % Conv::STRIDE_W),
        d(index_d),
        h(index_h),
        w(index_w) {}

  __host__ __device__ __forceinline__ int taps() const { return d.count * h.count * w.count; }
};

// The taps that a tile's outputs meet, those of its phase or all, in turn, the innermost axis
// fastest. They are counted: a thread that divided for each would take longer than its products.
template <typename Conv>
struct TapCursor {
  static constexpr bool PHASED = Conv::PHASES > 1;
  using OfPhase = Phase<Conv>;
  OfPhase phase;
  int d, h, w;

  // From the `tap`-th on, of a phase's `index`.
  __device__ __forceinline__ TapCursor(int index, int tap) : phase(index), d(0), h(0), w(0) {
    if (tap == 0) return;  // of a phase that may have none
    w = tap % width(), tap /= width();
    h = tap % height(), d = tap / height();
  }
  // Whether the next one is the first again.
  __device__ __forceinline__ bool advance() {
    if (++w < width()) return false;
    w = 0;
    if (++h < height()) return false;
    h = 0;
    if (++d < depth()) return false;
    d = 0;
    return true;
  }
  // Where its inputs begin for outputs that begin at 0.
  __device__ __forceinline__ int offset_d() const {
    return PHASED ? phase.d.offset - d * phase.d.STEP : d * Conv::DILATION_D - Conv::PADDING_D;
  }
  __device__ __forceinline__ int offset_h() const {
    return PHASED ? phase.h.offset - h * phase.h.STEP : h * Conv::DILATION_H - Conv::PADDING_H;
  }
  __device__ __forceinline__ int offset_w() const {
    return PHASED ? phase.w.offset - w * phase.w.STEP : w * Conv::DILATION_W - Conv::PADDING_W;
  }
  // Which tap of the kernel it is; a phase's in reverse, as gathers count them.
  __device__ __forceinline__ int tap() const {
    if (!PHASED) return (d * Conv::KERNEL_H + h) * Conv::KERNEL_W + w;
    const int kw = phase.w.first_tap + w * phase.w.NEXT_TAP;
    const int kh = phase.h.first_tap + h * phase.h.NEXT_TAP;
    const int kd = phase.d.first_tap + d * phase.d.NEXT_TAP;
    return Conv::TAPS - 1 - ((kd * Conv::KERNEL_H + kh) * Conv::KERNEL_W + kw);
  }
  // Taps along each axis.
  __device__ __forceinline__ int depth() const { return PHASED ? phase.d.count : Conv::KERNEL_D; }
  __device__ __forceinline__ int height() const { return PHASED ? phase.h.count : Conv::KERNEL_H; }
  __device__ __forceinline__ int width() const { return PHASED ? phase.w.count : Conv::KERNEL_W; }
};

// Along D, H and W, from one output of a tile to the next: of inputs, and of outputs.
template <typename Conv>
struct Steps {
  static constexpr bool PHASED = Conv::PHASES > 1;
  static constexpr int INPUT[3] = {PHASED ? 1 : Conv::STRIDE_D, PHASED ? 1 : Conv::STRIDE_H,
                                   PHASED ? 1 : Conv::STRIDE_W};
  static constexpr int OUTPUT[3] = {PHASED ? Conv::STRIDE_D : 1, PHASED ? Conv::STRIDE_H : 1,
                                    PHASED ? Conv::STRIDE_W : 1};
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_PHASES_CUH
