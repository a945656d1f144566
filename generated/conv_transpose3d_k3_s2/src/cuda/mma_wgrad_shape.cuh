// What a tiling of wgrad is: thread blocks, units of warps, tiles and where these lie in shared
// memory.
#pragma once

#include "common.cuh"

namespace convgen {

constexpr int QUAD = 4;         // neighbouring positions along W that one lane feeds to a product
constexpr int CHUNK_QUADS = 4;  // quads of one chunk: one for each lane of a row of a product
constexpr int PRODUCT_ROWS = 16, PRODUCT_COLUMNS = 8;

// Warps of a block, at most. With 12 of them a thread may have 168 registers, with 16 128: enough
// for few sums, and more warps hide more of each other's waiting. Coarse fragments, and of the fine
// operands those that the compiler prepares ahead, must fit beside them: with more than
// FEW_REGISTERS in all, sums went to local memory.
constexpr int LEAST_WARPS = 12, MOST_WARPS = 16;
constexpr int FEW_SUMS = 72, FEW_REGISTERS = 112, FINE_AHEAD = 24;
constexpr int most_warps(int sums, int coarse, int fine) {
  const int ahead = fine < FINE_AHEAD ? fine : FINE_AHEAD;
  return sums <= FEW_SUMS && sums + coarse + ahead <= FEW_REGISTERS ? MOST_WARPS : LEAST_WARPS;
}
constexpr int PRODUCT_STAGES = 2;
constexpr int ORIGINS_WORDS = 40;  // of shared memory: see ProductOrigins
constexpr int COPY_BYTES = 4;          // that an asynchronous copy has at least
constexpr int COPY_CHANNELS = 8;       // channels that a thread copies in a row, nothing in between
constexpr int COPY_MOST = 32;          // channels that a thread copies at one place of a tile
constexpr int CHUNKS_PER_STORE = 512;  // about 1024 additions: 3e-5 of a sum, if all are truncated
constexpr int PRODUCT_MAX_SPLITS = 1024;
constexpr int64_t PRODUCT_WORKSPACE_LIMIT = int64_t{256}
                                            << 20;  // bytes, unless one split needs more

// ---- A call, cut into thread blocks ---------------------------------------------------------

// How one tensor's part of a tile is copied: `width` neighbouring elements at each of some places
// (a table in shared memory lists them). A thread finds a place and copies `channels` channels.
struct ProductCopies {
  int places;
  Divisor by_places;
  int channels;  // a multiple of COPY_CHANNELS
  int total;     // places x blocks of channels
  int width;     // elements at a place, by the tensor's extents
  int access;    // elements per access, by the tensor's address too: divides `width`
  int pitch;     // elements between channels in shared memory
};

struct ProductShape {
  int coarse_d, coarse_h, coarse_w;
  int fine_d, fine_h, fine_w;
  int64_t coarse_channel_stride, fine_channel_stride;  // elements; below INDEX_LIMIT
  int64_t coarse_sample, fine_sample;                  // elements from sample to sample
  int64_t fine_elements;                               // of the whole tensor
  int coarse_channels, fine_channels;                  // per group
  int groups;
  uint32_t zero;  // see CoarseFragment

  // A block's warps: units (coarse tiles x fine tiles x blocks of taps along W, H and D) times
  // `parts`, which share the chunks of a tile and have a partial result each. Of warps that
  // multiply together, each part has whole warpgroups: `unit_warps`.
  int units_m, units_n, units_w, units_h, units_d, units, unit_warps, parts;
  Divisor blocks_m, blocks_n, blocks_w, blocks_h, blocks_d;
  int blocks, threads;

  // Positions are walked in tiles of tile_d x tile_h x tile_w within one sample, dealt to `splits`
  // blocks in turns (see SplitTiles): a block has tiles_per_split of them or one less.
  int tile_d, tile_h, tile_w, chunks;
  Divisor tiles_w, tiles_h, tiles_d;
  int tiles, splits, tiles_per_split, split_turn;
  int tiles_per_store;  // after which a warp adds its sums to its partial results

