// wgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"channels": [8], "positions": 4, "taps_h": 3, "taps_w": 3}
//
//   weight[a, b, t] =
//       sum over n, i of coarse[n, a, i] * fine[n, b, i * STRIDE - PADDING + t * DILATION]
//
// A matrix product with a long sum over positions. A thread keeps TAPS_H x TAPS_W taps x CHANNELS
// coarse channels of one fine channel in registers; the lanes of a warp are different fine channels
// (and blocks of taps), so that all of them read the same coarse values. Positions are walked in
// tiles of tile_h x tile_w; for each the block stages in shared memory (two buffers, asynchronous
// copies)
//   coarse: [channel][tile_h][tile_w], zero beyond the tensor: those positions add nothing
//   fine:   [channel][kernel depth][row][column], with the halo that the taps reach; the channel
//           pitch is odd.
// The tiles are dealt to `splits` thread blocks, whose partial sums lie in the workspace and are
// added in a fixed order by reduce_kernel: the result is the same to the bit in every run.

#include "wgrad.cuh"

namespace {

using namespace convgen;

using T = float;  // elements in memory
using Acc = float;  // sums, and everything in shared memory

// The specification, in three dimensions (D, H, W); o = i * STRIDE - PADDING + t * DILATION.
[[maybe_unused]] constexpr int KERNEL_D = 3, KERNEL_H = 3, KERNEL_W = 3;
[[maybe_unused]] constexpr int STRIDE_D = 2, STRIDE_H = 2, STRIDE_W = 2;
[[maybe_unused]] constexpr int PADDING_D = 0, PADDING_H = 0, PADDING_W = 0;
[[maybe_unused]] constexpr int DILATION_D = 1, DILATION_H = 1, DILATION_W = 1;
[[maybe_unused]] constexpr int GROUPS = 1;
[[maybe_unused]] constexpr int TAPS = KERNEL_D * KERNEL_H * KERNEL_W;
// Channel counts fixed at generation time; 0 where they are run-time values.
[[maybe_unused]] constexpr int COARSE_CHANNELS = 0;
[[maybe_unused]] constexpr int FINE_CHANNELS = 0;

constexpr int TAPS_H = 3, TAPS_W = 3;  // taps of one thread
constexpr int TAP_BLOCKS_H = 1, TAP_BLOCKS_W = 1;
constexpr int TAP_BLOCKS = KERNEL_D * TAP_BLOCKS_H * TAP_BLOCKS_W;
constexpr int POSITIONS = 4;  // neighbouring positions of W per step
// What one step of TAPS_W taps at POSITIONS positions loads of a row: every WINDOW_PITCH-th column,
// those of WINDOW_USED.
constexpr int WINDOW = 9, WINDOW_PITCH = 1;
constexpr uint64_t WINDOW_USED = 0x1ff;
// By axis: kernel, stride, padding and dilation; extents are a call's.
constexpr MeetingAxis MEETING[3] = {{0, 0, KERNEL_D, STRIDE_D, PADDING_D, DILATION_D},
                                    {0, 0, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H},
                                    {0, 0, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W}};

// Every tap of this thread at POSITIONS positions.
template <int CHANNELS>
__device__ __forceinline__ void accumulate(const WgradShape& s, const Acc* coarse, const Acc* fine,
                                           Acc (&acc)[TAPS_H * TAPS_W][CHANNELS]) {
  Acc c[CHANNELS][POSITIONS];
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) load_row(c[i], coarse + i * s.coarse_pitch);
  {  // row of taps h0 + 0
    Acc x[WINDOW];
    load_window<WINDOW_USED, WINDOW_PITCH>(x, fine);
    multiply_add_positions<0, STRIDE_W>(acc[0], c, x);  // tap (h0 + 0, w0 + 0)
    multiply_add_positions<1, STRIDE_W>(acc[1], c, x);  // tap (h0 + 0, w0 + 1)
    multiply_add_positions<2, STRIDE_W>(acc[2], c, x);  // tap (h0 + 0, w0 + 2)
  }
  {  // row of taps h0 + 1
    Acc x[WINDOW];
    load_window<WINDOW_USED, WINDOW_PITCH>(x, fine + 1 * s.columns);
    multiply_add_positions<0, STRIDE_W>(acc[3], c, x);  // tap (h0 + 1, w0 + 0)
    multiply_add_positions<1, STRIDE_W>(acc[4], c, x);  // tap (h0 + 1, w0 + 1)
    multiply_add_positions<2, STRIDE_W>(acc[5], c, x);  // tap (h0 + 1, w0 + 2)
  }
  {  // row of taps h0 + 2
    Acc x[WINDOW];
    load_window<WINDOW_USED, WINDOW_PITCH>(x, fine + 2 * s.columns);
    multiply_add_positions<0, STRIDE_W>(acc[6], c, x);  // tap (h0 + 2, w0 + 0)
    multiply_add_positions<1, STRIDE_W>(acc[7], c, x);  // tap (h0 + 2, w0 + 1)
    multiply_add_positions<2, STRIDE_W>(acc[8], c, x);  // tap (h0 + 2, w0 + 2)
  }
}

