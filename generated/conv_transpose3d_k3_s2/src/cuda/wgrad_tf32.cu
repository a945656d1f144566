// wgrad of conv_transpose3d_k3_s2, float32.
// Written by convgen 0.1.0; regenerate with
//   convgen generate --kernel 3 --stride 2
// Schedule: {"flush": 0, "group_taps": [1, 3], "group_tiles": [[1, 4], [1, 6]], "taps_h": 3,
//   "taps_w": 3, "tiles": [[1, 2], [2, 1]]}
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

#include "mma_wgrad_groups.cuh"

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
  if constexpr (HAS_WGMMA) return;  // such devices run wgrad_groups_kernel
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

// ---- By wgmma, where there is such a thing --------------------------------------------------
//
// The roles are exchanged: fine channels are the rows (16 for each warp) of a product, from
// registers, and coarse channels its columns (N_BLOCKS x 8), which the tensor core reads from
// shared memory. A warp keeps M_TILES such tiles of fine channels at TAPS_H x TAPS_W taps. Four
// warps multiply together: each has fine channels and taps of its own, all have the same coarse
// channels and chunks. Other warps stage: the fine tensor by asynchronous copies as above, the
// coarse one likewise, 16-bit words where the tensor core reads them; those of TF32 they then put
// in order, rounded.

namespace groups {

constexpr int TAPS_H = 1, TAPS_W = 3;  // taps of one warp
constexpr int TAP_BLOCKS_H = 3, TAP_BLOCKS_W = 1;
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

// Whether lines may be loose: no asynchronous copy need divide them, and all columns are staged.
constexpr bool LOOSENS = sizeof(Raw) < COPY_BYTES && POSITION_COLUMNS * COLUMN_STEP == STRIDE_W;

template <int M_TILES, int N_BLOCKS>
constexpr int FRAGMENTS = M_TILES * TAPS_H * TAPS_W * N_BLOCKS;
template <int M_TILES, int N_BLOCKS>
constexpr bool FEW = 4 * FRAGMENTS<M_TILES, N_BLOCKS> +
                         M_TILES * TAPS_H * 4 * (2 * TAPS_W * PRODUCT_STEPS<Product> +
                                                 WINDOW_VECTORS * VECTOR) <=
                     FEW_MULTIPLYING_REGISTERS;
template <int M_TILES, int N_BLOCKS>
using Sums = float[M_TILES][TAPS_H][TAPS_W][N_BLOCKS][4];

// What a lane reads of a chunk's fine tensor.
template <int M_TILES>
using Windows = FineRows<Product, WINDOW_VECTORS, VECTOR>[M_TILES][TAPS_H];

// And of loose lines.
constexpr bool PAIRED = LOOSENS && COLUMN_STEP == 1 && POSITION_COLUMNS % 2 == 0;
template <int M_TILES>
using LooseWindows =
    std::conditional_t<PAIRED, LooseRows<SHIFT, TAPS_W, TAP_COLUMNS, POSITION_COLUMNS>,
                       FineRows<Product, WINDOW_VECTORS, VECTOR>>[M_TILES][TAPS_H];

// `fine` is this lane's window of the first row of taps; `half_rows` is 8 fine channels, `tap_row`
// one row of taps.
template <int M_TILES>
__device__ __forceinline__ void load_windows(Windows<M_TILES>& x, const uint32_t* fine,
                                             int half_rows, int tap_row) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int h = 0; h < TAPS_H; ++h) {
      x[m][h].template load<QUAD_COLUMNS, QUAD_PITCH>(fine + 2 * m * half_rows + h * tap_row,
                                                      half_rows);
    }
  }
}