  // Shared memory, in words: the origins, the table of quads, the two tables of places, then the
  // stages, each
  //   coarse [channel][tile_d][tile_h][tile_w], fine [channel][plane][row][column].
  // Staged planes lie plane_step apart in the fine tensor, rows row_step.
  int planes, rows, columns, plane_step, row_step;
  int position_planes, position_rows;  // staged planes and rows from position to position
  int tap_planes, tap_rows;            // and from tap to tap
  int row_words, coarse_pitch, fine_pitch;
  int coarse_table, fine_table, stages, coarse_words, stage_words;
  int rounds, rounds_per_chunk;  // of copies, by all threads
  int copy_instructions;         // of a warp and tile
  int coarse_slots, slots;  // threads over all rounds that copy coarse places (whole warps), all
  // Whether lines of the fine tensor are staged as they lie in memory, in vectors of 16 bytes
  // (places are vectors then): each starts with up to 15 bytes that lie before it.
  bool unaligned;
  int line;         // elements of an unaligned row
  int fine_staged;  // channels of a stage, beyond the tensor's too
  int shared_bytes;
  ProductCopies coarse, fine;
};

// What the specification and the schedule say; lengths along W in staged columns (see the kernel).
struct ProductTraits {
  int kernel_d, kernel_h;
  int stride_d, stride_h, stride_w, dilation_d, dilation_h, dilation_w;
  int taps_h, taps_w, tap_blocks_h, tap_blocks_w;
  int coarse_tile, fine_tile;     // channels of a unit
  int fragments;                  // of a unit's sums: 16 x 8 channels at one tap
  int products;                   // per chunk and warp
  int warps;                      // of a block, at most, that multiply
  int warpgroup_warps = 1;        // of them, those that multiply together
  bool may_be_unaligned = false;  // whether lines may be unaligned
  int unaligned_loads = 0;        // then of a chunk and warp, of one word for each lane
  int producer_warps = 0;         // others, which stage; 0 if all of them do
  int element_bytes;
  int quad_columns, quad_pitch, window_columns, tap_columns, column_align;
  bool joins_w;                            // whether a block may own several blocks of taps along W
  int coarse_residue, fine_residue;        // of the channel pitches, mod 32 words
  int coarse_wavefronts, fine_wavefronts;  // of shared memory, per chunk and warp
};

// Word of a row at which a staged column lies.
__host__ __device__ constexpr int column_word(int column, int quad_columns, int quad_pitch,
                                              int elements) {
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
      : step(positions == 1 ? dilation
             : taps == 1    ? stride
                            : greatest_divisor(stride, dilation)),
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

// The numbers of a cut that its cost depends on.
struct ProductCut {
  int64_t m, n, w, h, d, parts;   // units and parts
  int64_t tile_d, tile_h, quads;  // positions
};

// Instructions: to find a place, to copy a channel there.
constexpr int64_t COPY_PLACE = 40, COPY_ONE = 4;
// Of a coarse copy beside COPY_ONE, where lines are not unaligned: by these figures cuts were
// measured, before 16-bit words were copied to their places.
constexpr double COARSE_COPY = 4;
// Of a producer warp, where lines are unaligned: to begin a tile, to begin 16 channels of it, to
// copy WARP vectors of each of these; to find a chunk's coarse quads.
constexpr int64_t UNALIGNED_TILE = 80, UNALIGNED_CHANNELS = 45, UNALIGNED_PLACE = 26;
constexpr double COARSE_PLACE = 14;
// Wavefronts of shared memory that copies take where lines are unaligned, as measured: for each
// vector and for each line of a channel; for 128 bytes of coarse channels.
constexpr double VECTOR_WAVEFRONTS = 0.42, LINE_WAVEFRONTS = 0.5, COARSE_WAVEFRONTS = 4;

// Wavefronts of one load of a warp from unaligned rows, on average over where these may begin. Lane
// 4 g + t reads the word at quad t, `quad_words` apart, of channel g: channels are `pitch` words
// apart in shared memory and `stride` elements of `element_bytes` (4 at most) in the tensor, whose
// place within a vector they keep.
constexpr double unaligned_wavefronts(int pitch, int64_t stride, int quad_words,
                                      int element_bytes) {
  const int vector = VECTOR_BYTES / element_bytes, elements = 4 / element_bytes;
  int sum = 0;
  for (int begin = 0; begin < vector; ++begin) {
    int words[WARP] = {}, most = 0;  // by bank; no two lanes read the same one
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const int within = static_cast<int>((begin + g * (stride % vector)) % vector);
      const int bank = (g * pitch + t * quad_words + within / elements) % WARP;
      if (++words[bank] > most) most = words[bank];
    }
    sum += most;
  }
  return double(sum) / vector;
}

// Channel pitches of unaligned rows, which are whole vectors.
struct UnalignedPitches {
  double wavefronts[WARP / VECTOR_WORDS] = {};  // of a load, by the pitch mod 32 words

