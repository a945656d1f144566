// The part of the mma engine's wgrad that does not depend on the specification.
#pragma once

#include "common.cuh"
#include "mma.cuh"

namespace convgen {

constexpr int QUAD = 4;        // neighbouring positions along W that one lane feeds to a product
constexpr int CHUNK_QUADS = 4;  // quads of one chunk: one for each lane of a row of a product
constexpr int PRODUCT_ROWS = 16, PRODUCT_COLUMNS = 8;

constexpr int PRODUCT_WARPS = 12;  // of a block, at most; 168 registers a thread
constexpr int PRODUCT_STAGES = 2;
constexpr int ORIGINS_WORDS = 24;  // of shared memory: see ProductOrigins
constexpr int COPY_CHANNELS = 4;  // channels that a thread copies at one place of a tile
constexpr int CHUNKS_PER_STORE = 512;  // about 1024 additions: 3e-5 of a sum, if all are truncated
constexpr int PRODUCT_MAX_SPLITS = 1024;
constexpr int64_t PRODUCT_WORKSPACE_LIMIT = int64_t{256} << 20;  // bytes, unless one split needs more

// ---- A call, cut into thread blocks ---------------------------------------------------------

// How one tensor's part of a tile is copied: `width` neighbouring elements at each of some places
// (a table in shared memory lists them), COPY_CHANNELS channels at a time.
struct ProductCopies {
  int places;
  Divisor by_places;
  int total;  // places x blocks of channels
  int width;  // elements at a place, by the tensor's extents
  int access;  // elements per access, by the tensor's address too: divides `width`
  int pitch;  // elements between channels in shared memory
};

struct ProductShape {
  int coarse_d, coarse_h, coarse_w;
  int fine_d, fine_h, fine_w;
  int64_t coarse_channel_stride, fine_channel_stride;  // elements
  int coarse_channels, fine_channels;                  // per group
  int groups;

  // A block's warps: units (coarse tiles x fine tiles x blocks of taps along W, H and D) times
  // `parts`, which share the chunks of a tile and have a partial result each.
  int units_m, units_n, units_w, units_h, units_d, units, parts;
  Divisor blocks_m, blocks_n, blocks_w, blocks_h, blocks_d;
  int blocks, threads;

  // Positions are walked in tiles of tile_d x tile_h x tile_w within one sample, dealt to `splits`
  // blocks in contiguous runs.
  int tile_d, tile_h, tile_w, chunks;
  Divisor tiles_w, tiles_h, tiles_d;
  int tiles, splits, tiles_per_split;
  int tiles_per_store;  // after which a warp adds its sums to its partial results

  // Shared memory, in words: the origins of two tiles, the table of quads, the two tables of places,
  // then the stages, each
  //   coarse [channel][tile_d][tile_h][tile_w], fine [channel][plane][row][column].
  // Staged planes lie plane_step apart in the fine tensor, rows row_step.
  int planes, rows, columns, plane_step, row_step;
  int position_planes, position_rows;  // staged planes and rows from position to position
  int tap_planes, tap_rows;            // and from tap to tap
  int row_words, coarse_pitch, fine_pitch;
  int coarse_table, fine_table, stages, coarse_words, stage_words;
  int rounds, rounds_per_chunk;  // of copies, by all threads
  int shared_bytes;
  ProductCopies coarse, fine;
};

// What the specification and the schedule say; lengths along W in staged columns (see the kernel).
struct ProductTraits {
  int kernel_d, kernel_h;
  int stride_d, stride_h, stride_w, dilation_d, dilation_h;
  int taps_h, taps_w, tap_blocks_h, tap_blocks_w;
  int m_tiles, n_tiles, products;  // products per chunk and warp
  int element_bytes;
  int quad_columns, quad_pitch, window_columns, tap_columns, column_align;
  bool joins_w;  // whether a block may own several blocks of taps along W
  int coarse_residue, fine_residue;      // of the channel pitches, mod 32 words
  int coarse_wavefronts, fine_wavefronts;  // of shared memory, per chunk and warp
};

// Word of a row at which a staged column lies.
__host__ __device__ constexpr int column_word(int column, int quad_columns, int quad_pitch, int elements) {
  return column / quad_columns * quad_pitch + column % quad_columns / elements;
}

constexpr int64_t greatest_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_divisor(b, a % b);
}

// What a run of `positions` positions and `taps` taps touches along D or H: `count` planes or rows,
// `step` apart.
struct ProductSpan {
  int64_t count, step, position, tap;

