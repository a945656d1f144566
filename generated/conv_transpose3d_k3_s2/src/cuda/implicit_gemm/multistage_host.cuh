// The host's part of multistage.cuh: which tile a call has, what it needs, its launches.
#ifndef CONVGEN_IMPLICIT_GEMM_MULTISTAGE_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_MULTISTAGE_HOST_CUH

#include <tuple>

#include "multistage.cuh"
#include "turned.cuh"

namespace convgen {

// Of the tensor cores' rate, where a multiprocessor has several CTAs and where it has one; of the
// rows of positions, what level 2 is read for where a kernel has several taps; clocks of a CTA
// beside its products. By these an H200 that runs code for sm_80 should take in bf16 and
// channels_last, of 3 x 3 x 3 taps (and takes),
//
//   256 -> 256 channels, 4 x 120 x 180 positions               0.76 ms (0.72)
//   384 -> 384 channels, 4 x 60 x 104 positions                0.51 ms (0.51)
//   64 -> 64 channels, two samples of 64 x 64 x 64 positions   0.28 ms (0.33)
//   32 -> 32 channels, two samples of 96 x 96 x 96 positions   0.37 ms (0.40)
constexpr double ATTAINED = 0.7, ATTAINED_ALONE = 0.45;
constexpr double MISSED_IN_LEVEL1 = 0.5;
constexpr double CTA_CLOCKS = 3000;
constexpr double PAYING_RATIO = 1.15;  // of the others' time and ours
// Of the other kernels: of the tensor cores' rate, and of products per clock and multiprocessor,
// the most. Of the four layers above an H200 that runs code for sm_80 makes 272 to 400, in TF32 250
// to 348.
constexpr double OTHERS_ATTAIN = 0.8;
template <typename T>
constexpr double OTHERS_MOST = sizeof(T) == 4 ? 350 : 400;
constexpr int MULTISTAGE_CHANNELS = 32;  // of a group, of either tensor: the others are for fewer

template <typename Conv>
struct KMajor : Conv {
  static constexpr Major WEIGHTS = Major::K;
};

template <typename T, typename Conv, bool COARSE_INPUT, typename... Blocks>
class MultistageGemm {
 public:
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T), BLOCK_K = STAGE_ROW_BYTES / sizeof(T);
  static constexpr int TAPS = Conv::TAPS, PHASES = Conv::PHASES;
  using Step = Steps<Conv>;
  static_assert(COARSE_INPUT || Conv::WEIGHTS == Major::K, "channels_last weights of fprop");
  static_assert(!Conv::LINEAR || Conv::KERNEL_D * Conv::KERNEL_H == 1, "one spatial dimension");

  MultistageGemm(const Operands& call, const DeviceLimits& limits)
      : call_(call), limits_(limits), rates_(gpu_rates(limits.capability)) {
    output_channels_ = static_cast<int>(call.output_channels / Conv::GROUPS);
    input_channels_ = static_cast<int>(call.input_channels / Conv::GROUPS);
    padded_ = static_cast<int>(round_up(input_channels_, VECTOR));
    packs_input_ = !call.input_channels_last || padded_ != input_channels_;
    // TF32 is rounded. A row of weights has input channels, which lie so in channels_last weights
    // of fprop.
    packs_weight_ = sizeof(T) == 4 || COARSE_INPUT || padded_ != input_channels_ ||
                    (TAPS > 1 && !call.weight_channels_last);
    // Of a phase neighbours along W lie apart.
    turns_ = PHASES > 1 && !call.output_channels_last && !reads_beside();
    call_.output_channels_last |= turns_;
    if constexpr (TapMask<Conv>::FITS) {
      if (fits()) (consider<Blocks>(), ...);
    }
  }

