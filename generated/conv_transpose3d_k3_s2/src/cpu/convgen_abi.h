// The boundary between a generated library and its caller: plain C, raw pointers, no torch.
//
// One library per backend exports, for every contraction (fprop, dgrad, wgrad, bgrad) and dtype
// (f32, f64, f16, bf16) that it was generated for:
//
//   int64_t convgen_<contraction>_<dtype>_workspace(const ConvgenCall*)
//       bytes of workspace that the call needs (pointers in the struct are not read);
//   int     convgen_<contraction>_<dtype>(const ConvgenCall*)
//       0, or an error code that convgen_error_string() names. Asynchronous on `stream` (CUDA),
//       never allocates, never synchronizes.
//
// With o = i * stride - padding + t * dilation in each spatial dimension:
//
//   fprop   coarse[n, a, i]      = bias[a] + sum_{b, t} fine[n, b, o]   * weight[a, b / groups, t]
//   dgrad   fine[n, b, o]        = bias[b] + sum_{a, t} coarse[n, a, i] * weight[a, b / groups, t]
//   wgrad   weight[a, b/groups, t] =         sum_{n, i} coarse[n, a, i] * fine[n, b, o]
//   bgrad   bias[a]              = sum_{n, i} coarse[n, a, i]     (the tensor is given as coarse)
//
// Where convgen_wgrad_<dtype>_packed exists, fprop and wgrad begin by packing what they read of
// fine into the workspace. That function does what wgrad does, in a workspace where an fprop of the
// same fine tensor, extents and dtype has left it.
//
// The CPU's library has wbgrad, too: wgrad, and in the same pass the bias gradient, which sums
// coarse for a convolution and fine for a transposed one.
//
// All tensors are contiguous, (N, C, D, H, W) and (A, B / groups, KD, KH, KW), but for those that
// `channels_last` names, where a function takes such: all of the CPU's, bgrad on CUDA, others of a
// dtype on CUDA where ..._takes_layout says so of a call (of tensors at multiples of 16 bytes), and
// those of implicit GEMMs, convgen_<contraction>_<math mode>_implicit_gemm, of which ..._expected
// says in nanoseconds what a call is to take, or -1 if it is not for them. Every element of the
// output is written. Extents of one- and two-dimensional operators have leading ones.
//
// CUDA's library has convgen_transpose_<dtype>, too, from one memory format to the other.
//
// Of a library that was generated with an epilogue, the contraction that is the layer itself (dgrad
// of a transposed convolution, else fprop) goes on with its sums as `epilogue` says, 0 for nothing:
//
//   result = activation(sum + bias + residual)      preactivation = sum + bias + residual
#pragma once

#include <stdint.h>

struct ConvgenCall {
  void* coarse;     // (batch, coarse_channels, coarse_extent[0..2])
  void* fine;       // (batch, fine_channels, fine_extent[0..2])
  void* weight;     // (coarse_channels, fine_channels / groups, KD, KH, KW)
  void* bias;       // one value per output channel, or null; of the tensors' dtype
  void* workspace;  // 256-byte aligned, at least as large as ..._workspace() says
  void* stream;     // cudaStream_t; unused on the CPU
  int64_t device;   // CUDA device index of all pointers; on the CPU, the number of threads to use
  int64_t batch;
  int64_t coarse_channels;
  int64_t fine_channels;
  int64_t coarse_extent[3];
  int64_t fine_extent[3];
  int64_t channels_last;  // which tensors lie so: a sum of ConvgenOperand
  int64_t epilogue;       // a sum of ConvgenEpilogue; without any, what follows is not read
  void* residual;         // of the result's shape, dtype and format, and so is the next
  void* preactivation;    // written
};

// Tensors that may lie in memory as (N, D, H, W, C) and (A, KD, KH, KW, B / groups).
enum ConvgenOperand { CONVGEN_COARSE = 1, CONVGEN_FINE = 2, CONVGEN_WEIGHT = 4 };

// What the layer's own contraction does with its sums.
enum ConvgenEpilogue { CONVGEN_ACTIVATE = 1, CONVGEN_RESIDUAL = 2, CONVGEN_PREACTIVATION = 4 };

// Error codes: positive ones are cudaError_t.
enum ConvgenError {
  CONVGEN_OK = 0,
  CONVGEN_TOO_LARGE = -1,   // one channel's volume has 2^31 elements or more, or a grid is too big
  CONVGEN_BAD_CHANNELS = -2  // channel counts differ from those the library was generated for
};

#if defined(__cplusplus)
#define CONVGEN_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define CONVGEN_EXPORT
#endif

CONVGEN_EXPORT const char* convgen_error_string(int code);
