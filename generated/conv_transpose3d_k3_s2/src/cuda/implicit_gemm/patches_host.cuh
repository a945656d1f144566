// The host's part of patches: a pack, and a product of matrices. See patches.cuh.
#ifndef CONVGEN_IMPLICIT_GEMM_PATCHES_HOST_CUH
#define CONVGEN_IMPLICIT_GEMM_PATCHES_HOST_CUH

#include "either.cuh"
#include "host.cuh"
#include "patches.cuh"

namespace convgen {

// The convolution of one tap that a product with the matrix is. READS: the matrix is its input;
// else it is the output, in which an epilogue does not find its tensors.
template <typename Conv, bool READS>
struct PatchConv : Conv {
  static constexpr int KERNEL_D = 1, KERNEL_H = 1, KERNEL_W = 1, TAPS = 1, PHASES = 1;
  static constexpr int STRIDE_D = 1, STRIDE_H = 1, STRIDE_W = 1;
};
template <typename Conv>
struct PatchConv<Conv, false> : PatchConv<Conv, true> {
  static constexpr bool HAS_EPILOGUE = false;
};
template <typename Conv>
constexpr bool READS_PATCHES<PatchConv<Conv, true>> = true;

// The fine tensor of a call, and the matrix whose rows have `row` elements.
template <typename T, typename Conv>
class PatchMatrix {
 public:
  static constexpr int VECTOR = VECTOR_BYTES / sizeof(T), TAPS = Conv::TAPS;

  PatchMatrix(const ConvgenCall& call, int64_t row) : call_(call) {
    last_ = (call.channels_last & CONVGEN_FINE) != 0;
    channels_first_ = (call.channels_last & CONVGEN_WEIGHT) == 0;
    const int64_t channels = call.fine_channels, *e = call.fine_extent;
    if (call.batch < 1 || channels < 1 || row > INT32_MAX / 2) return;
    constexpr int KERNEL[3] = {Conv::KERNEL_D, Conv::KERNEL_H, Conv::KERNEL_W};
    for (int i = 0; i < 3; ++i) {  // windows beyond the tensor
      if (call.coarse_extent[i] * KERNEL[i] > e[i]) return;
    }
    PatchTiles& s = tiles_;
    s.channels = static_cast<int>(channels), s.row = static_cast<int>(row);
    s.depth = static_cast<int>(call.coarse_extent[0]);
    s.height = static_cast<int>(call.coarse_extent[1]);
    s.width = static_cast<int>(call.coarse_extent[2]);
    s.stride_n = channels * e[0] * e[1] * e[2];
    s.stride_c = last_ ? 1 : e[0] * e[1] * e[2], s.stride_w = last_ ? channels : 1;
    s.stride_h = e[2] * s.stride_w, s.stride_d = e[1] * s.stride_h;
    fits_ = rows() > 0 && cut();
  }

  bool fits() const { return fits_; }
  int64_t rows() const {
    return call_.batch * tiles_.depth * tiles_.height * int64_t{tiles_.width};
  }
  int64_t elements() const { return rows() * tiles_.row; }
  int64_t bytes() const { return round_up(elements() * static_cast<int64_t>(sizeof(T)), 1024); }

  int pack(T* matrix) const { return copy<true>(static_cast<const T*>(call_.fine), matrix); }
  // The columns of the matrix are fine's; what lies in no window becomes `bias` or, of none, zero.
  int unpack(const T* matrix, const T* bias, int multiprocessors) const {
    T* const fine = static_cast<T*>(call_.fine);
    const int error = copy<false>(matrix, fine);
    const int64_t* const e = call_.fine_extent;
    const PatchTiles& s = tiles_;
    if (error ||
        (e[0] == int64_t{s.depth} * Conv::KERNEL_D && e[1] == int64_t{s.height} * Conv::KERNEL_H &&
         e[2] == int64_t{s.width} * Conv::KERNEL_W)) {
      return error;
    }
    const int64_t lines = call_.batch * e[0] * e[1] * (last_ ? 1 : s.channels);
    const auto clear = [&](auto last) {
      return launch<clear_rest_kernel<T, Conv, decltype(last)::value>, true>(
          dim3(8 * multiprocessors), dim3(PATCH_THREADS), 0, device(), call_.stream, fine, bias, s,
          lines, static_cast<int>(e[0]), static_cast<int>(e[1]), static_cast<int>(e[2]));
    };
    return last_ ? clear(Constant<true>()) : clear(Constant<false>());
  }
  int spread_bias(const void* bias, T* columns) const {
    const dim3 grid(
        static_cast<unsigned>(ceil_div(int64_t{tiles_.channels} * TAPS, PATCH_THREADS)));
    const T* const from = static_cast<const T*>(bias);
    return channels_first_
               ? launch<spread_bias_kernel<T, TAPS, true>, true>(grid, dim3(PATCH_THREADS), 0,
                                                                 device(), call_.stream, from,
                                                                 columns, tiles_.channels)
               : launch<spread_bias_kernel<T, TAPS, false>, true>(grid, dim3(PATCH_THREADS), 0,
                                                                  device(), call_.stream, from,
                                                                  columns, tiles_.channels);
  }

