// wgrad with coarse channels in the lanes: for layers with many channels.
//
//   fine -> lines of positions, one for each channel: as they lie, or copied with zeros around them
//   task: a range of blocks of positions, some blocks of coarse channels, some columns of one group
//     for each block of positions:
//       pack        coarse -> [block of coarse channels][position][lanes] (L2)
//       correlate   (brgemm.h) -> sums [block of coarse channels][column][lanes]
//   then, behind a barrier, the sums of all ranges are added in order, in double.
//
// A column is a fine channel and a kernel element, in the order of the weights; its lines lie at
// one distance from those of any other. How positions are cut into blocks and ranges depends on the
// extents alone, so that results have the same bits for any number of threads. Weights that come
// out as NaN are summed again over what they meet (meeting.h), since taps that meet nothing
// multiply zeros.
#pragma once

#include "bias.h"
#include "brgemm.h"
#include "layout.h"
#include "lines.h"
#include "meeting.h"
#include "runtime.h"
#include "scratch.h"

namespace {

template <class Problem>
class BrgemmWgrad {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  using FineLines = Lines<AxisD, AxisH, AxisW>;
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr bool CONVERTS = !std::is_same_v<Real, Storage>;
  static constexpr int64_t BLOCK_POSITIONS = 256;
  static constexpr int64_t LEAST_TERMS = 64, MOST_TERMS = 192;  // products in a chain
  static constexpr int64_t RANGE_BLOCKS = 16;                   // sums of so many blocks add up
  static constexpr int64_t PARTIAL_BYTES = 64 << 20;            // of the sums of all ranges
  static constexpr int64_t COARSE_BYTES = 192 << 10;            // of a task, packed: in L2
  static constexpr int64_t SUMS_BYTES = 192 << 10;              // of a task: in L2

  int64_t batch, groups;
  int64_t coarse_channels, fine_channels;  // of one group: a, b
  int64_t coarse_extent[3], fine_extent[3];
  bool coarse_last, weight_last;  // channels_last
  FineLines lines;
  int vectors;                                 // of a block of coarse channels
  int64_t width, channel_blocks;               // coarse channels of a block, blocks
  int64_t part, parts;                         // blocks of coarse channels of a task, tasks
  int64_t columns, column_part, column_parts;  // of a group, of a task, tasks
  int64_t block[3], blocks[3], block_count;    // positions per block, blocks; of the whole batch
  int64_t segment, chain;                      // positions of a line; lines added in registers
  int64_t range, ranges;                       // blocks of a range, ranges
  int threads;
  int64_t fine_at, partial_at, threads_at, total_bytes;  // in the workspace
  int64_t lines_at, offsets_at, sums_at, thread_bytes;   // of a thread

