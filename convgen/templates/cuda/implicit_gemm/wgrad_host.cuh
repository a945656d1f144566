// The host's part of the weight's gradient: how a call is dealt out, what it needs, its launches.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_HOST_CUH

#include "deal.cuh"
#include "host.cuh"
#include "wgrad.cuh"

namespace convgen {

template <typename T, typename Conv, typename Lines>
class ImplicitGemmWgrad;

template <typename T, typename Conv, int... LINES>
class ImplicitGemmWgrad<T, Conv, Sizes<LINES...>> {
 public:
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T);
  static constexpr int TAPS = Conv::KERNEL_D * Conv::KERNEL_H * Conv::KERNEL_W;

  ImplicitGemmWgrad(const ConvgenCall& call, const DeviceLimits& limits)
      : call_(call), limits_(limits) {
    const auto lies = [&](int operand, int64_t channels) {
      return (call.channels_last & operand) != 0 && channels / Conv::GROUPS % VECTOR == 0;
    };
    packs_coarse_ = !lies(CONVGEN_COARSE, call.coarse_channels);
    packs_fine_ = !lies(CONVGEN_FINE, call.fine_channels);
    (consider<LINES, 128>(), ...);
    (consider<LINES, 64>(), ...);
  }

  bool found() const { return clocks_ < 1e30; }
  // Whether what packing contiguous tensors takes is made up for, as measured on an H200.
  bool pays() const {
    if (call_.channels_last & (CONVGEN_COARSE | CONVGEN_FINE)) {
      return expected_ms() < other_wgrad_ms<T, Conv>(call_, limits_.multiprocessors);
    }
    return least_products<Conv>(call_) >= PAYING_WGRAD_PRODUCTS;
  }
  // Whether the current device, `device`, runs code for sm_90a.
  static bool is_compiled(int device) {
    constexpr int SMALLEST = -largest(-LINES...);
    int threads = 0;
    return launch_bound<wgrad_kernel<T, SMALLEST, 64, Conv>, WGRAD_THREADS>(device, threads) ==
               cudaSuccess &&
           threads == WGRAD_THREADS;
  }
  double expected_ms() const { return clocks_ / CLOCKS_PER_MS; }
  int64_t workspace_bytes() const {
    return coarse_bytes() + fine_bytes() + (t_.ctas + pairs_) * partials_ * sizeof(float);
  }

  int run() const {
    unsigned char* const workspace = static_cast<unsigned char*>(call_.workspace);
    const T* coarse = static_cast<const T*>(call_.coarse);
    const T* fine = static_cast<const T*>(call_.fine);
    if (packs_coarse_) {
      T* const packed = reinterpret_cast<T*>(workspace);
      if (const int error = pack(coarse, packed, call_.coarse_channels, call_.coarse_extent,
                                 call_.channels_last & CONVGEN_COARSE)) {
        return error;
      }
      coarse = packed;
    }
    if (packs_fine_) {
      T* const packed = reinterpret_cast<T*>(workspace + coarse_bytes());
      if (const int error = pack(fine, packed, call_.fine_channels, call_.fine_extent,
                                 call_.channels_last & CONVGEN_FINE)) {
        return error;
      }
      fine = packed;
    }
    float* const partials = reinterpret_cast<float*>(workspace + coarse_bytes() + fine_bytes());
    int error = CONVGEN_TOO_LARGE;
    const bool found = ((row_ == 128 && lines_ == LINES &&
                         (error = launch_with<LINES, 128>(coarse, fine, partials), true)) ||
                        ...) ||
                       ((row_ == 64 && lines_ == LINES &&
                         (error = launch_with<LINES, 64>(coarse, fine, partials), true)) ||
                        ...);
    return found ? error : CONVGEN_TOO_LARGE;
  }