 private:
  template <bool VALUE>
  struct Constant {
    static constexpr bool value = VALUE;
  };
  static constexpr int CAPACITY = PATCH_TILE_BYTES / sizeof(T), WORD = 4 / sizeof(T);

  int device() const { return static_cast<int>(call_.device); }
  // An odd number of words.
  static int64_t pitch_of(int64_t length) { return (ceil_div(length, WORD) | 1) * WORD; }

  // Cuts windows and channels into tiles; false where none is small enough.
  bool cut() {
    PatchTiles& s = tiles_;
    // Of so many windows fine's lines have 128 bytes.
    const int64_t wanted = ceil_div(ROW_BYTES / sizeof(T), Conv::KERNEL_W);
    const int64_t least = s.width < wanted ? s.width : wanted;
    int64_t chunk = s.channels;
    if (pitch_of(s.row) * least > CAPACITY) {
      constexpr int UNITS = VECTOR / greatest_divisor(TAPS, VECTOR);
      const int unit = channels_first_ ? UNITS : VECTOR;
      chunk = (CAPACITY / least - VECTOR - 2 * WORD) / TAPS / unit * unit;
      if (chunk < unit) chunk = unit;
      if (chunk >= s.channels) chunk = s.channels;
    }
    const int64_t longest = chunk * TAPS + VECTOR < s.row ? chunk * TAPS + VECTOR : s.row;
    const int64_t pitch = pitch_of(longest), most = CAPACITY / pitch;
    if (most < 1) return false;
    const int64_t tiles_w = ceil_div(s.width, most < s.width ? most : s.width);
    const int64_t windows = ceil_div(s.width, tiles_w), chunks = ceil_div(s.channels, chunk);
    if (rows() / s.width * tiles_w * chunks > INT32_MAX) return false;
    s.chunk = static_cast<int>(chunk), s.chunks = static_cast<int>(chunks);
    s.windows = static_cast<int>(windows), s.tiles_w = static_cast<int>(tiles_w);
    s.pitch = static_cast<int>(pitch);
    const bool wide = s.row % VECTOR == 0 &&
                      (chunks == 1 || (channels_first_ ? chunk * TAPS % VECTOR == 0
                                                       : (s.channels | s.chunk) % VECTOR == 0));
    s.packed_vector = wide ? VECTOR : 1;
    return true;
  }

  // Elements of an access of fine: lines of a tile are whole numbers of them, and begin at such.
  int fine_vector() const {
    const PatchTiles& s = tiles_;
    int vector = access_elements(call_.fine, s.stride_h, sizeof(T), VECTOR);
    const auto divides = [&](int64_t length) { return length % vector == 0; };
    const int64_t column = s.stride_w * Conv::KERNEL_W;
    while (vector > 1 &&
           !(last_ && s.chunks > 1 ? divides(s.channels) && divides(s.chunk)
                                   : divides(column * s.windows) && divides(column * s.width))) {
      vector /= 2;
    }
    return vector;
  }

  template <bool PACKS>
  int copy(const T* from, T* to) const {
    PatchTiles s = tiles_;
    s.fine_vector = fine_vector();
    const int64_t blocks = rows() / s.width * s.tiles_w * s.chunks;
    const auto go = [&](auto last, auto first) {
      return launch<patches_kernel<T, Conv, decltype(last)::value, decltype(first)::value, PACKS>,
                    true>(dim3(static_cast<unsigned>(blocks)), dim3(PATCH_THREADS), 0, device(),
                          call_.stream, from, to, s);
    };
    const Constant<true> yes;
    const Constant<false> no;
    return last_ ? (channels_first_ ? go(yes, yes) : go(yes, no))
                 : (channels_first_ ? go(no, yes) : go(no, no));
  }

