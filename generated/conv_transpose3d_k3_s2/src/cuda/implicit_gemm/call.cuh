// What the host knows of a call of an implicit GEMM, and what it makes of tensors: views and packs.
#ifndef CONVGEN_IMPLICIT_GEMM_CALL_CUH
#define CONVGEN_IMPLICIT_GEMM_CALL_CUH

#include "../common.cuh"
#include "../gpu_rates.cuh"
#include "maps.cuh"
#include "pack.cuh"

namespace convgen {

constexpr int largest(int x) { return x; }
template <typename... More>
constexpr int largest(int x, More... more) {
  return x > largest(more...) ? x : largest(more...);
}

// Sizes of tiles that are compiled, in groups of eight positions.
template <int... LINES>
struct Sizes {};

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

// Whether a convolution's input is packed already: see patches_host.cuh.
template <typename Conv>
constexpr bool READS_PATCHES = false;

// These kernels are of sm_90a alone: other GPUs of its kind have an H200's proportions.
constexpr GpuRates RATES = gpu_rates(90);
constexpr double LEVEL2_BYTES_PER_CLOCK = RATES.bulk_bytes;
constexpr double COPY_BYTES_PER_CLOCK = RATES.copy_bytes;
constexpr double CLOCKS_PER_MS = RATES.clocks_per_ms;

// Contiguous tensors are packed first. As measured on an H200, that pays from so many channels of a
// group on, of the tensor with fewer, and from so many channels times taps.
template <typename T>
constexpr int PAYING_CHANNELS = sizeof(T) == 4 ? 64 : 32;
constexpr int PAYING_PRODUCTS = 256, PAYING_WGRAD_PRODUCTS = 1728;
// With so few positions whatever the products: others have too few thread blocks for deep sums, and
// read wide weights again and again.
constexpr int PAYING_POSITIONS = 1024;
// Of TF32's wgrad, where other kernels have channels_last tensors transposed.
constexpr int PAYING_LAST_PRODUCTS = 864;

// Bytes of rows per clock that a multiprocessor loads, of so many channels. Boxes that step over
// positions of 16 bytes come at half the rate (resnet50-stem and convnext-stem, 3 channels packed
// to 8).
template <typename T>
double load_rate(int channels, const int (&step)[3]) {
  const bool slow = channels * sizeof(T) <= 16 && step[0] * step[1] * step[2] > 1;
  return slow ? LEVEL2_BYTES_PER_CLOCK / 2 : LEVEL2_BYTES_PER_CLOCK;
}

constexpr int64_t FLAG_BYTES = 1024;  // behind packed weights: see Plan::unfolded

// See tiles.cuh.
enum class SlabKind { HALO, TAP, CHANNELS };

// How one call is computed.
struct Plan {
  Tiling tiling;
  // Of a folded tiling: planes meet taps that they do not read, with weights of zero, which spreads
  // infinities and NaNs. Where there are any, this tiling does it again.
  Tiling unfolded;
  SlabKind slab;
  int lines;
  double clocks = 1e30;
  double packs = 0;  // clocks of the input's
};

// Phases share what they read: as many places as stay in the L2 cache have the tiles of the phase
// with most taps first, those of the least last. Each phase's are a multiple of the grid.
template <typename Conv>
void order_phases(Tiling& t, int64_t places, double input_bytes, int multiprocessors) {
  static_assert(Conv::PHASES <= MOST_PHASES, "phases that a tiling has room for");
  for (int i = 0; i < Conv::PHASES; ++i) {
    const int taps = Phase<Conv>(i).taps();
    int at = i;
    for (; at > 0 && Phase<Conv>(t.phases[at - 1]).taps() < taps; --at) {
      t.phases[at] = t.phases[at - 1];
    }
    t.phases[at] = static_cast<unsigned char>(i);
  }
  const double cached = places * (RATES.level2_capacity_bytes / 2 / input_bytes) / multiprocessors;
  const int64_t waves = cached < 1 ? 1 : static_cast<int64_t>(cached);
  t.places = static_cast<int>(places);
  t.phase_places =
      static_cast<int>(waves * multiprocessors < places ? waves * multiprocessors : places);
}

// Extents and strides of an output.
inline void lay_out(Output& out, int64_t batch, int64_t channels, const int64_t (&extent)[3],
                    bool channels_last) {
  out.width = static_cast<int>(extent[2]), out.height = static_cast<int>(extent[1]);
  out.depth = static_cast<int>(extent[0]), out.batch = static_cast<int>(batch);
  out.stride_n = channels * extent[0] * extent[1] * extent[2];
  out.stride_c = channels_last ? 1 : out.stride_n / channels;
  out.stride_w = channels_last ? channels : 1;
  out.stride_h = extent[2] * out.stride_w, out.stride_d = extent[1] * out.stride_h;
  out.elements = batch * out.stride_n;
}

inline int ceil_log2(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

// The tile of `positions`, a power of two, of powers of two along W, H, D and N, that covers an
// output with the least waste. `step` is the stride of what it reads; W has 2^least_w positions or
// more, and of equals the tile is taken whose lines are longest, up to 2^longest_w.
inline Tiling power_of_two_tiling(const int64_t (&extent)[3], int64_t batch, int positions,
                                  const int (&step)[3], int least_w, int longest_w) {
  const int log2_positions = ceil_log2(positions);
  Tiling best = {};
  int64_t fewest = INT64_MAX;
  for (int w = least_w; w <= log2_positions; ++w) {
    for (int h = 0; w + h <= log2_positions; ++h) {
      for (int d = 0; w + h + d <= log2_positions; ++d) {
        const int n = log2_positions - w - h - d;
        // Boxes have up to 256 elements along a dimension, skipped ones included.
        if ((step[2] << w) > 256 || (step[1] << h) > 256 || (step[0] << d) > 256) continue;
        const int64_t tiles = ceil_div(extent[2], 1 << w) * ceil_div(extent[1], 1 << h) *
                              ceil_div(extent[0], 1 << d) * ceil_div(batch, 1 << n);
        if (tiles < fewest || (tiles == fewest && best.log2_w < longest_w)) {
          fewest = tiles;
          best.log2_w = w, best.log2_h = h, best.log2_d = d;
          best.extent_w = 1 << w, best.extent_h = 1 << h, best.extent_d = 1 << d;
          best.extent_n = 1 << n;
        }
      }
    }
  }
  best.tiles_w = ceil_div(extent[2], best.extent_w);
  best.tiles_h = ceil_div(extent[1], best.extent_h);
  return best;
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

// The same of a contiguous tensor of one line: positions, then channels, N.
template <typename T>
TensorView channels_view(int64_t positions, int64_t channels, int64_t batch) {
  TensorView v = {};
  v.rank = 3;
  const uint64_t extents[3] = {uint64_t(positions), uint64_t(channels), uint64_t(batch)};
  uint64_t stride = sizeof(T);
  for (int i = 0; i < 3; ++i) {
    v.extent[i] = extents[i], v.stride_bytes[i] = stride, v.step[i] = 1;
    stride *= extents[i];
  }
  v.swizzle = ROW_BYTES;
  return v;
}

// The box of positions that leaves with one TMA store: the first of a tile, of a halo's all along
// H.
inline void set_store_box(TensorView& view, const Tiling& t, bool halo) {
  int left = 8 * STORE_LINES;
  const int extents[4] = {t.extent_w, halo ? left : t.extent_h, t.extent_d, t.extent_n};
  for (int i = 0; i < 4; ++i) {
    view.box[1 + i] = extents[i] < left ? extents[i] : left;
    left /= view.box[1 + i];
  }
}

// The maps of an output, one for each phase, whose positions are `step` apart along D, H and W.
template <typename T, int PHASES>
int make_output_maps(OutputMaps<PHASES>& maps, void* address, const TensorView& whole,
                     const int (&step)[3], int device) {
  for (int index = 0; index < PHASES; ++index) {
    const int phase[3] = {index / (step[1] * step[2]), index / step[2] % step[1], index % step[2]};
    TensorView view = whole;
    unsigned char* first = static_cast<unsigned char*>(address);
    for (int i = 0; i < 3; ++i) {
      first += phase[i] * whole.stride_bytes[3 - i];
      view.extent[3 - i] = ceil_div(whole.extent[3 - i] - phase[i], step[i]);
      view.stride_bytes[3 - i] *= step[i];
    }
    if (const int error = make_tensor_map<T>(maps.of[index], first, view, device)) return error;
  }
  return CONVGEN_OK;
}

// How a tensor's channels are packed, those of a group to `padded` ones.
inline PackShape pack_shape(int64_t batch, int64_t channels, const int64_t (&extent)[3], int groups,
                            int64_t padded, bool last) {
  PackShape s;
  s.positions = extent[0] * extent[1] * extent[2];
  s.batch = static_cast<int>(batch), s.groups = groups;
  s.channels = static_cast<int>(channels / groups), s.padded = static_cast<int>(padded);
  s.stride_n = channels * s.positions;
  s.stride_c = last ? 1 : s.positions, s.stride_p = last ? channels : 1;
  return s;
}

// weight[coarse][fine / groups][tap], or (`last`) with the taps before the fine channels. `counts`
// are groups, and output and input channels of each.
template <bool COARSE_INPUT>
WeightShape weight_shape(int taps, bool last, const int (&counts)[3], int padded_outputs,
                         int padded_inputs) {
  WeightShape s;
  s.groups = counts[0], s.output_channels = counts[1], s.input_channels = counts[2];
  const int64_t fine = COARSE_INPUT ? s.output_channels : s.input_channels;
  const int64_t of_coarse = fine * taps, of_fine = last ? 1 : taps;
  s.stride_output = COARSE_INPUT ? of_fine : of_coarse;
  s.stride_input = COARSE_INPUT ? of_coarse : of_fine;
  s.stride_tap = last ? fine : 1;
  s.padded_inputs = padded_inputs, s.padded_outputs = padded_outputs;
  return s;
}

constexpr int MOST_TURNED_TAPS = 32;  // that shared memory has room for

// Launches of pack_weights_kernel, or pack_turned_weights_kernel, and of
// pack_folded_weights_kernel.
template <typename T, typename Conv, bool COARSE_INPUT>
int pack_weights(const Operands& call, T* to, const WeightShape& s, int64_t rows, int64_t columns) {
  const int64_t blocks = ceil_div(rows, 8);
  if constexpr (COARSE_INPUT && Conv::WEIGHTS == Major::K && Conv::TAPS <= MOST_TURNED_TAPS) {
    if (s.groups == 1 || s.output_channels % 8 == 0) {
      return launch<pack_turned_weights_kernel<T, Conv::TAPS, Conv::PARTS>, true>(
          dim3(static_cast<unsigned>(ceil_div(columns, 32)),
               static_cast<unsigned>(blocks < 65535 ? blocks : 65535)),
          dim3(PACK_THREADS), 0, call.device, call.stream, static_cast<const T*>(call.weight), to,
          s);
    }
  }
  return launch<pack_weights_kernel<T, Conv::TAPS, COARSE_INPUT, Conv::WEIGHTS, Conv::PARTS>, true>(
      dim3(static_cast<unsigned>(ceil_div(columns, 32)),
           static_cast<unsigned>(blocks < 65535 ? blocks : 65535)),
      dim3(PACK_THREADS), 0, call.device, call.stream, static_cast<const T*>(call.weight), to, s);
}
template <typename T, typename Conv, bool COARSE_INPUT>
int pack_folded_weights(const Operands& call, T* to, const WeightShape& s, int* flag,
                        int multiprocessors) {
  return launch<pack_folded_weights_kernel<T, Conv::KERNEL_D, Conv::TAPS / Conv::KERNEL_D,
                                           COARSE_INPUT, Conv::WEIGHTS, Conv::PARTS>,
                true>(dim3(2 * multiprocessors), dim3(PACK_THREADS), 0, call.device, call.stream,
                      static_cast<const T*>(call.weight), to, s, flag);
}

template <typename T, typename Conv>
int add_partials(const Operands& call, const Output& out, int splits) {
  const dim3 grid(static_cast<unsigned>(ceil_div(out.elements, PACK_THREADS)));
  const int channels = static_cast<int>(call.output_channels);
  if constexpr (Conv::HAS_EPILOGUE) {
    using Finish = typename Conv::Finish;
    return launch<add_partials_kernel<T, Finish>, true>(grid, dim3(PACK_THREADS), 0, call.device,
                                                        call.stream, out, splits, channels,
                                                        Finish(*call.call, call.output));
  } else {
    return launch<add_partials_kernel<T>, true>(grid, dim3(PACK_THREADS), 0, call.device,
                                                call.stream, out, splits, channels);
  }
}

// The elements of `size` bytes that one access may have, up to `widest`, at any whole number of
// them behind `base` in lines of `extent`.
inline int access_elements(const void* base, int64_t extent, int size, int widest) {
  while (widest > 1 &&
         (extent % widest != 0 || reinterpret_cast<uintptr_t>(base) % (widest * size) != 0)) {
    widest /= 2;
  }
  return widest;
}

template <Form FORM>
struct FormConstant {
  static constexpr Form value = FORM;
};

// Packs a tensor's channels side by side; with `last` they lie so already, but not as they should.
template <Form FORM, typename T>
int pack_input(const T* from, T* to, const PackShape& s, bool last, int device, void* stream,
               int multiprocessors) {
  if (last) {
    return launch<pack_channels_kernel<T, FORM>, true>(
        dim3(16 * multiprocessors), dim3(PACK_THREADS), 0, device, stream, from, to, s);
  }
  constexpr int BLOCK_K = ROW_BYTES / sizeof(T);
  const dim3 grid(static_cast<unsigned>(ceil_div(s.positions, PACK_POSITIONS)),
                  static_cast<unsigned>(ceil_div(int64_t{s.groups} * s.padded, BLOCK_K)),
                  s.batch < 65535 ? s.batch : 65535);
  const bool wide =
      s.positions % 4 == 0 && reinterpret_cast<uintptr_t>(from) % (4 * sizeof(T)) == 0;
  return wide ? launch<pack_positions_kernel<T, FORM, true>, true>(grid, dim3(PACK_THREADS), 0,
                                                                   device, stream, from, to, s)
              : launch<pack_positions_kernel<T, FORM, false>, true>(grid, dim3(PACK_THREADS), 0,
                                                                    device, stream, from, to, s);
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_CALL_CUH
