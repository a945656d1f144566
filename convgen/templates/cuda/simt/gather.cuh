// The part of fprop and dgrad that does not depend on the specification: how a call is cut into
// tiles, how a tile is staged, how results leave. The rendered unit supplies the arithmetic.
//
// Both contractions gather: output positions read an input around them. Their three axes are
// called R (register rows: a thread owns ROWS consecutive positions along it), Y and X (lanes run
// along the flattened (Y, X) plane, X fastest and contiguous in memory).
#pragma once

#include <type_traits>

#include "common.cuh"

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

  // The cut: planes are cut into strips of columns; LANES positions of a strip, times ROWS rows,
  // times `warps_c` blocks of CHANNELS output channels are one thread block.
  int strip_width, lanes, warps_c;
  Divisor by_strip_width;
  Divisor channel_blocks, phases, row_tiles, lane_tiles, strips, groups;
  int64_t blocks;

  int threads;

  // The staged tile: `chunk` of `words` input words of [planes][rows][residue of X][columns].
  int words;
  int planes, rows, row_pitch, residue_pitch, plane_pitch, channel_pitch;
  Divisor by_columns, by_rows;  // staged accesses of a line, lines of a plane
  int chunk, chunks, tile_elements, stage_elements;
  int stages;  // buffers that hold a staged tile and its weights
  int shared_bytes;
  int load_width;     // elements per staged access; above 1, tiles start at a multiple of it
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
};

constexpr int GATHER_MAX_WARPS = 12;  // at up to 168 registers a thread
constexpr int GATHER_LEAST_STAGES = 2;

