// The host's part of the weight's gradient a tap at a time: how a call is dealt out, its launches.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_HOST_CUH

#include "deal.cuh"
#include "host.cuh"
#include "wgrad_packs.cuh"
#include "wgrad_taps.cuh"

namespace convgen {

// Columns of a tile that are compiled.
template <int... COLUMNS>
struct Columns {};

template <typename T, typename Conv, typename Sizes>
class TapWgrad;

template <typename T, typename Conv, int... COLUMNS>
class TapWgrad<T, Conv, Columns<COLUMNS...>> {
 public:
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T), BLOCK_K = ROW_BYTES / sizeof(T);
  static constexpr int TAPS = Conv::TAPS;
  static constexpr bool POINTWISE = TAPS == 1 && Conv::PADDING_D == 0 && Conv::PADDING_H == 0 &&
                                    Conv::PADDING_W == 0 && Conv::STRIDE_D == 1 &&
                                    Conv::STRIDE_H == 1 && Conv::STRIDE_W == 1;

  static_assert(!Conv::LINEAR || Conv::KERNEL_D * Conv::KERNEL_H == 1, "a line of taps");
  static_assert(Conv::DILATION_D > 0 && Conv::DILATION_H > 0 && Conv::DILATION_W > 0,
                "distances of taps");

  TapWgrad(const ConvgenCall& call, const DeviceLimits& limits)
      : given_(call),
        call_(call),
        limits_(limits),
        packs_(call, READS_PATCHES<Conv>, FLOATS && takes_lines(), limits.multiprocessors) {
    if (packs() || READS_PATCHES<Conv>) call_ = packs_.packed(call);
    if (POINTWISE) {
      for (int i = 0; i < 3; ++i) {  // output padding
        if (call_.coarse_extent[i] != call_.fine_extent[i]) return;
      }
      // Without neighbours, all positions are those of one line, and channels_last of all samples'.
      const int64_t* const c = call_.coarse_extent;
      const bool merges = is_last() && call_.batch * c[0] * c[1] * c[2] <= INDEX_LIMIT;
      for (int64_t (*e)[3] : {&call_.coarse_extent, &call_.fine_extent}) {
        (*e)[2] *= (*e)[0] * (*e)[1], (*e)[0] = (*e)[1] = 1;
        if (merges) (*e)[2] *= call_.batch;
      }
      if (merges) call_.batch = 1;
    }
    t_.groups = Conv::GROUPS;
    t_.coarse_channels = static_cast<int>(call.coarse_channels / Conv::GROUPS);
    t_.fine_channels = static_cast<int>(call.fine_channels / Conv::GROUPS);
    // Some hundred boxes are considered: once for each shape.
    thread_local ShapeCache<Plan> plans;
    bool known;
    const int64_t extra = call.channels_last + int64_t{8} * limits.multiprocessors;
    Plan& plan = plans.find(call, extra, known);
    if (!known) {
      if (is_last() ? deal_rows_of_channels() : deal_rows_of_positions()) {
        (consider<COLUMNS>(), ...);
      }
      plan = best_;
    }
    best_ = plan;
  }

  bool found() const { return best_.clocks < 1e30; }
  bool pays() const {
    const bool last = given_.channels_last & (CONVGEN_COARSE | CONVGEN_FINE);
    return (!packs() && !last) ||
           expected_ms() < other_wgrad_ms<T, Conv>(given_, limits_.multiprocessors);
  }
  // Whether the current device, `device`, runs code for sm_90a.
  static bool is_compiled(int device) {
    constexpr Major MAJOR = HAS_K ? Major::K : Major::MN;
    int threads = 0;
    return launch_bound<tap_wgrad_kernel<T, largest(COLUMNS...), MAJOR, Conv>, GEMM_THREADS>(
               device, threads) == cudaSuccess &&
           threads == GEMM_THREADS;
  }
  double expected_ms() const {
    return (best_.clocks + (packs() ? packs_.clocks() : 0)) / CLOCKS_PER_MS;
  }
  int64_t workspace_bytes() const {
    const int64_t packed = packs() ? packs_.bytes() : 0;
    if (best_.tiling.is_whole) return packed;
    return packed + (int64_t{best_.tiling.ctas} + best_.pairs) * TAP_PARTIALS<1> * best_.columns *
                        sizeof(float);
  }

