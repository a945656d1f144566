// Rounding to TF32 as far as the tensor core looks.
#pragma once

#include "device.cuh"

namespace convgen {

// The nearest TF32 value of a float, away from zero between two, in the bits that the tensor core
// does not ignore (all but the lowest 13). Half a unit in the last place is 2^-11 of the power of
// two; NaNs and infinities stay. Two instructions on two pipes: cvt.rna.tf32.f32 becomes a
// comparison and an addition, and cvt.rn.tf32.f32 of sm_90 a conversion, of which a multiprocessor
// starts so few that they bound the kernels.
__device__ __forceinline__ uint32_t nearest_tf32(uint32_t bits) {
  const float power = __uint_as_float(bits & 0xff800000u);
  return __float_as_uint(__fmaf_rz(power, 0x1p-11f, __uint_as_float(bits)));
}

}  // namespace convgen