// Cuts a call into tiles: blocks of warps by channels first, then the strip width that stages the
// fewest elements, then as many input words per stage as keep the tile small.
inline int cut_gather(GatherShape& s, const GatherTraits& t, int64_t batch, int64_t groups,
                      int shared_limit) {
  shared_limit -= t.scratch_bytes;
  const int64_t channel_blocks = ceil_div(s.out_channels, t.channels_per_warp);
  // Fewest blocks per output channel, then least idle warps.
  const int64_t blocks_c = ceil_div(channel_blocks, t.max_warps_c);
  s.warps_c = static_cast<int>(ceil_div(channel_blocks, blocks_c));
  const int rows = t.rows_per_thread;
  const int64_t flat_rows = t.scattered ? rows : 1;
  const int64_t plane = int64_t{s.y.positions} * s.x.positions;
  const int64_t weights = int64_t{t.taps_per_pass} * t.packed_per_slot * s.warps_c;
  int warps_p = t.max_warps / s.warps_c;
  while (warps_p > 1 && int64_t{warps_p - 1} * t.lanes_per_warp * flat_rows >= plane) --warps_p;

  double best_cost = -1;
  for (; warps_p >= 1; --warps_p) {
    if (best_cost >= 0 && warps_p * s.warps_c < t.max_warps / 2) break;  // too few to fill the chip
    const int64_t lanes = int64_t{warps_p} * t.lanes_per_warp;
    const int64_t flat = lanes * flat_rows;
    for (const int64_t target : {1024, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8}) {
      const int64_t strips = ceil_div(s.x.positions, target);
      const int64_t width = ceil_div(s.x.positions, strips);
      const int64_t positions = width * s.y.positions;
      // A run of `flat` positions that may start anywhere in a line touches this many lines.
      int64_t tile_rows = (flat - 2) / width + 2;
      if (flat % width == 0) tile_rows = flat / width;
      if (width % flat == 0) tile_rows = 1;
      if (tile_rows > s.y.positions) tile_rows = s.y.positions;
      const int64_t staged_rows = (tile_rows - 1) * t.step_y + t.span_y + 1;
      const int64_t planes = t.scattered ? 1 : int64_t{rows - 1} * t.step_r + t.span_r + 1;
      // A tile that starts at a multiple of the access width may start that much earlier.
      const int64_t columns =
          round_up((width - 1) * t.step_x + t.span_x + s.load_width, s.load_width);
      const int64_t residue_pitch = ceil_div(columns, t.step_x);
      int64_t word = planes * staged_rows * residue_pitch * t.step_x;
      if (t.pitch_residue) {
        word = round_up(word - t.pitch_residue, 16) + t.pitch_residue;
      }
      const int64_t bytes = GATHER_LEAST_STAGES * t.word_bytes * t.chunk_step *
                            (round_up(word, 4) + round_up(weights, 4));
      if (bytes > shared_limit) continue;
      const int64_t tiles = strips * ceil_div(positions, flat);
      // Staged accesses (a line costs about a warp's more than its length), and idle lanes; fewer
      // warps hide less.
      const int64_t line = residue_pitch * t.step_x / s.load_width + WARP;
      const double cost =
          double(tiles) * (planes * staged_rows * line + flat * rows * 4) * (1.0 + 0.5 / warps_p);
      if (best_cost >= 0 && cost >= best_cost) continue;
      best_cost = cost;
      s.strip_width = static_cast<int>(width);
      s.lanes = static_cast<int>(lanes);
      s.planes = static_cast<int>(planes);
      s.rows = static_cast<int>(staged_rows);
      s.residue_pitch = static_cast<int>(residue_pitch);
      s.row_pitch = static_cast<int>(residue_pitch * t.step_x);
      s.plane_pitch = static_cast<int>(staged_rows * s.row_pitch);
      s.channel_pitch = static_cast<int>(word);
      s.strips = Divisor(strips);
      s.lane_tiles = Divisor(ceil_div(positions, flat));
    }
  }
  if (best_cost < 0) return CONVGEN_TOO_LARGE;
  s.threads = s.lanes / t.lanes_per_warp * t.warp_threads * s.warps_c + t.extra_threads;

  // Input words per stage: as many as let two stages fit into half of the shared memory (two blocks
  // could then live on a multiprocessor, or one with more stages), and no more than there are.
  const int64_t per_word =
      GATHER_LEAST_STAGES * (round_up(s.channel_pitch, 4) + round_up(weights, 4)) * t.word_bytes;
  int64_t chunk = shared_limit / 2 / per_word;
  if (chunk > t.max_chunk) chunk = t.max_chunk;
  chunk = chunk / t.chunk_step * t.chunk_step;
  if (chunk < t.chunk_step) chunk = t.chunk_step;
  s.words = static_cast<int>(round_up(t.words, t.chunk_step));
  s.chunks = static_cast<int>(ceil_div(s.words, chunk));
  s.chunk = static_cast<int>(round_up(ceil_div(s.words, s.chunks), t.chunk_step));
  s.chunks = static_cast<int>(ceil_div(s.words, s.chunk));
  s.tile_elements = static_cast<int>(round_up(int64_t{s.chunk} * s.channel_pitch, 4));
  s.stage_elements = s.tile_elements + static_cast<int>(round_up(int64_t{s.chunk} * weights, 4));
  const int stage_bytes = s.stage_elements * t.word_bytes;
  if (GATHER_LEAST_STAGES * stage_bytes > shared_limit) return CONVGEN_TOO_LARGE;
  s.stages = shared_limit / stage_bytes / t.stage_step * t.stage_step;
  if (s.stages > t.most_stages) s.stages = t.most_stages;
  s.shared_bytes = s.stages * stage_bytes + t.scratch_bytes;

  const int64_t row_tiles = ceil_div(s.r.positions, t.scattered ? 1 : rows);
  s.by_strip_width = Divisor(s.strip_width);
  s.by_rows = Divisor(s.rows);
  s.by_columns = Divisor(s.row_pitch / s.load_width);
  s.channel_blocks = Divisor(blocks_c);
  s.phases = Divisor(t.phases);
  s.row_tiles = Divisor(row_tiles);
  s.groups = Divisor(groups);
  s.blocks =
      blocks_c * t.phases * row_tiles * s.lane_tiles.divisor * s.strips.divisor * groups * batch;
  return s.blocks <= INDEX_LIMIT ? CONVGEN_OK : CONVGEN_TOO_LARGE;
}