  ConvgenCall call_;
  PatchTiles tiles_ = {};
  bool last_, channels_first_, fits_ = false;
};

// The call of the product: fine is the matrix, at the beginning of the workspace, and what follows
// it is the product's own.
template <typename T, typename Conv>
ConvgenCall product_of(const ConvgenCall& call, const PatchMatrix<T, Conv>& matrix,
                       int64_t used_bytes) {
  ConvgenCall product = call;
  product.fine = call.workspace;
  product.workspace = static_cast<unsigned char*>(call.workspace) + used_bytes;
  product.fine_channels *= Conv::TAPS, product.channels_last |= CONVGEN_FINE;
  // Without neighbours, all samples' positions are those of one line.
  if ((call.channels_last & CONVGEN_COARSE) && matrix.rows() <= INDEX_LIMIT) {
    product.batch = 1, product.coarse_extent[2] = matrix.rows();
    product.coarse_extent[0] = product.coarse_extent[1] = 1;
  }
  for (int i = 0; i < 3; ++i) product.fine_extent[i] = product.coarse_extent[i];
  return product;
}

// fprop (the matrix is packed and read) and dgrad (it is written, and unpacked).
template <typename T, typename Conv, bool COARSE_INPUT, typename TapSizes>
class PatchGemm {
  using Matrix = PatchMatrix<T, Conv>;
  using Product = ImplicitGemm<T, PatchConv<Conv, !COARSE_INPUT>, COARSE_INPUT, Sizes<>, TapSizes>;

 public:
  PatchGemm(const Operands& call, const DeviceLimits& limits)
      : call_(call),
        limits_(limits),
        matrix_(*call.call, row_of(call)),
        product_call_(product_of(*call.call, matrix_, used_bytes())),
        product_(operands(), limits) {}
  PatchGemm(const PatchGemm&) = delete;  // the product knows where its call is
  PatchGemm& operator=(const PatchGemm&) = delete;

  bool found() const {
    const bool finishes = COARSE_INPUT && Conv::HAS_EPILOGUE && call_.call->epilogue != 0;
    return matrix_.fits() && product_.found() && !finishes;
  }
  bool pays() const {
    if (Conv::PARTS == 2) return false;  // not timed
    return expected_ms() < other_gather_ms<T, Conv>(*call_.call, limits_.multiprocessors);
  }
  static bool is_compiled(int device) { return Product::is_compiled(device); }
  double expected_ms() const {
    return product_.expected_ms() +
           pack_clocks<T>(matrix_.elements(), limits_.multiprocessors) / CLOCKS_PER_MS;
  }
  int64_t workspace_bytes() const { return used_bytes() + product_.workspace_bytes(); }

  int run() {
    T* const matrix = static_cast<T*>(call_.workspace);
    if constexpr (COARSE_INPUT) {
      if (call_.bias != nullptr) {
        if (const int error = matrix_.spread_bias(call_.bias, bias_columns())) return error;
      }
      if (const int error = product_.run()) return error;
      return matrix_.unpack(matrix, static_cast<const T*>(call_.bias), limits_.multiprocessors);
    } else {
      const int error = matrix_.pack(matrix);
      return error ? error : product_.run();
    }
  }

 private:
  // What is read has whole vectors; what is written, none but its own columns.
  static int64_t row_of(const Operands& call) {
    const int64_t columns = call.call->fine_channels * Conv::TAPS;
    return COARSE_INPUT ? columns : round_up(columns, Matrix::VECTOR);
  }
  int64_t bias_bytes() const {
    const int64_t columns = call_.call->fine_channels * Conv::TAPS;
    return COARSE_INPUT ? round_up(columns * static_cast<int64_t>(sizeof(T)), 1024) : 0;
  }
  int64_t used_bytes() const { return matrix_.bytes() + bias_bytes(); }
  T* bias_columns() const {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(call_.workspace) + matrix_.bytes());
  }

  Operands operands() const {
    Operands o = call_;
    o.call = &product_call_;
    const ConvgenCall& c = product_call_;
    const bool coarse_last = (c.channels_last & CONVGEN_COARSE) != 0;
    if (COARSE_INPUT) {
      o.output = c.fine, o.output_channels = c.fine_channels, o.output_channels_last = true;
      o.bias = call_.bias == nullptr ? nullptr : bias_columns();
      o.input_channels_last = coarse_last;
    } else {
      o.input = c.fine, o.input_channels = c.fine_channels, o.input_channels_last = true;
      o.output_channels_last = coarse_last;
    }
    o.workspace = c.workspace, o.batch = c.batch;
    for (int i = 0; i < 3; ++i) o.input_extent[i] = o.output_extent[i] = c.coarse_extent[i];
    return o;
  }

  Operands call_;
  DeviceLimits limits_;
  Matrix matrix_;
  ConvgenCall product_call_;
  Product product_;
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_PATCHES_HOST_CUH
