// How a call of an implicit GEMM is dealt out: of all ways the one that is expected to take least
// time.
#ifndef CONVGEN_IMPLICIT_GEMM_CHOICE_CUH
#define CONVGEN_IMPLICIT_GEMM_CHOICE_CUH

#include "turned.cuh"

namespace convgen {

template <typename T, typename Conv>
class GemmChoice {
 public:
  static constexpr int BLOCK_K = ROW_BYTES / sizeof(T), STEP_K = STEP_BYTES / sizeof(T);
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T), TAPS = Conv::TAPS, PARTS = Conv::PARTS;
  static constexpr bool MN = Conv::WEIGHTS == Major::MN;
  static constexpr bool DENSE = Conv::STRIDE_D == 1 && Conv::STRIDE_H == 1 && Conv::STRIDE_W == 1;
  // A slab serves several taps of a plane, or, with stride 1, of several planes; and it must leave
  // room for another. With a stride, two warps split slabs (3xTF32) more slowly than few taps'
  // products take.
  template <int LINES, typename Slab = GatherHalo<Conv, LINES>>
  static constexpr bool HAS_HALO =
      (DENSE ? TAPS > 1 : PARTS == 1 && Slab::TAPS > Slab::RESIDUES) &&
      2 * SLAB_STAGE_BYTES<Slab> <= 160 * 1024 && Slab::BOX_H * Slab::STEP_H <= 256 &&
      (Conv::LINEAR || Slab::LOADS == 1);
  // Without neighbours, all positions are those of one line.
  static constexpr bool POINTWISE =
      TAPS == 1 && DENSE && Conv::PADDING_D == 0 && Conv::PADDING_H == 0 && Conv::PADDING_W == 0;
  static constexpr bool HAS_CHANNELS = POINTWISE && sizeof(T) == 2 && !READS_PATCHES<Conv>;
  template <typename Slab>
  static constexpr SlabKind KIND = Slab::HALO                 ? SlabKind::HALO
                                   : Slab::MAJOR == Major::MN ? SlabKind::CHANNELS
                                                              : SlabKind::TAP;

  // Of a strided dgrad, phases are gathers of stride 1 (see phases.cuh).
  static constexpr int PHASES = Conv::PHASES;
  // Whether floats are split by the pack of the input: of a slab that is loaded again for each tap.
  // What is loaded once is split in shared memory, from half of the bytes.
  template <typename Slab>
  static constexpr bool SPLITS_FIRST = PARTS == 2 && !Slab::HALO && TAPS > 1;
  static constexpr bool PHASED = PHASES > 1;
  using Step = Steps<Conv>;

  int64_t input_elements() const {  // with the channels that a pack adds
    const int64_t* e = call_.input_extent;
    return call_.batch * e[0] * e[1] * e[2] * Conv::GROUPS * padded_;
  }
  int64_t output_elements() const {
    const int64_t* e = call_.output_extent;
    return call_.batch * call_.output_channels * e[0] * e[1] * e[2];
  }

 protected:
  GemmChoice(const Operands& call, const DeviceLimits& limits) : call_(call), limits_(limits) {
    if (POINTWISE) {
      for (int64_t (*e)[3] : {&call_.input_extent, &call_.output_extent}) {
        (*e)[2] *= (*e)[0] * (*e)[1], (*e)[0] = (*e)[1] = 1;
      }
    }
    output_channels_ = static_cast<int>(call.output_channels / Conv::GROUPS);
    input_channels_ = static_cast<int>(call.input_channels / Conv::GROUPS);
    // Of a group's last product no channel may be the next group's.
    padded_ = round_up(input_channels_, Conv::GROUPS > 1 ? STEP_K : VECTOR);
  }

  // Whether a contiguous input is multiplied as it lies: rows of positions that begin at multiples
  // of 16 bytes. Of a group's last product no channel may be the next group's.
  bool reads_channels() const {
    return HAS_CHANNELS && call_.input_extent[2] % VECTOR == 0 &&
           (Conv::GROUPS == 1 || input_channels_ % STEP_K == 0);
  }