// Where a thread block works: block `index` of s.blocks.
struct GatherBlock {
  int channel_block, phase, group, batch;
  int r0;     // first position along R
  int x0;     // first column of the strip
  int flat0;  // first flattened position within the strip
};

__device__ __forceinline__ GatherBlock locate_block(const GatherShape& s, int index,
                                                    int flat_per_block, int rows_per_block) {
  GatherBlock block;
  block.channel_block = s.channel_blocks.split(index);
  block.phase = s.phases.split(index);
  block.r0 = s.row_tiles.split(index) * rows_per_block;
  block.flat0 = s.lane_tiles.split(index) * flat_per_block;
  block.x0 = s.strips.split(index) * s.strip_width;
  block.group = s.groups.split(index);
  block.batch = index;
  return block;
}

// Stages `count` input channels, of which `channels` exist, of a tile whose first element is input
// position (r, y, x): plane j is row r + j * PLANE_STEP of R, line j is y + j * LINE_STEP of Y, and
// columns are laid out by their residue modulo STEP_X, so that neighbouring lanes read neighbouring
// words. A thread takes WIDTH neighbouring columns of a line (`x` and the input's lines are then
// multiples of WIDTH, and STEP_X is 1), finds its place once and copies it for every channel.
// Positions outside the input and channels that do not exist are zero. BATCH channels at a time are
// copied by addresses of their own, which one instruction finds each: threads with registers to
// spare then wait for none of them.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, int WIDTH, int BATCH, typename Acc, typename T>
__device__ __forceinline__ void stage_lines(const GatherShape& s, const Crew& crew, Acc* tile,
                                            const T* input, int count, int channels, int r, int y,
                                            int x) {
  auto stage_place = [&](Acc* to, const T* from, bool inside) {
    const int existing = inside ? min(count, channels) : 0;
    int channel = 0;
    if constexpr (BATCH > 1) {
      const uint32_t stride = static_cast<uint32_t>(s.in_channel_stride);  // below 2^31
#pragma unroll 1
      for (; channel + BATCH <= existing; channel += BATCH) {
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          stage_vector<WIDTH>(to + i * s.channel_pitch, from + uint64_t{stride} * i, true);
        }
        from += uint64_t{stride} * BATCH;
        to += BATCH * s.channel_pitch;
      }
    }
#pragma unroll 4
    for (; channel < existing; ++channel) {
      stage_vector<WIDTH>(to, from, true);
      from += s.in_channel_stride;
      to += s.channel_pitch;
    }
    for (; channel < count; ++channel) {
      stage_vector<WIDTH>(to, input, false);
      to += s.channel_pitch;
    }
  };
  auto line_inside = [&](int line, const T*& from) {
    int plane = line;
    const int row = s.by_rows.split(plane);
    const int input_r = r + plane * PLANE_STEP, input_y = y + row * LINE_STEP;
    const bool inside = static_cast<unsigned>(input_r) < static_cast<unsigned>(s.r.input) &&
                        static_cast<unsigned>(input_y) < static_cast<unsigned>(s.y.input);
    from = input;
    if (inside) from += input_r * s.r.input_stride + input_y * s.y.input_stride;
    return inside;
  };
  if constexpr (WIDTH > 1) {
    // Short lines of wide accesses: threads are dealt places, not lines.
    const int items = s.planes * s.rows * s.by_columns.divisor;
    for (int item = crew.thread; item < items; item += crew.threads) {
      int line = item;
      const int column = s.by_columns.split(line) * WIDTH;
      const T* from;
      const bool inside = line_inside(line, from) &&
                          static_cast<unsigned>(x + column) < static_cast<unsigned>(s.x.input);
      stage_place(tile + line * s.row_pitch + column, inside ? from + (x + column) : input, inside);
    }
  } else {
    // Long lines: a line per warp at a time.
    const int lines = s.planes * s.rows, lane = crew.thread % WARP;
    for (int line = crew.thread / WARP; line < lines; line += crew.threads / WARP) {
      const T* from;
      const bool line_is_inside = line_inside(line, from);
      Acc* const to_line = tile + line * s.row_pitch;
      // Where STEP_X divides a warp, a lane's columns have one residue.
      constexpr bool ONE_RESIDUE = WARP % STEP_X == 0;
      Acc* to_lane = to_line + lane % STEP_X * s.residue_pitch + lane / STEP_X;
      for (int column = lane; column < s.row_pitch; column += WARP) {
        const bool inside =
            line_is_inside && static_cast<unsigned>(x + column) < static_cast<unsigned>(s.x.input);
        Acc* const to =
            ONE_RESIDUE ? to_lane : to_line + column % STEP_X * s.residue_pitch + column / STEP_X;
        stage_place(to, inside ? from + (x + column) : input, inside);
        to_lane += WARP / STEP_X;
      }
    }
  }
}