// The same from loose lines: `at` is how far the window's first tap lies behind `fine`, and from
// LOOSE_SHIFT on what its place within a granule adds; `tap_row` is both, too.
template <int M_TILES>
__device__ __forceinline__ void load_loose_windows(LooseWindows<M_TILES>& x, const uint32_t* fine,
                                                   uint32_t at, int half_rows, uint32_t tap_row) {
#pragma unroll
  for (int h = 0; h < TAPS_H; ++h) {
    const uint32_t of_row = at + h * tap_row;
    const uint32_t bytes = (of_row & ((1u << LOOSE_SHIFT) - 1)) + (of_row >> LOOSE_SHIFT);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      if constexpr (PAIRED) {
        x[m][h].load(fine + 2 * m * half_rows, bytes, half_rows);
      } else {
        x[m][h].template load_loose<FineColumn, SHIFT, TAPS_W, TAP_COLUMNS, POSITION_COLUMNS,
                                    COLUMN_STEP>(fine + 2 * m * half_rows, bytes, half_rows);
      }
    }
  }
}

// Starts the products of one chunk.
template <int M_TILES, int N_BLOCKS, class Rows>
__device__ __forceinline__ void multiply(const Rows (&x)[M_TILES][TAPS_H], SharedColumns<1> coarse,
                                         Sums<M_TILES, N_BLOCKS>& sum) {
  // All operands first: between products there is no place for what makes them.
  constexpr int STEPS = PRODUCT_STEPS<Product>;
  uint32_t a[STEPS][M_TILES][TAPS_H][TAPS_W][4];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int h = 0; h < TAPS_H; ++h) {
        // tap (h0 + h, w0 + 0)
        x[m][h].template find<POSITION_COLUMNS>(a[step][m][h][0], step,
                                                SHIFT + 0 * TAP_COLUMNS);
        // tap (h0 + h, w0 + 1)
        x[m][h].template find<POSITION_COLUMNS>(a[step][m][h][1], step,
                                                SHIFT + 1 * TAP_COLUMNS);
        // tap (h0 + h, w0 + 2)
        x[m][h].template find<POSITION_COLUMNS>(a[step][m][h][2], step,
                                                SHIFT + 2 * TAP_COLUMNS);
#pragma unroll
        for (int i = 0; i < TAPS_W * 4; ++i) wgmma_settle(a[step][m][h][i / 4][i % 4]);
      }
    }
  }
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int h = 0; h < TAPS_H; ++h) {
#pragma unroll
        for (int w = 0; w < TAPS_W; ++w) {
          Product::multiply_group(sum[m][h][w], a[step][m][h][w],
                                  coarse + step * N_BLOCKS * COLUMNS_WORDS);
        }
      }
    }
  }
  wgmma_commit();
}

