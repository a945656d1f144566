// The host's part of the weight's gradient in TF32: how a call is dealt out, its packs and
// launches.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_HOST_CUH

#include "deal.cuh"
#include "host.cuh"
#include "wgrad_quarters.cuh"

namespace convgen {

// PARTS of a value: 1 in TF32, 2 in 3xTF32.
template <typename Conv, int PARTS, typename Lines>
class QuarterWgrad;

template <typename Conv, int PARTS, int... LINES>
class QuarterWgrad<Conv, PARTS, Sizes<LINES...>> {
 public:
  static constexpr int WIDE = 64, NARROW = 32;  // fine channels of a block

  QuarterWgrad(const ConvgenCall& call, const DeviceLimits& limits) : call_(call), limits_(limits) {
    const bool is_empty = volume(call.coarse_extent) == 0 || volume(call.fine_extent) == 0;
    if (is_empty || call.batch == 0) return;
    coarse_ = coarse_shape(), fine_ = fine_shape();
    if (coarse_.blocks() > INT32_MAX || fine_.blocks() > INT32_MAX) return;
    (consider<QuarterStage<Conv, LINES, WIDE, PARTS>>(), ...);
    (consider<QuarterStage<Conv, LINES, NARROW, PARTS>>(), ...);
  }

  bool found() const { return clocks_ < 1e30; }
  // Whether what the packs take is made up for, as measured on an H200. Other kernels have tensors
  // whose channels lie side by side transposed.
  bool pays() const {
    const bool last = call_.channels_last & (CONVGEN_COARSE | CONVGEN_FINE);
    return least_products<Conv>(call_) >= (last ? PAYING_LAST_PRODUCTS : PAYING_WGRAD_PRODUCTS);
  }
  // Whether the current device, `device`, runs code for sm_90a.
  static bool is_compiled(int device) {
    using Smallest = QuarterStage<Conv, -largest(-LINES...), NARROW, PARTS>;
    if constexpr (!Smallest::EXISTS) {
      return false;
    } else {
      int threads = 0;
      return launch_bound<quarter_wgrad_kernel<Smallest, Conv>, WGRAD_THREADS>(device, threads) ==
                 cudaSuccess &&
             threads == WGRAD_THREADS;
    }
  }
  double expected_ms() const { return clocks_ / CLOCKS_PER_MS; }
  int64_t workspace_bytes() const {
    return packed_bytes(coarse_) + packed_bytes(fine_) +
           (t_.ctas + pairs_) * partials_ * static_cast<int64_t>(sizeof(float));
  }

  int run() const {
    unsigned char* const workspace = static_cast<unsigned char*>(call_.workspace);
    float4* const coarse = reinterpret_cast<float4*>(workspace);
    float4* const fine = reinterpret_cast<float4*>(workspace + packed_bytes(coarse_));
    float* const partials =
        reinterpret_cast<float*>(workspace + packed_bytes(coarse_) + packed_bytes(fine_));
    if (const int error = pack(CONVGEN_COARSE, call_.coarse, coarse, coarse_)) return error;
    if (const int error = pack(CONVGEN_FINE, call_.fine, fine, fine_)) return error;
    int error = CONVGEN_TOO_LARGE;
    const auto launched = [&](auto stage) {
      using Stage = decltype(stage);
      if (lines_ != Stage::LINES || channels_ != Stage::CHANNELS) return false;
      error = launch_with<Stage>(coarse, fine, partials);
      return true;
    };
    const bool found = (launched(QuarterStage<Conv, LINES, WIDE, PARTS>{}) || ...) ||
                       (launched(QuarterStage<Conv, LINES, NARROW, PARTS>{}) || ...);
    return found ? error : CONVGEN_TOO_LARGE;
  }

 private:
  static int64_t volume(const int64_t (&e)[3]) { return e[0] * e[1] * e[2]; }

  // Coarse positions of a residue along the axis that is divided, of a quarter.
  int quarter() const {
    constexpr int AXIS = Conv::LINEAR ? 2 : 1;
    constexpr int RESIDUES = Conv::LINEAR ? Conv::DILATION_W : Conv::DILATION_H;
    return static_cast<int>(ceil_div(ceil_div(call_.coarse_extent[AXIS], RESIDUES), QUARTERS));
  }