// ---- Lines that no wide access can copy ------------------------------------------------------
//
// Warps that only stage are bound by how many instructions a copy takes. So each lane keeps its
// columns, finds out once which of them lie inside the input, and walks down the lines of a plane
// with constant steps: the copies of a line differ by offsets that are part of the instruction.

// Where a staged tile begins in the input.
struct TileOrigin {
  int r, y, x;
};

// Words of one channel, copied asynchronously. `from` is where a lane's first column would be in
// the input's line 0; of the channels from the word's on, `channels` exist.
template <typename T>
struct SingleWords {
  static constexpr int CHANNELS = 1;
  static constexpr bool ASYNCHRONOUS = true;
  const T* from;

  __device__ __forceinline__ SingleWords(const GatherShape&, const T* from, int /*channels*/)
      : from(opaque(from)) {}

  // COUNT words, PITCH apart, of elements STRIDE apart, `at` elements on; zeros if not inside.
  template <int PITCH, int STRIDE, int COUNT>
  __device__ __forceinline__ void copy(T* to, uint32_t at, const bool (&inside)[COUNT]) const {
    const T* const elements = from + at;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      copy_async<sizeof(T)>(to + i * PITCH, elements + i * STRIDE, inside[i]);
    }
  }
};

// How lanes are dealt the columns of a line: LANES neighbouring ones at a time, so that a lane's
// next column has the same residue and lies PITCH words further. Where STEP_X leaves too many lanes
// idle that way, all of them take part, and find each place anew.
template <int STEP_X>
struct ColumnDeal {
  static constexpr bool EVEN = WARP % STEP_X <= 4;
  static constexpr int LANES = EVEN ? WARP - WARP % STEP_X : WARP;
  static constexpr int PITCH = LANES / STEP_X;

  __device__ static __forceinline__ int place(const GatherShape& s, int column) {
    return STEP_X == 1 ? column : column % STEP_X * s.residue_pitch + column / STEP_X;
  }
};

// What neighbouring lines or planes, STEP apart, have in the input: those of [begin, end).
struct Inside {
  int begin, end;
};

template <int STEP>
__device__ __forceinline__ Inside find_inside(int origin, int count, int extent) {
  return {origin < 0 ? min((-origin + STEP - 1) / STEP, count) : 0,
          origin < extent ? min((extent - origin + STEP - 1) / STEP, count) : 0};
}

// The words that a warp stages together: one, or two that have `to_next` words between them in the
// tile.
template <class Words>
struct WordPair {
  Words words[2];
  int to_next;
  bool two;
};

