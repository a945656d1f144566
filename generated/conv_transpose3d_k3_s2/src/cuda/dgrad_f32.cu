// dgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"channels": [8], "row_axis": "d", "rows": 4, "unroll": "taps", "variants": 2}
//
//   fine[n, b, o] = bias[b] +
//       sum over a, t of coarse[n, a, (o + PADDING - t * DILATION) / STRIDE] * weight[a, b, t]
//   over the taps t for which the division is exact. Outputs o = q * STRIDE + r of one phase r
//   share their taps, each at a constant offset from q: a dense gather of the coarse grid, without
//   divisions or wasted products.
//
// A thread block computes `lanes` positions of the flattened (h, w) plane
// x ROWS positions along d x VARIANTS neighbouring phases along w
// x `warps_c` blocks of CHANNELS fine channels. Lanes run along the plane, so that loads from
// shared memory and stores to global memory are coalesced; a thread keeps VARIANTS x ROWS x
// CHANNELS sums in registers. For each chunk of coarse channels the block stages in shared memory
// (two buffers, asynchronous copies)
//   the tile:    [channel][d][h][residue of w mod STEP_X][w / STEP_X],
//                with its halo, zero outside
//   the weights: [block of CHANNELS][channel][tap][CHANNELS], packed by dgrad_pack_kernel.

#include "gather.cuh"

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

// Axes of the tile: R = d, Y = h, X = w.
constexpr int STEP_R = 1, STEP_Y = 1, STEP_X = 1;  // inputs per position
constexpr int PHASES_R = 2, PHASES_Y = 2, PHASES_X = 2;
constexpr int ROWS = 4;  // positions per thread, consecutive along R
constexpr int VARIANTS = 2;  // phases of X per thread
constexpr int GROUPS_X = 1;  // thread blocks that share the phases of X
constexpr bool SCATTERED = false;
// A tile holds the window of a whole phase: neighbouring planes and lines of the input.
constexpr int PLANE_STEP = 1, LINE_STEP = 1, ROW_STEP = STEP_R, LANE_STEP_Y = STEP_Y;
// Smallest offset of all taps along X.
constexpr int FIRST_X = -1;

// Smallest offset and number of taps of each phase along R and Y.
__device__ const int FIRST_R[] = {-1, 0};
__device__ const int FIRST_Y[] = {-1, 0};
__device__ const int COUNT_R[] = {2, 1};
__device__ const int COUNT_Y[] = {2, 1};

// Packed weights: the kernel element of each slot; the first slot of each region (what one pass
// reads); the first region of each phase.
constexpr int SLOTS = 27, REGIONS = 4;
constexpr int TAPS_PER_PASS = 12;
__device__ const int SLOT_TAP[] = {
    26, 8, 24, 25, 6, 7, 20, 2, 18, 19, 0, 1, 23, 5, 21, 22, 3, 4, 17, 15, 16, 11, 9, 10, 14, 12,
    13};
__device__ const int REGION_FIRST[] = {0, 12, 18, 24, 27};
__device__ const int PHASE_REGION[] = {0, 1, 2, 3};

// Every tap of d phase 0, h phase 0, for one input channel.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d0_h0(
    const GatherShape& s, const Acc* tile, const Acc* weight,
    Acc (&acc)[VARIANTS][ROWS][CHANNELS]) {
  {  // h -1, w -1
    Acc x[5];
    const Acc* column = tile;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 0 * CHANNELS);  // tap (2, 2, 2)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 1 * CHANNELS);  // tap (0, 2, 2)
  }
  {  // h -1, w +0
    Acc x[5];
    const Acc* column = tile + 1;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 2 * CHANNELS);  // tap (2, 2, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 3 * CHANNELS);  // tap (2, 2, 1)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 4 * CHANNELS);  // tap (0, 2, 0)
    multiply_add<1, ROW_STEP>(acc[1], x, weight + 5 * CHANNELS);  // tap (0, 2, 1)
  }
  {  // h +0, w -1
    Acc x[5];
    const Acc* column = tile + 1 * s.row_pitch;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 6 * CHANNELS);  // tap (2, 0, 2)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 7 * CHANNELS);  // tap (0, 0, 2)
  }
  {  // h +0, w +0
    Acc x[5];
    const Acc* column = tile + 1 * s.row_pitch + 1;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 8 * CHANNELS);  // tap (2, 0, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 9 * CHANNELS);  // tap (2, 0, 1)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 10 * CHANNELS);  // tap (0, 0, 0)
    multiply_add<1, ROW_STEP>(acc[1], x, weight + 11 * CHANNELS);  // tap (0, 0, 1)
  }
}

