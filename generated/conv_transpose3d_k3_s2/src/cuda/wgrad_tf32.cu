// wgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"promotion": 0, "taps_h": 3, "taps_w": 3, "tiles": [[1, 2], [2, 1]],
//   "warpgroup_taps": [0, 0], "warpgroup_tiles": []}
//
//   weight[a, b, t] = sum over n, i of coarse[n, a, i] * fine[n, b, i * STRIDE - PADDING + t *
//   DILATION]
//
// On the tensor cores: coarse channels are the rows (16) of a product, fine channels its columns
// (8), positions its depth. A warp keeps M_TILES x N_TILES such tiles of channels at TAPS_H x
// TAPS_W taps in registers; its fragments of the coarse tensor serve all of these. It takes 16
// positions (a chunk) at a time: the four lanes that share a channel each load a quad of
// neighbouring positions, and of the fine tensor the window of a row that the taps at these
// positions read; a tap along W is then a choice of registers. Quads may lie in different rows of a
// tile: a table in shared memory gives the window's offset.
//
// A thread block is `units` such warps (tiles of channels and blocks of taps) times `parts`, which
// share the chunks. For each tile of tile_d x tile_h x tile_w positions it stages in shared memory
// (two buffers, asynchronous copies between the products of the tile before)
//   coarse: [channel][tile_d][tile_h][tile_w], zero beyond the tensor: those positions add nothing
//   fine:   [channel][plane][row][column], with the halo that the block's taps reach
// with channel pitches that put the lanes of a load into different banks. A thread finds a place of
// a tile and copies many channels there. The tiles are dealt to
// `splits` blocks, whose partial sums lie in the workspace and are added in a fixed order: the
// result is the same to the bit in every run.

#include "mma_wgrad.cuh"
#include "mma_wgrad_sums.cuh"