  ProductSpan(int64_t positions, int64_t taps, int64_t stride, int64_t dilation)
      : step(positions == 1 ? dilation : taps == 1 ? stride : greatest_divisor(stride, dilation)),
        position(stride / step),
        tap(dilation / step) {
    count = (positions - 1) * position + (taps - 1) * tap + 1;
  }
};

// Widest access to rows of `row` elements (4, 2 or 1 of them, at most 16 bytes).
inline int row_width(int64_t row, int most) {
  int width = most;
  while (width > 1 && row % width != 0) width /= 2;
  return width;
}

// Widest access within `width` elements that an address allows.
template <typename T>
int access_within(const void* address, int width) {
  while (width > 1 && reinterpret_cast<uintptr_t>(address) % (width * sizeof(T)) != 0) width /= 2;
  return width;
}

// How one cut is expected to do, in clocks of a multiprocessor.
struct ProductCost {
  double tile;   // one tile of all blocks on a multiprocessor
  double total;  // the whole call
  int64_t resident;  // blocks on a multiprocessor
};

// The numbers of a cut that its cost depends on.
struct ProductCut {
  int64_t m, n, w, h, d, parts;         // units and parts
  int64_t tile_d, tile_h, quads;        // positions
};

constexpr double PRODUCT_CLOCKS = 1.5;     // of a multiprocessor with all four quarters at work
constexpr double LEVEL2_BYTES = 28;        // per clock and multiprocessor
constexpr double TILE_CLOCKS = 300;        // barrier, first loads, last products

// Shared memory of a cut, in words; fills in what depends on the tile alone.
inline int64_t lay_out(ProductShape& s, const ProductTraits& t, const ProductCut& cut) {
  const int elements = 4 / t.element_bytes;
  const ProductSpan d(cut.tile_d, cut.d, t.stride_d, t.dilation_d);
  const ProductSpan h(cut.tile_h, cut.h * t.taps_h, t.stride_h, t.dilation_h);
  const int64_t columns = (cut.quads - 1) * t.quad_columns +
                          (cut.w - 1) * t.taps_w * t.tap_columns + t.window_columns;
  // A copy's table packs these, and computes with 32 bits.
  if (d.count >= 1 << 12 || h.count >= 1 << 16 || columns >= 1 << 16) return INDEX_LIMIT;
  if (d.count * d.step >= 1 << 30 || h.count * h.step >= 1 << 30) return INDEX_LIMIT;
  const int64_t last = columns - elements;
  const int64_t row_words =
      column_word(static_cast<int>(last), t.quad_columns, t.quad_pitch, elements) + 1;
  const int64_t chunks = ceil_div(cut.tile_d * cut.tile_h * cut.quads, CHUNK_QUADS);
  auto pitch = [](int64_t words, int residue) {
    return words + ((residue - words) % WARP + WARP) % WARP;
  };
  const int64_t coarse_pitch = pitch(chunks * CHUNK_QUADS * QUAD / elements, t.coarse_residue);
  const int64_t fine_pitch = pitch(d.count * h.count * row_words, t.fine_residue);
  const int64_t coarse_words = cut.m * t.m_tiles * PRODUCT_ROWS * coarse_pitch;
  const int64_t fine_words = cut.n * t.n_tiles * PRODUCT_COLUMNS * fine_pitch;
  const int coarse_width =
      row_width(s.coarse_w, cut.quads % 2 == 0 ? 16 / t.element_bytes : QUAD);
  const int fine_width = row_width(s.fine_w, t.column_align);
  const int64_t coarse_places = cut.tile_d * cut.tile_h * cut.quads * QUAD / coarse_width;
  const int64_t fine_places = d.count * h.count * columns / fine_width;
  const int64_t coarse_table = ORIGINS_WORDS + chunks * CHUNK_QUADS;
  const int64_t fine_table = coarse_table + 2 * coarse_places;
  const int64_t stages = round_up(fine_table + 2 * fine_places, 4);
  const int64_t words = stages + PRODUCT_STAGES * (coarse_words + fine_words);
  if (words >= 1 << 19) return INDEX_LIMIT;

  s.tile_d = static_cast<int>(cut.tile_d), s.tile_h = static_cast<int>(cut.tile_h);
  s.tile_w = static_cast<int>(cut.quads * QUAD), s.chunks = static_cast<int>(chunks);
  s.planes = static_cast<int>(d.count), s.plane_step = static_cast<int>(d.step);
  s.position_planes = static_cast<int>(d.position), s.tap_planes = static_cast<int>(d.tap);
  s.rows = static_cast<int>(h.count), s.row_step = static_cast<int>(h.step);
  s.position_rows = static_cast<int>(h.position), s.tap_rows = static_cast<int>(h.tap);
  s.columns = static_cast<int>(columns), s.row_words = static_cast<int>(row_words);
  s.coarse_pitch = static_cast<int>(coarse_pitch), s.fine_pitch = static_cast<int>(fine_pitch);
  s.coarse_table = static_cast<int>(coarse_table), s.fine_table = static_cast<int>(fine_table);
  s.stages = static_cast<int>(stages);
  s.coarse_words = static_cast<int>(coarse_words);
  s.stage_words = static_cast<int>(coarse_words + fine_words);
  s.shared_bytes = static_cast<int>(words * 4);
  s.coarse.width = coarse_width, s.fine.width = fine_width;
  s.coarse.pitch = s.coarse_pitch * elements, s.fine.pitch = s.fine_pitch * elements;
  s.coarse.places = static_cast<int>(coarse_places), s.fine.places = static_cast<int>(fine_places);
  s.coarse.total = static_cast<int>(coarse_places * cut.m * t.m_tiles * PRODUCT_ROWS / COPY_CHANNELS);
  s.fine.total = static_cast<int>(fine_places * cut.n * t.n_tiles * PRODUCT_COLUMNS / COPY_CHANNELS);
  return words;
}