  int run() const {
    int error = CONVGEN_TOO_LARGE;
    if (packs() && (error = packs_.run(given_))) return error;
    const bool last = !FLOATS && is_last();
    const bool found =
        ((!last && best_.columns == COLUMNS && (error = launch_with<COLUMNS, Major::K>(), true)) ||
         ...) ||
        ((last && best_.columns == COLUMNS && (error = launch_with<COLUMNS, Major::MN>(), true)) ||
         ...);
    return found ? error : CONVGEN_TOO_LARGE;
  }

 private:
  // How one call is computed.
  struct Plan {
    TapWgradTiling tiling;
    double clocks = 1e30;
    int columns, pairs;
  };

  // Operands of floats are multiplied K-major, whichever way each of them lies; in 16 bits they lie
  // alike, or are packed so.
  static constexpr bool FLOATS = sizeof(T) == 4;
  static constexpr bool HAS_K = FLOATS || (POINTWISE && !READS_PATCHES<Conv>), HAS_MN = !FLOATS;
  // Whether contiguous tensors are read as they lie: lines of multiples of 16 bytes.
  bool takes_lines() const {
    const int64_t* e = given_.coarse_extent;
    return POINTWISE && HAS_K && e[0] * e[1] * e[2] % VECTOR == 0;
  }
  // Whether what does not lie as these need it is packed: channels side by side.
  bool packs() const {
    const bool lies = takes_lines() && !(given_.channels_last & (CONVGEN_COARSE | CONVGEN_FINE));
    return !lies && packs_.any();
  }

  bool is_last(int operand) const { return (call_.channels_last & operand) != 0; }
  bool is_last() const { return is_last(CONVGEN_COARSE) && is_last(CONVGEN_FINE); }
  // Whether rows of an operand's channels, where it has such, are whole vectors.
  bool has_vectors(int operand) const {
    const int64_t channels =
        operand == CONVGEN_COARSE ? call_.coarse_channels : call_.fine_channels;
    return !is_last(operand) || channels / Conv::GROUPS % VECTOR == 0;
  }
  bool has_vectors() const { return has_vectors(CONVGEN_COARSE) && has_vectors(CONVGEN_FINE); }

  // K blocks are parts of a sample's line. Of floats one tensor may have its channels side by side.
  bool deal_rows_of_positions() {
    const int64_t* e = call_.coarse_extent;
    const bool mixed = is_last(CONVGEN_COARSE) || is_last(CONVGEN_FINE);
    if (!HAS_K || !POINTWISE || e[2] % VECTOR != 0) return false;
    if (mixed && !(FLOATS && has_vectors())) return false;
    t_.rows = t_.step_w = BLOCK_K, t_.step_h = t_.step_d = t_.step_n = 1;
    t_.tiles_w = static_cast<int>(ceil_div(e[2], BLOCK_K)), t_.tiles_h = t_.tiles_d = 1;
    t_.tiles_n = static_cast<int>(call_.batch), t_.last_w = (t_.tiles_w - 1) * t_.step_w;
    return true;
  }

  // Whether positions beyond the output along an axis meet nothing but zeros: of the first one, the
  // first tap lies beyond fine.
  bool ends_with_fine(int axis, int stride, int padding) const {
    return call_.coarse_extent[axis] * stride - padding >= call_.fine_extent[axis];
  }

  // Boxes of one size that cover an extent, none of them smaller than it need be.
  static bool is_even(int64_t extent, int64_t size) {
    return ceil_div(extent, ceil_div(extent, size)) == size;
  }