namespace {

using namespace convgen;

using T = float;  // elements in memory
using Product = Tf32Product;
using Raw = Product::Raw;

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
// By axis: kernel, stride, padding and dilation; extents are a call's.
constexpr MeetingAxis MEETING[3] = {{0, 0, KERNEL_D, STRIDE_D, PADDING_D, DILATION_D},
                                    {0, 0, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H},
                                    {0, 0, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W}};

constexpr int TAPS_H = 3, TAPS_W = 3;  // taps of one warp
constexpr int TAP_BLOCKS_H = 1, TAP_BLOCKS_W = 1;
// Staged columns: POSITION_COLUMNS for each position, COLUMN_STEP apart in the fine tensor. A
// quad's columns lie in QUAD_PITCH words. Column 0 is SHIFT left of the first that is read, so that
// copies are aligned.
constexpr int POSITION_COLUMNS = 2, COLUMN_STEP = 1, TAP_COLUMNS = 1;
constexpr int QUAD_COLUMNS = QUAD * POSITION_COLUMNS, QUAD_PITCH = 8;
constexpr int SHIFT = 0, COLUMN_ALIGN = 4;
// A window is WINDOW_VECTORS loads of VECTOR words.
constexpr int WINDOW_VECTORS = 3, VECTOR = 4;
constexpr int WINDOW_COLUMNS = WINDOW_VECTORS * VECTOR * Product::ELEMENTS;

using FineColumn = StagedColumn<POSITION_COLUMNS, STRIDE_W, COLUMN_STEP>;

using CoarseColumn = StagedColumn<1, 1, 1>;

template <int M_TILES, int N_TILES>
using Sums = float[N_TILES][TAPS_H][TAPS_W][M_TILES][4];

// One chunk. `coarse` and `fine` are this lane's quad and its window of the first row of taps;
// `half_rows` is 8 coarse channels, `columns` 8 fine ones, `tap_row` one row of taps.
template <int M_TILES, int N_TILES>
__device__ __forceinline__ void accumulate(const uint32_t* coarse, int half_rows,
                                           const uint32_t* fine, int columns, int tap_row,
                                           uint32_t zero, Sums<M_TILES, N_TILES>& sum) {
  CoarseFragment<Product> a[M_TILES];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) a[m].load(coarse + 2 * m * half_rows, half_rows, zero);
#pragma unroll
  for (int n = 0; n < N_TILES; ++n) {
    {  // row of taps h0 + 0
      FineWindow<Product, WINDOW_VECTORS, VECTOR> x;
      x.load<QUAD_COLUMNS, QUAD_PITCH>(fine + n * columns);
#pragma unroll
      for (int step = 0; step < PRODUCT_STEPS<Product>; ++step) {
        // tap (h0 + 0, w0 + 0)
        x.multiply(sum[n][0][0], a, step, SHIFT + 0 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 0, w0 + 1)
        x.multiply(sum[n][0][1], a, step, SHIFT + 1 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 0, w0 + 2)
        x.multiply(sum[n][0][2], a, step, SHIFT + 2 * TAP_COLUMNS, POSITION_COLUMNS);
      }
    }
    {  // row of taps h0 + 1
      FineWindow<Product, WINDOW_VECTORS, VECTOR> x;
      x.load<QUAD_COLUMNS, QUAD_PITCH>(fine + n * columns + tap_row);
#pragma unroll
      for (int step = 0; step < PRODUCT_STEPS<Product>; ++step) {
        // tap (h0 + 1, w0 + 0)
        x.multiply(sum[n][1][0], a, step, SHIFT + 0 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 1, w0 + 1)
        x.multiply(sum[n][1][1], a, step, SHIFT + 1 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 1, w0 + 2)
        x.multiply(sum[n][1][2], a, step, SHIFT + 2 * TAP_COLUMNS, POSITION_COLUMNS);
      }
    }
    {  // row of taps h0 + 2
      FineWindow<Product, WINDOW_VECTORS, VECTOR> x;
      x.load<QUAD_COLUMNS, QUAD_PITCH>(fine + n * columns + 2 * tap_row);
#pragma unroll
      for (int step = 0; step < PRODUCT_STEPS<Product>; ++step) {
        // tap (h0 + 2, w0 + 0)
        x.multiply(sum[n][2][0], a, step, SHIFT + 0 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 2, w0 + 1)
        x.multiply(sum[n][2][1], a, step, SHIFT + 1 * TAP_COLUMNS, POSITION_COLUMNS);
        // tap (h0 + 2, w0 + 2)
        x.multiply(sum[n][2][2], a, step, SHIFT + 2 * TAP_COLUMNS, POSITION_COLUMNS);
      }
    }
  }
}

// What the specification says of a cut, whichever kernel it is for.
ProductTraits specified_traits() {
  ProductTraits t;
  t.kernel_d = KERNEL_D, t.kernel_h = KERNEL_H;
  t.stride_d = STRIDE_D, t.stride_h = STRIDE_H, t.stride_w = STRIDE_W;
  t.dilation_d = DILATION_D, t.dilation_h = DILATION_H, t.dilation_w = DILATION_W;
  t.element_bytes = sizeof(T);
  return t;
}

// Registers of a lane's coarse fragments, and of what a chunk's products read of its windows.
template <int M_TILES>
constexpr int COARSE_REGISTERS = M_TILES * 8 / Product::ELEMENTS;
constexpr int WINDOW_REGISTERS = 2 * 5;
template <int N_TILES>
constexpr int FINE_REGISTERS = N_TILES * TAPS_H * WINDOW_REGISTERS;

// Operands that are split take the registers that few sums leave.
template <int M_TILES, int N_TILES>
constexpr int BLOCK_WARPS =
    Product::SPLIT ? LEAST_WARPS
                   : most_warps(M_TILES * N_TILES * TAPS_H * TAPS_W * 4, COARSE_REGISTERS<M_TILES>,
                                FINE_REGISTERS<N_TILES>);