inline int64_t count_blocks(const ProductShape& s, const ProductTraits& t, const ProductCut& cut) {
  return ceil_div(ceil_div(s.coarse_channels, t.m_tiles * PRODUCT_ROWS), cut.m) *
         ceil_div(ceil_div(s.fine_channels, t.n_tiles * PRODUCT_COLUMNS), cut.n) *
         ceil_div(t.tap_blocks_w, cut.w) * ceil_div(t.tap_blocks_h, cut.h) *
         ceil_div(t.kernel_d, cut.d) * s.groups;
}

inline int64_t count_tiles(const ProductShape& s, const ProductCut& cut, int64_t batch) {
  return ceil_div(s.coarse_w, cut.quads * QUAD) * ceil_div(s.coarse_h, cut.tile_h) *
         ceil_div(s.coarse_d, cut.tile_d) * batch;
}

// Clocks that summing one split's (or part's) partial results adds.
inline double reduction_clocks(const ProductTraits& t, int64_t blocks, const ProductCut& cut,
                               int multiprocessors) {
  const double units = double(cut.m) * cut.n * cut.w * cut.h * cut.d;
  const double bytes = 512.0 * t.m_tiles * t.n_tiles * t.taps_h * t.taps_w * units * blocks;
  return 2 * bytes / (LEVEL2_BYTES * multiprocessors);
}

// Expected time of a cut that lay_out() has laid out in `words` words.
inline ProductCost cost_of(const ProductShape& s, const ProductTraits& t, const ProductCut& cut,
                           int64_t words, int64_t batch, int multiprocessors, int shared_limit) {
  const int64_t units = cut.m * cut.n * cut.w * cut.h * cut.d, warps = units * cut.parts;
  ProductCost cost;
  cost.resident = PRODUCT_WARPS / warps;
  // A block's own 1 KiB; the limit of one block is the multiprocessor's less that.
  const int64_t fit = (int64_t{shared_limit} + 1024) / (words * 4 + 1024);
  if (cost.resident > fit) cost.resident = fit;
  if (cost.resident < 1) cost.resident = 1;
  const double resident = double(cost.resident);
  const double chunks = double(ceil_div(s.chunks, cut.parts));
  const double products = double(ceil_div(cost.resident * warps, 4)) * 4 * chunks * t.products *
                          PRODUCT_CLOCKS;
  const double copies = double(s.coarse.total) + s.fine.total;  // of COPY_CHANNELS accesses
  const double shared = resident * (warps * chunks * (t.coarse_wavefronts + t.fine_wavefronts) +
                                    s.stage_words / 32.0 + copies * COPY_CHANNELS / 32.0);
  // About 20 instructions to find a place, 4 to copy one channel, four schedulers.
  const double issue = resident * (copies / 32 * (20 + 4 * COPY_CHANNELS) / 4 +
                                   warps * chunks * t.products * 3.4 / 4);
  const double level2 = resident * s.stage_words * 4 / LEVEL2_BYTES;
  double most = products > shared ? products : shared;
  if (issue > most) most = issue;
  if (level2 > most) most = level2;
  // Few warps hide little of each other's waiting.
  const double idle = resident * warps < 8 ? 8 / (resident * warps) : 1;
  cost.tile = most * idle + 0.15 * (products + shared + issue + level2 - most) + TILE_CLOCKS;
  const int64_t blocks = count_blocks(s, t, cut), tiles = count_tiles(s, cut, batch);
  const double slots = resident * multiprocessors;
  double waves = double(blocks) * tiles / slots;
  if (waves < 1) waves = 1;
  double splits = slots / blocks;
  if (splits > tiles) splits = double(tiles);
  if (splits < 1) splits = 1;
  cost.total = waves * cost.tile +
               splits * cut.parts * reduction_clocks(t, blocks, cut, multiprocessors);
  return cost;
}