  // Outputs of a phase along an axis, at most.
  int64_t of_phase(int axis) const {
    return ceil_div(call_.output_extent[axis], Step::OUTPUT[axis]);
  }

  // Planes are samples where there is one plane of each and no tap reaches another.
  bool samples_are_planes() const {
    return Conv::KERNEL_D == 1 && Conv::STRIDE_D == 1 && Conv::PADDING_D == 0 &&
           call_.input_extent[0] == 1 && call_.output_extent[0] == 1;
  }

  template <typename Slab, int LINES>
  void consider(bool as_it_lies) {
    if constexpr (Slab::HALO) {
      if constexpr (HAS_HALO<LINES>) consider_tiles<Slab, LINES>(halo_tiling<LINES>(), as_it_lies);
    } else {
      constexpr int LEAST_W = Slab::MAJOR == Major::MN ? 6 : 1;  // whole rows of 64 positions
      consider_tiles<Slab, LINES>(tap_tiling<LINES>(LEAST_W), as_it_lies);
    }
  }

  template <int LINES>
  Tiling halo_tiling() const {
    Tiling t = {};
    t.extent_w = Conv::LINEAR ? 8 * LINES : 8;
    t.extent_h = Conv::LINEAR ? 1 : LINES;
    t.extent_d = t.extent_n = 1;
    // More than any tile has: the lines of a halo's are all along H.
    t.log2_w = Conv::LINEAR ? 16 : 3, t.log2_h = 16, t.log2_d = 16;
    t.tiles_w = ceil_div(of_phase(2), t.extent_w), t.tiles_h = ceil_div(of_phase(1), t.extent_h);
    return t;
  }

  template <int LINES>
  Tiling tap_tiling(int least_w) const {
    static_assert((LINES & (LINES - 1)) == 0, "a tile of taps is a power of two");
    const bool merged = samples_are_planes();
    return power_of_two_tiling({merged ? call_.batch : of_phase(0), of_phase(1), of_phase(2)},
                               merged ? 1 : call_.batch, 8 * LINES, Step::INPUT, least_w,
                               call_.output_channels_last ? 3 : 6);  // lines that leave whole
  }

  // What a halo's slab has, by the way that `t` is dealt out; false where TMA has no such boxes.
  template <typename Slab, int LINES>
  bool halo_box(Tiling& t) const {
    const int parts = Slab::STRIDED ? t.position_groups : 1;  // of it, one for each consumer
    int height = Slab::BOX_H;
    t.loads = Slab::LOADS, t.load_w = Slab::LOAD_W;
    if (Conv::LINEAR) {
      const int width = Slab::BOX_W + (parts - 1) * 8 * LINES;
      t.loads = loads_of(width, Slab::STEP_W), t.load_w = load_width(width, Slab::STEP_W);
      t.tiles_w = ceil_div(of_phase(2), 8 * LINES * parts);
    } else {
      height += (parts - 1) * LINES;
      t.tiles_h = ceil_div(of_phase(1), LINES * parts);
    }
    t.slab_bytes = t.loads * t.load_w * height * ROW_BYTES;
    t.slab_stage_bytes = static_cast<int>(PARTS * round_up(t.slab_bytes, ATOM_BYTES));
    return height * Slab::STEP_H <= 256 && t.load_w * Slab::STEP_W <= 256;
  }

