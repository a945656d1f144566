// The tensor cores of sm_80 and later, through mma.sync, and the roundings that go with them.
//
// An environment that stands in for a GPU replaces this file: it defines CONVGEN_MMA_CUH and
// supplies the same names.
#ifndef CONVGEN_MMA_CUH
#define CONVGEN_MMA_CUH

#include "device.cuh"

namespace convgen {

// How a float becomes a TF32 value (8 exponent bits, 10 mantissa bits).
enum class Rounding { NEAREST_AWAY, NEAREST_EVEN };

// The bits of x rounded to TF32; infinities and NaNs stay what they are.
template <Rounding ROUNDING>
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t bits;
  if constexpr (ROUNDING == Rounding::NEAREST_AWAY) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = 0;  // no launch reaches this: see mma_tf32
#endif
  } else {
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (finite) bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
#endif
  }
  return bits;
}

// d += a * b for one 16 x 8 tile, all lanes of the warp together. With g = lane / 4, t = lane % 4:
//   a: rows g, g + 8 at words t (a[0], a[1]) and t + 4 (a[2], a[3])
//   b: words t (b[0]) and t + 4 (b[1]) of column g
//   d: row g, columns 2t, 2t + 1 (d[0], d[1]); row g + 8 (d[2], d[3])
// A word is one TF32 value (K = 8), or two consecutive 16-bit values of K, lower first (K = 16).
// A library for several architectures compiles these for older ones too, as nothing: its callers
// choose other kernels there.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace convgen

#endif  // CONVGEN_MMA_CUH