// Every tap of d phase 0, h phase 1, for one input channel.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d0_h1(
    const GatherShape& s, const Acc* tile, const Acc* weight,
    Acc (&acc)[VARIANTS][ROWS][CHANNELS]) {
  {  // h +0, w -1
    Acc x[5];
    const Acc* column = tile;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 0 * CHANNELS);  // tap (2, 1, 2)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 1 * CHANNELS);  // tap (0, 1, 2)
  }
  {  // h +0, w +0
    Acc x[5];
    const Acc* column = tile + 1;
    load_column<0x1f>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 2 * CHANNELS);  // tap (2, 1, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 3 * CHANNELS);  // tap (2, 1, 1)
    multiply_add<1, ROW_STEP>(acc[0], x, weight + 4 * CHANNELS);  // tap (0, 1, 0)
    multiply_add<1, ROW_STEP>(acc[1], x, weight + 5 * CHANNELS);  // tap (0, 1, 1)
  }
}

// Every tap of d phase 1, h phase 0, for one input channel.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d1_h0(
    const GatherShape& s, const Acc* tile, const Acc* weight,
    Acc (&acc)[VARIANTS][ROWS][CHANNELS]) {
  {  // h -1, w -1
    Acc x[4];
    const Acc* column = tile;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 0 * CHANNELS);  // tap (1, 2, 2)
  }
  {  // h -1, w +0
    Acc x[4];
    const Acc* column = tile + 1;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 1 * CHANNELS);  // tap (1, 2, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 2 * CHANNELS);  // tap (1, 2, 1)
  }
  {  // h +0, w -1
    Acc x[4];
    const Acc* column = tile + 1 * s.row_pitch;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 3 * CHANNELS);  // tap (1, 0, 2)
  }
  {  // h +0, w +0
    Acc x[4];
    const Acc* column = tile + 1 * s.row_pitch + 1;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 4 * CHANNELS);  // tap (1, 0, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 5 * CHANNELS);  // tap (1, 0, 1)
  }
}

// Every tap of d phase 1, h phase 1, for one input channel.
template <int CHANNELS>
__device__ __forceinline__ void accumulate_d1_h1(
    const GatherShape& s, const Acc* tile, const Acc* weight,
    Acc (&acc)[VARIANTS][ROWS][CHANNELS]) {
  {  // h +0, w -1
    Acc x[4];
    const Acc* column = tile;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 0 * CHANNELS);  // tap (1, 1, 2)
  }
  {  // h +0, w +0
    Acc x[4];
    const Acc* column = tile + 1;
    load_column<0xf>(x, column, s.plane_pitch);
    multiply_add<0, ROW_STEP>(acc[0], x, weight + 1 * CHANNELS);  // tap (1, 1, 0)
    multiply_add<0, ROW_STEP>(acc[1], x, weight + 2 * CHANNELS);  // tap (1, 1, 1)
  }
}

