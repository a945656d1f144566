// How an implicit GEMM is dealt out: tiles, slabs, what lies in shared memory. See kernel.cuh.
#ifndef CONVGEN_IMPLICIT_GEMM_TILES_CUH
#define CONVGEN_IMPLICIT_GEMM_TILES_CUH

#include <type_traits>

#include "phases.cuh"
#include "sm90.cuh"

namespace convgen {

constexpr int ROW_BYTES = 128;  // of channels: a K block
constexpr int STEP_BYTES = 32;  // of K in one product
constexpr int BLOCK_M = 64;     // output channels of a warpgroup
constexpr int WARPGROUP = 128;  // threads
constexpr int CONSUMERS = 2;    // warpgroups
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int GEMM_THREADS = (CONSUMERS + 1) * WARPGROUP;
// Launch bounds tell the host whether a device runs code that was compiled for it: see
// launch_bound.
template <int THREADS>
constexpr int COMPILED_THREADS = HAS_WGMMA ? THREADS : 32;
constexpr int ATOM_BYTES = 8 * ROW_BYTES;  // what the swizzle repeats after
constexpr int MOST_STAGES = 16;
constexpr int MOST_PHASES = 16;
constexpr int STORE_LINES = 4;  // groups of eight positions that leave with one TMA store
constexpr int STORE_BYTES = STORE_LINES * ATOM_BYTES;

// How a tile's sums leave.
enum class Epilogue {
  TMA,      // 16 bits, channels side by side: boxes of 32 positions x 64 channels
  STAGED,   // 16 bits, W side by side: the whole tile by way of shared memory, behind the next one
  STRIDED,  // straight from registers, any layout
  PARTIAL,  // fp32 sums of one split of K, added up by another kernel
};

// How the positions, channels and K blocks of a call are dealt out.
struct Tiling {
  // A warpgroup's tile, in positions; powers of two but for the lines of a halo's.
  int extent_w, extent_h, extent_d, extent_n;
  int log2_w, log2_h, log2_d;  // of the p-th position: w = p mod 2^log2_w, h = p >> log2_w ...
  int tiles_w, tiles_h, tiles_d, tiles_n;
  int position_groups;  // 2 if the consumers have different positions, else 1
  int fold;             // planes of a consumer: 2 with up to 32 output channels each, else 1
  int channel_blocks;   // of a group's output channels
  int groups;
  int input_channels;       // from one group's first to the next one's, as the slabs' map counts
  int output_channels;      // of a group
  int blocks;               // K blocks of a group's input channels
  int last_steps;           // products of the last one, 1 to 4
  int splits;               // of K
  int tiles;                // of all CTAs: positions x channel blocks x groups x phases or splits
  int first_tap, tap_step;  // of the weights' map, in the order of the gather
  int input_depth;
  int slab_stages, weight_stages;
  int slab_bytes;  // of one slab's loads: as their boxes say
  int slab_stage_bytes;
  int loads, load_w;  // of a slab along W, and positions of each
  bool rounds;        // whether slabs are rounded to TF32, or split, in shared memory
  // From a value's upper part to its lower one, where both are packed (3xTF32): samples of the
  // slabs' map, taps of the weights'.
  int lower_sample, lower_tap;
  // Of a strided dgrad: those with most taps first, and in how many places all tiles of one phase
  // precede the next one's.
  unsigned char phases[MOST_PHASES];
  int places, phase_places;
};

// Of outputs with their channels side by side: one for each phase.
template <int PHASES>
struct OutputMaps {
  TensorMap of[PHASES];
};

// Where sums go. Strides are in elements.
struct Output {
  void* address;
  float* partials;
  const void* bias;
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w, elements;
  int64_t first;  // element, of a phase
  int width, height, depth, batch;
  int vector;  // elements along W that one access may have: 1, 2, 4 or 8
  Epilogue epilogue;
  int* saw_nonfinite;  // is set to 1 where a sum is; or null
  const int* only_if;  // null, or what has to be 1 for anything to be done
};

// ---- Slabs --------------------------------------------------------------------------------------

// TMA's boxes have up to 256 elements along a dimension, skipped ones included: longer lines take
// several loads of as many positions, a multiple of eight.
constexpr int loads_of(int width, int step) {
  const int most = 256 / step / 8 * 8;
  return width * step <= 256 ? 1 : (width + most - 1) / most;
}
constexpr int load_width(int width, int step) {
  const int loads = loads_of(width, step);
  return loads == 1 ? width : (width + 8 * loads - 1) / (8 * loads) * 8;
}

// An axis that a stride divides into residues: taps whose distance is a multiple of the stride meet
// positions of one residue, in which they are neighbours.
template <int KERNEL, int STRIDE, int DILATION>
struct Residues {
  static constexpr int NEXT_TAP = STRIDE / greatest_divisor(STRIDE, DILATION);
  static constexpr int COUNT = NEXT_TAP < KERNEL ? NEXT_TAP : KERNEL;  // that any tap meets
  static constexpr int REACH = (KERNEL - 1) * DILATION / STRIDE;
};

// What a slab has of a plane: positions of one consumer and, so much further, what its taps reach.
template <typename Conv, int LINES, int REACH_H, int REACH_W, int STEP>
struct HaloBox {
  static constexpr bool HALO = true, LINEAR = Conv::LINEAR;
  static constexpr Major MAJOR = Major::K;
  static constexpr int PARTS = Conv::PARTS;
  static constexpr int BOX_W = (LINEAR ? 8 * LINES : 8) + REACH_W;
  static constexpr int BOX_H = LINEAR ? 1 : LINES + REACH_H;
  static constexpr int LOADS = loads_of(BOX_W, STEP), LOAD_W = load_width(BOX_W, STEP);
  static constexpr int ROWS = LOADS * LOAD_W * BOX_H;
  static constexpr int PITCH = LINEAR ? 8 : BOX_W;
};

// 8 x LINES positions of a plane (of a line, for a LINEAR convolution, 8 * LINES ones) and their
// halo; one slab for each plane that the taps along D reach. With a stride, one for each residue of
// such a plane, and both consumers' positions in it, whose lines follow each other.
template <typename Conv, int LINES>
struct HaloSlab
    : HaloBox<Conv, LINES, Residues<Conv::KERNEL_H, Conv::STRIDE_H, Conv::DILATION_H>::REACH,
              Residues<Conv::KERNEL_W, Conv::STRIDE_W, Conv::DILATION_W>::REACH, Conv::STRIDE_W> {
  static constexpr bool STRIDED = Conv::STRIDE_D * Conv::STRIDE_H * Conv::STRIDE_W > 1;
  static constexpr int TAPS = Conv::KERNEL_H * Conv::KERNEL_W;
  static constexpr int PLANES = Conv::KERNEL_D;
  using AxisH = Residues<Conv::KERNEL_H, Conv::STRIDE_H, Conv::DILATION_H>;
  using AxisW = Residues<Conv::KERNEL_W, Conv::STRIDE_W, Conv::DILATION_W>;
  static constexpr int RESIDUES = AxisH::COUNT * AxisW::COUNT;
  static constexpr int STEP_D = Conv::STRIDE_D, STEP_H = Conv::STRIDE_H, STEP_W = Conv::STRIDE_W;

  // Which plane of the input a slab has for outputs that begin at 0, where neighbouring planes of
  // one consumer are `step` slabs apart. It is the same for all phases.
  struct Window {
    __host__ __device__ __forceinline__ explicit Window(int) {}
    __device__ __forceinline__ int plane(int slab, int step) const {
      return slab / step * Conv::DILATION_D + slab % step - Conv::PADDING_D;
    }
  };
  // The taps of a plane that meet a residue, in turn, and where their rows begin.
  struct Taps {
    int first_w, h, w;
    __device__ __forceinline__ Taps(const Window&, int residue)
        : first_w(residue % AxisW::COUNT), h(residue / AxisW::COUNT), w(first_w) {}
    __device__ __forceinline__ void restart(const Window& window, int residue) {
      *this = Taps(window, residue);
    }
    __device__ __forceinline__ bool more() const { return h < Conv::KERNEL_H; }
    __device__ __forceinline__ void advance() {
      w += AxisW::NEXT_TAP;
      if (w >= Conv::KERNEL_W) w = first_w, h += AxisH::NEXT_TAP;
    }
    __device__ __forceinline__ int tap(int plane) const {
      return plane * TAPS + h * Conv::KERNEL_W + w;
    }
    __device__ __forceinline__ int row() const {
      return h * Conv::DILATION_H / Conv::STRIDE_H * HaloSlab::PITCH +
             w * Conv::DILATION_W / Conv::STRIDE_W;
    }
    // Of the input, where the first tap's begin for outputs that begin at 0.
    __device__ __forceinline__ int offset_h() const {
      return h * Conv::DILATION_H % Conv::STRIDE_H - Conv::PADDING_H;
    }
    __device__ __forceinline__ int offset_w() const {
      return w * Conv::DILATION_W % Conv::STRIDE_W - Conv::PADDING_W;
    }
  };
};

// The halo of a strided dgrad: all that the taps of a tile's phase reach in a plane (phases.cuh).
// All phases load as much as the one with most taps.
template <typename Conv, int LINES>
struct PhaseSlab
    : HaloBox<Conv, LINES, decltype(Phase<Conv>::h)::REACH, decltype(Phase<Conv>::w)::REACH, 1> {
  static constexpr bool STRIDED = true;
  using Axes = Phase<Conv>;
  using AxisH = decltype(Axes::h);
  using AxisW = decltype(Axes::w);
  static constexpr int TAPS = AxisH::MOST * AxisW::MOST, PLANES = decltype(Axes::d)::MOST;
  static constexpr int RESIDUES = 1, STEP_D = 1, STEP_H = 1, STEP_W = 1;

  struct Window : Axes {
    using Axes::Axes;
    __device__ __forceinline__ int plane(int slab, int) const {
      return this->d.offset - slab * this->d.STEP;
    }
    __host__ __device__ __forceinline__ int planes() const {
      return this->h.count * this->w.count == 0 ? 0 : this->d.count;
    }
  };
  struct Taps {
    const Window& axes;
    int h = 0, w = 0;
    __device__ __forceinline__ Taps(const Window& window, int) : axes(window) {}
    __device__ __forceinline__ void restart(const Window&, int) { h = w = 0; }
    __device__ __forceinline__ bool more() const { return h < axes.h.count; }
    __device__ __forceinline__ void advance() {
      if (++w == axes.w.count) w = 0, ++h;
    }
    // Gathers count them in reverse.
    __device__ __forceinline__ int tap(int plane) const {
      const int kd = axes.d.first_tap + plane * axes.d.NEXT_TAP;
      const int kh = axes.h.first_tap + h * axes.h.NEXT_TAP;
      const int kw = axes.w.first_tap + w * axes.w.NEXT_TAP;
      return Conv::TAPS - 1 - ((kd * Conv::KERNEL_H + kh) * Conv::KERNEL_W + kw);
    }
    __device__ __forceinline__ int row() const {
      return (axes.h.count - 1 - h) * axes.h.STEP * PhaseSlab::PITCH +
             (axes.w.count - 1 - w) * axes.w.STEP;
    }
    __device__ __forceinline__ int offset_h() const {
      return axes.h.offset - (axes.h.count - 1) * axes.h.STEP;
    }
    __device__ __forceinline__ int offset_w() const {
      return axes.w.offset - (axes.w.count - 1) * axes.w.STEP;
    }
  };
};

// The halo that a gather has.
template <typename Conv, int LINES>
struct GatherHalo
    : std::conditional_t<(Conv::PHASES > 1), PhaseSlab<Conv, LINES>, HaloSlab<Conv, LINES>> {};

// The positions of one tap.
template <typename Conv, int LINES>
struct TapSlab {
  static constexpr bool HALO = false, LINEAR = Conv::LINEAR, STRIDED = false;
  static constexpr Major MAJOR = Major::K;
  static constexpr int PARTS = Conv::PARTS;
  static constexpr int PLANES = 1, RESIDUES = 1;
  static constexpr int ROWS = 8 * LINES, PITCH = 8;
  struct Window {
    __host__ __device__ __forceinline__ explicit Window(int) {}
  };
  struct Taps {
    bool is_left = true;
    __device__ __forceinline__ Taps(const Window&, int) {}
    __device__ __forceinline__ void restart(const Window&, int) { is_left = true; }
    __device__ __forceinline__ bool more() const { return is_left; }
    __device__ __forceinline__ void advance() { is_left = false; }
    __device__ __forceinline__ int tap(int) const { return 0; }
    __device__ __forceinline__ int row() const { return 0; }
  };
};

// The positions of a kernel of one tap in a contiguous tensor, as they lie: rows of 64 positions,
// one for each channel of a K block, in chunks of as many positions.
template <typename Conv, int LINES>
struct ChannelSlab : TapSlab<Conv, LINES> {
  static constexpr Major MAJOR = Major::MN;
  static constexpr int CHUNKS = LINES / 8, CHUNK_ROWS = 64;
};

// Of 3xTF32 the upper parts, or values that are to be split, and behind them the lower parts.
template <typename Slab>
constexpr int SLAB_PART_BYTES = (Slab::ROWS * ROW_BYTES + ATOM_BYTES - 1) / ATOM_BYTES * ATOM_BYTES;
template <typename Slab>
constexpr int SLAB_STAGE_BYTES = Slab::PARTS * SLAB_PART_BYTES<Slab>;

// The same where a slab may have both consumers' positions.
template <typename Slab>
__device__ __forceinline__ int slab_stage_bytes(const Tiling& t) {
  if constexpr (Slab::STRIDED) return t.slab_stage_bytes;
  return SLAB_STAGE_BYTES<Slab>;
}

// ---- Shared memory ------------------------------------------------------------------------------

// Behind it, at the next multiple of 1024 bytes: slabs, weights, what leaves.
struct SharedStorage {
  uint64_t slab_full[MOST_STAGES], slab_rounded[MOST_STAGES], slab_empty[MOST_STAGES];
  uint64_t weight_full[MOST_STAGES], weight_empty[MOST_STAGES];
  uint64_t staged_full[CONSUMERS], staged_empty[CONSUMERS];
};

// A staged tile: [channel][group of eight positions], 16 bytes each, in an odd number of them, so
// that eight channels' lie in different banks.
template <int LINES>
constexpr int STAGED_PITCH = LINES | 1;

template <int LINES>
constexpr int output_stage_bytes(Epilogue epilogue) {
  return epilogue == Epilogue::TMA      ? 2 * STORE_BYTES
         : epilogue == Epilogue::STAGED ? BLOCK_M * STAGED_PITCH<LINES> * 16
                                        : 0;
}

template <typename Conv>
__host__ __device__ __forceinline__ int weight_stage_bytes(const Tiling& t) {
  return Conv::PARTS * (t.position_groups == 2 ? 1 : 2) * BLOCK_M * ROW_BYTES;
}

// From the beginning of dynamic shared memory to the first multiple of ATOM_BYTES behind `bytes`.
__device__ __forceinline__ int aligned_offset(const void* dynamic, int bytes) {
  const int end = static_cast<int>(shared_address(dynamic)) + bytes;
  return bytes + (ATOM_BYTES - end % ATOM_BYTES) % ATOM_BYTES;
}

struct PipelineState {
  int index = 0;
  uint32_t phase = 0;
  // By at most as many buffers as there are.
  __device__ __forceinline__ void advance(int count, int stages) {
    index += count;
    if (index >= stages) index -= stages, phase ^= 1;
  }
};

// A ring of buffers, between the threads that fill it and the consumers' warps.
struct Pipeline {
  uint64_t *full, *empty;