  template <typename Slab, int LINES>
  void consider_tiles(Tiling t, bool as_it_lies) {
    const bool merged = samples_are_planes();
    const int64_t depth = merged ? call_.batch : of_phase(0);
    const int64_t batch = merged ? 1 : call_.batch;
    t.groups = Conv::GROUPS;
    t.input_channels = padded_, t.output_channels = output_channels_;
    t.input_depth = static_cast<int>(call_.input_extent[0]);
    t.blocks = ceil_div(padded_, BLOCK_K);
    t.last_steps = ceil_div(padded_ - (t.blocks - 1) * BLOCK_K, STEP_K);
    t.slab_bytes = t.extent_w * t.extent_h * t.extent_d * t.extent_n * ROW_BYTES;
    t.slab_stage_bytes = SLAB_STAGE_BYTES<Slab>;
    t.rounds =
        PARTS == 2 ? !SPLITS_FIRST<Slab> : sizeof(T) == 4 && as_it_lies && !READS_PATCHES<Conv>;
    if (SPLITS_FIRST<Slab>) t.slab_bytes *= 2;
    t.lower_sample = static_cast<int>(batch);
    const bool packs = SPLITS_FIRST<Slab> || !(as_it_lies || Slab::MAJOR == Major::MN);
    const double pack = packs ? pack_clocks<T>(input_elements(), limits_.multiprocessors,
                                               SPLITS_FIRST<Slab> ? 2 : 1)
                              : 0;
    const int steps = (t.blocks - 1) * (BLOCK_K / STEP_K) + t.last_steps;
    // One consumer's positions or both's, and of each one plane or two.
    for (int way = 0; way < 3; ++way) {
      const int position_groups = way == 0 ? 1 : 2;
      t.position_groups = position_groups, t.fold = way == 2 ? 2 : 1;
      if (t.fold == 2 &&
          !(Slab::HALO && Conv::DILATION_D == 1 && Conv::KERNEL_D > 1 && !Slab::STRIDED &&
            Conv::GROUPS == 1 && output_channels_ <= BLOCK_M / 2)) {
        continue;
      }
      if constexpr (Slab::HALO) {
        if (!halo_box<Slab, LINES>(t)) continue;
      }
      t.lower_tap = t.fold == 2 ? TAPS / Conv::KERNEL_D * (Conv::KERNEL_D + 1) : TAPS;
      t.channel_blocks = ceil_div(output_channels_, BLOCK_M * (3 - position_groups));
      const int planes_of_tile = Slab::STRIDED ? 1 : position_groups * t.fold;
      t.tiles_d = ceil_div(depth, Slab::HALO ? planes_of_tile : t.extent_d);
      t.tiles_n = ceil_div(batch, t.extent_n);
      int64_t places = int64_t{t.tiles_w} * t.tiles_h * t.tiles_d * t.tiles_n;
      if (!Slab::HALO) places = ceil_div(places, position_groups);
      if constexpr (PHASED) {
        order_phases<Conv>(t, places, double(input_elements()) * sizeof(T),
                           limits_.multiprocessors);
      }
      const int64_t tiles = places * t.channel_blocks * t.groups * PHASES;
      const int units = t.blocks * (Slab::HALO ? 1 : (TAPS + PHASES - 1) / PHASES);
      // Loads of one unit: slabs and weights.
      const Planes<Conv, Slab> planes(t);
      const double met = planes.met(t);
      // A phase has a part of the taps along each axis.
      const double taps = met * double(TAPS) / PHASES / Slab::PLANES * planes.count;
      const double slabs =
          Slab::HALO && PHASED ? double(Conv::KERNEL_D) / Conv::STRIDE_D : double(planes.slabs);
      const double bytes = met * slabs * Slab::RESIDUES * t.slab_bytes +
                           (Slab::HALO ? taps : double(planes.count)) * weight_stage_bytes<Conv>(t);
      // A product of 64 x 8 LINES and 32 bytes of K takes 4 LINES clocks.
      const double products = taps * CONSUMERS * 4 * LINES * (PARTS == 2 ? 3 * steps : steps) +
                              (PARTS == 2 ? taps * t.blocks * GEMM_PROMOTION_CLOCKS : 0);
      const double loads = units * bytes / load_rate<T>(padded_, Step::INPUT);
      for (int splits = 1; splits <= (t.fold == 2 || PHASED ? 1 : 32) && splits <= units;
           ++splits) {
        if (splits > 1 && tiles * splits > 2 * limits_.multiprocessors) break;
        if (tiles * splits > INT32_MAX) break;
        t.splits = splits, t.tiles = static_cast<int>(tiles * splits);
        const double waves = ceil_div(t.tiles, limits_.multiprocessors);
        const double part = double(ceil_div(units, splits)) / units;
        double clocks = waves * (part * (products > loads ? products : loads) + GEMM_TILE_CLOCKS);
        if (t.fold == 2) clocks += LAUNCH_CLOCKS;
        if (splits > 1) {
          clocks += LAUNCH_CLOCKS + 8.0 * splits * output_elements() /
                                        (LEVEL2_BYTES_PER_CLOCK / 2 * limits_.multiprocessors);
        }
        if (clocks + pack < best_.clocks + best_.packs && stages<Slab, LINES>(t)) {
          best_ = {t, t, KIND<Slab>, LINES, clocks, pack};
          if (t.fold == 2) {
            Tiling& u = best_.unfolded;
            u.fold = 1, u.tiles_d = ceil_div(depth, position_groups);
            u.tiles = static_cast<int>(int64_t{u.tiles_w} * u.tiles_h * u.tiles_d * u.tiles_n);
          }
        }
      }
    }
  }