  // K blocks are boxes of up to 64 positions (of floats 32) whose channels lie side by side. Those
  // are taken with which the fewest cover the output, and of these the smallest. Where positions
  // beyond the output would meet elements of fine, the last boxes along W and H end with it, and
  // all along D do.
  bool deal_rows_of_channels() {
    if (!has_vectors() || call_.batch == 0) return false;
    const int64_t *e = call_.coarse_extent, batch = call_.batch;
    const bool free_w = ends_with_fine(2, Conv::STRIDE_W, Conv::PADDING_W);
    const bool free_h = ends_with_fine(1, Conv::STRIDE_H, Conv::PADDING_H);
    const bool free_d = ends_with_fine(0, Conv::STRIDE_D, Conv::PADDING_D);
    // Boxes have up to 256 elements along a dimension, skipped ones included.
    const auto most = [&](int axis, int stride, int64_t left) {
      const int64_t size = left < 256 / stride ? left : 256 / stride;
      return size < e[axis] ? size : e[axis];
    };
    int64_t fewest = INT64_MAX;
    for (int64_t w = most(2, Conv::STRIDE_W, BLOCK_K); w > 0; --w) {
      if (!is_even(e[2], w)) continue;
      for (int64_t h = most(1, Conv::STRIDE_H, BLOCK_K / w); h > 0; --h) {
        if (!is_even(e[1], h)) continue;
        for (int64_t d = most(0, Conv::STRIDE_D, BLOCK_K / (w * h)); d > 0; --d) {
          if (free_d ? !is_even(e[0], d) : e[0] % d != 0) continue;
          const int64_t samples = BLOCK_K / (w * h * d);
          const int64_t tiles_n = ceil_div(batch, samples), n = ceil_div(batch, tiles_n);
          const int64_t tiles_w = ceil_div(e[2], w), tiles_h = ceil_div(e[1], h);
          const int64_t tiles_d = ceil_div(e[0], d), tiles = tiles_w * tiles_h * tiles_d * tiles_n;
          if (tiles > fewest || tiles > INT32_MAX) continue;
          if (tiles == fewest && w * h * d * n >= t_.rows) continue;
          fewest = tiles;
          t_.step_w = static_cast<int>(w), t_.step_h = static_cast<int>(h);
          t_.step_d = static_cast<int>(d), t_.step_n = static_cast<int>(n);
          t_.tiles_w = static_cast<int>(tiles_w), t_.tiles_h = static_cast<int>(tiles_h);
          t_.tiles_d = static_cast<int>(tiles_d), t_.tiles_n = static_cast<int>(tiles_n);
          t_.rows = static_cast<int>(w * h * d * n);
        }
      }
    }
    const int first_w = (t_.tiles_w - 1) * t_.step_w, first_h = (t_.tiles_h - 1) * t_.step_h;
    t_.last_w = free_w ? first_w : static_cast<int>(e[2] - t_.step_w);
    t_.last_h = free_h ? first_h : static_cast<int>(e[1] - t_.step_h);
    return fewest < INT64_MAX;
  }

