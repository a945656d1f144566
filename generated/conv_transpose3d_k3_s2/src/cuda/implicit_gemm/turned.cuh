// Outputs that leave with their channels side by side and are turned then, and what packs pay from.
#ifndef CONVGEN_IMPLICIT_GEMM_TURNED_CUH
#define CONVGEN_IMPLICIT_GEMM_TURNED_CUH

#include "../transpose.cuh"
#include "call.cuh"

namespace convgen {

// (N, positions, C) at `turned` -> (N, C, positions), the call's output.
template <typename T>
int turn_output(const Operands& call, const void* turned) {
  const int64_t* e = call.output_extent;
  return transpose(static_cast<T*>(call.output), static_cast<const T*>(turned), call.batch,
                   e[0] * e[1] * e[2], call.output_channels, call.device, call.stream);
}

// Of a copy in another order, of which so many are written.
template <typename T>
double pack_clocks(int64_t elements, int multiprocessors, int copies = 1) {
  const double bytes = (1.0 + copies) * elements * sizeof(T);
  return LAUNCH_CLOCKS + bytes / (COPY_BYTES_PER_CLOCK * multiprocessors);
}

// Products per clock and multiprocessor of the kernels that read contiguous tensors as they lie,
// with channels in multiples of OTHER_CHANNELS, as measured on an H200: of strided layers in 16
// bits the most of any backward (hunyuan-vae-down; of one tap, resnet50-shortcut), of others a
// large layer's forward in TF32, and in 3xTF32 (KernelBench 61: 3.09 ms).
template <typename T, typename Conv>
constexpr double OTHER_PRODUCTS =
    Conv::PARTS == 2                                                          ? 186
    : sizeof(T) == 4 || Conv::STRIDE_D * Conv::STRIDE_H * Conv::STRIDE_W == 1 ? 520
    : Conv::TAPS == 1                                                         ? 73
                                                                              : 310;

// Channels of either tensor, a multiple of which these rates are for. With fewer, the others have
// products of eights.
constexpr int OTHER_CHANNELS = 16;
inline int64_t other_channels(int64_t channels) {
  return round_up(channels, channels < OTHER_CHANNELS ? OTHER_CHANNELS / 2 : OTHER_CHANNELS);
}

// What these are expected to take.
template <typename T, typename Conv>
double other_ms(const ConvgenCall& call, int multiprocessors) {
  const int64_t* const c = call.coarse_extent;
  const int64_t* const f = call.fine_extent;
  const double coarse = double(call.batch) * call.coarse_channels * c[0] * c[1] * c[2];
  const double fine = double(call.batch) * call.fine_channels * f[0] * f[1] * f[2];
  const double positions = double(call.batch) * Conv::GROUPS * c[0] * c[1] * c[2];
  const double products = positions * other_channels(call.coarse_channels / Conv::GROUPS) *
                          other_channels(call.fine_channels / Conv::GROUPS) * Conv::TAPS;
  const double arithmetic = products / OTHER_PRODUCTS<T, Conv>;
  const double memory = (coarse + fine) * sizeof(T) / COPY_BYTES_PER_CLOCK;
  return (arithmetic > memory ? arithmetic : memory) / multiprocessors / CLOCKS_PER_MS;
}
// The same of a gather, with what it takes beside: the least of all layers (segresnet-up) takes 12
// us.
template <typename T, typename Conv>
double other_gather_ms(const ConvgenCall& call, int multiprocessors) {
  return other_ms<T, Conv>(call, multiprocessors) + 0.008;
}

// ---- Calls in channels_last -------------------------------------------------------------------
//
// With few channels the kernels that read contiguous tensors as they lie may be quicker, though
// tensors are transposed for them, and the result. What follows is what an H200 took
// (figures/h200_networks_bf16.json, figures/h200_networks_tf32.json).

// Products per clock and multiprocessor with channels padded to eights: 16 -> 16 channels, k3, of
// 224 x 224 x 144 positions (segresnet-1) take 817 us, in TF32 1186. Of 1 -> 32, k3 (nnunet-stem),
// and 3 -> 64, k7 s2 (resnet50-stem), they are 200 to 300 in both, of 96 -> 3, k3 (wan-vae-out),
// fewer.
template <typename T>
constexpr double FEW_PRODUCTS = sizeof(T) == 2 ? 264 : 182;
constexpr int FEW_MULTIPLE = 8;
// Of their bytes, one kernel's after another: 32 -> 3, k1 (nnunet-head), takes 117 us, 1.6 times
// what its tensors take at the speed of memory.
constexpr double FEW_TRAFFIC = 1.6;
// What a small call takes beside that, and beside what these kernels take unforeseen: 16 -> 32, k3
// s2, at 24^3 positions (monai-unet-down) takes 35 us, and 45 where 35 were foreseen.
constexpr double FEW_CLOCKS = 12e-3 * CLOCKS_PER_MS;
// Of a transposition: 3.8 TB/s, and 3.5 us with its launch.
constexpr double TRANSPOSED_BYTES_PER_CLOCK = 16.7, TRANSPOSE_CLOCKS = 3.5e-3 * CLOCKS_PER_MS;
// Of a multiprocessor for a position, where results of 16 bits leave element by element into lines
// of channels: so much longer nnunet-head's and wan-vae-out's tiles take than those that leave
// whole.
constexpr double UNALIGNED_STORE_CLOCKS = 9.4;

template <typename T>
double unaligned_store_clocks(const Operands& call, bool leaves_by_tma,
                              const DeviceLimits& limits) {
  if (sizeof(T) == 4 || !call.output_channels_last || leaves_by_tma) return 0;
  const int64_t* const e = call.output_extent;
  return UNALIGNED_STORE_CLOCKS * call.batch * e[0] * e[1] * e[2] / limits.multiprocessors;
}

// What a call takes if its tensors are transposed where they lie channels_last. The weight is
// small: it only costs a launch.
template <typename T, typename Conv>
double transposed_ms(const ConvgenCall& call, int multiprocessors) {
  const auto elements = [&](int64_t channels, const int64_t (&extent)[3]) {
    return double(call.batch) * channels * extent[0] * extent[1] * extent[2];
  };
  const auto padded = [&](int64_t channels) {
    return double(round_up(channels / Conv::GROUPS, FEW_MULTIPLE));
  };
  const double coarse = elements(call.coarse_channels, call.coarse_extent);
  const double fine = elements(call.fine_channels, call.fine_extent);
  const double products = elements(Conv::GROUPS, call.coarse_extent) * Conv::TAPS *
                          padded(call.coarse_channels) * padded(call.fine_channels);
  const double arithmetic = products / FEW_PRODUCTS<T>;
  const double memory = FEW_TRAFFIC * (coarse + fine) * sizeof(T) / COPY_BYTES_PER_CLOCK;
  double clocks = arithmetic > memory ? arithmetic : memory, launches = 0;
  for (const int operand : {CONVGEN_COARSE, CONVGEN_FINE, CONVGEN_WEIGHT}) {
    if (!(call.channels_last & operand)) continue;
    ++launches;
    const double moved = operand == CONVGEN_COARSE ? coarse : operand == CONVGEN_FINE ? fine : 0;
    clocks += 2 * moved * sizeof(T) / TRANSPOSED_BYTES_PER_CLOCK;
  }
  return (clocks / multiprocessors + launches * TRANSPOSE_CLOCKS + FEW_CLOCKS) / CLOCKS_PER_MS;
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_TURNED_CUH