// Chooses who computes what: of all cuts that fit, the one expected to be fastest.
inline int cut_products(ProductShape& s, const ProductTraits& t, int64_t batch, int multiprocessors,
                        int shared_limit, double& expected) {
  const int64_t tiles_m = ceil_div(s.coarse_channels, t.m_tiles * PRODUCT_ROWS);
  const int64_t tiles_n = ceil_div(s.fine_channels, t.n_tiles * PRODUCT_COLUMNS);
  // A count that leaves the last block emptier than a smaller one would is not tried.
  auto even = [](int64_t total, int64_t count) {
    return count <= total && ceil_div(total, ceil_div(total, count)) == count;
  };
  ProductCut best = {};
  ProductCost best_cost = {0, -1, 0};
  ProductShape trial = s;

  ProductCut cut;
  auto consider = [&] {
    const int64_t words = lay_out(trial, t, cut);
    if (words * 4 > shared_limit) return false;
    const ProductCost cost = cost_of(trial, t, cut, words, batch, multiprocessors, shared_limit);
    if (best_cost.total < 0 || cost.total < best_cost.total) best_cost = cost, best = cut;
    return true;
  };
  auto consider_tiles = [&] {
    const int64_t row_quads = ceil_div(s.coarse_w, QUAD);
    // Lines of 128 positions, or 64, or 32 and so on; even ones.
    int64_t last = 0;
    for (int64_t most = 32; last != 1 && most >= 4; most /= 2) {
      cut.quads = ceil_div(row_quads, ceil_div(row_quads, most));
      if (cut.quads == last) continue;
      last = cut.quads;
      for (cut.tile_h = 1; cut.tile_h <= s.coarse_h; cut.tile_h += cut.tile_h < 4 ? 1 : 2) {
        cut.tile_d = 1;
        if (cut.tile_h * cut.quads > 128 || !consider()) break;
        // Several planes where they share what they stage, or where one is little work.
        if (cut.d == 1 && cut.tile_h < s.coarse_h) continue;
        for (cut.tile_d = 2; cut.tile_d <= s.coarse_d && cut.tile_d <= 4; ++cut.tile_d) {
          if (cut.tile_d * cut.tile_h * cut.quads > 128 || !consider()) break;
        }
      }
    }
  };
  for (cut.m = 1; cut.m <= PRODUCT_WARPS; ++cut.m) {
    if (!even(tiles_m, cut.m)) continue;
    for (cut.n = 1; cut.m * cut.n <= PRODUCT_WARPS; ++cut.n) {
      if (!even(tiles_n, cut.n)) continue;
      for (cut.w = 1; cut.m * cut.n * cut.w <= PRODUCT_WARPS; ++cut.w) {
        if (!even(t.tap_blocks_w, cut.w) || (cut.w > 1 && !t.joins_w)) continue;
        for (cut.h = 1; cut.m * cut.n * cut.w * cut.h <= PRODUCT_WARPS; ++cut.h) {
          if (!even(t.tap_blocks_h, cut.h)) continue;
          for (cut.d = 1; cut.m * cut.n * cut.w * cut.h * cut.d <= PRODUCT_WARPS; ++cut.d) {
            if (!even(t.kernel_d, cut.d)) continue;
            const int64_t units = cut.m * cut.n * cut.w * cut.h * cut.d;
            // Whole quarters of the multiprocessor, or as many warps as there can be.
            for (cut.parts = 1; cut.parts * units <= PRODUCT_WARPS; ++cut.parts) {
              const bool most = (cut.parts + 1) * units > PRODUCT_WARPS;
              if (cut.parts * units % 4 == 0 || most) consider_tiles();
            }
          }
        }
      }
    }
  }
  if (best_cost.total < 0) return CONVGEN_TOO_LARGE;
  expected = best_cost.total;

  cut = best;
  lay_out(s, t, cut);
  s.units_m = static_cast<int>(cut.m), s.units_n = static_cast<int>(cut.n);
  s.units_w = static_cast<int>(cut.w), s.units_h = static_cast<int>(cut.h);
  s.units_d = static_cast<int>(cut.d), s.parts = static_cast<int>(cut.parts);
  s.units = s.units_m * s.units_n * s.units_w * s.units_h * s.units_d;
  s.threads = s.units * s.parts * WARP;
  s.blocks_m = Divisor(ceil_div(tiles_m, cut.m));
  s.blocks_n = Divisor(ceil_div(tiles_n, cut.n));
  s.blocks_w = Divisor(ceil_div(t.tap_blocks_w, cut.w));
  s.blocks_h = Divisor(ceil_div(t.tap_blocks_h, cut.h));
  s.blocks_d = Divisor(ceil_div(t.kernel_d, cut.d));
  const int64_t blocks = count_blocks(s, t, cut), tiles = count_tiles(s, cut, batch);
  if (tiles > INDEX_LIMIT || blocks > INDEX_LIMIT) return CONVGEN_TOO_LARGE;
  s.blocks = static_cast<int>(blocks), s.tiles = static_cast<int>(tiles);
  s.tiles_w = Divisor(ceil_div(s.coarse_w, s.tile_w));
  s.tiles_h = Divisor(ceil_div(s.coarse_h, s.tile_h));
  s.tiles_d = Divisor(ceil_div(s.coarse_d, s.tile_d));
  s.coarse.by_places = Divisor(s.coarse.places), s.fine.by_places = Divisor(s.fine.places);
  // All copies of the next tile are on their way by two thirds of this one.
  s.rounds = static_cast<int>(ceil_div(s.coarse.total + s.fine.total, s.threads));
  const int64_t chunks = ceil_div(2 * ceil_div(s.chunks, s.parts), 3);
  s.rounds_per_chunk = static_cast<int>(ceil_div(s.rounds, chunks));
  const int64_t run = ceil_div(s.chunks, s.parts);  // chunks of a warp and tile
  s.tiles_per_store = static_cast<int>(ceil_div(CHUNKS_PER_STORE, run));

  // Splits: the least time in waves of blocks.
  const int64_t slots = best_cost.resident * multiprocessors;
  const double reduction = cut.parts * reduction_clocks(t, blocks, cut, multiprocessors);
  const int64_t split_bytes =
      int64_t{512} * t.m_tiles * t.n_tiles * t.taps_h * t.taps_w * s.units * blocks * s.parts;
  int64_t most = PRODUCT_WORKSPACE_LIMIT / split_bytes;
  if (most > PRODUCT_MAX_SPLITS) most = PRODUCT_MAX_SPLITS;
  if (most > tiles) most = tiles;
  if (most > 4 * slots / blocks + 1) most = 4 * slots / blocks + 1;
  if (most < 1) most = 1;
  double best_time = -1;
  s.splits = 1;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double run = double(ceil_div(tiles, splits)) * best_cost.tile + 2 * TILE_CLOCKS;
    const double time = double(ceil_div(splits * blocks, slots)) * run + splits * reduction;
    if (best_time >= 0 && time >= best_time) continue;
    best_time = time;
    s.splits = static_cast<int>(splits);
  }
  s.tiles_per_split = static_cast<int>(ceil_div(tiles, s.splits));
  if (tiles > 0) s.splits = static_cast<int>(ceil_div(tiles, s.tiles_per_split));
  return blocks * s.splits <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