 private:
  bool samples_are_planes() const {
    return Conv::KERNEL_D == 1 && Conv::PADDING_D == 0 && call_.fine_extent[0] == 1 &&
           call_.coarse_extent[0] == 1;
  }
  // A group's channels as TMA can begin at them.
  static int64_t padded(int64_t channels) {
    return round_up(channels / Conv::GROUPS, VECTOR) * Conv::GROUPS;
  }
  int64_t packed_bytes(int64_t channels, const int64_t (&e)[3]) const {
    return round_up(
        call_.batch * e[0] * e[1] * e[2] * padded(channels) * static_cast<int64_t>(sizeof(T)),
        1024);
  }
  int64_t coarse_bytes() const {
    return packs_coarse_ ? packed_bytes(call_.coarse_channels, call_.coarse_extent) : 0;
  }
  int64_t fine_bytes() const {
    return packs_fine_ ? packed_bytes(call_.fine_channels, call_.fine_extent) : 0;
  }

  template <int SIZE, int ROW>
  static constexpr bool EXISTS =
      Conv::STRIDE_D == 1 && Conv::STRIDE_H == 1 && Conv::STRIDE_W == 1 &&
      Conv::KERNEL_H * Conv::KERNEL_W > 1 && 2 * WgradStage<Conv, SIZE, ROW>::BYTES <= 200 * 1024 &&
      WgradStage<Conv, SIZE, ROW>::Halo::BOX_H <= 256 &&
      (Conv::LINEAR || WgradStage<Conv, SIZE, ROW>::Halo::LOADS == 1);

  template <int SIZE, int ROW>
  void consider() {
    if constexpr (EXISTS<SIZE, ROW>) {
      using Stage = WgradStage<Conv, SIZE, ROW>;
      WgradTiling t = {};
      const int64_t* e = call_.coarse_extent;
      t.step_w = Conv::LINEAR ? 8 * SIZE : 8, t.step_h = Conv::LINEAR ? 1 : SIZE;
      if (e[2] < t.step_w || e[1] < t.step_h) return;
      t.tiles_w = static_cast<int>(ceil_div(e[2], t.step_w));
      t.tiles_h = static_cast<int>(ceil_div(e[1], t.step_h));
      t.last_w = static_cast<int>(e[2] - t.step_w), t.last_h = static_cast<int>(e[1] - t.step_h);
      t.depth = static_cast<int>(samples_are_planes() ? call_.batch : e[0]);
      t.batch = static_cast<int>(samples_are_planes() ? 1 : call_.batch);
      t.groups = Conv::GROUPS;
      t.coarse_channels = static_cast<int>(call_.coarse_channels / Conv::GROUPS);
      t.fine_channels = static_cast<int>(call_.fine_channels / Conv::GROUPS);
      t.coarse_pitch = static_cast<int>(padded(call_.coarse_channels) / Conv::GROUPS);
      t.fine_pitch = static_cast<int>(padded(call_.fine_channels) / Conv::GROUPS);
      t.coarse_blocks = static_cast<int>(ceil_div(t.coarse_channels, Stage::CHANNELS));
      t.fine_blocks = static_cast<int>(ceil_div(t.fine_channels, Stage::CHANNELS));
      const int64_t positions = int64_t{t.tiles_w} * t.tiles_h * t.depth * t.batch;
      t.positions = static_cast<int>(positions);
      const int64_t pairs = int64_t{Conv::KERNEL_D} * TapLines<Conv>::GROUPS * t.groups *
                            t.coarse_blocks * t.fine_blocks;
      if (pairs * positions > INT32_MAX / 2) return;
      t.units = static_cast<int>(pairs * positions);
      t.stages = (limits_.shared_bytes - static_cast<int>(sizeof(WgradStorage)) - ATOM_BYTES) /
                 Stage::BYTES;
      if (t.stages > 8) t.stages = 8;
      const double products = SIZE / 2 * WGRAD_CONSUMERS * Stage::SUMS;
      const double loads = Stage::LOADED_BYTES / LEVEL2_BYTES_PER_CLOCK;
      const Deal deal = deal_units(pairs, positions, products > loads ? products : loads,
                                   4.0 * Stage::PARTIALS, limits_.multiprocessors);
      t.ctas = deal.ctas;
      const double clocks = deal.clocks + GEMM_TILE_CLOCKS + LAUNCH_CLOCKS + pack_clocks();
      if (clocks < clocks_) {
        clocks_ = clocks, t_ = t, lines_ = SIZE, row_ = ROW, pairs_ = pairs;
        partials_ = Stage::PARTIALS;
      }
    }
  }