// Neighbouring lines or planes of a tile: how far apart in the tile and in the input. Distances
// within the input are 32-bit, so that an address is one instruction, and none waits for another.
struct Walk {
  int count;
  int to;
  uint32_t from;
};

// Stages COUNT columns of some lines (or planes).
template <class Deal, int COUNT, class Words, typename Acc>
__device__ __forceinline__ void copy_lines(const WordPair<Words>& pair, Acc* to, uint32_t from,
                                           const Walk& lines, const bool (&inside)[COUNT]) {
  if (pair.two) {
#pragma unroll 2
    for (int line = 0; line < lines.count; ++line) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pair.words[i].template copy<Deal::PITCH, Deal::LANES>(to + i * pair.to_next, from, inside);
      }
      from += lines.from;
      to += lines.to;
    }
  } else {
    // Several lines by addresses of their own: a copy keeps its address for a while.
    constexpr int TOGETHER = COUNT >= 4 ? 2 : 4;
    int line = 0;
    for (; line + TOGETHER <= lines.count; line += TOGETHER) {
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) {
        pair.words[0].template copy<Deal::PITCH, Deal::LANES>(to + i * lines.to,
                                                              from + i * lines.from, inside);
      }
      from += TOGETHER * lines.from;
      to += TOGETHER * lines.to;
    }
#pragma unroll 1
    for (; line < lines.count; ++line) {
      pair.words[0].template copy<Deal::PITCH, Deal::LANES>(to, from, inside);
      from += lines.from;
      to += lines.to;
    }
  }
}

// The same for some lines of some planes and one word, which passes through registers: as many
// loads as a thread has room for are on their way at once.
template <class Deal, int COUNT, class Words, typename Acc>
__device__ __forceinline__ void load_lines(const Words& word, Acc* to, uint32_t from,
                                           const Walk& lines, const Walk& planes,
                                           const bool (&inside)[COUNT]) {
  constexpr int BATCH = COUNT == 1 ? 4 : COUNT == 2 ? 2 : 1;
  // From a plane's last line to the next one's first.
  const int to_jump = planes.to - (lines.count - 1) * lines.to;
  const uint32_t from_jump = planes.from - (lines.count - 1) * lines.from;
  int line = 0;
#pragma unroll 1
  for (int left = lines.count * planes.count; left > 0; left -= BATCH) {
    typename Words::template Columns<COUNT> columns[BATCH];
    Acc* to_line[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      to_line[j] = to;
      if (j < left) word.template load<Deal::LANES>(columns[j], from, inside);
      const bool last = ++line == lines.count;
      to += last ? to_jump : lines.to;
      from += last ? from_jump : lines.from;
      if (last) line = 0;
    }
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      if (j < left) word.template store<Deal::PITCH>(to_line[j], columns[j]);
    }
  }
}

// Stages the columns `column`, `column` + LANES, ... (COUNT of them) of all lines, for `words`
// words, which exist. Warps are dealt words, two at a time, and where those are few, planes.
//
// SHORT: the columns from `column` on, of which there are less than LANES; an access then takes
// several lines.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, int COUNT, bool SHORT, class Words,
          typename Acc, typename T>