template <int CHANNELS>
__global__ void __launch_bounds__(WGRAD_MAX_THREADS, 1)
    wgrad_kernel(const WgradShape s, const T* coarse, const T* fine, Acc* partial) {
  Acc* const shared = dynamic_shared<Acc>();
  const WgradBlock block = locate_wgrad_block(s);
  const int warp_a = threadIdx.x / WARP % s.warps_a;
  const int unit = threadIdx.x / WARP / s.warps_a * WARP + threadIdx.x % WARP;

  // This thread's fine channel, block of taps and group.
  int tap_block = unit;
  const int fine_slot = s.by_fine_block.split(tap_block);
  tap_block += block.tap0;
  int fine_channel = block.fine0 + fine_slot;
  const int group_slot = s.groups_per_block > 1 ? s.by_group_fine.divide(fine_slot) : 0;
  fine_channel -= group_slot * s.fine_channels;
  const int group = block.group0 + group_slot;
  const int coarse_channel = block.coarse0 + warp_a * CHANNELS;
  const bool active = unit < s.units && tap_block < TAP_BLOCKS && fine_channel < s.fine_channels &&
                      group < s.groups && coarse_channel < s.coarse_channels;
  const int tap_w = tap_block % TAP_BLOCKS_W * TAPS_W;
  const int tap_h = tap_block / TAP_BLOCKS_W % TAP_BLOCKS_H * TAPS_H;
  const int tap_d = tap_block / (TAP_BLOCKS_W * TAP_BLOCKS_H);
  const int first_d = block.tap0 / (TAP_BLOCKS_W * TAP_BLOCKS_H);  // depth of the tile's plane 0
  const int coarse_offset = (group_slot * s.coarse_block + warp_a * CHANNELS) * s.coarse_pitch;
  const int fine_offset = fine_slot * s.fine_pitch +
                          ((tap_d - first_d) * s.rows + tap_h) * s.columns + tap_w * DILATION_W;

  Acc acc[TAPS_H * TAPS_W][CHANNELS];
#pragma unroll
  for (int t = 0; t < TAPS_H * TAPS_W; ++t) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) acc[t][c] = 0;
  }

  auto stage = [&](int buffer, int index) {
    const WgradTile tile = locate_wgrad_tile(s, index);
    Acc* const to = shared + buffer * s.stage_elements;
    stage_coarse(s, to, coarse, block, tile);
    // Taps are neighbouring rows of the tile: rows of a dilated kernel lie DILATION_H apart, and
    // such a tile has one row of positions.
    stage_fine<DILATION_D, DILATION_H>(s, to + s.coarse_elements, fine, block, tile.n,
                                       tile.d * STRIDE_D - PADDING_D + first_d * DILATION_D,
                                       tile.h0 * STRIDE_H - PADDING_H,
                                       tile.w0 * STRIDE_W - PADDING_W);
  };

  // Two buffers: the next tile is on its way while this one is multiplied.
  const int first = block.split * s.tiles_per_split;
  const int end = min(first + s.tiles_per_split, s.tiles);
  stage(0, first);
  copy_commit();
  for (int index = first; index < end; ++index) {
    const int buffer = (index - first) & 1;
    if (index + 1 < end) stage(buffer ^ 1, index + 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (active) {
      const Acc* const staged = shared + buffer * s.stage_elements;
      const Acc* const coarse_tile = staged + coarse_offset;
      const Acc* const fine_tile = staged + s.coarse_elements + fine_offset;
      for (int h = 0; h < s.tile_h; ++h) {
        const Acc* coarse_row = coarse_tile + h * s.tile_w;
        const Acc* fine_row = fine_tile + h * STRIDE_H * s.columns;
        for (int w = 0; w < s.tile_w; w += POSITIONS) {
          accumulate<CHANNELS>(s, coarse_row + w, fine_row + w * STRIDE_W, acc);
        }
      }
    }
    __syncthreads();
  }

  if (!active) return;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    if (coarse_channel + c >= s.coarse_channels) break;
    const int64_t group_row = (int64_t{block.split} * s.groups + group) * s.coarse_channels;
    const int64_t row = (group_row + coarse_channel + c) * s.fine_channels + fine_channel;
#pragma unroll
    for (int t = 0; t < TAPS_H * TAPS_W; ++t) {
      const int h = tap_h + t / TAPS_W, w = tap_w + t % TAPS_W;
      if (h < KERNEL_H && w < KERNEL_W) {
        partial[row * TAPS + (tap_d * KERNEL_H + h) * KERNEL_W + w] = acc[t][c];
      }
    }
  }
}