  __device__ __forceinline__ uint64_t* producer_acquire(PipelineState at, int bytes) const {
    mbarrier_wait(&empty[at.index], at.phase ^ 1);
    mbarrier_arrive_expect(&full[at.index], bytes);
    return &full[at.index];
  }
  __device__ __forceinline__ void consumer_wait(PipelineState at) const {
    mbarrier_wait(&full[at.index], at.phase);
  }
  // One lane of each warp.
  __device__ __forceinline__ void consumer_release(int index) const {
    mbarrier_arrive(&empty[index]);
  }
};

// ---- Tiles --------------------------------------------------------------------------------------

// What a CTA computes next, for the consumer with the `p`-th positions and `m`-th channels.
struct Tile {
  int split, group, channel;  // the first channel, of the group's
  int phase;                  // see phases.cuh
  int n, d, h, w;             // the first position, of the phase's

  template <typename Slab, int PHASES>
  __device__ __forceinline__ static Tile of(const Tiling& t, int index, int p, int m) {
    Tile tile;
    tile.split = index % t.splits, index /= t.splits;
    const int block = index % (t.channel_blocks * t.groups);
    index /= t.channel_blocks * t.groups;
    tile.group = block / t.channel_blocks;
    tile.channel = (block % t.channel_blocks * (3 - t.position_groups) + m) * BLOCK_M;
    tile.phase = 0;
    if constexpr (PHASES > 1) {
      const int first = index / (PHASES * t.phase_places) * t.phase_places;
      const int places = min(t.phase_places, t.places - first), within = index - PHASES * first;
      tile.phase = t.phases[within / places], index = first + within % places;
    }
    // Halo tiles of both consumers are neighbouring planes, which share slabs, or, with a stride,
    // neighbouring lines, or positions of a line, of one slab.
    constexpr bool BY_PLANES = Slab::HALO && !Slab::STRIDED;
    constexpr bool ALONG_W = Slab::STRIDED && Slab::LINEAR;
    constexpr bool ALONG_H = Slab::STRIDED && !Slab::LINEAR;
    if (!Slab::HALO) index = index * t.position_groups + p;
    const int places_w = index % t.tiles_w * (ALONG_W ? t.position_groups : 1);
    tile.w = (places_w + (ALONG_W ? p : 0)) * t.extent_w, index /= t.tiles_w;
    const int places_h = index % t.tiles_h * (ALONG_H ? t.position_groups : 1);
    tile.h = (places_h + (ALONG_H ? p : 0)) * t.extent_h, index /= t.tiles_h;
    const int planes = BY_PLANES ? t.position_groups * t.fold : Slab::HALO ? 1 : t.extent_d;
    tile.d = index % t.tiles_d * planes + (BY_PLANES ? p * t.fold : 0);
    tile.n = index / t.tiles_d * t.extent_n;
    return tile;
  }
};

// Units of K that a split multiplies: a K block of halo slabs, a K block and tap of tap slabs.
template <typename Conv, typename Slab>
struct Units {
  int begin, end;
  int taps;  // of a K block
  __device__ __forceinline__ Units(const Tiling& t, const Tile& tile) {
    taps = Slab::HALO ? 1 : Conv::TAPS;
    if constexpr (Conv::PHASES > 1 && !Slab::HALO) taps = Phase<Conv>(tile.phase).taps();
    begin = t.blocks * taps * tile.split / t.splits;
    end = t.blocks * taps * (tile.split + 1) / t.splits;
  }
};

// Which planes' slabs of a unit a consumer multiplies: those from `p * fold` on, one for each tap
// along D. Neighbouring planes share slabs where the taps are neighbours, too. With a stride both
// consumers multiply all of them.
template <typename Conv, typename Slab>
struct Planes {
  int count;   // of a consumer
  int groups;  // of positions, in planes of their own
  int step;    // planes from one to the next
  int next;    // planes from the last one to the next unit's first
  int slabs;   // planes of a unit, all consumers' together