// ---- Where a thread block works -------------------------------------------------------------

struct ProductBlock {
  int coarse0, fine0, group;     // first channels, within the group
  int tap_d, tap_h, tap_w;       // first taps
  int kind, split;
};

template <int M_TILES, int N_TILES, int TAPS_H, int TAPS_W>
__device__ __forceinline__ ProductBlock locate_products(const ProductShape& s, int index) {
  ProductBlock block;
  block.split = index / s.blocks;
  index -= block.split * s.blocks;
  block.kind = index;
  block.coarse0 = s.blocks_m.split(index) * s.units_m * M_TILES * PRODUCT_ROWS;
  block.fine0 = s.blocks_n.split(index) * s.units_n * N_TILES * PRODUCT_COLUMNS;
  block.tap_w = s.blocks_w.split(index) * s.units_w * TAPS_W;
  block.tap_h = s.blocks_h.split(index) * s.units_h * TAPS_H;
  block.tap_d = s.blocks_d.split(index) * s.units_d;
  block.group = index;
  return block;
}

// A unit of a block: which of its tiles of channels and blocks of taps.
struct ProductUnit {
  int m, n, w, h, d;
};

__device__ __forceinline__ ProductUnit locate_unit(const ProductShape& s, int unit) {
  ProductUnit u;
  u.m = unit % s.units_m, unit /= s.units_m;
  u.n = unit % s.units_n, unit /= s.units_n;
  u.w = unit % s.units_w, unit /= s.units_w;
  u.h = unit % s.units_h;
  u.d = unit / s.units_h;
  return u;
}