  // Deals the shared memory out; false where it is too little.
  template <typename Slab, int LINES>
  bool stages(Tiling& t) const {
    int left = limits_.shared_bytes - static_cast<int>(sizeof(SharedStorage)) - ATOM_BYTES -
               CONSUMERS * output_stage_bytes<LINES>(epilogue_of(t));
    const int slab = t.slab_stage_bytes, weight = weight_stage_bytes<Conv>(t);
    // Planes from one consumer's to the other's; with a stride they share slabs.
    const int skew = Slab::STRIDED ? 0 : t.position_groups - 1;
    if constexpr (Slab::HALO && PARTS == 2) {
      // A tap takes thrice as long, and its weights and slabs are released with it. A slab more
      // than a consumer may have behind it, of those that are the other's.
      t.slab_stages = (left - 2 * weight) / slab;
      if (t.slab_stages > 6) t.slab_stages = 6;
      if (t.slab_stages < skew * t.fold + 2) return false;
      t.weight_stages = (left - t.slab_stages * slab) / weight;
    } else if constexpr (Slab::HALO) {
      // A few taps' weights, as many slabs as fit, and weights again. Slabs are released once the
      // next plane's first products are issued: two consumers' planes span four slabs by then, and
      // six where they are folded and another K block follows.
      t.slab_stages = (left - 4 * weight) / slab;
      if (t.slab_stages > 6) t.slab_stages = 6;
      const int fold = t.blocks > 1 ? t.fold : 1;
      if (t.slab_stages < 2 * skew * fold + 2) return false;
      t.weight_stages = (left - t.slab_stages * slab) / weight;
    } else {
      t.weight_stages = left / (t.position_groups * slab + weight);
      t.slab_stages = t.weight_stages * t.position_groups;
      if (t.weight_stages < 2) return false;
    }
    if (t.slab_stages > MOST_STAGES) t.slab_stages = MOST_STAGES;
    if (t.weight_stages > MOST_STAGES) t.weight_stages = MOST_STAGES;
    return true;
  }

  Epilogue epilogue_of(const Tiling& t) const {
    if (t.splits > 1) return Epilogue::PARTIAL;
    if (sizeof(T) == 4) return Epilogue::STRIDED;
    if (call_.output_channels_last) return leaves_by_tma() ? Epilogue::TMA : Epilogue::STRIDED;
    return t.log2_w >= 3 ? Epilogue::STAGED : Epilogue::STRIDED;
  }
  bool leaves_by_tma() const {  // with its channels side by side
    return sizeof(T) == 2 && call_.output_channels % VECTOR == 0 &&
           (Conv::GROUPS == 1 || output_channels_ % BLOCK_M == 0);
  }
  // Whether an epilogue has tensors that lie as the result does.
  bool reads_beside() const {
    return Conv::HAS_EPILOGUE &&
           (call_.call->epilogue & (CONVGEN_RESIDUAL | CONVGEN_PREACTIVATION)) != 0;
  }

  Operands call_;
  DeviceLimits limits_;
  Plan best_;
  int output_channels_, input_channels_, padded_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_CHOICE_CUH
