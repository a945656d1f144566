// The tiling of a call of fprop or dgrad, on the host: its tiles, and what of them a thread block
// stages at once.
//
// Both contractions gather: output positions read an input around them. Their three axes are
// called R (register rows: a thread owns ROWS consecutive positions along it), Y and X (lanes run
// along the flattened (Y, X) plane, X fastest and contiguous in memory).
#pragma once

#include "common.cuh"
#include "gpu_rates.cuh"

namespace convgen {

// One axis of a gather, at run time.
struct GatherAxis {
  int input;         // input extent
  int output;        // output extent
  int positions;     // output positions per phase: ceil(output / phases)
  int input_stride;  // elements between neighbours
  int output_stride;
};

struct GatherShape {
  GatherAxis r, y, x;
  int in_channels, out_channels;  // per group
  int64_t in_channel_stride, out_channel_stride;
  int64_t in_span;  // elements from a group's first to its last

  // The cut: planes are cut into strips of columns; LANES positions of a strip, times ROWS rows,
  // times `warps_c` blocks of CHANNELS output channels are one thread block.
  int strip_width, lanes, warps_c;
  Divisor by_strip_width;
  Divisor channel_blocks, phases, row_tiles, lane_tiles, strips, groups;
  int64_t blocks;

  int threads;

  // The staged tile: `chunk` of `words` input words of [planes][rows][residue of X][columns].
  int words;
  int columns;  // that lanes read of a line
  int planes, rows, row_pitch, residue_pitch, plane_pitch, channel_pitch;
  Divisor by_columns, by_rows;  // staged accesses of a line, lines of a plane
  Divisor by_planes;            // planes of a channel
  int chunk, chunks, tile_elements, stage_elements;
  int stages;  // buffers that hold a staged tile and its weights
  int shared_bytes;
  int load_width;  // elements per staged access; above 1, tiles start at a multiple of it

  // Lines that pass through raw buffers (GatherTraits::raw_buffers): how many a buffer holds, bytes
  // of a line there, in whole vectors, and of a buffer; parts that this cuts a plane into, planes,
  // vectors of a line.
  int raw_lines, raw_line_bytes, raw_bytes;
  Divisor raw_parts, raw_planes, raw_vectors;

  // Of tiles in vectors, whose channels lie in 8-channel blocks (vectors.cuh), of a product's four
  // lanes twice: channels, and elements of the tile, from lane to lane, half to half, block to
  // block.
  int lane_channels, half_channels;
  int lane_pitch, half_pitch, block8_pitch;