template <int M_TILES, int N_TILES>
__global__ void __launch_bounds__(BLOCK_WARPS<M_TILES, N_TILES> * WARP, 1)
    wgrad_kernel(const ProductShape s, const T* coarse, const T* fine, float4* partial) {
  constexpr int ELEMENTS = Product::ELEMENTS;
  uint32_t* const shared = dynamic_shared<uint32_t>();
  ProductOrigins* const origins = reinterpret_cast<ProductOrigins*>(shared);  // of tiles, by parity
  uint32_t* const windows = shared + ORIGINS_WORDS;                           // by quad of a tile
  uint2* const coarse_table = reinterpret_cast<uint2*>(shared + s.coarse_table);
  uint2* const fine_table = reinterpret_cast<uint2*>(shared + s.fine_table);
  uint32_t* const stages = shared + s.stages;

  const ProductBlock block =
      locate_products<M_TILES * PRODUCT_ROWS, N_TILES * PRODUCT_COLUMNS, TAPS_H, TAPS_W>(
          s, blockIdx.x);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int part = warp / s.units;
  const ProductUnit unit = locate_unit(s, warp % s.units);
  const bool active = block.coarse0 + unit.m * M_TILES * PRODUCT_ROWS < s.coarse_channels &&
                      block.fine0 + unit.n * N_TILES * PRODUCT_COLUMNS < s.fine_channels &&
                      block.tap_d + unit.d < KERNEL_D && block.tap_h + unit.h * TAPS_H < KERNEL_H &&
                      block.tap_w + unit.w * TAPS_W < KERNEL_W;

  // The tables, and zeros behind the last quad of each coarse channel.
  fill_windows<QUAD_PITCH>(s, windows);
  fill_coarse_table(s, coarse_table, s.coarse.width);
  fill_fine_table<QUAD_COLUMNS, QUAD_PITCH, ELEMENTS>(s, fine_table);
  const int quads = s.tile_d * s.tile_h * (s.tile_w / QUAD);
  const int first_words = quads * QUAD / ELEMENTS,
            all_words = s.chunks * CHUNK_QUADS * QUAD / ELEMENTS;
  const int zeros = all_words - first_words;
  for (int i = threadIdx.x; i < zeros * s.units_m * M_TILES * PRODUCT_ROWS; i += blockDim.x) {
    uint32_t* const word = stages + i / zeros * s.coarse_pitch + first_words + i % zeros;
    word[0] = word[s.stage_words] = 0;
  }

  // One thread says where tiles start, from what lies in shared memory of its block and of the next
  // tile, and takes no registers in the loop. Of tiles the loop only counts those that are `left`
  // (this one too), for the same reason; buffers and origins go by the parity of that.
  int left = split_tiles(s, block.split);
  SplitTiles* const dealt = reinterpret_cast<SplitTiles*>(&origins[3]);
  auto aim = [&](int left) {
    const ProductTile tile = locate_product_tile(s, dealt->tile());
    dealt->advance(s);
    ProductOrigins o = origins[2];
    o.coarse.channel = static_cast<const T*>(o.coarse.channel) + tile.n * s.coarse_sample;
    o.fine.channel = static_cast<const T*>(o.fine.channel) + tile.n * s.fine_sample;
    o.coarse.d = tile.d0, o.coarse.h = tile.h0, o.coarse.w = tile.w0;
    o.fine.d += tile.d0 * STRIDE_D;
    o.fine.h += tile.h0 * STRIDE_H;
    o.fine.w += tile.w0 * STRIDE_W;
    origins[left & 1] = o;
  };
  if (threadIdx.x == 0) {
    ProductOrigins& o = origins[2];
    o.coarse.channel = coarse + (int64_t{block.group} * s.coarse_channels + block.coarse0) *
                                    s.coarse_channel_stride;
    o.fine.channel =
        fine + (int64_t{block.group} * s.fine_channels + block.fine0) * s.fine_channel_stride;
    o.coarse.d = o.coarse.h = o.coarse.w = 0;
    o.fine.d = block.tap_d * DILATION_D - PADDING_D;
    o.fine.h = block.tap_h * DILATION_H - PADDING_H;
    o.fine.w = block.tap_w * DILATION_W - PADDING_W - SHIFT;
    o.coarse.channels = s.coarse_channels - block.coarse0;
    o.fine.channels = s.fine_channels - block.fine0;
    *dealt = SplitTiles(block.split);
    aim(left);
    if (left > 1) aim(left - 1);
  }
  __syncthreads();

  // The compiler would keep the tables' addresses beside the sums.
  auto table = [&](int at) { return reinterpret_cast<const uint2*>(shared + opaque(at)); };
  // The index-th copy of the tile with `tile` left.
  auto stage = [&](int tile, int index) {
    static_assert(sizeof(ProductOrigins) * 3 + 16 == ORIGINS_WORDS * 4, "the room for them");
    Raw* const to = reinterpret_cast<Raw*>(stages + (tile & 1) * s.stage_words);
    if (index < s.coarse_slots) {  // whole warps
      if (index >= s.coarse.total) return;
      copy_place<CoarseColumn, 4 * ELEMENTS>(
          s.coarse, table(s.coarse_table), to, origins[tile & 1].coarse,
          static_cast<int>(s.coarse_channel_stride),
          make_int3(s.coarse_d, s.coarse_h, s.coarse_w), 1, 1, index);
    } else {
      copy_place<FineColumn, COLUMN_ALIGN>(
          s.fine, table(s.fine_table), to + s.coarse_words * ELEMENTS, origins[tile & 1].fine,
          static_cast<int>(s.fine_channel_stride), make_int3(s.fine_d, s.fine_h, s.fine_w),
          s.plane_step, s.row_step, index - s.coarse_slots);
    }
  };

  // This lane's channels in a stage: g and g + 8 of each coarse tile, g of each fine tile; its quad
  // of a chunk is t.
  const int g = lane / 4, t = lane % 4;
  const int coarse_offset =
      (unit.m * M_TILES * PRODUCT_ROWS + g) * s.coarse_pitch + t * QUAD / ELEMENTS;
  const int tap_row = s.tap_rows * s.row_words;
  const int fine_offset =
      s.coarse_words + (unit.n * N_TILES * PRODUCT_COLUMNS + g) * s.fine_pitch +
      unit.d * s.tap_planes * s.rows * s.row_words + unit.h * TAPS_H * tap_row +
      column_word(unit.w * TAPS_W * TAP_COLUMNS, QUAD_COLUMNS, QUAD_PITCH, ELEMENTS);
  // Both in one register, as no word of shared memory lies beyond 2^16, and whether there is work.
  constexpr uint32_t NO_WORK = ~0u;
  const uint32_t offsets =
      active ? static_cast<uint32_t>(fine_offset) << 16 | coarse_offset : NO_WORK;

  Sums<M_TILES, N_TILES> sum = {};

  constexpr int TILE = 1;
  int until_store = s.tiles_per_store * TILE;
  int window = windows[part * CHUNK_QUADS + t];

#pragma unroll 1
  for (int copy = threadIdx.x; copy < s.slots; copy += blockDim.x) stage(left, copy);
  copy_commit();
  for (; left > 0; --left) {
    copy_wait<0>();
    __syncthreads();  // the tile has arrived, and nobody reads the other buffer or this tile's
                      // origin any more
    if (threadIdx.x == 0 && left > 2) aim(left - 2);
    const uint32_t* const staged = stages + (left & 1) * s.stage_words;
    const uint32_t* coarse_tile = staged + coarse_offset;
    const uint32_t* fine_tile = staged + fine_offset;
    for (int chunk = part;; chunk += s.parts) {
      // The next tile's copies are dealt to this one's chunks, beside whose products they go
      // unnoticed; what is left of them follows the last. Which are this chunk's follows from its
      // number: beside the sums there is no register to count them.
      if (left > 1) {
        const int step = s.rounds_per_chunk * s.units * WARP;
        int copy = opaque(threadIdx.x) + (chunk - part) * step;
        const int until = chunk < s.chunks ? min(copy + step * s.parts, s.slots) : s.slots;
#pragma unroll 1
        for (; copy < until; copy += blockDim.x) stage(left - 1, copy);
      }
      if (chunk >= s.chunks) break;
      if (PACKED_OFFSETS ? offsets != NO_WORK : active) {
        // The next chunk's comes in time; beside two sets of sums there is no register for it.
        const int at = window;
        window = windows[(chunk + s.parts) * CHUNK_QUADS + t];
        if constexpr (PACKED_OFFSETS) {
          const uint32_t both = opaque(static_cast<int>(offsets));
          coarse_tile = staged + (both & 0xffff), fine_tile = staged + (both >> 16);
        }
        accumulate<M_TILES, N_TILES>(
            coarse_tile + chunk * (CHUNK_QUADS * QUAD / ELEMENTS), opaque(8 * s.coarse_pitch),
            fine_tile + at, opaque(PRODUCT_COLUMNS * s.fine_pitch),
            opaque(tap_row), s.zero, sum);
      }
    }
    copy_commit();

    // The sums leave the registers now and then, and at the end: tensor cores truncate when they
    // add, and the loss grows with the length of a run.
    until_store -= TILE;
    if (until_store >= TILE && left > 1) continue;
    // Every warp stores its sums, also one beyond the channels or taps: they are zero, and nobody
    // reads them.
    const int self = opaque(threadIdx.x / WARP), kind = opaque(blockIdx.x) % s.blocks;
    const int split = opaque(blockIdx.x) / s.blocks;
    const int64_t slice = int64_t{split} * s.parts + self / s.units;
    float4* to = partial + ((slice * s.blocks + kind) * s.units + self % s.units) *
                               (M_TILES * N_TILES * TAPS_H * TAPS_W * WARP) + lane;
    const bool begun = split_tiles(s, split) - left >= s.tiles_per_store;
    store_sums<N_TILES * TAPS_H * TAPS_W * M_TILES>(to, &sum[0][0][0][0], begun);
    until_store = s.tiles_per_store * TILE;
  }
}

