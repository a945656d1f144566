// half and bfloat16 for the host: storage of 16 bits, converted with the GPU's rounding.
#pragma once

#include <stdint.h>
#include <string.h>

namespace convgen {

struct half {
  uint16_t bits;
};

struct bfloat16 {
  uint16_t bits;
};

namespace host {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// cvt.rn.f16.f32: to nearest, ties to even; subnormal results kept; NaN becomes 0x7fff.
inline uint16_t half_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest half and 65536
    result = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // 2^-14: the result is subnormal, a multiple of 2^-24,
    // which is the last place of numbers around 0.5: the addition rounds.
    result = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude << 13));
  // 2^112 moves the exponent's bias from 15 to 127; exact, also for subnormal halves.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// cvt.rn.bf16.f32: to nearest, ties to even; NaN becomes 0x7fff.
inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

}  // namespace host
}  // namespace convgen
