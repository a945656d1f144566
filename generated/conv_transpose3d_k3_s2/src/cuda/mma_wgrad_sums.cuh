// The sum over splits and parts of the mma engine's wgrad, which writes the weights.
#pragma once

#include "meeting.cuh"
#include "mma_wgrad.cuh"

namespace convgen {

constexpr int SUM_ROWS = 8;

// Of the sums of a fragment, which weight [coarse][fine][tap] sum `i` of a lane is, or -1.
template <bool FINE_ROWS, int COARSE_TILES, int FINE_TILES, int TAPS_H, int TAPS_W>
__device__ __forceinline__ int64_t weight_of_sum(const ProductShape& s,
                                                 const MeetingAxis (&axes)[3], int index, int lane,
                                                 int i) {
  constexpr int FRAGMENTS = COARSE_TILES * FINE_TILES * TAPS_H * TAPS_W;
  constexpr int COARSE = FINE_ROWS ? PRODUCT_COLUMNS : PRODUCT_ROWS;
  constexpr int FINE = FINE_ROWS ? PRODUCT_ROWS : PRODUCT_COLUMNS;
  int fragment = index % FRAGMENTS;
  const int unit_index = index / FRAGMENTS;
  const ProductUnit unit = locate_unit(s, unit_index % s.units);
  const ProductBlock block =
      locate_products<COARSE_TILES * COARSE, FINE_TILES * FINE, TAPS_H, TAPS_W>(
          s, unit_index / s.units);
  const int m = fragment % COARSE_TILES;
  fragment /= COARSE_TILES;
  const int w = block.tap_w + unit.w * TAPS_W + fragment % TAPS_W;
  fragment /= TAPS_W;
  const int h = block.tap_h + unit.h * TAPS_H + fragment % TAPS_H;
  const int n = fragment / TAPS_H;
  const int d = block.tap_d + unit.d;
  const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
  const int coarse =
      block.coarse0 + (unit.m * COARSE_TILES + m) * COARSE + (FINE_ROWS ? column : row);
  const int fine = block.fine0 + (unit.n * FINE_TILES + n) * FINE + (FINE_ROWS ? row : column);
  if (d >= axes[0].kernel || h >= axes[1].kernel || w >= axes[2].kernel ||
      coarse >= s.coarse_channels || fine >= s.fine_channels) {
    return -1;
  }
  const int64_t taps = int64_t{axes[0].kernel} * axes[1].kernel * axes[2].kernel;
  const int64_t tap = (int64_t{d} * axes[1].kernel + h) * axes[2].kernel + w;
  const int64_t channel = int64_t{block.group} * s.coarse_channels + coarse;
  return (channel * s.fine_channels + fine) * taps + tap;
}

// Partial results: [split][part][kind of block][unit][fragment][lane], four sums each; a fragment
// is 16 coarse x 8 fine channels at one tap, or 16 fine x 8 coarse ones if FINE_ROWS, in the order
// [fine tile][tap h][tap w][coarse tile]. Adds them in an order fixed by their number and writes
// weight[coarse][fine][tap].
// Four blocks of a multiprocessor leave 64 registers; ptxas would spill for a fifth.
template <bool FINE_ROWS, int COARSE_TILES, int FINE_TILES, int TAPS_H, int TAPS_W, typename T>
__global__ void __launch_bounds__(WARP* SUM_ROWS, 4)
    sum_products_kernel(const ProductShape s, const Meeting<T> met, T* weight,
                        const float4* partial, int slices) {
  __shared__ float4 rows[SUM_ROWS][WARP];
  await_earlier_kernel();  // whose sums these are
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP;
  const int64_t slice_stride = int64_t{gridDim.x} * WARP;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4* from = partial + int64_t{blockIdx.x} * WARP + lane;
#pragma unroll 4
  for (int slice = row; slice < slices; slice += SUM_ROWS) {
    const float4 part = from[slice * slice_stride];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  rows[row][lane] = sum;
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int i = 1; i < SUM_ROWS; ++i) {
    const float4 part = rows[i][lane];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }

  auto weight_of = [&](int index, int lane, int i) {
    return weight_of_sum<FINE_ROWS, COARSE_TILES, FINE_TILES, TAPS_H, TAPS_W>(s, met.axes, index,
                                                                              lane, i);
  };
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t index = weight_of(blockIdx.x, lane, i);
    if (index >= 0) narrow(weight[index], values[i]);
  }
  const float all = (sum.x + sum.y) + (sum.z + sum.w);
  if (all == all) return;
  // Places are found anew, so that no register keeps them.
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int64_t index = weight_of(opaque(blockIdx.x), opaque(threadIdx.x), i);
    if (index < 0) continue;
    const float value = widen(weight[index]);
    if (value != value) narrow(weight[index], meeting_sum<float>(met, index));
  }
}

}  // namespace convgen