template <int M_TILES, int N_TILES>
ProductTraits traits(int coarse_wavefronts, int fine_wavefronts) {
  ProductTraits t = specified_traits();
  t.taps_h = TAPS_H, t.taps_w = TAPS_W, t.tap_blocks_h = TAP_BLOCKS_H,
  t.tap_blocks_w = TAP_BLOCKS_W;
  t.coarse_tile = M_TILES * PRODUCT_ROWS, t.fine_tile = N_TILES * PRODUCT_COLUMNS;
  t.fragments = M_TILES * N_TILES * TAPS_H * TAPS_W;
  t.products = t.fragments * PRODUCT_STEPS<Product> * (Product::SPLIT ? 3 : 1);
  t.warps = BLOCK_WARPS<M_TILES, N_TILES>;
  t.quad_columns = QUAD_COLUMNS, t.quad_pitch = QUAD_PITCH, t.window_columns = WINDOW_COLUMNS;
  t.tap_columns = TAP_COLUMNS, t.column_align = COLUMN_ALIGN;
  t.joins_w = false;
  t.coarse_residue = 16, t.fine_residue = 4;
  t.coarse_wavefronts = coarse_wavefronts, t.fine_wavefronts = fine_wavefronts;
  return t;
}

// A call's cut, and which of the compiled tiles it uses.
struct Plan {
  ProductShape shape;
  int tile, fragments;
  bool grouped;  // of those of wgrad_warpgroups_kernel
};