  QuarterShape shape(const int64_t (&extent)[3], int64_t channels) const {
    QuarterShape s = {};
    s.batch = static_cast<int>(call_.batch), s.depth = static_cast<int>(extent[0]);
    s.channels = static_cast<int>(channels);
    s.h.extent = static_cast<int>(extent[1]), s.h.residues = Conv::DILATION_H;
    s.w.extent = static_cast<int>(extent[2]), s.w.residues = Conv::DILATION_W;
    s.w.count = static_cast<int>(ceil_div(extent[2], Conv::DILATION_W));
    return s;
  }
  static void finish(QuarterShape& s) {
    s.column_tiles = static_cast<int>(ceil_div(s.w.count, QUARTER_TILE));
    s.channel_tiles = static_cast<int>(ceil_div(s.channels, QUARTER_TILE));
    s.part = int64_t{s.batch} * s.h.residues * s.w.residues * s.depth * s.h.count * s.w.count *
             s.channels;
  }
  QuarterShape coarse_shape() const {
    QuarterShape s = shape(call_.coarse_extent, call_.coarse_channels);
    s.h.step = s.w.step = 1;
    QuarterAxis& divided = Conv::LINEAR ? s.w : s.h;
    s.h.count = 1;
    divided.count = quarter(), divided.quarter = quarter() * divided.residues;
    finish(s);
    return s;
  }
  QuarterShape fine_shape() const {
    QuarterShape s = shape(call_.fine_extent, call_.fine_channels);
    s.h.step = Conv::STRIDE_H, s.h.padding = Conv::PADDING_H;
    s.w.step = Conv::STRIDE_W, s.w.padding = Conv::PADDING_W;
    QuarterAxis& divided = Conv::LINEAR ? s.w : s.h;
    const int kernel = Conv::LINEAR ? Conv::KERNEL_W : Conv::KERNEL_H;
    s.h.count = 1;
    divided.count = (quarter() - 1) * divided.step + kernel;
    divided.quarter = quarter() * divided.step * divided.residues;
    finish(s);
    return s;
  }
  static int64_t packed_bytes(const QuarterShape& s) {
    return round_up(PARTS * s.part * UNIT_BYTES, 1024);
  }

  template <typename Stage>
  void consider() {
    if constexpr (Stage::EXISTS) {
      QuarterTiling t = {};
      t.tiles_w = static_cast<int>(ceil_div(coarse_.w.count, Stage::TILE_W));
      t.tiles_h = static_cast<int>(ceil_div(coarse_.h.count, Stage::TILE_H));
      t.depth = coarse_.depth;
      t.groups = Conv::GROUPS;
      t.coarse_channels = coarse_.channels / Conv::GROUPS;
      t.fine_channels = fine_.channels / Conv::GROUPS;
      t.coarse_blocks = static_cast<int>(ceil_div(t.coarse_channels, BLOCK_M));
      t.fine_blocks = static_cast<int>(ceil_div(t.fine_channels, Stage::CHANNELS));
      const int64_t samples = call_.batch * Conv::DILATION_H * Conv::DILATION_W;
      const int64_t positions = int64_t{t.tiles_w} * t.tiles_h * t.depth * samples;
      const int64_t pairs = int64_t{Conv::KERNEL_D} * Stage::Taps::GROUPS * t.groups *
                            t.coarse_blocks * t.fine_blocks;
      if (samples > INT32_MAX / PARTS || t.coarse_channels > 65535) return;
      if (positions > INT32_MAX / 2 || pairs > INT32_MAX / 2) return;
      if (pairs * positions > INT32_MAX / 2) return;
      t.samples = static_cast<int>(samples), t.positions = static_cast<int>(positions);
      t.units = static_cast<int>(pairs * positions);
      t.stages = (limits_.shared_bytes - static_cast<int>(sizeof(WgradStorage)) - ATOM_BYTES) /
                 Stage::BYTES;
      if (t.stages > 8) t.stages = 8;
      if (t.stages < 2) return;
      // The tensor cores read both operands anew for each product: 128 bytes a clock.
      constexpr double COLUMNS = 2 * Stage::SUMS;
      constexpr double PRODUCT =
          COLUMNS / 2 > (BLOCK_M + COLUMNS) / 4 ? COLUMNS / 2 : (BLOCK_M + COLUMNS) / 4;
      const double products = Stage::OWN_STEPS * WGRAD_CONSUMERS * (PARTS == 2 ? 3 : 1) * PRODUCT;
      const double loads = Stage::BYTES / LEVEL2_BYTES_PER_CLOCK;
      const Deal deal = deal_units(pairs, positions, products > loads ? products : loads,
                                   4.0 * Stage::PARTIALS, limits_.multiprocessors);
      t.ctas = deal.ctas;
      const double clocks = deal.clocks + GEMM_TILE_CLOCKS + LAUNCH_CLOCKS + pack_clocks();
      if (clocks < clocks_) {
        clocks_ = clocks, t_ = t, lines_ = Stage::LINES, channels_ = Stage::CHANNELS;
        pairs_ = pairs, partials_ = Stage::PARTIALS;
      }
    }
  }