__device__ __forceinline__ void stage_columns(const GatherShape& s, const Crew& crew, Acc* tile,
                                              const T* input, int words, int channels,
                                              const TileOrigin& origin, int column) {
  using Deal = ColumnDeal<STEP_X>;
  static_assert(COUNT == 1 || (Deal::EVEN && !SHORT), "columns at constant distances");
  const int lane = crew.thread % WARP;
  int first_line = 0, access_lines = 1;
  if constexpr (SHORT) {
    const int columns = s.row_pitch - column, log2 = 32 - __clz(columns - 1);
    first_line = lane >> log2;
    access_lines = WARP >> log2;
    const int lane_column = lane & ((1 << log2) - 1);
    if (lane_column >= columns) return;
    column += lane_column;
  } else {
    column += lane;
    if (lane >= Deal::LANES || column >= s.row_pitch) return;
  }
  bool inside[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    inside[i] = static_cast<unsigned>(origin.x + column + i * Deal::LANES) <
                static_cast<unsigned>(s.x.input);
  }
  const Inside planes = find_inside<PLANE_STEP>(origin.r, s.planes, s.r.input);
  const Inside lines = find_inside<LINE_STEP>(origin.y, s.rows, s.y.input);
  const int warp = crew.thread / WARP, warps = crew.threads / WARP;
  const int share = (2 * words <= warps) + (4 * words <= warps);  // log2 of the warps of a word
  const int slots = warps >> share, turn = warp & ((1 << share) - 1);
  const int64_t word_stride = s.in_channel_stride * Words::CHANNELS;
  // The first plane and line that are inside, and the others.
  const uint32_t plane_stride = s.r.input_stride, line_stride = s.y.input_stride;
  const uint32_t from = (origin.r + planes.begin * PLANE_STEP) * plane_stride +
                        (origin.y + lines.begin * LINE_STEP) * line_stride;
  const int to_first = planes.begin * s.plane_pitch + lines.begin * s.row_pitch;
  const Walk walk_planes = {opaque(planes.end - planes.begin), s.plane_pitch,
                            PLANE_STEP * plane_stride};
  const Walk walk_lines = {opaque(lines.end - lines.begin), s.row_pitch, LINE_STEP * line_stride};
  constexpr int TOGETHER = Words::ASYNCHRONOUS ? 2 : 1;
  for (int word = warp >> share; word < words; word += TOGETHER * slots) {
    const T* const from_word = input + (origin.x + column + word * word_stride);
    const WordPair<Words> pair = {
        {Words(s, from_word, channels - word * Words::CHANNELS),
         Words(s, from_word + slots * word_stride, channels - (word + slots) * Words::CHANNELS)},
        slots * s.channel_pitch,
        TOGETHER == 2 && word + slots < words};
    Acc* const to_word = tile + Deal::place(s, column) + word * s.channel_pitch;
    Acc* const to = to_word + to_first;
    if constexpr (SHORT) {
      for (int line = first_line + turn * access_lines; line < walk_lines.count;
           line += access_lines << share) {
        Acc* const to_line = to + line * walk_lines.to;
        const uint32_t from_line = from + line * walk_lines.from;
        if constexpr (Words::ASYNCHRONOUS) {
          copy_lines<Deal>(pair, to_line, from_line, walk_planes, inside);
        } else {
          load_lines<Deal>(pair.words[0], to_line, from_line, walk_planes, {1, 0, 0}, inside);
        }
      }
    } else if constexpr (Words::ASYNCHRONOUS) {
      for (int plane = turn; plane < walk_planes.count; plane += 1 << share) {
        copy_lines<Deal>(pair, to + plane * walk_planes.to, from + plane * walk_planes.from,
                         walk_lines, inside);
      }
    } else {
      const Walk own_planes = {(walk_planes.count - turn + (1 << share) - 1) >> share,
                               walk_planes.to << share, walk_planes.from << share};
      load_lines<Deal>(pair.words[0], to + turn * walk_planes.to, from + turn * walk_planes.from,
                       walk_lines, own_planes, inside);
    }
    if (walk_planes.count == s.planes && walk_lines.count == s.rows) continue;
    // Lines outside of the input, which few tiles have.
    const Acc zero = {};
    for (int plane = turn; plane < s.planes; plane += 1 << share) {
      const bool plane_inside = plane >= planes.begin && plane < planes.end;
#pragma unroll 1
      for (int line = first_line; line < s.rows; line += access_lines) {
        if (plane_inside && line >= lines.begin && line < lines.end) continue;
        Acc* const to_line = to_word + plane * s.plane_pitch + line * s.row_pitch;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          to_line[i * Deal::PITCH] = zero;
          if (pair.two) to_line[i * Deal::PITCH + pair.to_next] = zero;
        }
      }
    }
  }
}

