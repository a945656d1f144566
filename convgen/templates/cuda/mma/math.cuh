// The math modes of the mma engine's gathers: what a word of an operand is, how it is made from
// the tensors' elements, and one 16 x 8 product of a word's worth of channels.
//
//   Input      what a staged word is: a float, a pair of 16-bit channels, or two neighbours
//   Element    one channel's part of it
//   CHANNELS   input channels per word
//   VALUES     weights per word
//   PACKED     weight words per lane and 16 x 8 product
//   copy       a word of an operand from another's
//   settle     keeps what makes an operand on its side of this place
//   multiply_group  the products of four warps, by wgmma, of N blocks of 8 columns
//   PROMOTES   whether sums leave the tensor core after every 8 words (see Tf32x3)
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "tf32.cuh"

namespace convgen {

template <Rounding ROUNDING>
struct Tf32 {
  using Input = float;
  using Element = float;
  static constexpr int CHANNELS = 1, VALUES = 1, PACKED = 2;
  static constexpr bool PROMOTES = false;

  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };

  __device__ static __forceinline__ void set(A& a, int i, float x) {
    if constexpr (ROUNDING == Rounding::NEAREST_AWAY) {
      a.word[i] = nearest_tf32(__float_as_uint(x));  // fewer instructions than the conversion
    } else {
      a.word[i] = round_tf32<ROUNDING>(x);
    }
  }
  __device__ static __forceinline__ void copy(A& to, int i, const A& from, int j) {
    to.word[i] = from.word[j];
  }
  __device__ static __forceinline__ void settle(A& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_settle(a.word[i]);
  }
  // Packed word `i` of a lane; word i % 2 of B, from channel `low`.
  __device__ static __forceinline__ uint32_t pack(int, float low, float) {
    return round_tf32<ROUNDING>(low);
  }
  __device__ static __forceinline__ void load(B& b, const uint32_t* packed) {
    const uint2 words = *reinterpret_cast<const uint2*>(packed);
    b.word[0] = words.x, b.word[1] = words.y;
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_tf32(d, a.word, b.word);
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const A& a,
                                                        SharedColumns<1> b) {
    wgmma_tf32(d, a.word, b);
  }
};

// fp32 accuracy from TF32 products: x = high + low, and high * high + high * low + low * high
// misses only low * low, 2^-22 of the product. The tensor core truncates when it adds, so sums
// leave it after every 8 words (PROMOTES) and are added in fp32.
struct Tf32x3 {
  using Input = float;
  using Element = float;
  static constexpr int CHANNELS = 1, VALUES = 1, PACKED = 4;
  static constexpr bool PROMOTES = true;

  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[2], low[2];
  };

  __device__ static __forceinline__ uint32_t rest(float x, uint32_t high) {
    return round_tf32<Rounding::NEAREST_AWAY>(x - __uint_as_float(high));
  }
  __device__ static __forceinline__ void set(A& a, int i, float x) {
    a.high[i] = round_tf32<Rounding::NEAREST_AWAY>(x);
    a.low[i] = rest(x, a.high[i]);
  }
  __device__ static __forceinline__ void copy(A& to, int i, const A& from, int j) {
    to.high[i] = from.high[j], to.low[i] = from.low[j];
  }
  __device__ static __forceinline__ void settle(A& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_settle(a.high[i]), wgmma_settle(a.low[i]);
  }
  __device__ static __forceinline__ uint32_t pack(int i, float low, float) {
    const uint32_t high = round_tf32<Rounding::NEAREST_AWAY>(low);
    return i < 2 ? high : rest(low, high);
  }
  __device__ static __forceinline__ void load(B& b, const uint32_t* packed) {
    const uint4 words = *reinterpret_cast<const uint4*>(packed);
    b.high[0] = words.x, b.high[1] = words.y, b.low[0] = words.z, b.low[1] = words.w;
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    mma_tf32(d, a.low, b.high);  // small terms first
    mma_tf32(d, a.high, b.low);
    mma_tf32(d, a.high, b.high);
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const A& a,
                                                        SharedColumns<2> b) {
    wgmma_tf32(d, a.low, b);  // small terms first
    wgmma_tf32(d, a.high, b + 64);
    wgmma_tf32(d, a.high, b);
  }
};

// Pairs of 16-bit channels, products accumulated in fp32.
template <typename T>
struct Pairs {
  using Input = uint32_t;
  using Element = uint16_t;
  static constexpr int CHANNELS = 2, VALUES = 2, PACKED = 2;
  static constexpr bool PROMOTES = false;

  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };

  __device__ static __forceinline__ uint32_t pair(T low, T high) {
    struct alignas(4) Both {
      T low, high;
    } both = {low, high};
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  __device__ static __forceinline__ void set(A& a, int i, uint32_t x) { a.word[i] = x; }
  __device__ static __forceinline__ void copy(A& to, int i, const A& from, int j) {
    to.word[i] = from.word[j];
  }
  __device__ static __forceinline__ void settle(A& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma_settle(a.word[i]);
  }
  __device__ static __forceinline__ uint32_t pack(int, T low, T high) { return pair(low, high); }
  __device__ static __forceinline__ void load(B& b, const uint32_t* packed) {
    const uint2 words = *reinterpret_cast<const uint2*>(packed);
    b.word[0] = words.x, b.word[1] = words.y;
  }
  __device__ static __forceinline__ void multiply(float (&d)[4], const A& a, const B& b) {
    if constexpr (std::is_same_v<T, half>) {
      mma_f16(d, a.word, b.word);
    } else {
      mma_bf16(d, a.word, b.word);
    }
  }
  template <int N>
  __device__ static __forceinline__ void multiply_group(float (&d)[N][4], const A& a,
                                                        SharedColumns<1> b) {
    if constexpr (std::is_same_v<T, half>) {
      wgmma_f16(d, a.word, b);
    } else {
      wgmma_bf16(d, a.word, b);
    }
  }
};

// Pairs of neighbouring 16-bit inputs of one channel, as they lie in memory. A word has the weights
// of two taps along X, or of one and zero: which follows from the half of a word in which the line
// begins (see WordOrder in fragments.cuh).
template <typename T>
struct Neighbours : Pairs<T> {
  static constexpr int CHANNELS = 1;
};

}  // namespace convgen