 public:
  explicit BrgemmWgrad(const ConvgenCall& call)
      : batch(call.batch),
        groups(Problem::GROUPS),
        coarse_channels(call.coarse_channels / Problem::GROUPS),
        fine_channels(call.fine_channels / Problem::GROUPS),
        columns(fine_channels * TAPS) {
    int64_t fine_volume = 1, coarse_volume = 1;
    for (int axis = 0; axis < 3; ++axis) {
      coarse_extent[axis] = call.coarse_extent[axis];
      fine_extent[axis] = call.fine_extent[axis];
      coarse_volume *= coarse_extent[axis];
      fine_volume *= fine_extent[axis];
    }
    const double terms =
        double(batch) * double(call.coarse_channels) * double(columns) * double(coarse_volume);
    coarse_last = call.channels_last & CONVGEN_COARSE || coarse_volume == 1;
    const bool fine_last =
        call.channels_last & CONVGEN_FINE && fine_volume > 1 && call.fine_channels > 1;
    weight_last = call.channels_last & CONVGEN_WEIGHT;
    threads = thread_count(call.device, terms);
    vectors = tile_vectors<Real>(coarse_channels);
    width = vectors * V;
    channel_blocks = ceil_div(coarse_channels, width);
    if (FineLines::POINTWISE && coarse_volume == fine_volume)
      for (int axis = 0; axis < 3; ++axis)
        coarse_extent[axis] = fine_extent[axis] = axis < 2 ? 1 : coarse_volume;
    lines =
        FineLines(coarse_extent, call.fine_channels, fine_extent, fine_last, CONVERTS, REAL_BYTES);
    choose_tasks(coarse_volume);
    Workspace workspace;
    fine_at = workspace.take(lines.copy_bytes(batch, REAL_BYTES));
    partial_at = workspace.take(ranges > 1 ? ranges * range_sums() * REAL_BYTES : 0);
    const int64_t positions = block[0] * block[1] * block[2];
    lines_at = round_up(part * positions * width * REAL_BYTES, 64);  // behind packed coarse
    const int64_t count = block[0] * block[1] * ceil_div(block[2], segment);
    offsets_at = lines_at + count * int64_t(sizeof(Line<Real>));
    sums_at = round_up(offsets_at + (column_part + TILE_MULTIPLE) * int64_t(sizeof(int64_t)), 64);
    const int64_t task_sums = ranges > 1 ? 0 : part * part_sums() * REAL_BYTES;
    thread_bytes = round_up(greatest(sums_at + task_sums, part_sums() * REAL_BYTES), 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  // Whether it is faster than register tiles with positions in the lanes (reduce.h).
  bool suits() const { return used_lanes() >= 0.6 && columns >= 2 * TILE_POSITIONS<MOST_VECTORS>; }

  // The part of a register tile's lanes that hold coarse channels.
  double used_lanes() const { return double(coarse_channels) / double(channel_blocks * width); }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call) const {
    if (block_count == 0) {
      memset(call.weight, 0, size_t(groups * coarse_channels * columns) * sizeof(Storage));
      return;
    }
    char* const workspace = static_cast<char*>(call.workspace);
    const int64_t tasks = groups * parts * column_parts * ranges;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      if (lines.copied)
        lines.copy(reinterpret_cast<Real*>(workspace + fine_at),
                   static_cast<const Storage*>(call.fine), batch);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) run_task(call, own, task);
      if (ranges > 1) {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < groups * channel_blocks * column_parts; ++i)
          add_ranges(call, reinterpret_cast<Real*>(own), i);
      }
    }
  }

 private:
  // Sums of a block of coarse channels, for a part of the columns or for all of them.
  int64_t part_sums() const { return round_up(column_part, TILE_MULTIPLE) * width; }
  int64_t range_sums() const { return groups * channel_blocks * column_parts * part_sums(); }

  void choose_tasks(int64_t coarse_volume) {
    // What a sum of one sign loses grows with its chains; long sums are allowed longer ones.
    const int64_t terms = least(greatest(batch * coarse_volume / 24, LEAST_TERMS), MOST_TERMS);
    const bool line = coarse_extent[0] == 1 && coarse_extent[1] == 1;
    segment = even_part(coarse_extent[2], line ? terms : BLOCK_COLUMNS);
    block[2] = segment * (line ? greatest(1, BLOCK_POSITIONS / greatest(1, segment)) : 1);
    block[2] = least(block[2], coarse_extent[2]);
    block[1] = even_part(coarse_extent[1], greatest(1, BLOCK_POSITIONS / greatest(1, block[2])));
    block[0] = even_part(coarse_extent[0],
                         greatest(1, BLOCK_POSITIONS / greatest(1, block[2] * block[1])));
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(coarse_extent[axis], block[axis]);
    block_count = batch * blocks[0] * blocks[1] * blocks[2];
    chain = greatest(1, terms / greatest(1, segment));
    const int64_t positions = block[0] * block[1] * block[2];
    column_part = least(
        columns, greatest(SUMS_BYTES / (width * REAL_BYTES) / TILE_MULTIPLE, 1) * TILE_MULTIPLE);
    column_parts = ceil_div(columns, column_part);
    part = even_part(channel_blocks,
                     greatest(1, least(COARSE_BYTES / greatest(1, positions * width * REAL_BYTES),
                                       SUMS_BYTES / (part_sums() * REAL_BYTES))));
    parts = ceil_div(channel_blocks, part);
    // Ranges: by the extents alone.
    const int64_t most = greatest(
        1, PARTIAL_BYTES /
               (groups * channel_blocks * round_up(columns, TILE_MULTIPLE) * width * REAL_BYTES));
    range = greatest(1, greatest(RANGE_BLOCKS, ceil_div(block_count, most)));
    ranges = greatest(1, ceil_div(block_count, range));
    while (threads > 1 && groups * parts * column_parts * ranges < TASKS_PER_THREAD * threads) {
      if (part > 1) {
        part = ceil_div(part, 2);
        parts = ceil_div(channel_blocks, part);
      } else if (column_part > 4 * TILE_MULTIPLE) {
        column_part = round_up(ceil_div(column_part, 2), TILE_MULTIPLE);
        column_parts = ceil_div(columns, column_part);
      } else {
        break;
      }
    }
  }

  void run_task(const ConvgenCall& call, char* own, int64_t task) const {
    char* const workspace = static_cast<char*>(call.workspace);
    const int64_t part0 = task % parts * part, column_index = task / parts % column_parts;
    const int64_t group = task / (parts * column_parts) % groups;
    const int64_t index = task / (parts * column_parts * groups);
    const int64_t channel_parts = least(part, channel_blocks - part0);
    const int64_t column0 = column_index * column_part;
    const int64_t count = least(column_part, columns - column0);
    const Correlate<Real> correlate = correlate_of<FineLines::STRIDE, Real>(vectors);
    Real* const packed = reinterpret_cast<Real*>(own);
    Line<Real>* const line = reinterpret_cast<Line<Real>*>(own + lines_at);
    int64_t* const offset = reinterpret_cast<int64_t*>(own + offsets_at);
    find_offsets(offset, column0, count);
    // Of block b: as `add_ranges` finds it, or in this thread's scratch.
    const int64_t block_sums = ranges > 1 ? column_parts * part_sums() : part_sums();
    Real* const sums =
        ranges > 1 ? reinterpret_cast<Real*>(workspace + partial_at) + index * range_sums() +
                         (group * channel_blocks + part0) * block_sums + column_index * part_sums()
                   : reinterpret_cast<Real*>(own + sums_at);
    for (int64_t b = 0; b < channel_parts; ++b)
      memset(sums + b * block_sums, 0, size_t(part_sums() * REAL_BYTES));
    const Real* const fine = lines.copied ? reinterpret_cast<const Real*>(workspace + fine_at)
                                          : static_cast<const Real*>(call.fine);
    for (int64_t i = index * range; i < least((index + 1) * range, block_count); ++i) {
      int64_t q0[3], extent[3];
      const int64_t n = place(i, q0);
      for (int axis = 0; axis < 3; ++axis)
        extent[axis] = least(block[axis], coarse_extent[axis] - q0[axis]);
      const int64_t positions = extent[0] * extent[1] * extent[2];
      for (int64_t b = 0; b < channel_parts; ++b)
        pack(packed + b * positions * width, call, n, group, (part0 + b) * width, q0, extent);
      const int64_t found = find_lines(
          line, fine + n * lines.image + group * fine_channels * lines.channel, q0, extent);
      for (int64_t b = 0; b < channel_parts; ++b)
        correlate(Columns<Real>{packed + b * positions * width, line, found, chain, offset, count,
                                sums + b * block_sums});
    }
    if (ranges == 1)
      for (int64_t b = 0; b < channel_parts; ++b)
        put_weights(call, sums + b * block_sums, group, (part0 + b) * width, column0, count);
  }

  // Image and first position of a block.
  int64_t place(int64_t index, int64_t* q0) const {
    q0[0] = index / (blocks[1] * blocks[2]) % blocks[0] * block[0];
    q0[1] = index / blocks[2] % blocks[1] * block[1];
    q0[2] = index % blocks[2] * block[2];
    return index / (blocks[0] * blocks[1] * blocks[2]);
  }

  // The fine channel and the kernel element of a column.
  void column_of(int64_t column, int64_t& channel, int64_t& element) const {
    channel = weight_last ? column % fine_channels : column / TAPS;
    element = weight_last ? column / fine_channels : column % TAPS;
  }

  // How far a column's lines lie behind where fine lines begin. Beyond the last column, it is
  // repeated up to a whole register tile.
  void find_offsets(int64_t* offset, int64_t column0, int64_t count) const {
    lines.for_elements([&](int64_t element, int64_t at) {
      const int64_t first = weight_last ? element * fine_channels : element;
      const int64_t pitch = weight_last ? 1 : TAPS;
      for (int64_t c = greatest(ceil_div(column0 - first, pitch), 0); c < fine_channels; ++c) {
        const int64_t i = first + c * pitch - column0;
        if (i >= count) break;
        offset[i] = c * lines.channel + at;
      }
    });
    for (int64_t i = count; i % TILE_MULTIPLE; ++i) offset[i] = offset[count - 1];
  }

  // The lines of a block of positions, each as far as `segment`.
  int64_t find_lines(Line<Real>* line, const Real* fine, const int64_t* q0,
                     const int64_t* extent) const {
    Line<Real>* to = line;
    for (int64_t d = 0; d < extent[0]; ++d)
      for (int64_t h = 0; h < extent[1]; ++h)
        for (int64_t w = 0; w < extent[2]; w += segment)
          *to++ = {fine + lines.at(q0[0] + d, q0[1] + h, q0[2] + w), least(segment, extent[2] - w)};
    return to - line;
  }

  // A block of coarse channels at a block of positions: zeros beyond the last channel.
  void pack(Real* to, const ConvgenCall& call, int64_t n, int64_t group, int64_t a0,
            const int64_t* q0, const int64_t* count) const {
    const Pitches at(groups * coarse_channels, coarse_extent, coarse_last);
    const int64_t channels = least(width, coarse_channels - a0);
    const Storage* const from = static_cast<const Storage*>(call.coarse) + n * at.image +
                                (group * coarse_channels + a0) * at.channel + q0[0] * at.axis[0] +
                                q0[1] * at.axis[1] + q0[2] * at.axis[2];
    if (channels < width)
      memset(to, 0, size_t(count[0] * count[1] * count[2] * width * REAL_BYTES));
    int64_t lines[3];
    join_lines(lines, count, coarse_extent);
    for (int64_t d = 0; d < lines[0]; ++d)
      for (int64_t h = 0; h < lines[1]; ++h, to += lines[2] * width) {
        const Storage* const line = from + d * at.axis[0] + h * at.axis[1];
        if (coarse_last)
          for (int64_t w = 0; w < lines[2]; ++w)
            convert<Real>(to + w * width, line + w * at.axis[2], channels);
        else
          transpose<Real>(to, width, line, at.channel, channels, lines[2]);
      }
  }

  // Sums of all ranges, for a block of coarse channels and a part of the columns.
  void add_ranges(const ConvgenCall& call, Real* total, int64_t index) const {
    const Real* const partial =
        reinterpret_cast<const Real*>(static_cast<char*>(call.workspace) + partial_at) +
        index * part_sums();
    for (int64_t i = 0; i < part_sums(); ++i) {
      double sum = double(partial[i]);
      for (int64_t r = 1; r < ranges; ++r) sum += double(partial[r * range_sums() + i]);
      total[i] = Real(sum);
    }
    const int64_t column0 = index % column_parts * column_part, of_block = index / column_parts;
    put_weights(call, total, of_block / channel_blocks, of_block % channel_blocks * width, column0,
                least(column_part, columns - column0));
  }

  // Sums to weights: rows of columns, one for each coarse channel.
  void put_weights(const ConvgenCall& call, Real* sums, int64_t group, int64_t a0, int64_t column0,
                   int64_t count) const {
    const int64_t channels = least(width, coarse_channels - a0);
    const int64_t row0 = group * coarse_channels + a0;
    Vector<Real> unlike = {};  // sums of x - x: NaN, if any is no number
    for (int64_t i = 0; i < count * width; i += V) {
      const Vector<Real> value = load(sums + i);
      unlike += value - value;
    }
    bool any = false;
    for (int lane = 0; lane < V; ++lane) any |= unlike[lane] != 0;
    if (any)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t lane = 0; lane < channels; ++lane) {
          Real& sum = sums[i * width + lane];
          int64_t channel, element;
          column_of(column0 + i, channel, element);
          if (sum != sum)
            sum = Real(meeting_sum<Problem>(
                call, ((row0 + lane) * fine_channels + channel) * TAPS + element));
        }
    transpose<Real, true>(static_cast<Storage*>(call.weight) + row0 * columns + column0, columns,
                          sums, width, count, channels);
  }
};

}  // namespace