template <int M_TILES, int N_BLOCKS>
__global__ void __launch_bounds__(GROUP_BOUND<FEW<M_TILES, N_BLOCKS>>, 1)
    wgrad_groups_kernel(const ProductShape s, const T* coarse, const T* fine, float4* partial) {
  if constexpr (HAS_WGMMA) {
    constexpr int ELEMENTS = Product::ELEMENTS, COARSE = N_BLOCKS * PRODUCT_COLUMNS;
    constexpr int CHUNK = CHUNK_WORDS<Product, N_BLOCKS>, SUMS = FRAGMENTS<M_TILES, N_BLOCKS>;
    constexpr bool FEW_NEEDED = FEW<M_TILES, N_BLOCKS>;
    constexpr int STAGING = STAGING_WARPS<FEW_NEEDED>;
    uint32_t* const shared = dynamic_shared<uint32_t>();
    uint32_t* const windows = shared + ORIGINS_WORDS;  // by quad of a tile
    uint2* const coarse_table = reinterpret_cast<uint2*>(shared + s.coarse_table);
    uint2* const fine_table = reinterpret_cast<uint2*>(shared + s.fine_table);
    uint32_t* const stages = shared + s.stages;

    uint32_t* const tile_shift = shared;  // of loose lines, by buffer
    if (LOOSENS && s.loose) {
      fill_loose_windows<Raw, STRIDE_D, STRIDE_H, STRIDE_W>(s, windows);
      fill_granule_table<Raw>(s, fine_table);
    } else {
      fill_windows<QUAD_PITCH>(s, windows);
      fill_fine_table<QUAD_COLUMNS, QUAD_PITCH, ELEMENTS>(s, fine_table);
    }
    fill_quad_table(s, coarse_table);
    begin_releases<PRODUCT_STAGES>(shared + EMPTIES, s.unit_warps * s.parts * WARP);
    begin_releases<PRODUCT_STAGES>(shared + FILLS, STAGING * WARP);
    __syncthreads();

    const ProductBlock block =
        locate_products<COARSE, M_TILES * PRODUCT_ROWS, TAPS_H, TAPS_W>(s, blockIdx.x);
    const int tiles = split_tiles(s, block.split);
    const int meeting = blockDim.x;

    if (static_cast<int>(threadIdx.x) >= s.unit_warps * s.parts * WARP) {
      release_registers<STAGING_REGISTERS<FEW_NEEDED>>();
      const int thread = threadIdx.x - s.unit_warps * s.parts * WARP;
      const int staging_warp = __shfl_sync(0xffffffffu, thread / WARP, 0), lane = thread % WARP;
      const T* const fine_block =
          fine + (int64_t{block.group} * s.fine_channels + block.fine0) * s.fine_channel_stride;
      const T* const coarse_block =
          coarse +
          (int64_t{block.group} * s.coarse_channels + block.coarse0) * s.coarse_channel_stride;
      auto find_tile = [&](int index) {
        const ProductTile at = locate_product_tile(s, index);
        StagedTile tile;
        tile.fine.channel = fine_block + at.n * s.fine_sample;
        tile.fine.d = at.d0 * STRIDE_D + block.tap_d * DILATION_D - PADDING_D;
        tile.fine.h = at.h0 * STRIDE_H + block.tap_h * DILATION_H - PADDING_H;
        tile.fine.w = at.w0 * STRIDE_W + block.tap_w * DILATION_W - PADDING_W;
        tile.fine.channels = s.fine_channels - block.fine0;
        tile.coarse.channel = coarse_block + at.n * s.coarse_sample;
        tile.coarse.d = at.d0, tile.coarse.h = at.h0, tile.coarse.w = at.w0;
        tile.coarse.channels = s.coarse_channels - block.coarse0;
        find_quads<Product, N_BLOCKS>(s, tile);
        if (LOOSENS && s.loose) {
          find_lines(s, tile, reinterpret_cast<const Raw*>(fine));
        } else {
          tile.fine.w -= SHIFT;
          tile.first_line = 0, tile.lines = 0;
        }
        return tile;
      };
      SplitTiles dealt(block.split);
      StagedTile tile = find_tile(dealt.tile());
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        const int buffer = i % PRODUCT_STAGES;
        if (i >= PRODUCT_STAGES) {
          await_release<PRODUCT_EMPTY>(shared + EMPTIES, buffer, i / PRODUCT_STAGES, meeting);
        }
        uint32_t* const stage = stages + buffer * s.stage_words;
        uint32_t* const fine_stage = stage + s.coarse_words;
        if (LOOSENS && s.loose) {
          copy_granules<STAGING>(s, staging_warp, lane, fine_table, fine_stage, tile,
                        reinterpret_cast<const Raw*>(fine));
          if (thread == 0) tile_shift[buffer] = loose_shift(tile.first_line);
        } else {
#pragma unroll 1
          for (int copy = thread; copy < s.fine.total; copy += STAGING * WARP) {
            copy_place<FineColumn, COLUMN_ALIGN>(
                s.fine, fine_table, reinterpret_cast<Raw*>(fine_stage), tile.fine,
                static_cast<int>(s.fine_channel_stride), make_int3(s.fine_d, s.fine_h, s.fine_w),
                s.plane_step, s.row_step, copy);
          }
        }
        // Words that are copied to their places have two elements.
        constexpr bool IN_PLACE = CoarseRows<Product, N_BLOCKS>::IN_PLACE;
        const int access = IN_PLACE ? min(s.coarse.access, 2) : s.coarse.access;
        if (access == 4) {
          copy_coarse<STAGING, Product, N_BLOCKS, 4>(s, staging_warp, lane, coarse_table, stage,
                                                     tile);
        } else if (access == 2) {
          copy_coarse<STAGING, Product, N_BLOCKS, 2>(s, staging_warp, lane, coarse_table, stage,
                                                     tile);
        } else {
          copy_coarse<STAGING, Product, N_BLOCKS, 1>(s, staging_warp, lane, coarse_table, stage,
                                                     tile);
        }
        copy_commit();
        dealt.advance(s);
        StagedTile next = find_tile(min(dealt.tile(), s.tiles - 1));  // the last one has no next
        next.settle();
        copy_wait<0>();
        // What follows touches what others have copied.
        const bool clears = LOOSENS && s.loose && reaches_beside(s, tile.fine);
        if (!IN_PLACE || clears) named_barrier_sync(PRODUCT_COPIED, STAGING * WARP);
        if constexpr (!IN_PLACE) arrange_coarse<STAGING, Product, N_BLOCKS>(s, thread, stage);
        if (clears) {
          clear_beside_lines<STAGING, Raw>(s, thread, fine_table, fine_stage, tile.fine,
                                           tile.first_line);
        }
        bulk_fence();  // wgmma reads by the way of bulk copies
        release_buffer<PRODUCT_FULL>(shared + FILLS, buffer, meeting);
        tile = next;
      }
      // Meet the last arrivals, so that every one is answered.
      for (int i = max(tiles - PRODUCT_STAGES, 0); i < tiles; ++i) {
        await_release<PRODUCT_EMPTY>(shared + EMPTIES, i % PRODUCT_STAGES,
                                     i / PRODUCT_STAGES + 1, meeting);
      }
      return;
    }

    claim_registers<MULTIPLYING_REGISTERS<FEW_NEEDED>>();
    const int lane = threadIdx.x % WARP;
    // By a shuffle, which tells the compiler that lanes agree: tensor cores take addresses from
    // registers that a warp has once, and what each lane finds for itself is moved there for every
    // product.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    const int part = warp / s.unit_warps;
    // A group's warps without a unit do what the last one does, and nobody reads it.
    const ProductUnit unit = locate_unit(s, min(warp % s.unit_warps, s.units - 1));
    // This lane's channels are g and g + 8 of each tile, its quad of a chunk is t.
    const int g = lane / 4, t = lane % 4;
    const int tap_row = s.tap_rows * s.row_words;
    const int fine_offset =
        s.coarse_words + (unit.n * M_TILES * PRODUCT_ROWS + g) * s.fine_pitch +
        unit.d * s.tap_planes * s.rows * s.row_words + unit.h * TAPS_H * tap_row +
        (LOOSENS && s.loose
             ? 0
             : column_word(unit.w * TAPS_W * TAP_COLUMNS, QUAD_COLUMNS, QUAD_PITCH, ELEMENTS));
    // Of loose lines: where a unit's taps begin, and from LOOSE_SHIFT on how far within a granule
    // its lines lie, compared with the block's first. The same of a row of taps.
    const int64_t unit_elements =
        (int64_t{unit.d} * DILATION_D * s.fine_h + unit.h * TAPS_H * DILATION_H) * s.fine_w +
        s.fine_channel_stride * (unit.n * M_TILES * PRODUCT_ROWS + g);
    const uint32_t unit_place = unit.w * TAPS_W * DILATION_W * uint32_t{sizeof(Raw)} +
                                loose_shift(unit_elements * int64_t{sizeof(Raw)});
    const uint32_t loose_row =
        tap_row * 4 + loose_shift(int64_t{DILATION_H} * s.fine_w * int64_t{sizeof(Raw)});

    Sums<M_TILES, N_BLOCKS> sum = {};
    int until_store = s.tiles_per_store;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int buffer = i % PRODUCT_STAGES;
      await_release<PRODUCT_FULL>(shared + FILLS, buffer, i / PRODUCT_STAGES + 1, meeting);
      const uint32_t* const stage = stages + buffer * s.stage_words;
      const uint32_t* const fine_tile = stage + fine_offset;
      auto multiply_tile = [&](auto is_loose) {
        // Beside few sums the next chunk's windows are loaded before this one's products begin.
        constexpr int AHEAD = FEW_NEEDED ? 1 : 0;
        std::conditional_t<is_loose.value, LooseWindows<M_TILES>, Windows<M_TILES>> x[1 + AHEAD];
        // Of loose lines the place that all chunks add, from the start of shared memory on.
        const uint32_t place =
            is_loose.value ? unit_place + tile_shift[buffer] +
                                 static_cast<uint32_t>(fine_tile - shared) * 4
                           : 0;
        // Where a chunk's quad lies; the next one's comes in time, from a table that has one more.
        const uint32_t* const own = windows + opaque(t);
        uint32_t window = own[part * CHUNK_QUADS];
        const SharedColumns<1> columns(stage);
        auto load = [&](int chunk, int into) {
          const uint32_t at = window;
          window = own[(chunk + s.parts) * CHUNK_QUADS];
          const int half_rows = opaque(PRODUCT_COLUMNS * s.fine_pitch);
          if constexpr (is_loose.value) {
            load_loose_windows<M_TILES>(x[into], shared, at + place, half_rows, loose_row);
          } else {
            load_windows<M_TILES>(x[into], fine_tile + at, half_rows, opaque(tap_row));
          }
        };
        auto begin = [&](int chunk, int from) {
          multiply<M_TILES, N_BLOCKS>(x[from], columns + chunk * CHUNK, sum);
        };
        // A chunk's products go on while the next one's windows are loaded, where registers hold
        // both. ptxas keeps those that products read only where no loop's end lies between these
        // and their wait, so that a run of chunks ends with all products done.
        int chunk = part;
        if constexpr (OVERLAPS<Product, M_TILES * TAPS_H * TAPS_W, N_BLOCKS,
                               TAP_COLUMNS == POSITION_COLUMNS>) {
#pragma unroll 1
          for (; chunk + (RUN - 1) * s.parts < s.chunks; chunk += s.parts) {
            if constexpr (AHEAD > 0) load(chunk, 0);
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
              if (AHEAD == 0) load(chunk, 0);
              if (AHEAD > 0 && i + 1 < RUN) load(chunk + s.parts, (i + 1) % 2 * AHEAD);
              begin(chunk, i % 2 * AHEAD);
              if (i + 1 < RUN) {
                wgmma_wait<1>();
                chunk += s.parts;
              }
            }
            wgmma_wait<0>();
          }
        }
#pragma unroll 1
        for (; chunk < s.chunks; chunk += s.parts) {
          load(chunk, 0);
          begin(chunk, 0);
          wgmma_wait<0>();
        }
      };
      // Two loops rather than a branch in one: there is none between products and their wait.
      if (LOOSENS && s.loose) {
        multiply_tile(std::bool_constant<LOOSENS>());
      } else {
        multiply_tile(std::false_type());
      }
      release_buffer<PRODUCT_EMPTY>(shared + EMPTIES, buffer, meeting);

      // The sums leave the registers now and then, and at the end: tensor cores truncate when they
      // add, and the loss grows with the length of a run.
      if (--until_store > 0 && i + 1 < tiles) continue;
      float(*const sums)[4] = &sum[0][0][0][0];
