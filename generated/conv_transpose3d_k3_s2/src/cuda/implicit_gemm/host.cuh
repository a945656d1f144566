// The host's part of an implicit GEMM: how a call is dealt out, what it needs, its launches.
#ifndef CONVGEN_IMPLICIT_GEMM_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_HOST_CUH

#include "choice.cuh"

namespace convgen {

template <typename T, typename Conv, bool COARSE_INPUT, typename HaloSizes, typename TapSizes>
class ImplicitGemm;

template <typename T, typename Conv, bool COARSE_INPUT, int... HALO_LINES, int... TAP_LINES>
class ImplicitGemm<T, Conv, COARSE_INPUT, Sizes<HALO_LINES...>, Sizes<TAP_LINES...>>
    : public GemmChoice<T, Conv> {
 public:
  using Choice = GemmChoice<T, Conv>;
  using Choice::BLOCK_K, Choice::PARTS, Choice::TAPS, Choice::VECTOR;
  using Choice::HAS_CHANNELS, Choice::MN, Choice::PHASED, Choice::PHASES, Choice::POINTWISE;
  using Choice::input_elements, Choice::output_elements;
  template <int LINES>
  static constexpr bool HAS_HALO = Choice::template HAS_HALO<LINES>;
  using typename Choice::Step;

  ImplicitGemm(const Operands& call, const DeviceLimits& limits) : Choice(call, limits) {
    const bool as_it_lies =
        READS_PATCHES<Conv> || (call.input_channels_last && padded_ == input_channels_);
    const bool by_channels = !call.input_channels_last && reads_channels();
    // Phases lie apart: what lies along W would leave element by element. None is empty.
    turns_ = PHASED && !call.output_channels_last && (leaves_by_tma() || !reads_beside());
    call_.output_channels_last |= turns_;
    if (PHASED && !call_.output_channels_last) return;
    for (int i = 0; i < 3; ++i) {
      if (POINTWISE && call.input_extent[i] != call.output_extent[i]) return;  // output padding
      if (call.output_extent[i] < Step::OUTPUT[i]) return;
    }
    // Some hundred ways are considered: once for each shape.
    thread_local ShapeCache<Plan> plans;
    bool known;
    Plan& plan = plans.find(*call.call, call.call->channels_last | (turns_ ? 8 : 0), known);
    if (!known) {
      (this->template consider<GatherHalo<Conv, HALO_LINES>, HALO_LINES>(as_it_lies), ...);
      if (by_channels) {
        if constexpr (HAS_CHANNELS) {
          (this->template consider<ChannelSlab<Conv, TAP_LINES>, TAP_LINES>(as_it_lies), ...);
        }
      } else {
        (this->template consider<TapSlab<Conv, TAP_LINES>, TAP_LINES>(as_it_lies), ...);
      }
      plan = best_;
    }
    best_ = plan;
    packs_input_ = best_.packs > 0;
    padded_outputs_ = static_cast<int>(round_up(output_channels_, VECTOR));
    // TF32 is rounded, and read K-major: taps, then a row of input channels for each output.
    packs_weight_ = best_.tiling.fold == 2 || sizeof(T) == 4 || padded_ != input_channels_ ||
                    (TAPS > 1 && !call.weight_channels_last) ||
                    (MN && padded_outputs_ != output_channels_);
    const bool reversed = COARSE_INPUT && !packs_weight_;
    for (Tiling* t : {&best_.tiling, &best_.unfolded}) {
      t->first_tap = reversed ? TAPS - 1 : 0, t->tap_step = reversed ? -1 : 1;
    }
  }

  bool found() const { return best_.clocks < 1e30; }
  // Whether kernels that read contiguous tensors as they lie take longer, as measured on an H200.
  bool pays() const {
    const ConvgenCall& c = *call_.call;
    const double ms = expected_ms();
    if (c.channels_last) return ms < transposed_ms<T, Conv>(c, limits_.multiprocessors);
    const int least = input_channels_ < output_channels_ ? input_channels_ : output_channels_;
    if (PARTS == 2) {
      return least >= OTHER_CHANNELS && ms < other_gather_ms<T, Conv>(c, limits_.multiprocessors);
    }
    if (reads_channels()) return true;
    const bool suits = least >= PAYING_CHANNELS<T>;
    if (suits && output_elements() <= call_.output_channels * PAYING_POSITIONS) return true;
    if (PHASED) return ms < other_gather_ms<T, Conv>(c, limits_.multiprocessors);
    return suits && least * TAPS >= PAYING_PRODUCTS;
  }
  // Whether the current device, `device`, runs code for sm_90a.
  static bool is_compiled(int device) {
    constexpr int LINES = largest(TAP_LINES...);
    using Slab = TapSlab<Conv, LINES>;
    int error, threads = 0;
    if constexpr (Conv::HAS_EPILOGUE) {
      error = launch_bound<implicit_gemm_kernel<T, LINES, Conv, Slab, typename Conv::Finish>,
                           GEMM_THREADS>(device, threads);
    } else {
      error =
          launch_bound<implicit_gemm_kernel<T, LINES, Conv, Slab>, GEMM_THREADS>(device, threads);
    }
    return error == cudaSuccess && threads == GEMM_THREADS;
  }

  int64_t weight_bytes() const {
    const int64_t flag = best_.tiling.fold == 2 ? FLAG_BYTES : 0;
    const int64_t elements = packed_taps() * packed_weight_rows() * packed_weight_columns();
    const int64_t bytes = elements * PARTS * static_cast<int64_t>(sizeof(T));
    return packs_weight_ ? round_up(bytes, 1024) + flag : 0;
  }
  int64_t input_bytes() const {
    const int64_t bytes = input_elements() * input_parts() * static_cast<int64_t>(sizeof(T));
    return packs_input_ ? round_up(bytes, 1024) : 0;
  }
  int64_t workspace_bytes() const {
    const int64_t turned = turns_ ? output_elements() * static_cast<int64_t>(sizeof(T)) : 0;
    const int splits = best_.tiling.splits;  // one, where an output is turned
    return weight_bytes() + input_bytes() + turned +
           (splits > 1 ? splits * output_elements() * 4 : 0);
  }
  double expected_ms() const {
    double clocks = best_.clocks + best_.packs;
    clocks += unaligned_store_clocks<T>(call_, leaves_by_tma(), limits_);
    if (turns_) clocks += pack_clocks<T>(output_elements(), limits_.multiprocessors);
    // Thresholds that were measured with the packs of weights, not this, choose the other modes.
    if (PARTS == 2) {
      // Of one tap, splitting a slab takes as long as its products, beside these.
      if (TAPS == 1) clocks += best_.clocks;
      const int64_t weights = packed_taps() * packed_weight_rows() * packed_weight_columns();
      clocks += pack_clocks<T>(weights, limits_.multiprocessors, PARTS);
    }
    return clocks / CLOCKS_PER_MS;
  }

  int run() {
    unsigned char* const workspace = static_cast<unsigned char*>(call_.workspace);
    const T* input = static_cast<const T*>(call_.input);
    const T* weight = static_cast<const T*>(call_.weight);
    if (packs_weight_) {
      if (const int error = pack_weight(reinterpret_cast<T*>(workspace))) return error;
      weight = reinterpret_cast<const T*>(workspace);
    }
    if (packs_input_) {
      T* const packed = reinterpret_cast<T*>(workspace + weight_bytes());
      if (const int error = pack_input(packed)) return error;
      input = packed;
    }
    void* const rest = workspace + weight_bytes() + input_bytes();
    Output out = output_of(rest);
    if (best_.tiling.fold == 2) {
      int* const flag = reinterpret_cast<int*>(workspace + weight_bytes() - FLAG_BYTES);
      out.saw_nonfinite = flag;
      if (const int error = multiply(best_.tiling, input, weight, out)) return error;
      out.saw_nonfinite = nullptr, out.only_if = flag;
      return multiply(best_.unfolded, input, weight, out);
    }
    const int error = multiply(best_.tiling, input, weight, out);
    if constexpr (PHASED) return error || !turns_ ? error : turn_output<T>(call_, rest);
    if (error || best_.tiling.splits == 1) return error;
    return add_partials<T, Conv>(call_, out, best_.tiling.splits);
  }

 private:
  using Choice::best_, Choice::call_, Choice::limits_;
  using Choice::epilogue_of, Choice::leaves_by_tma, Choice::reads_beside, Choice::reads_channels;
  using Choice::output_channels_, Choice::input_channels_, Choice::padded_;
  using Choice::samples_are_planes;

  // Packed weights: see pack_weights_kernel and pack_folded_weights_kernel.
  int64_t packed_taps() const {
    return best_.tiling.fold == 2 ? TAPS / Conv::KERNEL_D * (Conv::KERNEL_D + 1) : TAPS;
  }
  int64_t packed_weight_rows() const {
    if (MN) return int64_t{Conv::GROUPS} * padded_;
    return best_.tiling.fold == 2 ? int64_t{BLOCK_M} : call_.output_channels;
  }
  // Of floats that a pack splits: see Choice::SPLITS_FIRST.
  int input_parts() const { return PARTS == 2 && !best_.tiling.rounds ? 2 : 1; }
  int64_t packed_weight_columns() const {
    if (!MN) return padded_;
    return best_.tiling.fold == 2 ? BLOCK_M : padded_outputs_;
  }

  // ---- Launches ---------------------------------------------------------------------------------

  int multiply(const Tiling& t, const T* input, const T* weight, const Output& out) const {
    int error = CONVGEN_TOO_LARGE;
    const auto has = [&](SlabKind slab, int lines) {
      return best_.slab == slab && best_.lines == lines;
    };
    const bool found =
        ((has(SlabKind::HALO, HALO_LINES) &&
          (error = launch_with<GatherHalo<Conv, HALO_LINES>, HALO_LINES>(t, input, weight, out),
           true)) ||
         ...) ||
        ((has(SlabKind::TAP, TAP_LINES) &&
          (error = launch_with<TapSlab<Conv, TAP_LINES>, TAP_LINES>(t, input, weight, out),
           true)) ||
         ...) ||
        ((has(SlabKind::CHANNELS, TAP_LINES) &&
          (error = launch_with<ChannelSlab<Conv, TAP_LINES>, TAP_LINES>(t, input, weight, out),
           true)) ||
         ...);
    return found ? error : CONVGEN_TOO_LARGE;
  }

  int pack_weight(T* to) const {
    const WeightShape s = weight_shape<COARSE_INPUT>(
        TAPS, call_.weight_channels_last, {Conv::GROUPS, output_channels_, input_channels_},
        padded_outputs_, padded_);
    if (best_.tiling.fold == 2) {
      int* const flag = reinterpret_cast<int*>(reinterpret_cast<unsigned char*>(to) +
                                               weight_bytes() - FLAG_BYTES);
      return pack_folded_weights<T, Conv, COARSE_INPUT>(call_, to, s, flag,
                                                        limits_.multiprocessors);
    }
    return pack_weights<T, Conv, COARSE_INPUT>(call_, to, s, packed_weight_rows(),
                                               packed_weight_columns());
  }

  int pack_input(T* to) const {
    const bool last = call_.input_channels_last;
    const PackShape s = pack_shape(call_.batch, call_.input_channels, call_.input_extent,
                                   Conv::GROUPS, padded_, last);
    const T* const from = static_cast<const T*>(call_.input);
    const auto pack = [&](auto form) {
      return convgen::pack_input<decltype(form)::value>(from, to, s, last, call_.device,
                                                        call_.stream, limits_.multiprocessors);
    };
    if constexpr (PARTS == 1) {
      return pack(FormConstant<Form::ROUNDED>());
    } else {
      return input_parts() == 2 ? pack(FormConstant<Form::SPLIT>())
                                : pack(FormConstant<Form::WHOLE>());
    }
  }

  // `rest` of the workspace has partial sums, or an output that is turned. Where that leaves by
  // TMA, its maps say where to, and what lies beside the result is found by the result's own
  // strides.
  Output output_of(void* rest) const {
    Output out = {};
    const bool elsewhere = turns_ && !leaves_by_tma();
    out.address = elsewhere ? rest : call_.output;
    out.partials = static_cast<float*>(rest), out.bias = call_.bias;
    lay_out(out, call_.batch, call_.output_channels, call_.output_extent,
            turns_ ? elsewhere : call_.output_channels_last);
    if (samples_are_planes()) {
      out.depth = out.batch, out.stride_d = out.stride_n, out.batch = 1;
    }
    out.stride_d *= Step::OUTPUT[0], out.stride_h *= Step::OUTPUT[1],
        out.stride_w *= Step::OUTPUT[2];
    out.epilogue = epilogue_of(best_.tiling);
    out.vector = 1;
    if (out.stride_w == 1) {
      const bool partial = out.epilogue == Epilogue::PARTIAL;
      const void* const base = partial ? rest : out.address;
      out.vector = access_elements(base, out.width, partial ? 4 : sizeof(T),
                                   out.epilogue == Epilogue::STAGED ? 8 : 2);
    }
    return out;
  }

  template <typename Slab, int LINES>
  int launch_with(const Tiling& t, const T* input, const T* weight, const Output& out) const {
    if constexpr ((Slab::HALO && !HAS_HALO<LINES>) || (Slab::MAJOR == Major::MN && !HAS_CHANNELS)) {
      return CONVGEN_TOO_LARGE;
    } else {
      TensorMap slab_map, weight_map;
      OutputMaps<PHASES> output_maps = {};
      if (const int error =
              encode<Slab>(t, slab_map, weight_map, output_maps, input, weight, out)) {
        return error;
      }
      const int shared_bytes = static_cast<int>(sizeof(SharedStorage)) + ATOM_BYTES +
                               t.slab_stages * t.slab_stage_bytes +
                               t.weight_stages * weight_stage_bytes<Conv>(t) +
                               CONSUMERS * output_stage_bytes<LINES>(out.epilogue);
      const int grid = t.tiles < limits_.multiprocessors ? t.tiles : limits_.multiprocessors;
      if constexpr (Conv::HAS_EPILOGUE) {
        using Finish = typename Conv::Finish;
        return launch<implicit_gemm_kernel<T, LINES, Conv, Slab, Finish>, true>(
            dim3(grid), dim3(GEMM_THREADS), shared_bytes, call_.device, call_.stream, slab_map,
            weight_map, output_maps, t, out, Finish(*call_.call, call_.output));
      } else {
        return launch<implicit_gemm_kernel<T, LINES, Conv, Slab>, true>(
            dim3(grid), dim3(GEMM_THREADS), shared_bytes, call_.device, call_.stream, slab_map,
            weight_map, output_maps, t, out);
      }
    }
  }

  template <typename Slab>
  int encode(const Tiling& t, TensorMap& slab_map, TensorMap& weight_map,
             OutputMaps<PHASES>& output_maps, const T* input, const T* weight,
             const Output& out) const {
    const bool merged = samples_are_planes();
    TensorView slab =
        Slab::MAJOR == Major::MN
            ? channels_view<T>(call_.input_extent[2], call_.input_channels, call_.batch)
            : positions_view<T>(Conv::GROUPS * padded_, call_.input_extent, call_.batch, merged);
    slab.box[0] = BLOCK_K, slab.extent[4] *= input_parts();
    if constexpr (Slab::MAJOR == Major::MN) {
      slab.box[0] = Slab::CHUNK_ROWS, slab.box[1] = BLOCK_K, slab.box[2] = 1;
    } else if constexpr (Slab::HALO) {
      const int height = t.slab_bytes / (t.loads * t.load_w * ROW_BYTES);
      slab.step[1] = Slab::STEP_W, slab.step[2] = Slab::STEP_H;
      slab.box[1] = t.load_w * Slab::STEP_W, slab.box[2] = height * Slab::STEP_H;
      slab.box[3] = slab.box[4] = 1;
    } else {
      const int extents[3] = {t.extent_d, t.extent_h, t.extent_w};
      for (int i = 0; i < 3; ++i) {
        slab.step[3 - i] = Step::INPUT[i], slab.box[3 - i] = extents[i] * Step::INPUT[i];
      }
      slab.box[4] = t.extent_n;
    }
    if (const int error = make_tensor_map<T>(slab_map, input, slab, call_.device)) return error;

    TensorView w = {};
    // As packed; else weight[coarse][tap][fine of the group] as it lies.
    w.rank = 3, w.swizzle = ROW_BYTES;
    w.extent[0] = packed_weight_columns(), w.extent[1] = packed_weight_rows();
    w.extent[2] = packed_taps() * PARTS;
    const uint64_t row_bytes = w.extent[0] * sizeof(T);
    w.stride_bytes[1] = packs_weight_ ? row_bytes : TAPS * row_bytes;
    w.stride_bytes[2] = packs_weight_ ? w.extent[1] * row_bytes : row_bytes;
    w.box[0] = MN ? BLOCK_M : BLOCK_K, w.box[2] = 1;
    w.box[1] = MN ? BLOCK_K : BLOCK_M * (3 - t.position_groups);
    w.step[0] = w.step[1] = w.step[2] = 1;
    if (const int error = make_tensor_map<T>(weight_map, weight, w, call_.device)) return error;
    if (out.epilogue != Epilogue::TMA) return CONVGEN_OK;

    TensorView o =
        positions_view<T>(call_.output_channels, call_.output_extent, call_.batch, merged);
    o.swizzle = output_channels_ <= BLOCK_M / 2 ? 64 : 128, o.box[0] = o.swizzle / 2;
    set_store_box(o, t, Slab::HALO);
    void* const address = turns_ ? out.partials : out.address;
    return make_output_maps<T>(output_maps, address, o, Step::OUTPUT, call_.device);
  }

  int padded_outputs_;
  bool packs_input_, packs_weight_, turns_;  // the output: see turned.cuh
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_HOST_CUH