  bool found() const { return clocks_ < 1e30; }
  // Whether this takes less time than the kernels that read contiguous tensors as they lie.
  bool pays() const {
    return least_channels() >= MULTISTAGE_CHANNELS && fills_ &&
           PAYING_RATIO * clocks() < other_clocks();
  }
  // Whether the current device, `device`, runs code that has these kernels.
  static bool is_compiled(int device) {
    int threads = 0;
    const int error = bound<std::tuple_element_t<0, std::tuple<Blocks...>>>(device, threads);
    return error == cudaSuccess && threads == MULTISTAGE_THREADS;
  }
  double expected_ms() const { return clocks() / rates_.clocks_per_ms; }
  int64_t workspace_bytes() const { return weight_bytes() + input_bytes() + turned_bytes(); }

  int run() {
    unsigned char* const workspace = static_cast<unsigned char*>(call_.workspace);
    const T* input = static_cast<const T*>(call_.input);
    const T* weight = static_cast<const T*>(call_.weight);
    if (packs_weight_) {
      T* const packed = reinterpret_cast<T*>(workspace);
      const WeightShape s = weight_shape<COARSE_INPUT>(
          TAPS, call_.weight_channels_last, {Conv::GROUPS, output_channels_, input_channels_},
          static_cast<int>(round_up(output_channels_, VECTOR)), padded_);
      if (const int error = pack_weights<T, KMajor<Conv>, COARSE_INPUT>(
              call_, packed, s, call_.output_channels, padded_)) {
        return error;
      }
      weight = packed;
    }
    if (packs_input_) {
      T* const packed = reinterpret_cast<T*>(workspace + weight_bytes());
      const bool last = call_.input_channels_last;
      const PackShape s = pack_shape(call_.batch, call_.input_channels, call_.input_extent,
                                     Conv::GROUPS, padded_, last);
      if (const int error = pack_input<Form::ROUNDED>(input, packed, s, last, call_.device,
                                                      call_.stream, limits_.multiprocessors)) {
        return error;
      }
      input = packed;
    }
    void* const turned = workspace + weight_bytes() + input_bytes();
    const Output out = output_of(turns_ ? turned : call_.output);
    int error = CONVGEN_TOO_LARGE, index = 0;
    ((index++ == block_ ? void(error = multiply<Blocks>(input, weight, out)) : void()), ...);
    return error || !turns_ ? error : turn_output<T>(call_, turned);
  }

 private:
  template <typename Block>
  static int bound(int device, int& threads) {
    if constexpr (Conv::HAS_EPILOGUE) {
      return launch_bound<multistage_kernel<T, Conv, Block, typename Conv::Finish>,
                          MULTISTAGE_BOUND>(device, threads);
    } else {
      return launch_bound<multistage_kernel<T, Conv, Block>, MULTISTAGE_BOUND>(device, threads);
    }
  }

  // ---- Sizes ------------------------------------------------------------------------------------

  int64_t input_elements() const {  // with the channels that a pack adds
    const int64_t* const e = call_.input_extent;
    return call_.batch * e[0] * e[1] * e[2] * Conv::GROUPS * padded_;
  }
  int64_t output_elements() const { return call_.output_channels * output_positions(); }
  int64_t output_positions() const {
    const int64_t* const e = call_.output_extent;
    return call_.batch * e[0] * e[1] * e[2];
  }
  int64_t phase_positions() const {  // of the largest phase
    int64_t count = call_.batch;
    for (int i = 0; i < 3; ++i) count *= ceil_div(call_.output_extent[i], Step::OUTPUT[i]);
    return count;
  }
  int64_t weight_elements() const { return int64_t{TAPS} * call_.output_channels * padded_; }
  int64_t weight_bytes() const {
    return packs_weight_ ? round_up(weight_elements() * int64_t{sizeof(T)}, 1024) : 0;
  }
  int64_t input_bytes() const {
    return packs_input_ ? round_up(input_elements() * int64_t{sizeof(T)}, 1024) : 0;
  }
  int64_t turned_bytes() const { return turns_ ? output_elements() * int64_t{sizeof(T)} : 0; }