struct ProductTile {
  int n, d0, h0, w0;
};

__device__ __forceinline__ ProductTile locate_product_tile(const ProductShape& s, int index) {
  ProductTile tile;
  tile.w0 = s.tiles_w.split(index) * s.tile_w;
  tile.h0 = s.tiles_h.split(index) * s.tile_h;
  tile.d0 = s.tiles_d.split(index) * s.tile_d;
  tile.n = index;
  return tile;
}

// ---- Staging --------------------------------------------------------------------------------

// A place of a tile: element of the channel in shared memory, and where it is in the tensor.
__device__ __forceinline__ uint2 pack_place(int element, int plane, int row, int column) {
  return make_uint2(static_cast<uint32_t>(element) | static_cast<uint32_t>(plane) << 20,
                    static_cast<uint32_t>(column) | static_cast<uint32_t>(row) << 16);
}

// Where a tile's part of a tensor starts, as the copies see it.
struct ProductOrigin {
  int64_t element;  // of the block's first channel of the tile's sample
  int d, h, w;      // may be negative: padding
  int channels;     // of the group, from that one on
};

// Both tensors' origins of a tile lie in shared memory, and so do those of the tile after it.
struct ProductOrigins {
  ProductOrigin coarse, fine;
};

// COPY_CHANNELS channels at one place: `valid` of them from the tensor, zeros in the others.
template <int ACCESS, typename Raw>
__device__ __forceinline__ void copy_channels(Raw* to, int pitch, const Raw* from,
                                              int64_t channel_stride, int valid) {
  if constexpr (ACCESS * sizeof(Raw) >= 4) {
#pragma unroll
    for (int i = 0; i < COPY_CHANNELS; ++i) {
      copy_async<ACCESS * sizeof(Raw)>(to + i * pitch, from + i * channel_stride, i < valid);
    }
  } else {
    Raw value[COPY_CHANNELS];
#pragma unroll
    for (int i = 0; i < COPY_CHANNELS; ++i) {
      value[i] = 0;
      if (i < valid) value[i] = from[i * channel_stride];
    }
#pragma unroll
    for (int i = 0; i < COPY_CHANNELS; ++i) to[i * pitch] = value[i];
  }
}

// Copies the index-th (place, block of channels) of a tile to `to`. The tensor's planes, rows and
// columns between those of places lie `steps` apart; Column maps a staged column to the tensor's.
template <class Column, typename Raw>
__device__ __forceinline__ void copy_place(const ProductCopies& c, const uint2* table, Raw* to,
                                           const Raw* tensor, const ProductOrigin& origin,
                                           int64_t channel_stride, int3 extent, int plane_step,
                                           int row_step, int index) {
  int channel = index;
  const uint2 place = table[c.by_places.split(channel)];
  channel *= COPY_CHANNELS;
  const int z = origin.d + static_cast<int>(place.x >> 20) * plane_step;
  const int y = origin.h + static_cast<int>(place.y >> 16) * row_step;
  const int x = origin.w + Column::offset(static_cast<int>(place.y & 0xffff));
  int valid = 0;
  const Raw* from = tensor;
  if (static_cast<unsigned>(z) < static_cast<unsigned>(extent.x) &&
      static_cast<unsigned>(y) < static_cast<unsigned>(extent.y) &&
      static_cast<unsigned>(x) < static_cast<unsigned>(extent.z)) {
    valid = origin.channels - channel;
    from += origin.element + channel * channel_stride + ((z * extent.y + y) * extent.z + x);
  }
  to += (place.x & 0xfffff) + channel * c.pitch;
  // Elements of a place are neighbours in the tensor too, and all of them inside it or none.
#pragma unroll 1
  for (int i = 0; i < c.width; i += c.access) {
    if constexpr (sizeof(Raw) == 2) {
      if (c.access == 8) copy_channels<8>(to + i, c.pitch, from + i, channel_stride, valid);
    }
    if (c.access == 4) copy_channels<4>(to + i, c.pitch, from + i, channel_stride, valid);
    if (c.access == 2) copy_channels<2>(to + i, c.pitch, from + i, channel_stride, valid);
    if (c.access == 1) copy_channels<1>(to + i, c.pitch, from + i, channel_stride, valid);
  }
}