// Stages `count` words of a tile, of whose channels `channels` exist, by warps that do nothing
// else. Positions and layout as in stage_lines; a word's pitch is a multiple of four words.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, class Words, typename Acc, typename T>
__device__ __forceinline__ void stage_by_warps(const GatherShape& s, const Crew& crew, Acc* tile,
                                               const T* input, int count, int channels,
                                               const TileOrigin& origin) {
  using Deal = ColumnDeal<STEP_X>;
  const int words = min(count, (channels + Words::CHANNELS - 1) / Words::CHANNELS);
  // Less than half an access is left to the short lines.
  const int rest = s.row_pitch % Deal::LANES;
  const int columns = s.row_pitch - (rest <= Deal::LANES / 2 ? rest : 0);
  auto stage = [&](auto count, auto is_short, int column) {
    stage_columns<PLANE_STEP, LINE_STEP, STEP_X, count.value, is_short.value, Words>(
        s, crew, tile, input, words, channels, origin, column);
  };
  using Long = std::false_type;
  int column = 0;
  if constexpr (Deal::EVEN) {
    for (; columns - column >= 4 * Deal::LANES; column += 4 * Deal::LANES) {
      stage(std::integral_constant<int, 4>(), Long(), column);
    }
    if (columns - column >= 2 * Deal::LANES) {
      stage(std::integral_constant<int, 2>(), Long(), column);
      column += 2 * Deal::LANES;
    }
  }
  for (; column < columns; column += Deal::LANES) {
    stage(std::integral_constant<int, 1>(), Long(), column);
  }
  if (columns < s.row_pitch) {
    stage(std::integral_constant<int, 1>(), std::true_type(), columns);
  }
  // Words without channels.
  struct alignas(16) Four {
    Acc element[4];
  };
  const int elements = count * s.channel_pitch;
#pragma unroll 1
  for (int i = words * s.channel_pitch + crew.thread * 4; i < elements; i += crew.threads * 4) {
    *reinterpret_cast<Four*>(tile + i) = Four{};
  }
}

// Stages a tile by the widest accesses that the call allows.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, int BATCH = 1, typename Acc, typename T>
__device__ __forceinline__ void stage_tile(const GatherShape& s, const Crew& crew, Acc* tile,
                                           const T* input, int count, int channels, int r, int y,
                                           int x) {
  if constexpr (STEP_X == 1) {
    if constexpr (sizeof(Acc) == 4) {
      if (s.load_width == 4) {
        stage_lines<PLANE_STEP, LINE_STEP, 1, 4, BATCH>(s, crew, tile, input, count, channels, r, y,
                                                        x);
        return;
      }
    }
    if (s.load_width == 2) {
      stage_lines<PLANE_STEP, LINE_STEP, 1, 2, BATCH>(s, crew, tile, input, count, channels, r, y,
                                                      x);
      return;
    }
  }
  if constexpr (BATCH > 1) {
    stage_by_warps<PLANE_STEP, LINE_STEP, STEP_X, SingleWords<T>>(s, crew, tile, input, count,
                                                                  channels, {r, y, x});
  } else {
    stage_lines<PLANE_STEP, LINE_STEP, STEP_X, 1, 1>(s, crew, tile, input, count, channels, r, y,
                                                     x);
  }
}

// x[j] = row j of a column of the tile, for the set bits j of USED.
template <uint64_t USED, int COUNT, typename Acc>
__device__ __forceinline__ void load_column(Acc (&x)[COUNT], const Acc* column, int pitch) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) x[j] = column[j * pitch];
  }
}

// x[m] = this thread's m-th position, where positions are scattered over the plane.
template <int COUNT, typename Acc>
__device__ __forceinline__ void load_scattered(Acc (&x)[COUNT], const Acc* column,
                                               const int (&position)[COUNT]) {
#pragma unroll
  for (int m = 0; m < COUNT; ++m) x[m] = column[position[m]];
}