  int least_channels() const {
    return input_channels_ < output_channels_ ? input_channels_ : output_channels_;
  }
  bool reads_beside() const {  // what lies as the result does
    return Conv::HAS_EPILOGUE &&
           (call_.call->epilogue & (CONVGEN_RESIDUAL | CONVGEN_PREACTIVATION)) != 0;
  }
  // Offsets are 32-bit, of vectors and of positions, with room for a tap's and a tile's.
  bool fits() const {
    for (int i = 0; i < 3; ++i) {
      if (call_.output_extent[i] < Step::OUTPUT[i]) return false;  // a phase without outputs
    }
    return output_positions() > 0 && call_.output_channels > 0 && input_channels_ > 0 &&
           input_elements() / VECTOR < INT32_MAX / 2 && weight_elements() / VECTOR < INT32_MAX &&
           output_positions() < INT32_MAX / 2;
  }

  // ---- Choice -----------------------------------------------------------------------------------

  template <typename Block>
  void consider() {
    const int index = considered_++;
    const int64_t multiprocessors = limits_.multiprocessors;
    const int64_t ctas = ceil_div(phase_positions(), Block::POSITIONS) *
                         ceil_div(output_channels_, Block::CHANNELS) * Conv::GROUPS * PHASES;
    if (ctas > INT32_MAX) return;
    const double units = double(ceil_div(padded_, BLOCK_K)) * TAPS / PHASES;
    const double products =
        2.0 * (Block::POSITIONS / 16) * (Block::CHANNELS / 8) * rates_.product_clocks;
    const double missed = TAPS > 1 ? MISSED_IN_LEVEL1 : 1;
    const double loads =
        STAGE_ROW_BYTES * (missed * Block::POSITIONS + Block::CHANNELS) / rates_.level2_bytes;
    const int64_t each = ceil_div(ctas, multiprocessors);  // CTAs of a multiprocessor
    const double multiplied = products / (each > 1 ? ATTAINED : ATTAINED_ALONE);
    const double clocks = each * units * (multiplied > loads ? multiplied : loads) +
                          ceil_div(each, Block::CTAS) * CTA_CLOCKS;
    if (clocks >= clocks_) return;
    clocks_ = clocks, block_ = index, fills_ = ctas >= multiprocessors;
  }

  double copy_clocks(double bytes) const {
    return LAUNCH_CLOCKS + 2 * bytes / (rates_.copy_bytes * limits_.multiprocessors);
  }
  // With what is packed and turned.
  double clocks() const {
    double clocks = clocks_;
    if (packs_weight_) clocks += LAUNCH_CLOCKS;
    if (packs_input_) clocks += copy_clocks(double(input_bytes()));
    if (turns_) clocks += copy_clocks(double(turned_bytes()));
    const double bytes = double(input_elements() + output_elements()) * sizeof(T);
    const double least = bytes / (rates_.copy_bytes * limits_.multiprocessors);
    return clocks > least ? clocks : least;
  }
  // What the kernels that read contiguous tensors as they lie take at least.
  double other_clocks() const {
    const ConvgenCall& c = *call_.call;
    const int64_t* const e = c.coarse_extent;
    const double coarse = double(c.batch) * c.coarse_channels * e[0] * e[1] * e[2];
    const double fine =
        double(c.batch) * c.fine_channels * c.fine_extent[0] * c.fine_extent[1] * c.fine_extent[2];
    const double products = double(c.batch) * Conv::GROUPS * e[0] * e[1] * e[2] * TAPS *
                            round_up(output_channels_, 8) * round_up(input_channels_, 8);
    constexpr double EACH = 16 * 8 * 32 / sizeof(T);  // of an mma.sync
    const double attained = OTHERS_ATTAIN * EACH / rates_.product_clocks;
    constexpr double MOST = OTHERS_MOST<T>;
    double clocks = products / (MOST < attained ? MOST : attained);
    const double memory = (coarse + fine) * sizeof(T) / rates_.copy_bytes;
    if (clocks < memory) clocks = memory;
    clocks /= limits_.multiprocessors;
    // Where tensors lie otherwise, they are transposed.
    if (c.channels_last & CONVGEN_COARSE) clocks += copy_clocks(coarse * sizeof(T));
    if (c.channels_last & CONVGEN_FINE) clocks += copy_clocks(fine * sizeof(T));
    return clocks;
  }

  // ---- Launches ---------------------------------------------------------------------------------