  template <int SIZE>
  void consider() {
    TapWgradTiling t = t_;
    t.coarse_last = is_last(CONVGEN_COARSE), t.fine_last = is_last(CONVGEN_FINE);
    t.coarse_blocks = static_cast<int>(ceil_div(t.coarse_channels, TAP_ROWS));
    t.taps_first = TAPS > 1 && !(call_.channels_last & CONVGEN_WEIGHT);
    t.fine_chunks = static_cast<int>(ceil_div(t.fine_channels, CHUNK_COLUMNS));
    t.column_blocks = static_cast<int>(ceil_div(TAPS * t.fine_chunks, SIZE / CHUNK_COLUMNS));
    const int64_t positions = int64_t{t.tiles_w} * t.tiles_h * t.tiles_d * t.tiles_n;
    const int64_t pairs = int64_t{t.groups} * t.coarse_blocks * t.column_blocks;
    if (positions > INT32_MAX / 2 || pairs > INT32_MAX / 2 || pairs * positions > INT32_MAX / 2) {
      return;
    }
    t.positions = static_cast<int>(positions), t.units = static_cast<int>(pairs * positions);
    double products = ROW_BYTES / STEP_BYTES * CONSUMERS * SIZE / 2.0;
    double loads = TAP_STAGE_BYTES<SIZE> / LEVEL2_BYTES_PER_CLOCK;
    if (FLOATS) {
      const int coarse = static_cast<int>(round_up(t.coarse_channels, FLOAT_ROWS));
      const int fine = static_cast<int>(round_up(t.fine_channels, FLOAT_ROWS));
      t.coarse_rows = coarse < TAP_ROWS ? coarse : TAP_ROWS;
      t.fine_rows = fine < SIZE ? fine : SIZE;
      // Of shared memory, 128 bytes a clock: rows are loaded, read and written by the warps that
      // round; each consumer reads its own and all of fine.
      const double rows = double(coarse) / t.coarse_blocks + double(fine) / t.column_blocks;
      const double consumers = double(ceil_div(t.coarse_channels, BLOCK_M)) / t.coarse_blocks;
      const double shared = 3 * rows + consumers * (BLOCK_M + SIZE);
      products *= consumers / CONSUMERS;
      loads = rows * ROW_BYTES / LEVEL2_BYTES_PER_CLOCK;
      if (loads < shared) loads = shared;
    }
    const Deal deal =
        deal_units(pairs, positions, products > loads ? products : loads, 4.0 * TAP_PARTIALS<SIZE>,
                   limits_.multiprocessors, store_clocks<SIZE>(t));
    t.ctas = deal.ctas, t.is_whole = deal.whole, t.grain = deal.whole ? t.positions : 1;
    t.stages = (limits_.shared_bytes - shared_bytes<SIZE>(t, 0)) / TAP_STAGE_BYTES<SIZE>;
    if (t.stages > MOST_STAGES) t.stages = MOST_STAGES;
    if (t.stages < 2) return;
    const double clocks = deal.clocks + GEMM_TILE_CLOCKS + LAUNCH_CLOCKS;
    if (clocks < best_.clocks) best_ = {t, clocks, SIZE, static_cast<int>(pairs)};
  }

  template <int SIZE>
  static int shared_bytes(const TapWgradTiling& t, int stages) {
    return static_cast<int>(sizeof(TapWgradStorage)) + ATOM_BYTES + stages * TAP_STAGE_BYTES<SIZE> +
           (t.is_whole && sizeof(T) == 2 ? STAGED_ROWS_BYTES<SIZE> : 0);
  }

  // Of a pair's results, counted as sectors of 32 bytes that a warp's stores touch, one in a clock;
  // where a warp's are neighbours, half of that.
  template <int SIZE>
  static double store_clocks(const TapWgradTiling& t) {
    constexpr int CHUNKS = SIZE / CHUNK_COLUMNS;
    if (!t.taps_first) return TAP_PARTIALS<SIZE> * sizeof(T) / STORED_TAP_BYTES;
    return TAP_PARTIALS<SIZE> / 32.0 * (TAPS <= CHUNKS ? 3 : 32 / CHUNKS + 1);
  }

  // Rows of positions: the lines of a contiguous tensor.
  int encode_lines(TensorMap& map, const void* first, int64_t channels, int rows) const {
    TensorView v = channels_view<T>(call_.coarse_extent[2], channels, call_.batch);
    v.box[0] = BLOCK_K, v.box[1] = rows, v.box[2] = 1;
    return make_tensor_map<T>(map, first, v, static_cast<int>(call_.device));
  }