template <int CHANNELS>
__global__ void __launch_bounds__(GATHER_MAX_WARPS * WARP, 1)
    dgrad_kernel(const GatherShape s, const T* input, const Acc* packed, const T* bias,
                 T* output) {
  Acc* const shared = dynamic_shared<Acc>();
  const GatherBlock block =
      locate_block(s, blockIdx.x, s.lanes * (SCATTERED ? ROWS : 1), SCATTERED ? 1 : ROWS);
  const int group_x = block.phase % GROUPS_X;
  const int phase_y = block.phase / GROUPS_X % PHASES_Y;
  const int phase_r = block.phase / (GROUPS_X * PHASES_Y);
  const int warp_c = threadIdx.x / WARP % s.warps_c;
  const int lane = threadIdx.x / WARP / s.warps_c * WARP + threadIdx.x % WARP;  // of s.lanes
  const int blocks_c = (s.out_channels + CHANNELS - 1) / CHANNELS;
  const int block_c = block.channel_block * s.warps_c + warp_c;

  // Where this thread's positions lie in the strip and in the tile. Lanes beyond the strip repeat
  // its last position, and store nothing.
  const int strip_positions = s.strip_width * s.y.positions;
  const int y0 = s.by_strip_width.divide(block.flat0);
  // The tile starts at a multiple of the access width, `shift` columns before its window.
  const int shift = (block.x0 * STEP_X + FIRST_X) & (s.load_width - 1);
  int position_y = min(block.flat0 + lane, strip_positions - 1);
  const int position_x = s.by_strip_width.split(position_y);
  const int thread_offset = (position_y - y0) * LANE_STEP_Y * s.row_pitch + shift + position_x;

  Acc acc[VARIANTS][ROWS][CHANNELS];
#pragma unroll
  for (int v = 0; v < VARIANTS; ++v) {
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) acc[v][m][c] = 0;
    }
  }

  const int passes = COUNT_R[phase_r] * COUNT_Y[phase_y] > 0 ? 1 : 0;
  const T* const channels =
      input + (int64_t{block.batch} * s.groups.divisor + block.group) * s.in_channels *
                  s.in_channel_stride;
  const Acc* const group_packed =
      packed + int64_t{block.group} * blocks_c * SLOTS * s.in_channels * CHANNELS;

  // Copies the tile and the weights of one pass over one chunk of input channels.
  auto stage = [&](int buffer, int chunk, int pass) {
    const int first_channel = chunk * s.chunk;
    const int count = min(s.chunk, s.in_channels - first_channel);
    const int r = block.r0 * STEP_R + FIRST_R[phase_r];
    const int y = y0 * STEP_Y + FIRST_Y[phase_y];
    const int x = block.x0 * STEP_X + FIRST_X - shift;
    Acc* const tile = shared + buffer * s.stage_elements;
    stage_tile<PLANE_STEP, LINE_STEP, STEP_X>(s, whole_block(), tile,
                                              channels + first_channel * s.in_channel_stride,
                                              count, count, r, y, x);
    const int region = PHASE_REGION[block.phase] + pass;
    const int region_taps = REGION_FIRST[region + 1] - REGION_FIRST[region];
    for (int w = 0; w < s.warps_c; ++w) {
      const int from_block = block.channel_block * s.warps_c + w;
      if (from_block >= blocks_c) break;
      const Acc* from = group_packed +
                        ((int64_t{from_block} * SLOTS + REGION_FIRST[region]) * s.in_channels +
                         first_channel * region_taps) *
                            CHANNELS;
      stage_packed<CHANNELS * sizeof(Acc) % 16 == 0>(
          whole_block(), tile + s.tile_elements + w * s.chunk * TAPS_PER_PASS * CHANNELS, from,
          count * region_taps * CHANNELS);
    }
  };

  // Two buffers: the next pass is on its way while this one is multiplied.
  if (passes > 0) stage(0, 0, 0);
  copy_commit();
  int buffer = 0;
  for (int chunk = 0; chunk < s.chunks; ++chunk) {
    for (int pass = 0; pass < passes; ++pass) {
      const bool last_pass = pass + 1 == passes;
      const int next_chunk = chunk + last_pass;
      if (next_chunk < s.chunks) stage(buffer ^ 1, next_chunk, last_pass ? 0 : pass + 1);
      copy_commit();
      copy_wait<1>();
      __syncthreads();
      if (block_c < blocks_c) {
        const int region = PHASE_REGION[block.phase] + pass;
        const int region_taps = REGION_FIRST[region + 1] - REGION_FIRST[region];
        const int count = min(s.chunk, s.in_channels - chunk * s.chunk);
        const Acc* tile = shared + buffer * s.stage_elements + thread_offset;
        const Acc* weight = shared + buffer * s.stage_elements + s.tile_elements +
                            warp_c * s.chunk * TAPS_PER_PASS * CHANNELS;
        for (int channel = 0; channel < count; ++channel) {
          switch (block.phase) {
            case 0:
              accumulate_d0_h0<CHANNELS>(s, tile, weight, acc);
              break;
            case 1:
              accumulate_d0_h1<CHANNELS>(s, tile, weight, acc);
              break;
            case 2:
              accumulate_d1_h0<CHANNELS>(s, tile, weight, acc);
              break;
            case 3:
              accumulate_d1_h1<CHANNELS>(s, tile, weight, acc);
              break;
          }
          tile += s.channel_pitch;
          weight += region_taps * CHANNELS;
        }
      }
      __syncthreads();
      buffer ^= 1;
    }
  }

  // Epilogue: bias, and the outputs of this thread's phases.
  const int first_out = block_c * CHANNELS;
  T* const out_channels =
      output +
      ((int64_t{block.batch} * s.groups.divisor + block.group) * s.out_channels + first_out) *
          s.out_channel_stride;
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    const int flat = block.flat0 + lane;
    const int at_r = (block.r0 + m) * PHASES_R + phase_r;
    const int at_y = position_y * PHASES_Y + phase_y;
    const int at_x = (block.x0 + position_x) * PHASES_X + group_x * VARIANTS;
    if (flat >= strip_positions) continue;
    if (at_r >= s.r.output || at_y >= s.y.output || at_x >= s.x.output) continue;
    const int valid = min(s.x.output - at_x, PHASES_X - group_x * VARIANTS);
    T* const to = out_channels + at_r * s.r.output_stride + at_y * s.y.output_stride + at_x;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (first_out + c >= s.out_channels) break;
      const Acc offset = bias ? widen(bias[block.group * s.out_channels + first_out + c]) : Acc(0);
      Acc value[VARIANTS];