// The plan of a call on the current device.
int plan(const ConvgenCall& call, const DeviceLimits& limits, Plan& p) {
  const bool grouped = false;
  thread_local ShapeCache<Plan> cache;
  bool known;
  Plan& cached = cache.find(call, grouped, known);
  if (!known) {
    const int64_t* c = call.coarse_extent;
    const int64_t* f = call.fine_extent;
    ProductShape blank;
    blank.coarse_d = static_cast<int>(c[0]), blank.coarse_h = static_cast<int>(c[1]);
    blank.coarse_w = static_cast<int>(c[2]);
    blank.fine_d = static_cast<int>(f[0]), blank.fine_h = static_cast<int>(f[1]),
    blank.fine_w = static_cast<int>(f[2]);
    blank.coarse_channel_stride = c[0] * c[1] * c[2];
    blank.fine_channel_stride = f[0] * f[1] * f[2];
    blank.groups = GROUPS, blank.zero = 0;
    blank.coarse_channels = static_cast<int>(call.coarse_channels / GROUPS);
    blank.fine_channels = static_cast<int>(call.fine_channels / GROUPS);
    blank.coarse_sample = call.coarse_channels * blank.coarse_channel_stride;
    blank.fine_sample = call.fine_channels * blank.fine_channel_stride;
    blank.fine_elements = call.batch * blank.fine_sample;
    double least = -1;
    int error = CONVGEN_TOO_LARGE;
    auto consider = [&](int tile, const ProductTraits& t) {
      ProductShape cut = blank;
      double expected;
      const int refused =
          cut_products(cut, t, call.batch, limits, expected);
      if (refused || (least >= 0 && expected >= least)) return;
      error = CONVGEN_OK;
      least = expected;
      cached.shape = cut, cached.tile = tile, cached.fragments = t.fragments;
    };
    cached.grouped = grouped;
    consider(0, traits<1, 2>(8, 72));
    consider(1, traits<2, 1>(16, 36));
    if (error) {
      cache.forget(cached);
      return error;
    }
  }
  p = cached;
  return CONVGEN_OK;
}