  // Maps of coarse for the K blocks before the last ones along W, and H, and for those: see
  // CoarseMaps.
  int encode_coarse(CoarseMaps& maps) const {
    if (!is_last(CONVGEN_COARSE)) {
      const int rows = FLOATS ? best_.tiling.coarse_rows : TAP_ROWS;
      return encode_lines(maps.of[0], call_.coarse, call_.coarse_channels, rows);
    }
    const TapWgradTiling& t = best_.tiling;
    for (int i = 0; i < 4; ++i) {
      TensorView v =
          positions_view<T>(call_.coarse_channels, call_.coarse_extent, call_.batch, false);
      const int64_t w = i % 2 ? int64_t{t.tiles_w - 1} * t.step_w : 0;
      const int64_t h = i / 2 ? int64_t{t.tiles_h - 1} * t.step_h : 0;
      v.extent[1] -= w, v.extent[2] -= h;
      v.box[0] = BLOCK_K, v.box[1] = t.step_w, v.box[2] = t.step_h;
      v.box[3] = t.step_d, v.box[4] = t.step_n;
      const T* const first = static_cast<const T*>(call_.coarse) +
                             (w + h * call_.coarse_extent[2]) * call_.coarse_channels;
      const int device = static_cast<int>(call_.device);
      if (const int error = make_tensor_map<T>(maps.of[i], first, v, device)) return error;
    }
    return CONVGEN_OK;
  }

  int encode_fine(TensorMap& map) const {
    if (!is_last(CONVGEN_FINE)) {
      const int rows = FLOATS ? best_.tiling.fine_rows : best_.columns;
      return encode_lines(map, call_.fine, call_.fine_channels, rows);
    }
    const TapWgradTiling& t = best_.tiling;
    TensorView v = positions_view<T>(call_.fine_channels, call_.fine_extent, call_.batch, false);
    v.step[1] = Conv::STRIDE_W, v.step[2] = Conv::STRIDE_H, v.step[3] = Conv::STRIDE_D;
    v.box[0] = BLOCK_K, v.box[1] = t.step_w * Conv::STRIDE_W;
    v.box[2] = t.step_h * Conv::STRIDE_H, v.box[3] = t.step_d * Conv::STRIDE_D;
    v.box[4] = t.step_n;
    return make_tensor_map<T>(map, call_.fine, v, static_cast<int>(call_.device));
  }

  template <int SIZE, Major MAJOR>
  int launch_with() const {
    if constexpr (MAJOR == Major::K ? !HAS_K : !HAS_MN) {
      return CONVGEN_TOO_LARGE;
    } else {
      CoarseMaps coarse_maps = {};
      TensorMap fine_map;
      if (const int error = encode_coarse(coarse_maps)) return error;
      if (const int error = encode_fine(fine_map)) return error;
      const TapWgradTiling& t = best_.tiling;
      float* const partials = static_cast<float*>(call_.workspace);
      const int device = static_cast<int>(call_.device);
      WeightOutput out;
      out.address = call_.weight;
      out.stride_coarse = int64_t{t.fine_channels} * TAPS;
      out.stride_fine = t.taps_first ? TAPS : 1;
      out.stride_tap = t.taps_first ? 1 : t.fine_channels;
      out.vector =
          access_elements(call_.weight, t.fine_channels, sizeof(T), sizeof(T) == 2 ? 8 : 2);
      const int error = launch<tap_wgrad_kernel<T, SIZE, MAJOR, Conv>, true>(
          dim3(t.ctas), dim3(GEMM_THREADS), shared_bytes<SIZE>(t, t.stages), device, call_.stream,
          coarse_maps, fine_map, t, out, partials);
      if (error || t.is_whole) return error;
      return launch<add_tap_wgrad_kernel<T, SIZE, TAPS>, true>(
          dim3(TAP_PARTIALS<SIZE> / 4 / PACK_THREADS, best_.pairs < 65535 ? best_.pairs : 65535),
          dim3(PACK_THREADS), 0, device, call_.stream, t, static_cast<const float*>(partials), out,
          best_.pairs);
    }
  }

  ConvgenCall given_, call_;  // the second with operands as they lie when they are packed
  DeviceLimits limits_;
  WgradPacks<T, Conv::GROUPS> packs_;
  TapWgradTiling t_ = {};
  Plan best_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_HOST_CUH
