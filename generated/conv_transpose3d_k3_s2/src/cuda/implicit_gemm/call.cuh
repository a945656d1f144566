// What the host knows of a call of an implicit GEMM, and what it makes of tensors: views and packs.
#ifndef CONVGEN_IMPLICIT_GEMM_CALL_CUH
#define CONVGEN_IMPLICIT_GEMM_CALL_CUH

#include "../common.cuh"
#include "maps.cuh"
#include "pack.cuh"

namespace convgen {

// A call, in the contraction's own words.
struct Operands {
  const ConvgenCall* call;
  const void *input, *weight, *bias;
  void *output, *workspace;
  int device;
  void* stream;
  int64_t batch, input_channels, output_channels;  // of all groups
  int64_t input_extent[3], output_extent[3];
  bool input_channels_last, output_channels_last, weight_channels_last;
};

// Rates of an H200, as measured; other GPUs of its kind have the same proportions.
constexpr double LEVEL2_BYTES_PER_CLOCK = 36;  // of one multiprocessor, all at work
constexpr double TILE_CLOCKS = 5000;           // of a tile beside its products
constexpr double LAUNCH_CLOCKS = 3500;         // of another kernel behind this one
constexpr double CLOCKS_PER_MS = 1.72e6;

constexpr int64_t FLAG_BYTES = 1024;  // behind packed weights: see Plan::unfolded

// How one call is computed.
struct Plan {
  Tiling tiling;
  // Of a folded tiling: planes meet taps that they do not read, with weights of zero, which spreads
  // infinities and NaNs. Where there are any, this tiling does it again.
  Tiling unfolded;
  bool halo;
  int lines;
  double clocks;
};

inline int ceil_log2(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

// Channels, then W, H, D, N of a tensor whose channels lie side by side; N as D where `merged`.
template <typename T>
TensorView positions_view(int64_t channels, const int64_t (&extent)[3], int64_t batch,
                          bool merged) {
  TensorView v = {};
  v.rank = 5;
  const uint64_t extents[5] = {uint64_t(channels), uint64_t(extent[2]), uint64_t(extent[1]),
                               uint64_t(merged ? batch : extent[0]), uint64_t(merged ? 1 : batch)};
  uint64_t stride = sizeof(T);
  for (int i = 0; i < 5; ++i) {
    v.extent[i] = extents[i], v.stride_bytes[i] = stride, v.step[i] = 1;
    stride *= extents[i];
  }
  v.swizzle = ROW_BYTES;
  return v;
}

// Packs a tensor's channels side by side; with `last` they lie so already, but not as they should.
template <typename T>
int pack_input(const T* from, T* to, const PackShape& s, bool last, int device, void* stream,
               int multiprocessors) {
  if (last) {
    return launch<pack_channels_kernel<T>, true>(dim3(16 * multiprocessors), dim3(PACK_THREADS), 0,
                                                 device, stream, from, to, s);
  }
  constexpr int BLOCK_K = ROW_BYTES / sizeof(T);
  const dim3 grid(static_cast<unsigned>(ceil_div(s.positions, PACK_POSITIONS)),
                  static_cast<unsigned>(ceil_div(int64_t{s.groups} * s.padded, BLOCK_K)),
                  s.batch < 65535 ? s.batch : 65535);
  const bool wide =
      s.positions % 4 == 0 && reinterpret_cast<uintptr_t>(from) % (4 * sizeof(T)) == 0;
  return wide ? launch<pack_positions_kernel<T, true>, true>(grid, dim3(PACK_THREADS), 0, device,
                                                             stream, from, to, s)
              : launch<pack_positions_kernel<T, false>, true>(grid, dim3(PACK_THREADS), 0, device,
                                                              stream, from, to, s);
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_CALL_CUH
