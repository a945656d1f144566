// The tensor cores: the names of mma.cuh, for the host.
#pragma once

#include "half.h"
#include "interpreter.h"

#define CONVGEN_MMA_CUH

namespace convgen {

enum class Rounding { NEAREST_AWAY, NEAREST_EVEN };

template <Rounding ROUNDING>
inline uint32_t round_tf32(float x) {
  uint32_t bits = host::bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  bits += ROUNDING == Rounding::NEAREST_AWAY ? 0x1000u : 0xfffu + ((bits >> 13) & 1u);
  return bits & 0xffffe000u;
}

namespace host {

enum class Product { tf32, bf16, f16 };

// d += a * b for one 16 x 8 tile, by all lanes of the warp; fragments as mma.sync lays them out.
void multiply_fragments(Product kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        Site site);

}  // namespace host

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::tf32, d, a, b, {file, line});
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::bf16, d, a, b, {file, line});
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::f16, d, a, b, {file, line});
}

}  // namespace convgen
