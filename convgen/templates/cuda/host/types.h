// CUDA's built-in types, for the host: vectors, extents, error codes.
#pragma once

#include <stdint.h>

#define CONVGEN_VECTOR2(name, element, alignment)                       \
  struct __attribute__((aligned(alignment))) name##2 { element x, y; }; \
  inline name##2 make_##name##2(element x, element y) {                 \
    name##2 v;                                                          \
    v.x = x, v.y = y;                                                   \
    return v;                                                           \
  }
#define CONVGEN_VECTOR3(name, element)                             \
  struct name##3 { element x, y, z; };                             \
  inline name##3 make_##name##3(element x, element y, element z) { \
    name##3 v;                                                     \
    v.x = x, v.y = y, v.z = z;                                     \
    return v;                                                      \
  }
#define CONVGEN_VECTOR4(name, element, alignment)                             \
  struct __attribute__((aligned(alignment))) name##4 { element x, y, z, w; }; \
  inline name##4 make_##name##4(element x, element y, element z, element w) { \
    name##4 v;                                                                \
    v.x = x, v.y = y, v.z = z, v.w = w;                                       \
    return v;                                                                 \
  }

CONVGEN_VECTOR2(char, signed char, 2)
CONVGEN_VECTOR2(uchar, unsigned char, 2)
CONVGEN_VECTOR2(short, short, 4)
CONVGEN_VECTOR2(ushort, unsigned short, 4)
CONVGEN_VECTOR2(int, int, 8)
CONVGEN_VECTOR2(uint, unsigned, 8)
CONVGEN_VECTOR2(float, float, 8)
CONVGEN_VECTOR2(double, double, 16)
CONVGEN_VECTOR2(longlong, long long, 16)
CONVGEN_VECTOR2(ulonglong, unsigned long long, 16)
CONVGEN_VECTOR3(int, int)
CONVGEN_VECTOR3(uint, unsigned)
CONVGEN_VECTOR3(float, float)
CONVGEN_VECTOR4(char, signed char, 4)
CONVGEN_VECTOR4(uchar, unsigned char, 4)
CONVGEN_VECTOR4(short, short, 8)
CONVGEN_VECTOR4(ushort, unsigned short, 8)
CONVGEN_VECTOR4(int, int, 16)
CONVGEN_VECTOR4(uint, unsigned, 16)
CONVGEN_VECTOR4(float, float, 16)

#undef CONVGEN_VECTOR2
#undef CONVGEN_VECTOR3
#undef CONVGEN_VECTOR4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// The codes that launches return; the values are CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};

typedef struct CUstream_st* cudaStream_t;