  double pack_clocks() const {
    const double read = 4.0 * call_.batch *
                        (static_cast<double>(call_.coarse_channels) * volume(call_.coarse_extent) +
                         static_cast<double>(call_.fine_channels) * volume(call_.fine_extent));
    const double written = static_cast<double>(packed_bytes(coarse_) + packed_bytes(fine_));
    return (read + written) / (QUARTER_COPY_BYTES * limits_.multiprocessors) + 2 * LAUNCH_CLOCKS;
  }

  int pack(int operand, const void* from, float4* to, const QuarterShape& s) const {
    return (call_.channels_last & operand) != 0 ? pack_with<true>(from, to, s)
                                                : pack_with<false>(from, to, s);
  }
  template <bool LAST>
  int pack_with(const void* from, float4* to, const QuarterShape& s) const {
    return launch<pack_quarters_kernel<PARTS, LAST>, true>(
        dim3(static_cast<unsigned>(s.blocks())), dim3(PACK_THREADS), 0,
        static_cast<int>(call_.device), call_.stream, static_cast<const float*>(from), to, s);
  }

  template <typename Stage>
  int launch_with(const float4* coarse, const float4* fine, float* partials) const {
    if constexpr (!Stage::EXISTS) {
      return CONVGEN_TOO_LARGE;
    } else {
      const int device = static_cast<int>(call_.device);
      TensorMap coarse_map, fine_map;
      TensorView v = quarters_view(coarse_, PARTS);
      v.box[0] = QUARTERS * BLOCK_M, v.box[1] = Stage::TILE_W, v.box[2] = Stage::TILE_H;
      if (const int error = make_tensor_map<float>(coarse_map, coarse, v, device)) return error;
      v = quarters_view(fine_, PARTS);
      v.box[0] = QUARTERS * Stage::CHANNELS, v.box[1] = Stage::BOX_W, v.box[2] = Stage::BOX_H;
      if (const int error = make_tensor_map<float>(fine_map, fine, v, device)) return error;

      const int shared_bytes =
          static_cast<int>(sizeof(WgradStorage)) + ATOM_BYTES + t_.stages * Stage::BYTES;
      if (const int error = launch<quarter_wgrad_kernel<Stage, Conv>, true>(
              dim3(t_.ctas), dim3(WGRAD_THREADS), shared_bytes, device, call_.stream, coarse_map,
              fine_map, t_, partials)) {
        return error;
      }
      const Adding add(call_, t_, Conv::TAPS, limits_.multiprocessors);
      constexpr MeetingAxis AXES[3] = {
          {0, 0, Conv::KERNEL_D, Conv::STRIDE_D, Conv::PADDING_D, Conv::DILATION_D},
          {0, 0, Conv::KERNEL_H, Conv::STRIDE_H, Conv::PADDING_H, Conv::DILATION_H},
          {0, 0, Conv::KERNEL_W, Conv::STRIDE_W, Conv::PADDING_W, Conv::DILATION_W}};
      return launch<add_quarters_kernel<Stage::CHANNELS, Conv>, true>(
          add.grid, dim3(PACK_THREADS), 0, device, call_.stream, t_,
          static_cast<const float*>(partials), add.out, add.taps,
          meeting_of<float>(call_, Conv::GROUPS, AXES), call_.channels_last);
    }
  }

  ConvgenCall call_;
  DeviceLimits limits_;
  QuarterShape coarse_ = {}, fine_ = {};
  QuarterTiling t_ = {};
  double clocks_ = 1e30;
  int lines_ = 0, channels_ = 0;
  int64_t pairs_ = 0, partials_ = 0;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_QUARTERS_HOST_CUH