// ---- Operands of products -------------------------------------------------------------------

// A lane holds four neighbouring positions (a quad) of a chunk's sixteen: their order within a
// product's depth is free as long as both operands agree. With g = lane / 4, t = lane % 4, quad t:
//   32-bit elements: product 0 takes positions 0 and 2 of the quads, product 1 positions 1 and 3, so
//     that a tap's second product reads what its right neighbour's first one does
//   16-bit elements: one product takes all four, as two words of two.

// Nearest TF32 value of x, away from zero between two, as far as the tensor core looks: it ignores
// the 13 bits below. Half a unit in the last place is 2^-11 of x's power of two; NaNs and infinities
// stay (two instructions, cvt.rna.tf32.f32 takes three).
__device__ __forceinline__ uint32_t nearest_tf32(uint32_t bits) {
  const float power = __uint_as_float(bits & 0xff800000u);
  return __float_as_uint(__fmaf_rz(power, 0x1p-11f, __uint_as_float(bits)));
}

struct Tf32Product {
  using Raw = uint32_t;
  static constexpr int ELEMENTS = 1;
  static constexpr bool SPLIT = false;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) { return nearest_tf32(bits); }
  __device__ static __forceinline__ uint32_t low(uint32_t, uint32_t) { return 0; }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

// x = high + low to 21 bits; the sum of three products misses low * low.
struct SplitTf32Product : Tf32Product {
  static constexpr bool SPLIT = true;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) { return bits & 0xffffe000u; }
  __device__ static __forceinline__ uint32_t low(uint32_t bits, uint32_t high) {
    return __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
  }
};

struct HalfProduct {
  using Raw = uint16_t;
  static constexpr int ELEMENTS = 2;
  static constexpr bool SPLIT = false;

  __device__ static __forceinline__ uint32_t high(uint32_t bits) { return bits; }
  __device__ static __forceinline__ uint32_t low(uint32_t, uint32_t) { return 0; }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

struct Bfloat16Product : HalfProduct {
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

template <class Product>
constexpr int PRODUCT_STEPS = 2 / Product::ELEMENTS;  // products per chunk

// WORDS words (2 or 4, aligned) of shared memory.
template <int WORDS>
__device__ __forceinline__ void load_vector(uint32_t* to, const uint32_t* from) {
  if constexpr (WORDS == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    static_assert(WORDS == 2, "a vector of shared memory");
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  }
}

// 16 coarse channels of a chunk. `half_rows` is 8 channels further.
template <class Product>
struct CoarseFragment {
  uint32_t high[PRODUCT_STEPS<Product>][4], low[PRODUCT_STEPS<Product>][4];

  __device__ __forceinline__ void load(const uint32_t* from, int half_rows) {
    constexpr int WORDS = QUAD / Product::ELEMENTS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t quad[WORDS];
      load_vector<WORDS>(quad, from + half * half_rows);
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const int step = i % PRODUCT_STEPS<Product>, at = i / PRODUCT_STEPS<Product> * 2 + half;
        high[step][at] = Product::high(quad[i]);
        if constexpr (Product::SPLIT) low[step][at] = Product::low(quad[i], high[step][at]);
      }
    }
  }
};

// What the taps of one row read at a lane's quad, for 8 fine channels: VECTORS x VECTOR words, which
// hold neighbouring staged columns.
template <class Product, int VECTORS, int VECTOR>
struct FineWindow {
  static constexpr int WORDS = VECTORS * VECTOR;
  uint32_t high[WORDS], low[WORDS];

  template <int QUAD_COLUMNS, int QUAD_PITCH>
  __device__ __forceinline__ void load(const uint32_t* from) {
    constexpr int ELEMENTS = Product::ELEMENTS;
    uint32_t word[WORDS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      load_vector<VECTOR>(word + v * VECTOR, from + column_word(v * VECTOR * ELEMENTS, QUAD_COLUMNS,
                                                                QUAD_PITCH, ELEMENTS));
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      high[i] = Product::high(word[i]);
      if constexpr (Product::SPLIT) low[i] = Product::low(word[i], high[i]);
    }
  }

