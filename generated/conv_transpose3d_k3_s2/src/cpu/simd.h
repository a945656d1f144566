// Vectors of the host, through the compiler's vector extension, and element conversions.
//
// Everything in these headers has internal linkage: the units of one library are compiled for
// different constants and types, and must not share the code of a function by its name.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#define CONVGEN_INLINE inline __attribute__((always_inline))
#define CONVGEN_NOINLINE __attribute__((noinline))
#define CONVGEN_INLINE_LAMBDA __attribute__((always_inline))

namespace {

#if defined(CONVGEN_VECTOR_BYTES)  // another processor's, for tests
constexpr int VECTOR_BYTES = CONVGEN_VECTOR_BYTES, VECTOR_REGISTERS = 32;
#elif defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTOR_REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, VECTOR_REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 16;
#endif

template <class Real, int BYTES = VECTOR_BYTES>
struct VectorOf {
  // may_alias: loads and stores go through pointers to arrays of elements.
  typedef Real Type __attribute__((vector_size(BYTES), may_alias));
  typedef Real Unaligned __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(Real))));
};

template <class Real>
using Vector = typename VectorOf<Real>::Type;

template <class Real>
constexpr int LANES = VECTOR_BYTES / int(sizeof(Real));

template <class Real>
CONVGEN_INLINE Vector<Real> load(const Real* from) {
  return *reinterpret_cast<const typename VectorOf<Real>::Unaligned*>(from);
}

template <class Real>
CONVGEN_INLINE void store(Real* to, Vector<Real> value) {
  *reinterpret_cast<typename VectorOf<Real>::Unaligned*>(to) = value;
}

// Keeps a value in a register: compilers rather load it again as an operand of every
// multiply-add, and then the load ports are what limits a register tile.
template <class T>
CONVGEN_INLINE void keep(T& value) {
#if defined(CONVGEN_VECTOR_BYTES)
  (void)value;
#elif defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

// The same for a pointer: addresses derived from it are not kept across this point.
template <class T>
CONVGEN_INLINE void keep(T*& value) {
  asm("" : "+r"(value));
}

// Elements I... of two vectors end to end.
template <int... I, class T>
CONVGEN_INLINE T shuffle(T a, T b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(sizeof(T))));
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

// Two vectors, end to end, to the elements of even index and those of odd index.
template <class Real, int... I>
CONVGEN_INLINE void deinterleave(const Real* from, Real* even, Real* odd,
                                 std::integer_sequence<int, I...>) {
  const Vector<Real> low = load(from), high = load(from + LANES<Real>);
  store(even, shuffle<2 * I...>(low, high));
  store(odd, shuffle<2 * I + 1 ...>(low, high));
}

template <class Real, int... I>
CONVGEN_INLINE Vector<Real> add_pairs(Vector<Real> a, Vector<Real> b,
                                      std::integer_sequence<int, I...>) {
  return shuffle<2 * I...>(a, b) + shuffle<2 * I + 1 ...>(a, b);
}

// Lane i of the result is the sum of the lanes of rows[i]: neighbors are added, then pairs of
// neighbors, and so on.
template <class Real>
CONVGEN_INLINE Vector<Real> sum_lanes(const Vector<Real>* rows) {
  constexpr int V = LANES<Real>;
  Vector<Real> sums[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) sums[i] = rows[i];
#pragma GCC unroll 4
  for (int count = V / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      sums[i] = add_pairs<Real>(sums[2 * i], sums[2 * i + 1], std::make_integer_sequence<int, V>{});
  return sums[0];
}

// Elements as they are stored. float and double are their own accumulators.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

CONVGEN_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CONVGEN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CONVGEN_INLINE float to_real(float value) { return value; }
CONVGEN_INLINE double to_real(double value) { return value; }
CONVGEN_INLINE float to_real(BFloat16 value) { return as_float(uint32_t(value.bits) << 16); }

// Branch-free, so that loops over it become vector code. Exponent 31 (infinities, NaN) moves to
// 255; subnormals are made by subtracting the implicit one again.
CONVGEN_INLINE float to_real(Half value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x38000000u : 0u;
  const uint32_t normal = magnitude + 0x38000000u + special;
  const uint32_t subnormal = as_bits(as_float(magnitude + 0x38800000u) - as_float(0x38800000u));
  return as_float((magnitude < 0x00800000u ? subnormal : normal) | sign);
}

CONVGEN_INLINE void from_real(float value, float& to) { to = value; }
CONVGEN_INLINE void from_real(double value, double& to) { to = value; }

// Round to nearest, ties to even; a NaN keeps its sign and becomes quiet.
CONVGEN_INLINE void from_real(float value, BFloat16& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40u;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

CONVGEN_INLINE void from_real(float value, Half& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent, round on the 13 bits that go; overflow carries into infinity.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Subnormal: adding 0.5 aligns the last place of half's subnormals with that of the sum.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = uint16_t(half | sign);
}

// Integer helpers; divisors are positive.
constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// The size of each part when `extent` is cut into equal parts of at most `limit`.
constexpr int64_t even_part(int64_t extent, int64_t limit) {
  return extent <= limit ? greatest(extent, 1) : ceil_div(extent, ceil_div(extent, limit));
}

}  // namespace
