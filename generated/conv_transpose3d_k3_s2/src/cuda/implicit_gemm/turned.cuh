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

// Of a copy in another order, which reads and writes 18 bytes per clock and multiprocessor.
template <typename T>
double pack_clocks(int64_t elements, int multiprocessors) {
  return LAUNCH_CLOCKS + 2.0 * elements * sizeof(T) / (18.0 * multiprocessors);
}

// Products per clock and multiprocessor of the kernels that read contiguous tensors as they lie, as
// measured on an H200: of strided layers in 16 bits the most of any backward (hunyuan-vae-down), of
// others a large layer's forward in TF32.
template <typename T, bool STRIDED>
constexpr double OTHER_PRODUCTS = STRIDED && sizeof(T) == 2 ? 310 : 520;

// What these are expected to take.
template <typename T, typename Conv>
double other_ms(const ConvgenCall& call, int multiprocessors) {
  const int64_t* const c = call.coarse_extent;
  const int64_t* const f = call.fine_extent;
  const double coarse = double(call.batch) * call.coarse_channels * c[0] * c[1] * c[2];
  const double fine = double(call.batch) * call.fine_channels * f[0] * f[1] * f[2];
  const double products = coarse * (call.fine_channels / Conv::GROUPS) * Conv::TAPS;
  constexpr bool STRIDED = Conv::STRIDE_D * Conv::STRIDE_H * Conv::STRIDE_W > 1;
  const double arithmetic = products / OTHER_PRODUCTS<T, STRIDED>;
  const double memory = (coarse + fine) * sizeof(T) / 18;
  return (arithmetic > memory ? arithmetic : memory) / multiprocessors / CLOCKS_PER_MS;
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_TURNED_CUH