// One tap: acc[m][c] += x[FIRST + m * STEP] * weight[c].
template <int FIRST, int STEP, int ROWS, int CHANNELS, int COUNT, typename Acc>
__device__ __forceinline__ void multiply_add(Acc (&acc)[ROWS][CHANNELS], const Acc (&x)[COUNT],
                                             const Acc* weight) {
  Acc w[CHANNELS];
  load_row(w, weight);
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) acc[m][c] += x[FIRST + m * STEP] * w[c];
  }
}

// Writes the VARIANTS neighbouring outputs of one position and channel.
template <int VARIANTS, typename T, typename Acc>
__device__ __forceinline__ void store_outputs(T* to, const Acc (&value)[VARIANTS], int valid,
                                              bool vector_store) {
  struct alignas(sizeof(T) * (VARIANTS == 2 || VARIANTS == 4 ? VARIANTS : 1)) Wide {
    T element[VARIANTS];
  };
  if constexpr (VARIANTS == 2 || VARIANTS == 4) {
    if (vector_store) {
      Wide wide;
#pragma unroll
      for (int v = 0; v < VARIANTS; ++v) narrow(wide.element[v], value[v]);
      *reinterpret_cast<Wide*>(to) = wide;
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < VARIANTS; ++v) {
    if (v < valid) narrow(to[v], value[v]);
  }
}

// The region of packed weights that holds element `at`, if each slot has `slot_elements`.
__device__ __forceinline__ int find_region(const int* region_first, int regions,
                                           int64_t slot_elements, int64_t at) {
  int low = 0, high = regions;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (region_first[middle] * slot_elements <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Weights (coarse, fine / groups, taps) -> [group][block of CHANNELS outputs][region]
// [input channel][slot of the region][CHANNELS], in the accumulator's type, zero beyond the last
// output channel. A region is the set of weight slots that one pass reads; slot_tap[slot] is the
// kernel element of a slot, or -1 for none.
template <int CHANNELS, bool OUTPUT_IS_COARSE, typename Acc, typename T>
__device__ __forceinline__ void pack_weight(Acc* packed, const T* weight, const int* slot_tap,
                                            const int* region_first, int regions, int taps,
                                            int slots, int in_channels, int out_channels,
                                            int64_t index) {
  const int blocks = (out_channels + CHANNELS - 1) / CHANNELS;
  // `index` counts packed elements: undo the layout from the outside in.
  const int64_t block_elements = int64_t{slots} * in_channels * CHANNELS;
  const int64_t outer = index / block_elements;
  int64_t rest = index % block_elements;
  const int group = static_cast<int>(outer / blocks);
  const int block = static_cast<int>(outer % blocks);
  const int64_t slot_elements = int64_t{in_channels} * CHANNELS;
  const int region = find_region(region_first, regions, slot_elements, rest);
  rest -= region_first[region] * slot_elements;
  const int region_slots = region_first[region + 1] - region_first[region];
  const int c = static_cast<int>(rest % CHANNELS);
  rest /= CHANNELS;
  const int slot = region_first[region] + static_cast<int>(rest % region_slots);
  const int in = static_cast<int>(rest / region_slots);
  const int out = block * CHANNELS + c;
  const int tap = slot_tap[slot];
  Acc value = 0;
  if (out < out_channels && tap >= 0) {
    const int64_t coarse = int64_t{group} * (OUTPUT_IS_COARSE ? out_channels : in_channels) +
                           (OUTPUT_IS_COARSE ? out : in);
    const int64_t fine = OUTPUT_IS_COARSE ? in : out;
    const int64_t fine_channels = OUTPUT_IS_COARSE ? in_channels : out_channels;
    value = widen(weight[(coarse * fine_channels + fine) * taps + tap]);
  }
  packed[index] = value;
}

}  // namespace convgen
