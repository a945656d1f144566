// fp32 accuracy from TF32's products (3xTF32): values are sums of two parts, and products of three.
#ifndef CONVGEN_IMPLICIT_GEMM_SPLIT_CUH
#define CONVGEN_IMPLICIT_GEMM_SPLIT_CUH

#include "tiles.cuh"

namespace convgen {

// x = upper + lower: the upper part is x rounded to TF32 (to nearest, halves away from zero), the
// lower one what that leaves, of which products read the first 11 bits.
//
// What rounds to no finite number is all in its lower part, beside 1 with its sign. An infinity in
// an upper part would meet the other operand's lower parts, which are zero or have either sign, and
// become NaN where the product of both values is infinite.
struct SplitFloat {
  float upper, lower;
};
__device__ __forceinline__ SplitFloat split_float(float x) {
  const uint32_t bits = __float_as_uint(x);
  const float rounded = __uint_as_float((bits + 0x1000u) & 0xffffe000u);
  const float one = __uint_as_float((bits & 0x80000000u) | 0x3f800000u);
  const float upper = (bits & 0x7fffffffu) < 0x7f7ff000u ? rounded : one;
  return {upper, x - upper};
}

// Of four values, whose lower parts replace them.
__device__ __forceinline__ uint4 split_vector(uint4& x) {
  const SplitFloat a = split_float(__uint_as_float(x.x)), b = split_float(__uint_as_float(x.y));
  const SplitFloat c = split_float(__uint_as_float(x.z)), d = split_float(__uint_as_float(x.w));
  x = make_uint4(__float_as_uint(a.lower), __float_as_uint(b.lower), __float_as_uint(c.lower),
                 __float_as_uint(d.lower));
  return make_uint4(__float_as_uint(a.upper), __float_as_uint(b.upper), __float_as_uint(c.upper),
                    __float_as_uint(d.upper));
}

// The products of one tap with STEPS x 32 bytes of K, as one batch whose sums begin with it. Of
// both operands the upper parts and the lower ones are given; the lower parts' own product, 2^-22
// of the whole, is left out. The tensor cores truncate when they add: the small products come
// first, while the sums are small, too.
template <int STEPS, int SUMS>
__device__ __forceinline__ void multiply_parts(float (&sums)[SUMS], const Operand (&weights)[2],
                                               const Operand (&positions)[2]) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    wgmma<float>(sums, weights[1].moved(k * STEP_BYTES), positions[0].moved(k * STEP_BYTES), k > 0);
  }
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    wgmma<float>(sums, weights[0].moved(k * STEP_BYTES), positions[1].moved(k * STEP_BYTES), 1);
  }
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    wgmma<float>(sums, weights[0].moved(k * STEP_BYTES), positions[0].moved(k * STEP_BYTES), 1);
  }
  wgmma_commit();
}

// The same of `steps`, 1 to 4, added to `totals`: sums leave the tensor cores after each tap.
template <int SUMS>
__device__ __forceinline__ void add_products(float (&totals)[SUMS], float (&sums)[SUMS],
                                             const Operand (&weights)[2],
                                             const Operand (&positions)[2], int steps) {
  static_assert(ROW_BYTES / STEP_BYTES == 4, "the steps of a K block");
  if (steps == 4) {
    multiply_parts<4>(sums, weights, positions);
  } else if (steps == 3) {
    multiply_parts<3>(sums, weights, positions);
  } else if (steps == 2) {
    multiply_parts<2>(sums, weights, positions);
  } else {
    multiply_parts<1>(sums, weights, positions);
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    wgmma_settle(sums[i]);
    totals[i] += sums[i];
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_SPLIT_CUH