  double pack_clocks() const {
    const double bytes = 2.0 * (coarse_bytes() + fine_bytes());
    return bytes / (COPY_BYTES_PER_CLOCK * limits_.multiprocessors) +
           (packs_coarse_ + packs_fine_) * LAUNCH_CLOCKS;
  }

  int pack(const T* from, T* to, int64_t channels, const int64_t (&e)[3], bool last) const {
    const PackShape s =
        pack_shape(call_.batch, channels, e, Conv::GROUPS, padded(channels) / Conv::GROUPS, last);
    return pack_input<Form::ROUNDED>(from, to, s, last, static_cast<int>(call_.device),
                                     call_.stream, limits_.multiprocessors);
  }

  template <int SIZE, int ROW>
  int launch_with(const T* coarse, const T* fine, float* partials) const {
    if constexpr (!EXISTS<SIZE, ROW>) {
      return CONVGEN_TOO_LARGE;
    } else {
      using Stage = WgradStage<Conv, SIZE, ROW>;
      const int device = static_cast<int>(call_.device);
      const bool merged = samples_are_planes();
      const int64_t coarse_channels = padded(call_.coarse_channels);
      const int64_t fine_channels = padded(call_.fine_channels);
      CoarseMaps coarse_maps;
      for (int i = 0; i < 4; ++i) {
        // What lies before the last tiles is outside of the maps with which these are loaded.
        TensorView v = positions_view<T>(coarse_channels, call_.coarse_extent, call_.batch, merged);
        const int64_t w = i % 2 ? int64_t{t_.tiles_w - 1} * t_.step_w : 0;
        const int64_t h = i / 2 ? int64_t{t_.tiles_h - 1} * t_.step_h : 0;
        v.extent[1] -= w, v.extent[2] -= h;
        v.swizzle = ROW, v.box[0] = Stage::CHANNELS, v.box[1] = t_.step_w, v.box[2] = t_.step_h;
        if (Conv::LINEAR && t_.step_w > 256) return CONVGEN_TOO_LARGE;
        v.box[3] = v.box[4] = 1;
        const T* const first = coarse + (w + h * call_.coarse_extent[2]) * coarse_channels;
        if (const int error = make_tensor_map<T>(coarse_maps.of[i], first, v, device)) {
          return error;
        }
      }
      TensorMap fine_map;
      TensorView v = positions_view<T>(fine_channels, call_.fine_extent, call_.batch, merged);
      v.swizzle = ROW, v.box[0] = Stage::CHANNELS;
      v.box[1] = Stage::Halo::LOAD_W, v.box[2] = Stage::Halo::BOX_H, v.box[3] = v.box[4] = 1;
      if (const int error = make_tensor_map<T>(fine_map, fine, v, device)) return error;

      const int shared_bytes =
          static_cast<int>(sizeof(WgradStorage)) + ATOM_BYTES + t_.stages * Stage::BYTES;
      if (const int error = launch<wgrad_kernel<T, SIZE, ROW, Conv>, true>(
              dim3(t_.ctas), dim3(WGRAD_THREADS), shared_bytes, device, call_.stream, coarse_maps,
              fine_map, t_, partials)) {
        return error;
      }
      const Adding add(call_, t_, TAPS, limits_.multiprocessors);
      return launch<add_wgrad_kernel<T, ROW, Conv>, true>(
          add.grid, dim3(PACK_THREADS), 0, device, call_.stream, t_,
          static_cast<const float*>(partials), add.out, add.taps);
    }
  }

  ConvgenCall call_;
  DeviceLimits limits_;
  WgradTiling t_ = {};
  double clocks_ = 1e30;
  int lines_ = 0, row_ = 0;
  int64_t pairs_ = 0, partials_ = 0;
  bool packs_coarse_, packs_fine_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_HOST_CUH