  Output output_of(void* address) const {
    Output out = {};
    out.address = address, out.bias = call_.bias;
    lay_out(out, call_.batch, call_.output_channels, call_.output_extent,
            call_.output_channels_last);
    out.stride_d *= Step::OUTPUT[0], out.stride_h *= Step::OUTPUT[1],
        out.stride_w *= Step::OUTPUT[2];
    // What may leave at once: 16 bytes of channels or positions, two floats of channels.
    out.vector = 1;
    const bool last = call_.output_channels_last;
    if (last || PHASES == 1) {
      const int64_t line = last ? output_channels_ : out.stride_c;
      const int widest = sizeof(T) == 2 ? 8 : last ? 2 : 1;
      const int elements = access_elements(address, line, sizeof(T), widest);
      if (elements == widest) out.vector = widest;
    }
    return out;
  }

  template <typename Block>
  int multiply(const T* input, const T* weight, const Output& out) const {
    MultistageShape s = {};
    for (int i = 0; i < 3; ++i) s.input_extent[i] = static_cast<int>(call_.input_extent[i]);
    const int64_t* const e = call_.output_extent;
    s.places = {Divisor(e[2]), Divisor(e[1]), Divisor(e[0])};
    s.channel_blocks = static_cast<int>(ceil_div(output_channels_, Block::CHANNELS));
    s.groups = Conv::GROUPS, s.output_channels = output_channels_;
    s.vectors = padded_ / VECTOR, s.position_vectors = Conv::GROUPS * s.vectors;
    s.blocks = static_cast<int>(ceil_div(padded_, BLOCK_K));
    // Packed: taps, output channels, input channels; else the taps are within an output channel.
    const int rows = static_cast<int>(call_.output_channels);
    s.weight_stride = packs_weight_ ? s.vectors : TAPS * s.vectors;
    s.tap_stride = packs_weight_ ? rows * s.vectors : s.vectors;
    const int64_t ctas =
        ceil_div(phase_positions(), Block::POSITIONS) * s.channel_blocks * s.groups * PHASES;
    const dim3 grid(static_cast<unsigned>(ctas)), threads(Block::THREADS);
    constexpr int SHARED_BYTES = STAGES * Block::STAGE_BYTES;
    const uint4* const from = reinterpret_cast<const uint4*>(input);
    const uint4* const by = reinterpret_cast<const uint4*>(weight);
    if constexpr (Conv::HAS_EPILOGUE) {
      using Finish = typename Conv::Finish;
      return launch<multistage_kernel<T, Conv, Block, Finish>, true>(
          grid, threads, SHARED_BYTES, call_.device, call_.stream, s, out, from, by,
          Finish(*call_.call, call_.output));
    } else {
      return launch<multistage_kernel<T, Conv, Block>, true>(
          grid, threads, SHARED_BYTES, call_.device, call_.stream, s, out, from, by);
    }
  }

  Operands call_;
  DeviceLimits limits_;
  GpuRates rates_;
  int output_channels_, input_channels_, padded_;
  bool packs_input_, packs_weight_, turns_;  // the output: see turned.cuh
  int block_ = 0, considered_ = 0;           // of Blocks
  bool fills_ = false;                       // whether every multiprocessor has a CTA
  double clocks_ = 1e30;
};

// 64 x 64 sums for each warp; with phases and rounding registers leave room for half.
template <typename T, typename Conv>
using WidestTile = std::conditional_t<(Conv::PHASES > 1 && sizeof(T) == 4),
                                      BlockTile<2, 2, 4, 4, 2>, BlockTile<2, 2, 4, 8, 2>>;

// The tiles that are compiled: 128 x 128, 256 x 64 and 256 x 32, and 64 x 64 for few positions.
template <typename T, typename Conv, bool COARSE_INPUT>
using Multistage =
    MultistageGemm<T, Conv, COARSE_INPUT, WidestTile<T, Conv>, BlockTile<4, 1, 4, 8, 2>,
                   BlockTile<4, 1, 4, 4, 2>, BlockTile<2, 2, 2, 4, 4>>;

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_MULTISTAGE_HOST_CUH