  // Word of an operand whose first position reads column `first` and whose next one is `step` on.
  __device__ static __forceinline__ uint32_t operand(const uint32_t (&words)[WORDS], int first,
                                                     int step) {
    if constexpr (Product::ELEMENTS == 1) {
      return words[first];
    } else {
      const int second = first + step;
      if (first % 2 == 0 && step == 1) return words[first / 2];
      return __byte_perm(words[first / 2], words[second / 2],
                         (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
    }
  }

  // d[m] += a[m] * (the tap whose first position reads column `first`), for one product's depth.
  template <int M_TILES>
  __device__ __forceinline__ void multiply(float (&d)[M_TILES][4],
                                           const CoarseFragment<Product> (&a)[M_TILES], int step,
                                           int first, int position_columns) const {
    uint32_t b[2], rest[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first + (step + 2 * i) * position_columns;
      b[i] = operand(high, column, position_columns);
      if constexpr (Product::SPLIT) rest[i] = operand(low, column, position_columns);
    }
    if constexpr (Product::SPLIT) {
      // Small terms first.
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].low[step], b);
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].high[step], rest);
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) Product::multiply(d[m], a[m].high[step], b);
  }
};

// sum += chain, and the chain starts again.
template <int COUNT>
__device__ __forceinline__ void flush(float* sum, float* chain) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    sum[i] += chain[i];
    chain[i] = 0;
  }
}

// *to = sum, or += if `begun`; the sum starts again.
__device__ __forceinline__ void store_sums(float4* to, float (&sum)[4], bool begun) {
  float4 total = make_float4(sum[0], sum[1], sum[2], sum[3]);
  if (begun) {
    const float4 before = *to;
    total.x += before.x, total.y += before.y, total.z += before.z, total.w += before.w;
  }
  *to = total;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = 0;
}

// ---- The sum over splits and parts ----------------------------------------------------------

constexpr int SUM_ROWS = 8;

// Partial results: [split][part][kind of block][unit][fragment][lane], four sums each; a fragment is
// 16 coarse x 8 fine channels at one tap, in the order [fine tile][tap h][tap w][coarse tile].
// Adds them in an order fixed by their number and writes weight[coarse][fine][tap].
template <int M_TILES, int N_TILES, int TAPS_H, int TAPS_W, typename T>
__global__ void __launch_bounds__(WARP* SUM_ROWS)
    sum_products_kernel(const ProductShape s, int kernel_d, int kernel_h, int kernel_w, T* weight,
                        const float4* partial, int slices) {
  __shared__ float4 rows[SUM_ROWS][WARP];
  constexpr int FRAGMENTS = M_TILES * N_TILES * TAPS_H * TAPS_W;
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP;
  const int64_t slice_stride = int64_t{gridDim.x} * WARP;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4* from = partial + int64_t{blockIdx.x} * WARP + lane;
#pragma unroll 4
  for (int slice = row; slice < slices; slice += SUM_ROWS) {
    const float4 part = from[slice * slice_stride];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  rows[row][lane] = sum;
  __syncthreads();
  if (row != 0) return;
#pragma unroll
  for (int i = 1; i < SUM_ROWS; ++i) {
    const float4 part = rows[i][lane];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }

  int fragment = blockIdx.x % FRAGMENTS;
  const int unit_index = blockIdx.x / FRAGMENTS;
  const ProductUnit unit = locate_unit(s, unit_index % s.units);
  const ProductBlock block =
      locate_products<M_TILES, N_TILES, TAPS_H, TAPS_W>(s, unit_index / s.units);
  const int m = fragment % M_TILES;
  fragment /= M_TILES;
  const int w = block.tap_w + unit.w * TAPS_W + fragment % TAPS_W;
  fragment /= TAPS_W;
  const int h = block.tap_h + unit.h * TAPS_H + fragment % TAPS_H;
  const int n = fragment / TAPS_H;
  const int d = block.tap_d + unit.d;
  if (d >= kernel_d || h >= kernel_h || w >= kernel_w) return;
  const int a = block.coarse0 + (unit.m * M_TILES + m) * PRODUCT_ROWS + lane / 4;
  const int b = block.fine0 + (unit.n * N_TILES + n) * PRODUCT_COLUMNS + lane % 4 * 2;
  const int64_t taps = int64_t{kernel_d} * kernel_h * kernel_w;
  const int64_t tap = (int64_t{d} * kernel_h + h) * kernel_w + w;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int coarse = a + i / 2 * 8, fine = b + i % 2;
    if (coarse < s.coarse_channels && fine < s.fine_channels) {
      const int64_t channel = int64_t{block.group} * s.coarse_channels + coarse;
      narrow(weight[(channel * s.fine_channels + fine) * taps + tap], values[i]);
    }
  }
}

}  // namespace convgen