// Runs KERNEL, and SUM over its partial results.
template <auto KERNEL, auto SUM>
int run(const ConvgenCall& call, const Plan& p) {
  const ProductShape& s = p.shape;
  const int device = static_cast<int>(call.device);
  float4* const partial = static_cast<float4*>(call.workspace);
  // Without positions, the sum over no splits is zero.
  const int slices = s.tiles > 0 ? s.splits * s.parts : 0;
  if (slices > 0) {
    if (const int error = launch<KERNEL>(
            dim3(s.blocks * s.splits), dim3(s.threads), s.shared_bytes, device, call.stream, s,
            static_cast<const T*>(call.coarse), static_cast<const T*>(call.fine), partial)) {
      return error;
    }
  }
  const dim3 grid(s.blocks * s.units * p.fragments), block(WARP * SUM_ROWS);
  T* const weight = static_cast<T*>(call.weight);
  const float4* const sums = partial;
  const Meeting<T> met = meeting_of<T>(call, GROUPS, MEETING);
  if (slices == 0) {
    return launch<SUM>(grid, block, 0, device, call.stream, s, met, weight, sums, slices);
  }
  return launch<SUM, true>(grid, block, 0, device, call.stream, s, met, weight, sums, slices);
}

}  // namespace

CONVGEN_EXPORT int64_t convgen_wgrad_tf32_workspace(const ConvgenCall* call) {
  DeviceLimits limits;
  Plan p;
  const DeviceScope scope(static_cast<int>(call->device));
  if (!volumes_fit(*call) || scope.error() != cudaSuccess ||
      device_limits(static_cast<int>(call->device), limits) != cudaSuccess) {
    return 0;
  }
  if (plan(*call, limits, p) != CONVGEN_OK) return 0;  // the call itself reports the error
  const ProductShape& s = p.shape;
  return int64_t{s.splits} * s.parts * s.blocks * s.units * p.fragments * WARP * sizeof(float4);
}

CONVGEN_EXPORT int convgen_wgrad_tf32(const ConvgenCall* call) {
  if ((COARSE_CHANNELS && call->coarse_channels != COARSE_CHANNELS) ||
      (FINE_CHANNELS && call->fine_channels != FINE_CHANNELS)) {
    return CONVGEN_BAD_CHANNELS;
  }
  if (!volumes_fit(*call)) return CONVGEN_TOO_LARGE;
  const DeviceScope scope(static_cast<int>(call->device));
  if (scope.error() != cudaSuccess) return scope.error();
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(static_cast<int>(call->device), limits)) return error;
  Plan p;
  if (const int error = plan(*call, limits, p)) return error;
  ProductShape& s = p.shape;
  s.coarse.access = access_within<T>(call->coarse, s.coarse.width);
  s.fine.access = access_within<T>(call->fine, s.fine.width);
  switch (p.tile) {
    case 0:
      return run<wgrad_kernel<1, 2>,
                 sum_products_kernel<false, 1, 2, TAPS_H, TAPS_W, T>>(*call, p);
    default:
      return run<wgrad_kernel<2, 1>,
                 sum_products_kernel<false, 2, 1, TAPS_H, TAPS_W, T>>(*call, p);
  }
}
