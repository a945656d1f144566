// Rounding to TF32 as far as the tensor core looks.
#pragma once

#include "device.cuh"

namespace convgen {

// The nearest TF32 value of a float, away from zero between two, in the bits that the tensor core
// does not ignore (all but the lowest 13). Half a unit in the last place is 2^-11 of the power of
// two; NaNs and infinities stay. Two instructions on two pipes: cvt.rna.tf32.f32 becomes a
// comparison and an addition on one, and beside mma.sync the conversion of sm_90, cvt.rn.tf32.f32,
// takes longer than both (68's wgrad 9.7 ms instead of 7.7).
__device__ __forceinline__ uint32_t nearest_tf32(uint32_t bits) {
  const float power = __uint_as_float(bits & 0xff800000u);
  return __float_as_uint(__fmaf_rz(power, 0x1p-11f, __uint_as_float(bits)));
}

}  // namespace convgen