#pragma unroll
      for (int j = 0; j < SUMS * 4; ++j) wgmma_settle(sums[j / 4][j % 4]);
      // Found anew: beside the sums there are no registers to keep it.
      const int self = opaque(threadIdx.x / WARP), own = self % s.unit_warps;
      const int kind = opaque(blockIdx.x) % s.blocks, split = opaque(blockIdx.x) / s.blocks;
      const int64_t slice = int64_t{split} * s.parts + self / s.unit_warps;
      float4* const to = partial +
                         ((slice * s.blocks + kind) * s.units + own) * (SUMS * WARP) +
                         opaque(threadIdx.x) % WARP;
      if (own < s.units) store_sums<SUMS>(to, sums, i + 1 > s.tiles_per_store);
      until_store = s.tiles_per_store;
    }
  }
}

template <int M_TILES, int N_BLOCKS>
ProductTraits traits(int fine_wavefronts, int loose_loads) {
  ProductTraits t = specified_traits();
  t.taps_h = TAPS_H, t.taps_w = TAPS_W, t.tap_blocks_h = TAP_BLOCKS_H,
  t.tap_blocks_w = TAP_BLOCKS_W;
  t.coarse_tile = N_BLOCKS * PRODUCT_COLUMNS, t.fine_tile = M_TILES * PRODUCT_ROWS;
  t.fragments = FRAGMENTS<M_TILES, N_BLOCKS>;
  t.products = M_TILES * TAPS_H * TAPS_W * PRODUCT_STEPS<Product>;
  t.warps = GROUPS_OF_WARPS * GROUP_WARPS, t.group_warps = GROUP_WARPS;
  t.staging_warps = STAGING_WARPS<FEW<M_TILES, N_BLOCKS>>;
  t.quad_columns = QUAD_COLUMNS, t.quad_pitch = QUAD_PITCH, t.window_columns = WINDOW_COLUMNS;
  t.tap_columns = TAP_COLUMNS, t.column_align = COLUMN_ALIGN;
  t.joins_w = false;
  t.loosens = LOOSENS;
  t.coarse_residue = 0, t.fine_residue = 4;
  t.coarse_wavefronts = 0, t.fine_wavefronts = fine_wavefronts;
  t.loose_loads = loose_loads;
  return t;
}

}  // namespace groups