  __host__ __device__ explicit Planes(const Tiling& t)
      : count(Slab::PLANES + t.fold - 1),
        groups(Slab::STRIDED ? 1 : t.position_groups),
        step(Conv::DILATION_D == 1 ? 1 : groups),
        next((groups - 1) * t.fold + 1),
        slabs((count - 1) * step + next) {}

  // Which planes of the consumers' meet the input, of a tile that begins at `d`: what no consumer
  // has but padding is neither loaded nor multiplied.
  struct Reach {
    int begin, end, slabs;
  };
  __host__ __device__ __forceinline__ Reach reach(const Tiling& t, int d,
                                                  const typename Slab::Window& window) const {
    Reach r = {0, count, slabs};
    if constexpr (Slab::HALO && Conv::PHASES > 1) {
      r.end = r.slabs = window.planes();
    } else if constexpr (Slab::HALO && Conv::KERNEL_D > 1) {
      const int first = d * Conv::STRIDE_D - Conv::PADDING_D;
      const int last = first + (groups - 1) * t.fold;
      while (r.begin < r.end && last + r.begin * Conv::DILATION_D < 0) ++r.begin;
      while (r.begin < r.end && first + (r.end - 1) * Conv::DILATION_D >= t.input_depth) --r.end;
      r.slabs = r.begin == r.end ? 0 : (r.end - r.begin - 1) * step + next;
    }
    return r;
  }
  // The part of them in all tiles.
  double met(const Tiling& t) const {
    if constexpr (!Slab::HALO || Conv::KERNEL_D == 1 || Conv::PHASES > 1) return 1;
    const typename Slab::Window window(0);
    int reached = 0;
    for (int i = 0; i < t.tiles_d; ++i) {
      const Reach r = reach(t, i * groups * t.fold, window);
      reached += r.end - r.begin;
    }
    return double(reached) / (double(t.tiles_d) * count);
  }
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_TILES_CUH