#pragma unroll
      for (int v = 0; v < VARIANTS; ++v) value[v] = acc[v][m][c] + offset;
      store_outputs<VARIANTS>(to + c * s.out_channel_stride, value, valid, s.vector_store);
    }
  }
}

template <int CHANNELS>
__global__ void dgrad_pack_kernel(Acc* packed, const T* weight, int in_channels,
                                  int out_channels, int64_t elements) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= elements) return;
  constexpr bool OUTPUT_IS_COARSE = false;
  pack_weight<CHANNELS, OUTPUT_IS_COARSE>(packed, weight, SLOT_TAP, REGION_FIRST, REGIONS, TAPS,
                                          SLOTS, in_channels, out_channels, index);
}

// Output channels per thread for a call: the compiled size that pads its groups least.
int channels_per_thread(int64_t out_channels) {
  return 8;
}

int64_t packed_elements(const ConvgenCall& call) {
  const int64_t in_channels = call.coarse_channels / GROUPS;
  const int64_t out_channels = call.fine_channels / GROUPS;
  const int64_t channels = channels_per_thread(out_channels);
  return GROUPS * round_up(out_channels, channels) * in_channels * SLOTS;
}

// Cuts a call into tiles, which are expected to take so many clocks.
int cut(const ConvgenCall& call, const DeviceLimits& limits, int channels,
        GatherShape& s, double& clocks) {
  const int64_t* in = call.coarse_extent;
  const int64_t* out = call.fine_extent;
  const int64_t in_stride[3] = {in[1] * in[2], in[2], 1};
  const int64_t out_stride[3] = {out[1] * out[2], out[2], 1};
  auto axis = [&](int i, int phases) {
    GatherAxis a;
    a.input = static_cast<int>(in[i]);
    a.output = static_cast<int>(out[i]);
    a.positions = static_cast<int>(ceil_div(out[i], phases));
    a.input_stride = static_cast<int>(in_stride[i]);
    a.output_stride = static_cast<int>(out_stride[i]);
    return a;
  };
  s.r = axis(0, PHASES_R);
  s.y = axis(1, PHASES_Y);
  s.x = axis(2, PHASES_X);
  s.in_channels = static_cast<int>(call.coarse_channels / GROUPS);
  s.out_channels = static_cast<int>(call.fine_channels / GROUPS);
  s.in_channel_stride = in[0] * in[1] * in[2];
  s.out_channel_stride = out[0] * out[1] * out[2];
  const int64_t batch = call.batch;
  s.in_span = (s.in_channels - 1) * s.in_channel_stride +
              int64_t{s.r.input - 1} * s.r.input_stride +
              int64_t{s.y.input - 1} * s.y.input_stride + s.x.input;

  const GpuRates rates = gpu_rates(limits.capability);
  GatherTraits traits;
  traits.phases = PHASES_R * PHASES_Y * GROUPS_X;
  traits.step_r = ROW_STEP;
  traits.step_y = LANE_STEP_Y;
  traits.step_x = STEP_X;
  traits.span_r = 1;
  traits.span_y = 1;
  traits.span_x = 1;
  traits.scattered = SCATTERED;
  traits.taps_per_pass = TAPS_PER_PASS;
  traits.slots = SLOTS, traits.regions = REGIONS;
  traits.variants = VARIANTS, traits.phases_x = PHASES_X;
  traits.rows_per_thread = ROWS;
  traits.max_warps = GATHER_MAX_WARPS;
  traits.lanes_per_warp = WARP;
  traits.channels_per_warp = channels;
  traits.packed_per_slot = channels;
  traits.word_bytes = sizeof(Acc);
  traits.words = s.in_channels;
  traits.chunk_step = 1;
  traits.max_chunk = 8;
  traits.element_bytes = sizeof(T);
  traits.slot_clocks = ROWS * channels / (sizeof(Acc) == 8 ? rates.fp64_warps : FP32_WARPS);
  return cut_gather(s, traits, batch, GROUPS, limits, rates, clocks);
}