// A call's cut, and which of the compiled tiles it uses.
struct Plan {
  ProductShape shape;
  int tile, fragments;
  bool grouped;  // of those of wgrad_groups_kernel
};

// The plan of a call on the current device.
int plan(const ConvgenCall& call, const DeviceLimits& limits, Plan& p) {
  constexpr bool FEW = groups::FEW<1, 4>;
  int bound = 0;
  if (const cudaError_t error =
          launch_bound<groups::wgrad_groups_kernel<1, 4>, GROUP_BOUND<FEW>>(
              static_cast<int>(call.device), bound)) {
    return error;
  }
  const bool grouped = bound == GROUP_THREADS<FEW>;
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
          cut_products(cut, t, call.batch, limits.multiprocessors, limits.shared_bytes, expected);
      if (refused || (least >= 0 && expected >= least)) return;
      error = CONVGEN_OK;
      least = expected;
      cached.shape = cut, cached.tile = tile, cached.fragments = t.fragments;
    };
    cached.grouped = grouped;
    if (grouped) {
      consider(0, groups::traits<1, 4>(24, 10));
      consider(1, groups::traits<1, 6>(24, 10));
    } else {
      consider(0, traits<1, 2>(8, 72));
      consider(1, traits<2, 1>(16, 36));
    }
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
  if (slices == 0) {
    return launch<SUM>(grid, block, 0, device, call.stream, s, KERNEL_D, KERNEL_H, KERNEL_W, weight,
                       sums, slices);
  }
  return launch<SUM, true>(grid, block, 0, device, call.stream, s, KERNEL_D, KERNEL_H, KERNEL_W,
                           weight, sums, slices);
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
  if (p.grouped) {
    switch (p.tile) {
      case 0:
        return run<groups::wgrad_groups_kernel<1, 4>,
                   sum_products_kernel<true, 4, 1, groups::TAPS_H, groups::TAPS_W, T>>(*call, p);
      default:
        return run<groups::wgrad_groups_kernel<1, 6>,
                   sum_products_kernel<true, 6, 1, groups::TAPS_H, groups::TAPS_W, T>>(*call, p);
    }
  }
  switch (p.tile) {
    case 0:
      return run<wgrad_kernel<1, 2>,
                 sum_products_kernel<false, 1, 2, TAPS_H, TAPS_W, T>>(*call, p);
    default:
      return run<wgrad_kernel<2, 1>,
                 sum_products_kernel<false, 2, 1, TAPS_H, TAPS_W, T>>(*call, p);
  }
}
