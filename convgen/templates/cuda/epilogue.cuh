// What a layer's own contraction does with its sums, before they are rounded and stored:
//
//   result = activation(sum + bias + residual)      preactivation = sum + bias + residual
//
// Kernels hand over the sums of neighbouring results where they would store them, bias included.
#ifndef CONVGEN_EPILOGUE_CUH
#define CONVGEN_EPILOGUE_CUH

#include <math.h>

#include "convgen_abi.h"
#include "device.cuh"

namespace convgen {

__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float tanh_(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_(double x) { return tanh(x); }
__device__ __forceinline__ float erf_(float x) { return erff(x); }
__device__ __forceinline__ double erf_(double x) { return erf(x); }

#define CONVGEN_ELEMENTWISE __device__ __forceinline__
#include "activations.h"

// Of one call. Activation has the function; residual and preactivation lie as the result does, and
// are found by a result's place in it.
template <class Activation, typename T>
struct Finish {
  const T* result;
  const T* residual;
  T* preactivation;
  bool activates;

  Finish(const ConvgenCall& call, const void* result_)
      : result(static_cast<const T*>(result_)),
        residual(call.epilogue & CONVGEN_RESIDUAL ? static_cast<const T*>(call.residual) : nullptr),
        preactivation(call.epilogue & CONVGEN_PREACTIVATION ? static_cast<T*>(call.preactivation)
                                                            : nullptr),
        activates(call.epilogue & CONVGEN_ACTIVATE) {}

  // COUNT neighbours from `at` on, of which `valid` exist.
  template <int COUNT, typename Acc>
  __device__ __forceinline__ void apply(const T* at, Acc (&sums)[COUNT], int valid) const {
    const int64_t place = at - result;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (residual && i < valid) sums[i] += widen(residual[place + i]);
      if (preactivation && i < valid) narrow(preactivation[place + i], sums[i]);
      if (activates) sums[i] = Activation::activation(sums[i]);
    }
  }
};

}  // namespace convgen

#endif  // CONVGEN_EPILOGUE_CUH