  bool vector_store;  // the phases of X that a thread computes leave in one access
};

// What a rendered unit knows of its own tile. A word is one element of the staged tile: an input
// channel, or however many of them one 32-bit word of a tensor core's operand holds.
struct GatherTraits {
  int rows_per_thread;         // ROWS
  int phases;                  // phases along R times phases along Y times groups of X phases
  int step_r, step_y, step_x;  // staged input positions per output position
  int span_r, span_y, span_x;  // largest minus smallest offset of a pass
  bool scattered;              // a thread's positions are `lanes` apart in the flattened plane
  int taps_per_pass;           // most weight slots that one pass stages
  int max_warps;               // of a thread block, those that compute
  int max_warps_c = 6;         // of them, with different output channels
  int warp_threads = WARP;     // several warps may be dealt together as one
  int most_stages = 2, stage_step = 1;  // the number of stages is a multiple of the step
  int scratch_bytes = 0;                // shared memory of a thread block behind the stages
  int extra_threads = 0;                // of a thread block beside them
  int lanes_per_warp;                   // positions that a warp's lanes make
  int channels_per_warp;                // output channels of one warp
  int packed_per_slot;  // packed weight words per slot, input word and warp of channels
  int word_bytes;
  int words;                  // input words per group, rounded up to chunk_step
  int chunk_step, max_chunk;  // input words per stage: a multiple of the one, at most the other
  int pitch_residue = 0;      // of a word's tile, modulo 16 words; 0 if any will do
  // Where accesses have one element each, lines pass through so many raw buffers, in vectors, if
  // any: of each of a word's channels, elements as they lie in the input.
  int raw_buffers = 0;
  int raw_channels = 1, element_bytes = 4;
  // Or tiles are staged as the input lies in memory, in vectors of so many elements: a channel of
  // a word after the other, [plane][line][column], where planes and lines are so many apart in the
  // input. Pitches then count elements.
  int vector = 0;
  int plane_step = 1, line_step = 1;
  int place_bytes = 0;       // of an entry of the table of a channel's vectors
  bool loads_words = false;  // whether lanes load words of neighbours (WordOrder)
  // What lanes load of a line at once: strips and tiles are multiples of it.
  int access = 1;
  // For expected_clocks: weight slots and regions of all phases, what a warp takes of its
  // multiprocessor for one slot and `chunk_step` words, and phases of X per thread.
  int slots, regions;
  double slot_clocks;
  int variants, phases_x;
};

// Of a raw buffer: at least so much, or one line; more than the other does not hide more.
constexpr int RAW_LEAST_BYTES = 1024, RAW_MOST_BYTES = 3072;
constexpr int RAW_MOST_LINES = 63;

// Bytes of the vectors that cover a line, wherever in a vector it begins.
inline int64_t raw_line_bytes(const GatherTraits& t, int64_t columns) {
  return round_up(columns * t.element_bytes + VECTOR_BYTES - t.element_bytes, VECTOR_BYTES);
}

// Lines that a raw buffer of so many bytes holds.
inline int64_t raw_lines(const GatherTraits& t, int64_t columns, int64_t lines, int64_t bytes) {
  const int64_t fit = bytes / (raw_line_bytes(t, columns) * t.raw_channels);
  const int64_t most = lines < RAW_MOST_LINES ? lines : RAW_MOST_LINES;
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// Shared memory of all raw buffers that hold so many lines.
inline int64_t raw_total(const GatherTraits& t, int64_t columns, int64_t lines) {
  return t.raw_buffers * t.raw_channels * lines * raw_line_bytes(t, columns);
}

// Where lanes load words of neighbours, the lines of a product's channels begin in the same half of
// a word. The channels of four lanes lie FAR apart where there are whole multiples of 32: these lie
// in different banks whatever a line's length. Else they are neighbours, or NEAR, where a channel
// has an odd number of elements.
constexpr int NEAR_CHANNELS = 2, FAR_CHANNELS = 8;
constexpr int FAR_PERIOD = 4 * FAR_CHANNELS;

inline int lane_channels_of(int64_t channels, int64_t channel_stride) {
  if (channels % FAR_PERIOD == 0) return FAR_CHANNELS;
  return channel_stride % 2 == 0 ? 1 : NEAR_CHANNELS;
}

// The first channel of an 8-channel block.
__host__ __device__ constexpr int block8_channel(int lane_channels, unsigned block8) {
  if (lane_channels == 1) return block8 * 8;
  const unsigned far = block8 / 4 * FAR_PERIOD + block8 / 2 % 2 * 4, near = block8 / 2 * 16;
  return (lane_channels == FAR_CHANNELS ? far : near) + block8 % 2;
}

// Pitches, in elements, of a tile that is staged as the input lies in memory: an element's place in
// its vector is the same on both sides wherever the tile begins, for each pitch is congruent to
// the distance in the input. Lines have room for the vectors that cover them from any start.
struct VectorPitches {
  int64_t vectors;  // of a line
  int64_t line, plane;
  int lane_channels, half_channels;
  int64_t lane, half, block8;

  VectorPitches(const GatherShape& s, const GatherTraits& t, int64_t columns, int64_t rows,
                int64_t planes) {
    auto congruent = [&](int64_t least, int64_t distance) {
      return least + ((distance - least) % t.vector + t.vector) % t.vector;
    };
    vectors = ceil_div(columns + t.vector - 1, t.vector);
    line = congruent(vectors * t.vector, int64_t{t.line_step} * s.y.input_stride);
    plane = congruent(rows * line, int64_t{t.plane_step} * s.r.input_stride);
    const int64_t channel = planes * plane, stride = s.in_channel_stride;
    // From a lane's channels to the next lane's: of the next few, that with the fewest wavefronts.
    auto spread = [&](int64_t least, int64_t distance, int slots) {
      int64_t best = 0;
      int fewest = WARP + 1;
      for (int64_t i = 0; i < 128 / t.element_bytes; i += t.vector) {
        const int64_t pitch = congruent(least, distance) + i;
        const int wavefronts = fragment_wavefronts(t, slots * pitch);
        if (wavefronts < fewest) fewest = wavefronts, best = pitch;
      }
      return best;
    };
    lane_channels = t.loads_words ? lane_channels_of(s.in_channels, stride) : 1;
    if (lane_channels == FAR_CHANNELS) {
      half_channels = NEAR_CHANNELS;
      half = congruent(channel, half_channels * stride);
      lane = spread(half + channel, lane_channels * stride, 1);
      block8 = round_up(4 * lane, t.vector) + t.vector;
    } else {
      half_channels = 4 * lane_channels;
      lane = spread(channel, lane_channels * stride, t.raw_channels);
      half = 4 * lane, block8 = 8 * lane;
      if (lane_channels == NEAR_CHANNELS) block8 = round_up(block8, t.vector) + t.vector;
    }
  }

 private:
  // Of a load of a fragment: lane 4 g + t reads position g of the channels t * lane_pitch on.
  static int fragment_wavefronts(const GatherTraits& t, int64_t lane_pitch) {
    int words[32][WARP], counts[32] = {}, most = 0;
    for (int lane = 0; lane < WARP; ++lane) {
      const int64_t element = lane / 4 * t.step_x + lane % 4 * lane_pitch;
      const int word = static_cast<int>(element * t.element_bytes / 4), bank = word % 32;
      bool known = false;
      for (int i = 0; i < counts[bank]; ++i) known |= words[bank][i] == word;
      if (!known) words[bank][counts[bank]++] = word;
      if (counts[bank] > most) most = counts[bank];
    }
    return most;
  }
};

constexpr int GATHER_MAX_WARPS = 12;  // at up to 168 registers a thread
constexpr int GATHER_LEAST_STAGES = 2;

// Cuts lines into what raw buffers hold: of a plane's as many as fit into these, each of which gets
// its part of `spare` bytes on top of the least. Returns the bytes of all buffers.
inline int cut_raw(GatherShape& s, const GatherTraits& t, int64_t spare, int64_t raw_least) {
  const int64_t least = raw_lines(t, s.row_pitch, s.rows, raw_least);
  int64_t bytes = (raw_total(t, s.row_pitch, least) + spare) / t.raw_buffers;
  if (bytes > RAW_MOST_BYTES) bytes = RAW_MOST_BYTES;
  int64_t lines = raw_lines(t, s.row_pitch, s.rows, bytes);
  if (lines < least) lines = least;
  const int64_t parts = ceil_div(s.rows, lines);
  s.raw_lines = static_cast<int>(ceil_div(s.rows, parts));
  s.raw_line_bytes = static_cast<int>(raw_line_bytes(t, s.row_pitch));
  s.raw_bytes = s.raw_lines * s.raw_line_bytes * t.raw_channels;
  s.raw_parts = Divisor(parts);
  s.raw_planes = Divisor(s.planes);
  s.raw_vectors = Divisor(s.raw_line_bytes / VECTOR_BYTES);
  return t.raw_buffers * s.raw_bytes;
}

// Cuts a call into tiles: `blocks_c` blocks of warps by channels, then the strip width that stages
// the fewest elements, then as many input words per stage as keep the tile small.
inline int cut_tiles(GatherShape& s, const GatherTraits& t, int64_t batch, int64_t groups,
                     int shared_limit, int64_t blocks_c, int64_t raw_least) {
  shared_limit -= t.scratch_bytes;
  s.warps_c = static_cast<int>(ceil_div(ceil_div(s.out_channels, t.channels_per_warp), blocks_c));
  const int rows = t.rows_per_thread;
  const int64_t flat_rows = t.scattered ? rows : 1;
  const int64_t plane = int64_t{s.y.positions} * s.x.positions;
  const int64_t weights = int64_t{t.taps_per_pass} * t.packed_per_slot * s.warps_c;
  int warps_p = t.max_warps / s.warps_c;
  while (warps_p > 1 && int64_t{warps_p - 1} * t.lanes_per_warp * flat_rows >= plane) --warps_p;

  const bool raw = t.raw_buffers > 0 && s.load_width == 1;
  const int64_t access = s.load_width > t.access ? s.load_width : t.access;
  double best_cost = -1;
  int64_t word_pitch = 0;  // of a word's tile, in words
  for (; warps_p >= 1; --warps_p) {
    if (best_cost >= 0 && warps_p * s.warps_c < t.max_warps / 2) break;  // too few to fill the chip
    const int64_t lanes = int64_t{warps_p} * t.lanes_per_warp;
    const int64_t flat = lanes * flat_rows;
    for (const int64_t target : {1024, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8}) {
      const int64_t strips = ceil_div(s.x.positions, target);
      const int64_t width = round_up(ceil_div(s.x.positions, strips), t.access);
      const int64_t positions = width * s.y.positions;
      // A run of `flat` positions that may start anywhere in a line touches this many lines.
      int64_t tile_rows = (flat - 2) / width + 2;
      if (flat % width == 0) tile_rows = flat / width;
      if (width % flat == 0) tile_rows = 1;
      if (tile_rows > s.y.positions) tile_rows = s.y.positions;
      const int64_t staged_rows = (tile_rows - 1) * t.step_y + t.span_y + 1;
      const int64_t planes = t.scattered ? 1 : int64_t{rows - 1} * t.step_r + t.span_r + 1;
      // A tile that starts at a multiple of the access width may start that much earlier.
      const int64_t columns = round_up((width - 1) * t.step_x + t.span_x + access, access);
      const int64_t residue_pitch = ceil_div(columns, t.step_x);
      int64_t pitch = residue_pitch * t.step_x, plane_pitch = staged_rows * pitch;
      int64_t word = planes * plane_pitch;
      if (t.pitch_residue) {
        word = round_up(word - t.pitch_residue, 16) + t.pitch_residue;
      }
      // Staged accesses of a line; each costs about a warp's more than its length.
      int64_t channel_pitch = word, line = pitch / s.load_width, accesses = line + WARP;
      if (t.vector) {
        const VectorPitches p(s, t, (width - 1) * t.step_x + t.span_x + 1, staged_rows, planes);
        pitch = p.line, plane_pitch = p.plane, channel_pitch = p.lane;
        word = ceil_div(t.raw_channels * p.block8 * t.element_bytes, 8 * t.word_bytes);
        line = accesses = p.vectors;
      }
      int64_t bytes = GATHER_LEAST_STAGES * t.word_bytes * t.chunk_step *
                      (round_up(word, 4) + round_up(weights, 4));
      const int64_t places = t.place_bytes * planes * staged_rows * line;
      if (t.vector) bytes += GATHER_LEAST_STAGES * VECTOR_BYTES + places;
      const int64_t raw_bytes =
          raw ? raw_total(t, pitch, raw_lines(t, pitch, staged_rows, raw_least)) : 0;
      if (bytes + raw_bytes > shared_limit) continue;
      const int64_t tiles = strips * ceil_div(positions, flat);
      // Staged accesses, and idle lanes; fewer warps hide less.
      const double cost = double(tiles) * (planes * staged_rows * accesses + flat * rows * 4) *
                          (1.0 + 0.5 / warps_p);
      if (best_cost >= 0 && cost >= best_cost) continue;
      best_cost = cost;
      s.strip_width = static_cast<int>(width);
      s.lanes = static_cast<int>(lanes);
      s.planes = static_cast<int>(planes);
      s.rows = static_cast<int>(staged_rows);
      s.columns = static_cast<int>((width - 1) * t.step_x + t.span_x + 1);
      s.residue_pitch = static_cast<int>(residue_pitch);
      s.row_pitch = static_cast<int>(pitch);
      s.plane_pitch = static_cast<int>(plane_pitch);
      s.channel_pitch = static_cast<int>(channel_pitch);
      s.by_columns = Divisor(line);
      if (t.vector) {
        const VectorPitches p(s, t, s.columns, staged_rows, planes);
        s.lane_channels = p.lane_channels, s.half_channels = p.half_channels;
        s.lane_pitch = static_cast<int>(p.lane), s.half_pitch = static_cast<int>(p.half);
        s.block8_pitch = static_cast<int>(p.block8);
      }
      word_pitch = word;
      s.strips = Divisor(strips);
      s.lane_tiles = Divisor(ceil_div(positions, flat));
    }
  }
  if (best_cost < 0) return CONVGEN_TOO_LARGE;
  const int places = t.place_bytes * s.planes * s.rows * static_cast<int>(s.by_columns.divisor);
  shared_limit -= places;
  if (raw) {
    shared_limit -=
        static_cast<int>(raw_total(t, s.row_pitch, raw_lines(t, s.row_pitch, s.rows, raw_least)));
  }
  s.threads = s.lanes / t.lanes_per_warp * t.warp_threads * s.warps_c + t.extra_threads;

  // Input words per stage: as many as let two stages fit into half of the shared memory (two blocks
  // could then live on a multiprocessor, or one with more stages), and no more than there are.
  const int64_t per_word =
      GATHER_LEAST_STAGES * (round_up(word_pitch, 4) + round_up(weights, 4)) * t.word_bytes;
  int64_t chunk = shared_limit / 2 / per_word;
  if (chunk > t.max_chunk) chunk = t.max_chunk;
  chunk = chunk / t.chunk_step * t.chunk_step;
  if (chunk < t.chunk_step) chunk = t.chunk_step;
  s.words = static_cast<int>(round_up(t.words, t.chunk_step));
  s.chunks = static_cast<int>(ceil_div(s.words, chunk));
  s.chunk = static_cast<int>(round_up(ceil_div(s.words, s.chunks), t.chunk_step));
  s.chunks = static_cast<int>(ceil_div(s.words, s.chunk));
  s.tile_elements = static_cast<int>(round_up(int64_t{s.chunk} * word_pitch, 4));
  // A tile may begin anywhere in its first vector.
  if (t.vector) s.tile_elements += VECTOR_BYTES / t.word_bytes;
  s.stage_elements = s.tile_elements + static_cast<int>(round_up(int64_t{s.chunk} * weights, 4));
  const int stage_bytes = s.stage_elements * t.word_bytes;
  if (GATHER_LEAST_STAGES * stage_bytes > shared_limit) return CONVGEN_TOO_LARGE;
  s.stages = shared_limit / stage_bytes / t.stage_step * t.stage_step;
  if (s.stages > t.most_stages) s.stages = t.most_stages;
  s.shared_bytes = s.stages * stage_bytes + t.scratch_bytes + places;
  if (raw) s.shared_bytes += cut_raw(s, t, shared_limit - s.stages * stage_bytes, raw_least);

  const int64_t row_tiles = ceil_div(s.r.positions, t.scattered ? 1 : rows);
  s.by_strip_width = Divisor(s.strip_width);
  s.by_rows = Divisor(s.rows);
  s.by_planes = Divisor(s.planes);
  s.channel_blocks = Divisor(blocks_c);
  s.phases = Divisor(t.phases);
  s.row_tiles = Divisor(row_tiles);
  s.groups = Divisor(groups);
  s.blocks =
      blocks_c * t.phases * row_tiles * s.lane_tiles.divisor * s.strips.divisor * groups * batch;
  return s.blocks <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

// What a call is expected to take, in clocks: convgen/engines/gather/cost.py in short. Thread
// blocks take turns on the multiprocessors; of a step the longer of products and copies counts, a
// part of the other, and what barriers take.
inline double expected_clocks(const GatherShape& s, const GatherTraits& t, int multiprocessors,
                              const GpuRates& rates) {
  const double warps = double(s.lanes) / t.lanes_per_warp * s.warps_c;
  const double slots = double(t.slots) / t.regions;  // of a step
  const double arithmetic = warps * slots * t.slot_clocks;
  const double words = double(s.tile_elements) / s.chunk + slots * t.packed_per_slot * s.warps_c;
  const double copies = words * t.word_bytes * t.chunk_step / rates.level2_bytes;
  const double longer = arithmetic > copies ? arithmetic : copies;
  const double step = longer + OVERLAP * (arithmetic + copies - longer) + GATHER_STEP_CLOCKS;
  const double steps = double(t.regions) / t.phases * s.words / t.chunk_step;
  const double outputs = double(s.lanes) * t.rows_per_thread * t.variants * t.channels_per_warp *
                         s.warps_c * t.element_bytes;
  const double stores = outputs / (t.phases_x == 1 ? STORED_BYTES : SPREAD_BYTES);
  return double(ceil_div(s.blocks, multiprocessors)) * (steps * step + GATHER_TILE_CLOCKS + stores);
}

// The best of some cuts: that with the least `cost` by a simple rule, unless expected_clocks has
// another take less by a margin.
template <class Cut>
class BestCut {
 public:
  void offer(const Cut& cut, int64_t cost, double clocks) {
    if (!found_ || cost < cost_) preferred_ = cut, cost_ = cost, preferred_clocks_ = clocks;
    if (!found_ || clocks < fastest_clocks_) fastest_ = cut, fastest_clocks_ = clocks;
    found_ = true;
  }
  bool found() const { return found_; }
  const Cut& best() const { return overrules() ? fastest_ : preferred_; }
  double clocks() const { return overrules() ? fastest_clocks_ : preferred_clocks_; }

 private:
  bool overrules() const { return fastest_clocks_ < OVERRULES * preferred_clocks_; }

  Cut preferred_, fastest_;
  int64_t cost_ = 0;
  double preferred_clocks_ = 0, fastest_clocks_ = 0;
  bool found_ = false;
};

// Cuts a call into tiles. Fewest blocks per output channel, each of which reads the input; more of
// them, with more positions each, where reading the weights takes longer. Raw buffers have one line
// where tiles leave no room for more.
inline int cut_gather(GatherShape& s, const GatherTraits& t, int64_t batch, int64_t groups,
                      const DeviceLimits& limits, const GpuRates& rates, double& clocks) {
  const int shared_limit = limits.shared_bytes;
  const int64_t channel_blocks = ceil_div(s.out_channels, t.channels_per_warp);
  const int64_t least = ceil_div(channel_blocks, t.max_warps_c);
  BestCut<GatherShape> cuts;
  for (int64_t warps_c = ceil_div(channel_blocks, least); warps_c >= 1; --warps_c) {
    const int64_t blocks_c = ceil_div(channel_blocks, warps_c);
    if (ceil_div(channel_blocks, blocks_c) != warps_c) continue;  // as another number of warps
    GatherShape shape = s;
    int failed = cut_tiles(shape, t, batch, groups, shared_limit, blocks_c, RAW_LEAST_BYTES);
    if (failed && t.raw_buffers > 0) {
      failed = cut_tiles(shape, t, batch, groups, shared_limit, blocks_c, 0);
    }
    if (!failed)
      cuts.offer(shape, blocks_c, expected_clocks(shape, t, limits.multiprocessors, rates));
  }
  if (!cuts.found()) return CONVGEN_TOO_LARGE;
  s = cuts.best();
  clocks = cuts.clocks();
  return CONVGEN_OK;
}

}  // namespace convgen
