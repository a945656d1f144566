// Activations of single elements, as torch.nn.functional has them; what is NaN stays NaN.
//
// In f32 they are branch-free, so that loops over them become vector code: accurate to a few units
// in the last place. In f64 they are the C library's.
#pragma once

#include <math.h>

#include "simd.h"

namespace {

// `a` where a condition holds, else `b`. Of a conditional expression, compilers move what it needs
// into branches.
CONVGEN_INLINE float select(bool condition, float a, float b) {
  const uint32_t mask = 0u - uint32_t(condition);
  return as_float((as_bits(a) & mask) | (as_bits(b) & ~mask));
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, by the polynomial of Cephes' expf; beyond the bounds
// it is 0 or infinite.
CONVGEN_INLINE float exp_(float x) {
  const float bounded = select(x < -104.0f, -104.0f, select(x > 89.0f, 89.0f, x));
  // Adding 1.5 * 2^23 rounds to whole numbers, which are then in the lowest bits.
  const float shifted = bounded * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, each of them a normal number: n is from -150 to 129.
  const int32_t whole = int32_t(as_bits(shifted)) - 0x4b400000;
  const int32_t half = whole >> 1;
  const float first = as_float(uint32_t(half + 127) << 23);
  const float second = as_float(uint32_t(whole - half + 127) << 23);
  return p * first * second;  // NaN, if x is, whatever became of its bits
}

CONVGEN_INLINE double exp_(double x) { return exp(x); }

CONVGEN_INLINE float tanh_(float x) {
  const float magnitude = fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * x + x;
  const float large = copysignf(1.0f - 2.0f / (exp_(2.0f * magnitude) + 1.0f), x);
  return select(magnitude < 0.625f, small, large);
}

CONVGEN_INLINE double tanh_(double x) { return tanh(x); }

// By the minimax polynomials of Juffa, https://stackoverflow.com/a/35148199.
CONVGEN_INLINE float erf_(float x) {
  const float magnitude = fabsf(x);
  const float t = select(magnitude > 4.0f, 4.0f, magnitude);  // beyond, it is 1 in f32
  const float square = t * t;
  float r = -1.72853470e-5f * t + 3.83197126e-4f;
  const float u = -3.88396438e-3f * t + 2.42546219e-2f;
  r = r * square + u;
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  const float large = copysignf(1.0f - exp_(r), x);
  float s = -5.96761703e-4f;
  s = s * square + 4.99119423e-3f;
  s = s * square - 2.67681349e-2f;
  s = s * square + 1.12819925e-1f;
  s = s * square - 3.76125336e-1f;
  s = s * square + 1.28379166e-1f;
  const float small = s * x + x;
  return select(t > 0.927734375f, large, small);
}

CONVGEN_INLINE double erf_(double x) { return erf(x); }

#define CONVGEN_ELEMENTWISE CONVGEN_INLINE
#include "activations.h"

}  // namespace