  UnalignedPitches(const ProductShape& s, const ProductTraits& t) {
    if (!t.may_be_unaligned) return;
    for (int pitch = 0; pitch < WARP; pitch += VECTOR_WORDS) {
      wavefronts[pitch / VECTOR_WORDS] = unaligned_wavefronts(
          pitch, s.fine_channel_stride, QUAD * t.stride_w * t.element_bytes / 4, t.element_bytes);
    }
  }

  double of(int64_t pitch) const { return wavefronts[pitch % WARP / VECTOR_WORDS]; }

  // The best pitch of channels that have `words` words. Of equals one of whole sectors of 32 bytes:
  // where all channels' copies fill whole ones, these take a quarter less. Then the least.
  int64_t best(int64_t words) const {
    int64_t best = words;
    for (int64_t pitch = words + VECTOR_WORDS; pitch < words + WARP; pitch += VECTOR_WORDS) {
      const bool equal = of(pitch) == of(best);
      if (of(pitch) < of(best) || (equal && best % 8 != 0 && pitch % 8 == 0)) best = pitch;
    }
    return best;
  }
};

// Instructions of a warp that copies `channels` channels at its places.
constexpr int64_t copy_instructions(int64_t channels) { return COPY_PLACE + COPY_ONE * channels; }

// How many channels a thread copies at a place: more take less time to find places, fewer leave
// less of the last round idle. The least time of the busiest warp.
inline void deal_copies(ProductShape& s, int64_t coarse_channels, int64_t fine_channels,
                        int64_t warps) {
  int64_t best = -1;
  for (int64_t coarse = COPY_CHANNELS; coarse <= COPY_MOST; coarse += COPY_CHANNELS) {
    if (coarse_channels % coarse != 0) continue;
    const int64_t coarse_total = s.coarse.places * (coarse_channels / coarse);
    const int64_t coarse_warps = ceil_div(coarse_total, WARP);
    for (int64_t fine = COPY_CHANNELS; fine <= COPY_MOST; fine += COPY_CHANNELS) {
      if (fine_channels % fine != 0) continue;
      const int64_t fine_total = s.fine.places * (fine_channels / fine);
      const int64_t all_warps = coarse_warps + ceil_div(fine_total, WARP);
      // Rounds of coarse places only, of both, and of fine ones only.
      const int64_t rounds = ceil_div(all_warps, warps), pure = coarse_warps / warps;
      const bool mixed = coarse_warps % warps != 0;
      const int64_t a = copy_instructions(coarse), b = copy_instructions(fine);
      const int64_t time = pure * a + (mixed ? (a > b ? a : b) : 0) + (rounds - pure - mixed) * b;
      if (best >= 0 && time >= best) continue;
      best = time;
      s.coarse.channels = static_cast<int>(coarse), s.fine.channels = static_cast<int>(fine);
      s.coarse.total = static_cast<int>(coarse_total);
      s.fine.total = static_cast<int>(fine_total);
      s.coarse_slots = static_cast<int>(coarse_warps * WARP);
      s.slots = s.coarse_slots + s.fine.total;
      s.rounds = static_cast<int>(rounds);
      s.copy_instructions = static_cast<int>(time);
    }
  }
}

// Shared memory of a cut, in words; fills in what depends on the tile alone.
inline int64_t lay_out(ProductShape& s, const ProductTraits& t, const UnalignedPitches& pitches,
                       const ProductCut& cut) {
  const int elements = 4 / t.element_bytes;
  const ProductSpan d(cut.tile_d, cut.d, t.stride_d, t.dilation_d);
  const ProductSpan h(cut.tile_h, cut.h * t.taps_h, t.stride_h, t.dilation_h);
  const int64_t columns =
      (cut.quads - 1) * t.quad_columns + (cut.w - 1) * t.taps_w * t.tap_columns + t.window_columns;
  // A copy's table packs these, and computes with 32 bits.
  if (d.count >= 1 << 12 || h.count >= 1 << 16 || columns >= 1 << 16) return INDEX_LIMIT;
  if (d.count * d.step >= 1 << 30 || h.count * h.step >= 1 << 30) return INDEX_LIMIT;
  const int fine_width = row_width(s.fine_w, t.column_align);
  const bool unaligned = t.may_be_unaligned && fine_width * t.element_bytes < COPY_BYTES;
  const int64_t last = columns - elements, vector = VECTOR_BYTES / t.element_bytes;
  const int64_t line =
      (cut.quads * QUAD - 1) * t.stride_w + (cut.w * t.taps_w - 1) * t.dilation_w + 1;
  const int64_t vectors = (line + vector - 2) / vector + 1;  // from any start
  // The table of vectors has 32 bits for how far a line lies behind the tile's first, in bytes.
  const int64_t span = ((d.count - 1) * d.step * s.fine_h + (h.count - 1) * h.step) * s.fine_w;
  if (unaligned && (span + columns * t.stride_w) * t.element_bytes >= INDEX_LIMIT)
    return INDEX_LIMIT;
  const int64_t row_words =
      unaligned ? vectors * VECTOR_WORDS
                : column_word(static_cast<int>(last), t.quad_columns, t.quad_pitch, elements) + 1;
  const int64_t chunks = ceil_div(cut.tile_d * cut.tile_h * cut.quads, CHUNK_QUADS);
  auto pitch = [](int64_t words, int residue) {
    return words + ((residue - words) % WARP + WARP) % WARP;
  };
  const bool staged_by_all = t.producer_warps == 0;
  const int64_t coarse_row = chunks * CHUNK_QUADS * QUAD / elements;
  // The tensor core reads coarse channels where wgmma wants them, without gaps.
  const int64_t coarse_pitch = staged_by_all ? pitch(coarse_row, t.coarse_residue) : coarse_row;
  const int64_t fine_row = d.count * h.count * row_words;
  const int64_t fine_pitch = unaligned ? pitches.best(fine_row) : pitch(fine_row, t.fine_residue);
  const int64_t coarse_words = cut.m * t.coarse_tile * coarse_pitch;
  const int64_t fine_words = cut.n * t.fine_tile * fine_pitch;
  const bool wide = staged_by_all && cut.quads % 2 == 0;
  const int coarse_width = row_width(s.coarse_w, wide ? 16 / t.element_bytes : QUAD);
  const int64_t coarse_places =
      cut.tile_d * cut.tile_h * cut.quads * QUAD / (staged_by_all ? coarse_width : QUAD);
  const int64_t fine_places = d.count * h.count * (unaligned ? vectors : columns / fine_width);
  const int64_t coarse_table = ORIGINS_WORDS + (chunks + cut.parts) * CHUNK_QUADS;
  const int64_t fine_table = coarse_table + 2 * coarse_places;
  // Channels of whole sectors begin at them, too.
  const int64_t stages = round_up(fine_table + 2 * fine_places, unaligned ? WARP : VECTOR_WORDS);
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
  s.unaligned = unaligned, s.line = static_cast<int>(line);
  s.fine_staged = static_cast<int>(cut.n) * t.fine_tile;
  s.coarse.width = coarse_width, s.fine.width = fine_width;
  s.coarse.pitch = s.coarse_pitch * elements, s.fine.pitch = s.fine_pitch * elements;
  s.coarse.places = static_cast<int>(coarse_places), s.fine.places = static_cast<int>(fine_places);
  const int64_t coarse_channels = staged_by_all ? cut.m * t.coarse_tile : 0;
  deal_copies(s, coarse_channels, cut.n * t.fine_tile,
              staged_by_all ? cut.m * cut.n * cut.w * cut.h * cut.d * cut.parts : t.producer_warps);
  if (unaligned) {
    const int64_t of_channels = UNALIGNED_CHANNELS + ceil_div(fine_places, WARP) * UNALIGNED_PLACE;
    s.copy_instructions =
        static_cast<int>(UNALIGNED_TILE + ceil_div(s.fine_staged, PRODUCT_ROWS) * of_channels);
  }
  return words;
}

}  // namespace convgen
