// The tiling of a call of wgrad, on the host: of all that fit, the one expected to be fastest.
#pragma once

#include "gpu_rates.cuh"
#include "mma_wgrad_shape.cuh"

namespace convgen {

// How one cut is expected to do, in clocks of a multiprocessor.
struct ProductCost {
  double tile;       // one tile of all blocks on a multiprocessor
  double total;      // the whole call
  int64_t resident;  // blocks on a multiprocessor
};

constexpr double TILE_CLOCKS = 300;  // barrier, first loads, last products
// Where warpgroups multiply, in clocks: a turn of putting coarse channels in order; from a tile's
// last copy to its arrival; a tile's barriers.
constexpr double ARRANGE_CLOCKS = 120, STAGING_LATENCY = 1500, WARPGROUP_TILE_CLOCKS = 150;

inline int64_t count_blocks(const ProductShape& s, const ProductTraits& t, const ProductCut& cut) {
  return ceil_div(ceil_div(s.coarse_channels, t.coarse_tile), cut.m) *
         ceil_div(ceil_div(s.fine_channels, t.fine_tile), cut.n) * ceil_div(t.tap_blocks_w, cut.w) *
         ceil_div(t.tap_blocks_h, cut.h) * ceil_div(t.kernel_d, cut.d) * s.groups;
}

inline int64_t count_tiles(const ProductShape& s, const ProductCut& cut, int64_t batch) {
  return ceil_div(s.coarse_w, cut.quads * QUAD) * ceil_div(s.coarse_h, cut.tile_h) *
         ceil_div(s.coarse_d, cut.tile_d) * batch;
}

// Clocks that summing one split's (or part's) partial results adds.
inline double reduction_clocks(const ProductTraits& t, int64_t blocks, const ProductCut& cut,
                               int multiprocessors, const GpuRates& rates) {
  const double units = double(cut.m) * cut.n * cut.w * cut.h * cut.d;
  const double bytes = 512.0 * t.fragments * units * blocks;
  return 2 * bytes / (rates.level2_bytes * multiprocessors);
}

// Consumer warps of a cut: each part has whole warpgroups.
inline int64_t consumer_warps(const ProductTraits& t, const ProductCut& cut) {
  return round_up(cut.m * cut.n * cut.w * cut.h * cut.d, t.warpgroup_warps) * cut.parts;
}

// Clocks of one tile where warpgroups multiply (wgmma) what others stage, per multiprocessor.
inline double warpgroup_clocks(const ProductShape& s, const ProductTraits& t,
                               const UnalignedPitches& pitches, const ProductCut& cut,
                               const GpuRates& rates) {
  const double chunks = double(ceil_div(s.chunks, cut.parts));
  const double warpgroups = double(consumer_warps(t, cut) / t.warpgroup_warps);
  // A product takes half a clock per column, and its second operand shared memory for half of that.
  const double product = t.products * t.coarse_tile / 2.0 * rates.warpgroup_product_clocks;
  const double tensor = warpgroups * chunks * product;
  double loads = t.fine_wavefronts;
  double copies = s.stage_words / 32.0 + double(s.fine.total) * s.fine.channels / WARP;
  if (s.unaligned) {
    loads = t.unaligned_loads * pitches.of(s.fine_pitch);
    const double lines = s.planes * s.rows;
    copies = s.fine_staged * (s.fine.places * VECTOR_WAVEFRONTS + lines * LINE_WAVEFRONTS) +
             s.coarse_words / 32.0 * COARSE_WAVEFRONTS;
  }
  const double shared = tensor / 2 + warpgroups * chunks * t.warpgroup_warps * loads + copies;
  // A group waits for its products before it loads the next chunk.
  const double serial = chunks * (product + WARPGROUP_LATENCY);
  // Coarse channels are copied, eight at a time, and put in order; beside unaligned rows they are
  // in order.
  const double blocks = double(s.chunks) * t.coarse_tile / 8;
  const double turns = s.unaligned ? 0 : blocks * PRODUCT_COLUMNS / (t.producer_warps * WARP);
  const double coarse = s.unaligned ? blocks * COPY_ONE + s.chunks * COARSE_PLACE
                                    : blocks * (COPY_ONE + COARSE_COPY) + s.chunks * COPY_PLACE;
  const double staging = (s.copy_instructions + coarse / t.producer_warps) * WARP_CLOCKS +
                         turns * ARRANGE_CLOCKS + STAGING_LATENCY;
  const double level2 = s.stage_words * 4 / rates.level2_bytes;
  double most = tensor > shared ? tensor : shared;
  if (serial > most) most = serial;
  if (staging > most) most = staging;
  if (level2 > most) most = level2;
  return most + 0.1 * (tensor + shared + staging + level2 - most) + WARPGROUP_TILE_CLOCKS;
}

// Expected time of a cut that lay_out() has laid out in `words` words.
inline ProductCost cost_of(const ProductShape& s, const ProductTraits& t,
                           const UnalignedPitches& pitches, const ProductCut& cut, int64_t words,
                           int64_t batch, const DeviceLimits& limits, const GpuRates& rates) {
  const int64_t units = cut.m * cut.n * cut.w * cut.h * cut.d, warps = units * cut.parts;
  ProductCost cost;
  cost.resident = t.warps / warps;
  // A block's own 1 KiB; the limit of one block is the multiprocessor's less that.
  const int64_t fit = (int64_t{limits.shared_bytes} + 1024) / (words * 4 + 1024);
  if (cost.resident > fit) cost.resident = fit;
  if (cost.resident < 1) cost.resident = 1;
  const double resident = double(cost.resident);
  const double chunks = double(ceil_div(s.chunks, cut.parts));
  const double products =
      double(ceil_div(cost.resident * warps, 4)) * 4 * chunks * t.products * rates.product_clocks;
  const double copies =
      (double(s.coarse.total) * s.coarse.channels + double(s.fine.total) * s.fine.channels) /
      WARP;  // of warps
  const double shared = resident * (warps * chunks * (t.coarse_wavefronts + t.fine_wavefronts) +
                                    s.stage_words / 32.0 + copies);
  // A scheduler issues an instruction per clock, but a warp only one in WARP_CLOCKS.
  const double turn = resident * warps / 4 > WARP_CLOCKS ? resident * warps / 4 : WARP_CLOCKS;
  const double issue = (s.copy_instructions + chunks * t.products * 3.0) * turn;
  const double level2 = resident * s.stage_words * 4 / rates.level2_bytes;
  double most = products > shared ? products : shared;
  if (issue > most) most = issue;
  if (level2 > most) most = level2;
  cost.tile = most + 0.15 * (products + shared + issue + level2 - most) + TILE_CLOCKS;
  if (t.producer_warps) {
    cost.resident = 1;
    cost.tile = warpgroup_clocks(s, t, pitches, cut, rates);
  }
  const int64_t blocks = count_blocks(s, t, cut), tiles = count_tiles(s, cut, batch);
  const double slots = double(cost.resident) * limits.multiprocessors;
  double waves = double(blocks) * tiles / slots;
  if (waves < 1) waves = 1;
  double splits = slots / blocks;
  if (splits > tiles) splits = double(tiles);
  if (splits < 1) splits = 1;
  cost.total = waves * cost.tile +
               splits * cut.parts * reduction_clocks(t, blocks, cut, limits.multiprocessors, rates);
  return cost;
}

// Chooses who computes what: of all cuts that fit, the one expected to be fastest.
inline int cut_products(ProductShape& s, const ProductTraits& t, int64_t batch,
                        const DeviceLimits& limits, double& expected) {
  const GpuRates rates = gpu_rates(limits.capability);
  const int64_t tiles_m = ceil_div(s.coarse_channels, t.coarse_tile);
  const int64_t tiles_n = ceil_div(s.fine_channels, t.fine_tile);
  // A count that leaves the last block emptier than a smaller one would is not tried.
  auto even = [](int64_t total, int64_t count) {
    return count <= total && ceil_div(total, ceil_div(total, count)) == count;
  };
  ProductCut best = {};
  ProductCost best_cost = {0, -1, 0};
  ProductShape trial = s;
  const UnalignedPitches pitches(s, t);

  ProductCut cut;
  auto consider = [&] {
    const int64_t words = lay_out(trial, t, pitches, cut);
    if (words * 4 > limits.shared_bytes) return false;
    const ProductCost cost = cost_of(trial, t, pitches, cut, words, batch, limits, rates);
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
  // Warps that multiply together have the same coarse channels.
  for (cut.m = 1; cut.m <= (t.warpgroup_warps > 1 ? 1 : t.warps); ++cut.m) {
    if (!even(tiles_m, cut.m)) continue;
    for (cut.n = 1; cut.m * cut.n <= t.warps; ++cut.n) {
      if (!even(tiles_n, cut.n)) continue;
      for (cut.w = 1; cut.m * cut.n * cut.w <= t.warps; ++cut.w) {
        if (!even(t.tap_blocks_w, cut.w) || (cut.w > 1 && !t.joins_w)) continue;
        for (cut.h = 1; cut.m * cut.n * cut.w * cut.h <= t.warps; ++cut.h) {
          if (!even(t.tap_blocks_h, cut.h)) continue;
          for (cut.d = 1; cut.m * cut.n * cut.w * cut.h * cut.d <= t.warps; ++cut.d) {
            if (!even(t.kernel_d, cut.d)) continue;
            const int64_t units = cut.m * cut.n * cut.w * cut.h * cut.d;
            // Whole quarters of the multiprocessor, or as many warps as there can be.
            const int64_t whole = round_up(units, t.warpgroup_warps);
            for (cut.parts = 1; cut.parts * whole <= t.warps; ++cut.parts) {
              const bool most = (cut.parts + 1) * whole > t.warps;
              if (cut.parts * whole % 4 == 0 || most) consider_tiles();
            }
          }
        }
      }
    }
  }
  if (best_cost.total < 0) return CONVGEN_TOO_LARGE;
  expected = best_cost.total;

  cut = best;
  lay_out(s, t, pitches, cut);
  s.units_m = static_cast<int>(cut.m), s.units_n = static_cast<int>(cut.n);
  s.units_w = static_cast<int>(cut.w), s.units_h = static_cast<int>(cut.h);
  s.units_d = static_cast<int>(cut.d), s.parts = static_cast<int>(cut.parts);
  s.units = s.units_m * s.units_n * s.units_w * s.units_h * s.units_d;
  s.unit_warps = static_cast<int>(consumer_warps(t, cut) / cut.parts);
  s.threads = (s.unit_warps * s.parts + t.producer_warps) * WARP;
  s.blocks_m = Divisor(ceil_div(tiles_m, cut.m));
  s.blocks_n = Divisor(ceil_div(tiles_n, cut.n));
  s.blocks_w = Divisor(ceil_div(t.tap_blocks_w, cut.w));
  s.blocks_h = Divisor(ceil_div(t.tap_blocks_h, cut.h));
  s.blocks_d = Divisor(ceil_div(t.kernel_d, cut.d));
  const int64_t blocks = count_blocks(s, t, cut), tiles = count_tiles(s, cut, batch);
  // With room for a turn of splits more.
  if (tiles > INDEX_LIMIT - 2 * PRODUCT_MAX_SPLITS || blocks > INDEX_LIMIT) {
    return CONVGEN_TOO_LARGE;
  }
  s.blocks = static_cast<int>(blocks), s.tiles = static_cast<int>(tiles);
  s.tiles_w = Divisor(ceil_div(s.coarse_w, s.tile_w));
  s.tiles_h = Divisor(ceil_div(s.coarse_h, s.tile_h));
  s.tiles_d = Divisor(ceil_div(s.coarse_d, s.tile_d));
  s.coarse.by_places = Divisor(s.coarse.places), s.fine.by_places = Divisor(s.fine.places);
  // All copies of the next tile are on their way by two thirds of this one.
  const int64_t chunks = ceil_div(2 * ceil_div(s.chunks, s.parts), 3);
  s.rounds_per_chunk = static_cast<int>(ceil_div(s.rounds, chunks));
  const int64_t run = ceil_div(s.chunks, s.parts);  // chunks of a warp and tile
  s.tiles_per_store = static_cast<int>(ceil_div(CHUNKS_PER_STORE, run));

  // Splits: the least time in waves of blocks.
  const int64_t slots = best_cost.resident * limits.multiprocessors;
  const double reduction =
      cut.parts * reduction_clocks(t, blocks, cut, limits.multiprocessors, rates);
  const int64_t split_bytes = int64_t{512} * t.fragments * s.units * blocks * s.parts;
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
  // From turn to turn a split's tiles are so far apart that it comes to all places of a sample.
  const int64_t of_sample = batch > 0 ? tiles / batch : 1;
  s.split_turn = 0;
  while (s.split_turn + 1 < s.splits && greatest_divisor(s.splits + s.split_turn, of_sample) != 1) {
    ++s.split_turn;
  }
  return blocks * s.splits <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

}  // namespace convgen
