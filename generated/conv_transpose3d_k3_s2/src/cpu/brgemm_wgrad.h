// wgrad with coarse channels in the lanes: for layers with many channels.
//
//   fine -> rows of channels, one per element (as it lies if it is channels_last)
//   task: a range of blocks of positions, some blocks of coarse channels, some taps of one group
//     for each block of positions:
//       pack        coarse -> [block of coarse channels][position][lanes] (L2)
//       point       at the fine rows that each tap meets, or at zeros
//       correlate   (brgemm.h) -> sums [block of coarse channels][tap][fine channel][lanes]
//   then, behind a barrier, the sums of all ranges are added in order, in double.
//
// How positions are cut into blocks and ranges depends on the extents alone, so that results have
// the same bits for any number of threads. Weights that come out as NaN are summed again over what
// they meet (meeting.h), since taps that meet nothing multiply zeros.
#pragma once

#include "bias.h"
#include "brgemm.h"
#include "layout.h"
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
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t STRIDE[3] = {AxisD::SOURCE_STRIDE, AxisH::SOURCE_STRIDE,
                                        AxisW::SOURCE_STRIDE};
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr bool CONVERTS = !std::is_same_v<Real, Storage>;
  static constexpr int64_t BLOCK_POSITIONS = 256;
  static constexpr int64_t LEAST_TERMS = 64, MOST_TERMS = 192;  // products in a chain
  static constexpr int64_t RANGE_BLOCKS = 16;                   // sums of so many blocks add up
  static constexpr int64_t PARTIAL_BYTES = 64 << 20;            // of the sums of all ranges
  static constexpr int64_t COARSE_BYTES = 192 << 10;            // of a task, packed: in L2
  static constexpr int64_t TABLE_BYTES = 64 << 10;              // of pointers to fine rows

  int64_t batch, groups;
  int64_t coarse_channels, fine_channels;  // of one group: a, b
  int64_t coarse_extent[3], fine_extent[3];
  bool coarse_last, fine_last, weight_last;  // channels_last
  bool repacked;                             // fine is copied to rows of channels
  int vectors;                               // of a block of coarse channels
  int64_t width, channel_blocks;             // coarse channels of a block, blocks
  int64_t part, parts;                       // blocks of coarse channels of a task, tasks
  int64_t tap_part, tap_parts;               // taps of a task, tasks
  int64_t block[3], blocks[3], block_count;  // positions per block, blocks; of the whole batch
  int64_t chain;                             // positions whose products are added in registers
  int64_t range, ranges;                     // blocks of a range, ranges
  int threads;
  int64_t zeros_at, fine_at, partial_at, threads_at, total_bytes;  // in the workspace
  int64_t rows_at, thread_bytes;                                   // of a thread

 public:
  explicit BrgemmWgrad(const ConvgenCall& call)
      : batch(call.batch),
        groups(Problem::GROUPS),
        coarse_channels(call.coarse_channels / Problem::GROUPS),
        fine_channels(call.fine_channels / Problem::GROUPS) {
    double terms =
        double(batch) * double(call.coarse_channels) * double(fine_channels) * double(TAPS);
    int64_t fine_volume = 1, coarse_volume = 1;
    for (int axis = 0; axis < 3; ++axis) {
      coarse_extent[axis] = call.coarse_extent[axis];
      fine_extent[axis] = call.fine_extent[axis];
      coarse_volume *= coarse_extent[axis];
      fine_volume *= fine_extent[axis];
    }
    terms *= double(coarse_volume);
    // What a sum of one sign loses grows with its chains; long sums are allowed longer ones.
    chain = least(greatest(batch * coarse_volume / 24, LEAST_TERMS), MOST_TERMS);
    coarse_last = call.channels_last & CONVGEN_COARSE || coarse_volume == 1;
    fine_last = call.channels_last & CONVGEN_FINE || fine_volume == 1 || call.fine_channels == 1;
    weight_last = call.channels_last & CONVGEN_WEIGHT;
    threads = thread_count(call.device, terms);
    repacked = CONVERTS || !fine_last;
    vectors = tile_vectors<Real>(coarse_channels);
    width = vectors * V;
    channel_blocks = ceil_div(coarse_channels, width);
    choose_tasks();
    Workspace workspace;
    zeros_at = workspace.take(fine_channels * REAL_BYTES);
    fine_at = workspace.take(repacked ? batch * call.fine_channels * fine_volume * REAL_BYTES : 0);
    partial_at = workspace.take(ranges * range_sums() * REAL_BYTES);
    const int64_t positions = block[0] * block[1] * block[2];
    rows_at = round_up(part * positions * width * REAL_BYTES, 64);  // behind packed coarse
    const int64_t table = rows_at + positions * tap_part * int64_t(sizeof(Real*));
    thread_bytes = round_up(greatest(table, block_sums() * REAL_BYTES), 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  // Whether it is faster than register tiles with positions in the lanes (reduce.h).
  bool suits() const {
    const double used = double(coarse_channels) / double(channel_blocks * width);
    return used >= 0.6 && fine_channels * TAPS >= 2 * TILE_POSITIONS<MOST_VECTORS>;
  }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call) const {
    if (block_count == 0) {
      memset(call.weight, 0,
             size_t(groups * coarse_channels * fine_channels * TAPS) * sizeof(Storage));
      return;
    }
    char* const workspace = static_cast<char*>(call.workspace);
    memset(workspace + zeros_at, 0, size_t(fine_channels * REAL_BYTES));
    const int64_t tasks = groups * parts * tap_parts * ranges;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      if (repacked)
        to_rows(reinterpret_cast<Real*>(workspace + fine_at),
                static_cast<const Storage*>(call.fine), batch, groups * fine_channels,
                fine_extent[0] * fine_extent[1] * fine_extent[2], fine_last);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) run_task(call, own, task);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < groups * channel_blocks; ++i)
        put_weights(call, reinterpret_cast<Real*>(own), i);
    }
  }

 private:
  // Sums of a block of coarse channels, up to a whole register tile for each part of the taps.
  int64_t part_sums(int64_t taps) const {
    return round_up(taps * fine_channels, TILE_MULTIPLE) * width;
  }
  int64_t block_sums() const { return tap_parts * part_sums(tap_part); }
  int64_t range_sums() const { return groups * channel_blocks * block_sums(); }

  void choose_tasks() {
    const bool line = coarse_extent[0] == 1 && coarse_extent[1] == 1;
    block[2] = even_part(coarse_extent[2], line ? BLOCK_POSITIONS : BLOCK_COLUMNS);
    block[1] = even_part(coarse_extent[1], greatest(1, BLOCK_POSITIONS / block[2]));
    block[0] = even_part(coarse_extent[0], greatest(1, BLOCK_POSITIONS / (block[2] * block[1])));
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(coarse_extent[axis], block[axis]);
    block_count = batch * blocks[0] * blocks[1] * blocks[2];
    const int64_t positions = block[0] * block[1] * block[2];
    part = even_part(channel_blocks, greatest(1, COARSE_BYTES / (positions * width * REAL_BYTES)));
    parts = ceil_div(channel_blocks, part);
    tap_part = even_part(TAPS, greatest(1, TABLE_BYTES / (positions * int64_t(sizeof(Real*)))));
    tap_parts = ceil_div(TAPS, tap_part);
    // Ranges: by the extents alone.
    const int64_t most = greatest(1, PARTIAL_BYTES / (range_sums() * REAL_BYTES));
    range = greatest(1, greatest(RANGE_BLOCKS, ceil_div(block_count, most)));
    ranges = greatest(1, ceil_div(block_count, range));
    while (threads > 1 && groups * parts * tap_parts * ranges < TASKS_PER_THREAD * threads) {
      if (part > 1) {
        part = ceil_div(part, 2);
        parts = ceil_div(channel_blocks, part);
      } else if (tap_part > 1) {
        tap_part = ceil_div(tap_part, 2);
        tap_parts = ceil_div(TAPS, tap_part);
      } else {
        break;
      }
    }
  }

  void run_task(const ConvgenCall& call, char* own, int64_t task) const {
    char* const workspace = static_cast<char*>(call.workspace);
    const int64_t part0 = task % parts * part, tap0 = task / parts % tap_parts * tap_part;
    const int64_t group = task / (parts * tap_parts) % groups;
    const int64_t index = task / (parts * tap_parts * groups);
    const int64_t channel_parts = least(part, channel_blocks - part0);
    const int64_t taps = least(tap_part, TAPS - tap0);
    const Correlate<Real> correlate = correlate_of<Real>(vectors);
    Real* const packed = reinterpret_cast<Real*>(own);
    const Real** const row_of = reinterpret_cast<const Real**>(own + rows_at);
    Real* const sums = reinterpret_cast<Real*>(workspace + partial_at) + index * range_sums() +
                       (group * channel_blocks + part0) * block_sums() +
                       tap0 / tap_part * part_sums(tap_part);
    for (int64_t b = 0; b < channel_parts; ++b)
      memset(sums + b * block_sums(), 0, size_t(part_sums(tap_part) * REAL_BYTES));
    for (int64_t i = index * range; i < least((index + 1) * range, block_count); ++i) {
      int64_t q0[3], count[3];
      const int64_t n = place(i, q0);
      for (int axis = 0; axis < 3; ++axis)
        count[axis] = least(block[axis], coarse_extent[axis] - q0[axis]);
      const int64_t positions = count[0] * count[1] * count[2];
      for (int64_t b = 0; b < channel_parts; ++b)
        pack(packed + b * positions * width, call, n, group, (part0 + b) * width, q0, count);
      point(row_of, call, n, group, tap0, taps, q0, count);
      for (int64_t b = 0; b < channel_parts; ++b)
        correlate(Columns<Real>{packed + b * positions * width, row_of, positions, chain,
                                fine_channels, taps * fine_channels, sums + b * block_sums()});
    }
  }

  // Image and first position of a block.
  int64_t place(int64_t index, int64_t* q0) const {
    q0[0] = index / (blocks[1] * blocks[2]) % blocks[0] * block[0];
    q0[1] = index / blocks[2] % blocks[1] * block[1];
    q0[2] = index % blocks[2] * block[2];
    return index / (blocks[0] * blocks[1] * blocks[2]);
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

  // Points at the fine rows that taps meet from a block of positions.
  void point(const Real** to, const ConvgenCall& call, int64_t n, int64_t group, int64_t tap0,
             int64_t taps, const int64_t* q0, const int64_t* count) const {
    char* const workspace = static_cast<char*>(call.workspace);
    const Real* const zeros = reinterpret_cast<const Real*>(workspace + zeros_at);
    const Real* const rows = repacked ? reinterpret_cast<const Real*>(workspace + fine_at)
                                      : static_cast<const Real*>(call.fine);
    const Pitches pitch(groups * fine_channels, fine_extent, true);
    const Real* const first_row = rows + n * pitch.image + group * fine_channels;
    for (int64_t tap = tap0; tap < tap0 + taps; ++tap) {
      const AxisTap at[3] = {AxisD::TAP[tap / (AxisH::TAPS * AxisW::TAPS)],
                             AxisH::TAP[tap / AxisW::TAPS % AxisH::TAPS],
                             AxisW::TAP[tap % AxisW::TAPS]};
      to = point_at<AxisW::SOURCE_STRIDE>(to, first_row, zeros, pitch, fine_extent, STRIDE, at, q0,
                                          count);
    }
  }

  // The weights of a block of coarse channels, from the sums of all ranges.
  void put_weights(const ConvgenCall& call, Real* total, int64_t index) const {
    const Real* const partial =
        reinterpret_cast<const Real*>(static_cast<char*>(call.workspace) + partial_at) +
        index * block_sums();
    for (int64_t i = 0; i < block_sums(); ++i) {
      double sum = double(partial[i]);
      for (int64_t r = 1; r < ranges; ++r) sum += double(partial[r * range_sums() + i]);
      total[i] = Real(sum);
    }
    const int64_t group = index / channel_blocks, a0 = index % channel_blocks * width;
    const int64_t pitch_tap = weight_last ? fine_channels : 1;
    const int64_t pitch_fine = weight_last ? 1 : TAPS;
    Storage* const weight = static_cast<Storage*>(call.weight);
    for (int64_t lane = 0; lane < least(width, coarse_channels - a0); ++lane) {
      const int64_t row = (group * coarse_channels + a0 + lane) * fine_channels * TAPS;
      for (int64_t tap = 0; tap < TAPS; ++tap) {
        const Real* const sums = total + tap / tap_part * part_sums(tap_part) +
                                 tap % tap_part * fine_channels * width + lane;
        const int64_t element = (AxisD::TAP[tap / (AxisH::TAPS * AxisW::TAPS)].tap * AxisH::TAPS +
                                 AxisH::TAP[tap / AxisW::TAPS % AxisH::TAPS].tap) *
                                    AxisW::TAPS +
                                AxisW::TAP[tap % AxisW::TAPS].tap;
        Storage* const to = weight + row + element * pitch_tap;
        for (int64_t b = 0; b < fine_channels; ++b) {
          Real sum = sums[b * width];
          if (sum != sum) sum = Real(meeting_sum<Problem>(call, row + b * TAPS + element));
          from_real(sum, to[b * pitch_fine]);
        }
      }
    }
  }
};

}  // namespace