template <int CHANNELS>
int run(const ConvgenCall& call, const DeviceLimits& limits) {
  const int64_t line = call.coarse_extent[2];
  const int load_width = STEP_X == 1 ? access_width<T, Acc>(call.coarse, line) : 1;
  thread_local ShapeCache<GatherShape> cache;
  bool known;
  GatherShape& s = cache.find(call, load_width, known);
  if (!known) {
    s.load_width = load_width;
    double clocks;
    if (const int error = cut(call, limits, CHANNELS, s, clocks)) {
      cache.forget(s);
      return error;
    }
  }
  const bool aligned = reinterpret_cast<uintptr_t>(call.fine) % (sizeof(T) * VARIANTS) == 0;
  s.vector_store =
      aligned && PHASES_X % VARIANTS == 0 && s.x.output % VARIANTS == 0;
  const int device = static_cast<int>(call.device);
  Acc* const packed = static_cast<Acc*>(call.workspace);
  const int64_t elements = packed_elements(call);
  constexpr int PACK_THREADS = 256;
  if (const int error = launch<dgrad_pack_kernel<CHANNELS>>(
          dim3(ceil_div(elements, PACK_THREADS)), dim3(PACK_THREADS), 0, device, call.stream,
          packed, static_cast<const T*>(call.weight), s.in_channels, s.out_channels, elements)) {
    return error;
  }
  return launch<dgrad_kernel<CHANNELS>>(
      dim3(s.blocks), dim3(s.threads), s.shared_bytes, device, call.stream, s,
      static_cast<const T*>(call.coarse), static_cast<const Acc*>(packed),
      static_cast<const T*>(call.bias), static_cast<T*>(call.fine));
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_dgrad_f32_workspace(const ConvgenCall* call) {
  return packed_elements(*call) * sizeof(Acc);
}

CONVGEN_EXPORT int convgen_dgrad_f32(const ConvgenCall* call) {
  if ((COARSE_CHANNELS && call->coarse_channels != COARSE_CHANNELS) ||
      (FINE_CHANNELS && call->fine_channels != FINE_CHANNELS)) {
    return CONVGEN_BAD_CHANNELS;
  }
  if (!volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  const DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(static_cast<int>(call->device), limits)) return error;
  switch (channels_per_thread(call->fine_channels / GROUPS)) {
    default:
      return run<8>(*call, limits);
  }
}

CONVGEN_EXPORT int64_t convgen_dgrad_f32_takes_layout(const ConvgenCall*) {
  return 0;
}