// Coarse channels per thread for a call: the compiled size that pads its groups least.
int channels_per_thread(int64_t coarse_channels) {
  return 8;
}

int plan(const ConvgenCall& call, const DeviceLimits& limits, WgradShape& s) {
  thread_local ShapeCache<WgradShape> cache;
  bool known;
  WgradShape& cached = cache.find(call, 0, known);
  if (!known) {
    const int64_t* c = call.coarse_extent;
    const int64_t* f = call.fine_extent;
    WgradShape cut;
    cut.coarse_d = static_cast<int>(c[0]), cut.coarse_h = static_cast<int>(c[1]);
    cut.coarse_w = static_cast<int>(c[2]);
    cut.fine_d = static_cast<int>(f[0]), cut.fine_h = static_cast<int>(f[1]);
    cut.fine_w = static_cast<int>(f[2]);
    cut.coarse_channel_stride = c[0] * c[1] * c[2];
    cut.fine_channel_stride = f[0] * f[1] * f[2];
    cut.groups = GROUPS;
    cut.coarse_channels = static_cast<int>(call.coarse_channels / GROUPS);
    cut.fine_channels = static_cast<int>(call.fine_channels / GROUPS);
    WgradTraits traits;
    traits.kernel_d = KERNEL_D, traits.kernel_h = KERNEL_H, traits.kernel_w = KERNEL_W;
    traits.stride_h = STRIDE_H, traits.stride_w = STRIDE_W;
    traits.dilation_h = DILATION_H, traits.dilation_w = DILATION_W;
    traits.taps_h = TAPS_H, traits.taps_w = TAPS_W;
    traits.tap_blocks_h = TAP_BLOCKS_H, traits.tap_blocks_w = TAP_BLOCKS_W;
    traits.positions = POSITIONS;
    if (const int error = cut_wgrad(cut, traits, channels_per_thread(cut.coarse_channels),
                                    sizeof(Acc), call.batch, limits.multiprocessors,
                                    limits.shared_bytes)) {
      cache.forget(cached);
      return error;
    }
    cached = cut;
  }
  s = cached;
  s.coarse_width = POSITIONS == 4 ? access_width<T, Acc>(call.coarse, call.coarse_extent[2]) : 1;
  return CONVGEN_OK;
}

template <int CHANNELS>
int run(const ConvgenCall& call, const WgradShape& s) {
  const int device = static_cast<int>(call.device);
  Acc* const partial = static_cast<Acc*>(call.workspace);
  if (const int error = launch<wgrad_kernel<CHANNELS>>(
          dim3(s.blocks * s.splits), dim3(s.threads), s.shared_bytes, device, call.stream, s,
          static_cast<const T*>(call.coarse), static_cast<const T*>(call.fine), partial)) {
    return error;
  }
  const int64_t elements = call.coarse_channels * int64_t{s.fine_channels} * TAPS;
  return reduce_splits(static_cast<T*>(call.weight), static_cast<const Acc*>(partial), elements,
                       s.splits, meeting_of<T>(call, GROUPS, MEETING), device, call.stream);
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_wgrad_f32_workspace(const ConvgenCall* call) {
  DeviceLimits limits;
  WgradShape s;
  if (device_limits(static_cast<int>(call->device), limits) != cudaSuccess) return 0;
  if (plan(*call, limits, s) != CONVGEN_OK) return 0;  // the call itself reports the error
  return s.splits * call->coarse_channels * int64_t{s.fine_channels} * TAPS * sizeof(Acc);
}

CONVGEN_EXPORT int convgen_wgrad_f32(const ConvgenCall* call) {
  if ((COARSE_CHANNELS && call->coarse_channels != COARSE_CHANNELS) ||
      (FINE_CHANNELS && call->fine_channels != FINE_CHANNELS)) {
    return CONVGEN_BAD_CHANNELS;
  }
  if (!volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  const DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(static_cast<int>(call->device), limits)) return error;
  WgradShape s;
  if (const int error = plan(*call, limits, s)) return error;
  switch (channels_per_thread(s.coarse_channels)) {
    default:
      return run<8>(*call, s);
  }
}

CONVGEN_EXPORT int64_t convgen_wgrad_f32_takes_layout(const ConvgenCall*) {
  return 0;
}

CONVGEN_EXPORT int64_t convgen_bgrad_f32_workspace(const ConvgenCall* call) {
  return call->batch * bias_parts(*call) * call->coarse_channels * sizeof(Acc);
}

CONVGEN_EXPORT int convgen_bgrad_f32(const ConvgenCall* call) {
  return bias_gradient<T, Acc>(*call);
}

CONVGEN_EXPORT int convgen_transpose_f32(const ConvgenCall* call) {
  return transpose<T>(*call);
}
