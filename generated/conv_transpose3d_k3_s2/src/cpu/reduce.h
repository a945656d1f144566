// wgrad: every weight is a sum over the batch and all positions,
//
//   weight[a, b, j] = sum over n, q of coarse[n, a, q] * fine[n, b, q * STRIDE + offset[j]]
//
// a and b are the channels of one group. Positions are vector lanes; lanes are added up last.
//
//   task: a range of blocks of positions, some a, some b of one group
//     fill       coarse blocks of all its a -> scratch (L2), zeros wherever fine's copy has a halo
//     for each b, block:
//       fill     fine block of b -> scratch (L1/L2), see scratch.h
//       compute  register tile: channels a x columns (taps of b), over the positions of the block:
//                         j0        j1        j2
//                 a0  [ lanes ] [ lanes ] [ lanes ]    += coarse[a][position]
//                 a1  [ lanes ] [ lanes ] [ lanes ]         * fine[offset[j] + position]
//                 ..                                      for all positions of the block
//                -> sums (L2): one vector per a and column, over some blocks: CHAIN_TERMS per lane,
//                   since in a long chain of terms of one sign every one is rounded to the last
//                   place of what has grown before
//     add up     lanes of sums -> totals of the task's range of blocks (in double where there are
//                several such passes) -> partial weights
//   then, behind a barrier, the partial weights of all ranges are added in order, in double.
//
// The bias gradient, where it is wanted too, sums what the fills have just brought into the caches.
//
// Halo positions are multiplied too, by zeros of coarse: an infinite or NaN element of fine makes
// NaN of taps that do not meet it. So weights that come out as NaN are summed again, one by one,
// over the elements that they meet (`meeting_sum`); the first NaN among these ends the sum.
//
// How positions are cut into ranges depends on the extents alone, so that results have the same
// bits for any number of threads.
#pragma once

#include "bias.h"
#include "meeting.h"
#include "runtime.h"
#include "scratch.h"

namespace {

template <class Problem>
class Reduce {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t COLUMNS = Problem::FINE_BLOCK * TAPS;
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);

  int64_t batch, groups;
  int64_t coarse_channels, fine_channels;  // of one group: a, b
  int64_t channel_block;                   // a per register tile
  int64_t coarse_part, coarse_parts;       // a per task (whole register tiles), tasks
  int64_t fine_part, fine_parts;           // b per task (whole FINE_BLOCKs), tasks
  int64_t coarse_extent[3], fine_extent[3];
  int64_t block[3], blocks[3];           // positions per block, blocks of one image
  int64_t block_count;                   // of the whole batch
  int64_t ranges;                        // of blocks, each with partial weights of its own
  int64_t resident;                      // blocks whose coarse scratch is filled at once
  Scratch<AxisD, AxisH, AxisW> scratch;  // of a fine channel
  int64_t segments[2], segment;          // runs of positions in a block (planes, rows), length
  int64_t coarse_pitch, fine_pitch;      // scratch of one channel of a block
  int threads;
  bool bias;  // the bias gradient is wanted, too
  int64_t offsets_at, partial_at, bias_at, threads_at, total_bytes;  // in the workspace
  int64_t fine_at, sums_at, totals_at, thread_bytes;                 // of a thread

 public:
  Reduce(const ConvgenCall& call, bool with_bias)
      : batch(call.batch),
        groups(Problem::GROUPS),
        coarse_channels(call.coarse_channels / Problem::GROUPS),
        fine_channels(call.fine_channels / Problem::GROUPS),
        bias(with_bias) {
    double terms =
        double(batch) * double(call.coarse_channels) * double(fine_channels) * double(TAPS);
    for (int axis = 0; axis < 3; ++axis) {
      coarse_extent[axis] = call.coarse_extent[axis];
      fine_extent[axis] = call.fine_extent[axis];
      terms *= double(coarse_extent[axis]);
    }
    threads = thread_count(call.device, terms);
    channel_block = Problem::Tiles::choose(coarse_channels).channels;
    choose_blocks();
    choose_tasks(terms);
    Workspace workspace;
    offsets_at = workspace.take(COLUMNS * int64_t(sizeof(int64_t)));
    partial_at = workspace.take(partial_is_output() ? 0 : ranges * weights() * REAL_BYTES);
    bias_at = workspace.take(bias ? block_count * biases() * int64_t(sizeof(double)) : 0);
    fine_at = round_up(resident * coarse_part * coarse_pitch * REAL_BYTES, 64);
    sums_at = fine_at + round_up((Problem::FINE_BLOCK * fine_pitch + V) * REAL_BYTES, 64);
    // Lanes are added up in whole groups of V sums.
    totals_at = sums_at + (coarse_part * COLUMNS + V) * VECTOR_BYTES;
    const int64_t totals = passes() > 1 ? coarse_part * fine_part * TAPS : 0;
    thread_bytes = round_up(totals_at + totals * int64_t(sizeof(double)), 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call) const {
    if (block_count == 0) {
      memset(call.weight, 0, size_t(weights()) * sizeof(Storage));
      if (bias) memset(call.bias, 0, size_t(biases()) * sizeof(Storage));
      return;
    }
    Problem::Tiles::visit(channel_block, [&](auto tile) {
      run_tasks<decltype(tile)::CHANNELS, decltype(tile)::WIDTH>(call);
    });
  }

 private:
  int64_t biases() const {
    return groups * (Problem::RESULT_IS_FINE ? fine_channels : coarse_channels);
  }

  int64_t weights() const { return groups * coarse_channels * fine_channels * TAPS; }

  // One range of blocks in the tensor's own type needs no partial weights.
  bool partial_is_output() const { return ranges == 1 && sizeof(Real) == sizeof(Storage); }

  void lay_out() {
    scratch.d = AxisLayout<AxisD>::choose(block[0]);
    scratch.h = AxisLayout<AxisH>::choose(block[1]);
    scratch.w = AxisLayout<AxisW>::choose(block[2], coarse_channels >= 16 ? 4 : 1);
    fine_pitch = scratch.channel();
    // Positions run on through the rows of a plane, or row by row: whatever needs fewer vectors.
    const int64_t plane = round_up((block[1] - 1) * scratch.pitch() + block[2], V);
    const int64_t row = round_up(block[2], V);
    const bool by_rows = block[1] * row <= plane;
    segments[0] = block[0];
    segments[1] = by_rows ? block[1] : 1;
    segment = by_rows ? row : plane;
    coarse_pitch = segments[0] * segments[1] * segment;
  }

  void halve(int axis) { block[axis] = even_part(coarse_extent[axis], ceil_div(block[axis], 2)); }

  void choose_blocks() {
    // A register tile's coarse rows stay in L1 while the columns change.
    const int64_t limit = Problem::COARSE_TILE_BYTES / REAL_BYTES / channel_block;
    block[0] = block[1] = 1;
    block[2] = even_part(coarse_extent[2], limit);
    lay_out();
    block[1] = even_part(coarse_extent[1], greatest(1, limit / scratch.pitch()));
    lay_out();
    block[0] = even_part(coarse_extent[0], greatest(1, limit / (segments[1] * segment)));
    lay_out();
    while (Problem::FINE_BLOCK * fine_pitch * REAL_BYTES > Problem::FINE_BYTES) {
      if (block[0] > 1) {
        halve(0);
      } else if (block[1] > 1) {
        halve(1);
      } else if (block[2] > 8 * V) {
        halve(2);
      } else {
        break;
      }
      lay_out();
    }
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(coarse_extent[axis], block[axis]);
    block_count = batch * blocks[0] * blocks[1] * blocks[2];
  }

  void choose_tasks(double terms) {
    const int64_t wanted = int64_t(least(int64_t(terms / Problem::TASK_TERMS), 256)) + 1;
    const int64_t sums_limit = Problem::SUMS_BYTES / (COLUMNS * VECTOR_BYTES);
    coarse_part =
        round_up(even_part(coarse_channels, greatest(least(sums_limit, 64), 1)), channel_block);
    coarse_parts = ceil_div(coarse_channels, coarse_part);
    // Filling coarse scratch must pay: 128 multiply-adds for every element.
    const int64_t fine_least = round_up(ceil_div(128, TAPS), Problem::FINE_BLOCK);
    int64_t tasks = groups * coarse_parts;
    fine_part = round_up(greatest(fine_least, ceil_div(fine_channels, greatest(1, wanted / tasks))),
                         Problem::FINE_BLOCK);
    fine_parts = ceil_div(fine_channels, fine_part);
    tasks *= fine_parts;
    // A range is long beside the adding up of lanes; partial weights must fit in memory.
    const int64_t most = least(block_count * coarse_pitch / Problem::RANGE_POSITIONS,
                               Problem::PARTIAL_BYTES / (weights() * REAL_BYTES));
    ranges = greatest(1, least(least(ceil_div(wanted, tasks), most), block_count));
    const int64_t per_range = ceil_div(block_count, ranges);
    ranges = greatest(1, ceil_div(block_count, greatest(per_range, 1)));
    resident = Problem::COARSE_BYTES / (coarse_part * coarse_pitch * REAL_BYTES);
    resident = least(resident, Problem::CHAIN_TERMS / (coarse_pitch / V));
    resident = greatest(1, least(per_range, resident));
  }

  // Over the resident blocks of a range, whose sums leave the lanes once each.
  int64_t passes() const { return ceil_div(ceil_div(block_count, ranges), resident); }

  template <int M, int WIDTH>
  void run_tasks(const ConvgenCall& call) const {
    char* const workspace = static_cast<char*>(call.workspace);
    int64_t* const offsets = reinterpret_cast<int64_t*>(workspace + offsets_at);
    Real* const partial = partial_is_output() ? reinterpret_cast<Real*>(call.weight)
                                              : reinterpret_cast<Real*>(workspace + partial_at);
    int64_t* to = offsets;
    for (int64_t b = 0; b < Problem::FINE_BLOCK; ++b)
      for (int jd = 0; jd < AxisD::TAPS; ++jd)
        for (int jh = 0; jh < AxisH::TAPS; ++jh)
          for (int jw = 0; jw < AxisW::TAPS; ++jw)
            *to++ = b * fine_pitch + scratch.offset(jd, jh, jw);
    const int64_t task_count = ranges * groups * coarse_parts * fine_parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      // What lies beyond the fine block meets zeros of coarse, but must be finite.
      memset(own + fine_at, 0, size_t(sums_at - fine_at));
      // From the last task to the first: the gradient of the input, which is computed before, has
      // left the end of the tensors in the cache that the cores share.
#pragma omp for schedule(dynamic)
      for (int64_t after = 0; after < task_count; ++after) {
        const int64_t task = task_count - 1 - after;
        run_task<M, WIDTH>(call, own, offsets, partial, task_at(task),
                           task_at(greatest(task - threads, 0)));
      }
      if (!partial_is_output()) {
        Storage* const weight = static_cast<Storage*>(call.weight);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < weights(); ++i) {
          double sum = double(partial[i]);
          for (int64_t range = 1; range < ranges; ++range)
            sum += double(partial[range * weights() + i]);
          if (sum != sum) sum = meeting_sum<Problem>(call, i);
          from_real(Real(sum), weight[i]);
        }
      }
      if (bias) {
        const double* const sums = reinterpret_cast<const double*>(workspace + bias_at);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < biases(); ++c) {
          double sum = 0;
          for (int64_t index = 0; index < block_count; ++index) sum += sums[index * biases() + c];
          from_real(Real(sum), static_cast<Storage*>(call.bias)[c]);
        }
      }
    }
  }

  // Sums the elements of a channel that belong to a block, for the bias gradient: STRIDE of them
  // per position and axis, and what is left over beside the last one.
  template <bool FINE>
  void sum_block(const ConvgenCall& call, const Storage* from, int64_t index,
                 int64_t channel) const {
    constexpr int64_t STRIDE[3] = {FINE ? AxisD::SOURCE_STRIDE : 1, FINE ? AxisH::SOURCE_STRIDE : 1,
                                   FINE ? AxisW::SOURCE_STRIDE : 1};
    const int64_t* const extent = FINE ? fine_extent : coarse_extent;
    int64_t q0[3], first[3], count[3];
    place(index, q0);
    for (int axis = 0; axis < 3; ++axis) {
      const bool last = q0[axis] + block[axis] >= coarse_extent[axis];
      first[axis] = least(q0[axis] * STRIDE[axis], extent[axis]);
      count[axis] =
          least(last ? extent[axis] : (q0[axis] + block[axis]) * STRIDE[axis], extent[axis]) -
          first[axis];
    }
    const bool whole_rows = count[2] == extent[2];
    const int64_t run = whole_rows ? count[1] * count[2] : count[2];
    double sum = 0;
    for (int64_t plane = 0; plane < count[0]; ++plane)
      for (int64_t row = 0; row < (whole_rows ? 1 : count[1]); ++row)
        sum += sum_of<Real>(
            from + ((first[0] + plane) * extent[1] + first[1] + row) * extent[2] + first[2], run);
    double* const sums = reinterpret_cast<double*>(static_cast<char*>(call.workspace) + bias_at);
    sums[index * biases() + channel] = sum;
  }

  // A task: its range of blocks, group and first channels.
  struct Task {
    int64_t range, group, a0, b0;
  };

  Task task_at(int64_t index) const {
    return {index / (groups * coarse_parts * fine_parts),
            index / (coarse_parts * fine_parts) % groups,
            index / fine_parts % coarse_parts * coarse_part, index % fine_parts * fine_part};
  }

  int64_t first_block(const Task& task) const { return task.range * ceil_div(block_count, ranges); }

  // A fine channel's volume in the image of a block, and the block's first position.
  const Storage* fine_of(const ConvgenCall& call, int64_t group, int64_t b, int64_t index,
                         int64_t* q0) const {
    const int64_t channel = (place(index, q0) * groups + group) * fine_channels + b;
    return static_cast<const Storage*>(call.fine) +
           channel * fine_extent[0] * fine_extent[1] * fine_extent[2];
  }

  // What the fill after that of block i for channel b reads; `next` is the thread's next task.
  Prefetch after(const ConvgenCall& call, const Task& task, const Task& next, int64_t b, int64_t i,
                 int64_t last, int64_t steps) const {
    int64_t q0[3];
    const bool more = i + 1 < last;
    const Storage* const channel = more ? fine_of(call, task.group, b, i + 1, q0)
                                        : fine_of(call, next.group, next.b0, first_block(next), q0);
    return scratch.planes_of(channel, fine_extent, q0, steps);
  }

  // Image and first position of a block.
  int64_t place(int64_t index, int64_t* q0) const {
    q0[0] = index / (blocks[1] * blocks[2]) % blocks[0] * block[0];
    q0[1] = index / blocks[2] % blocks[1] * block[1];
    q0[2] = index % blocks[2] * block[2];
    return index / (blocks[0] * blocks[1] * blocks[2]);
  }

  template <int M, int WIDTH>
  void run_task(const ConvgenCall& call, char* own, const int64_t* offsets, Real* partial,
                const Task& task, const Task& next) const {
    Real* const coarse = reinterpret_cast<Real*>(own);
    Real* const fine = reinterpret_cast<Real*>(own + fine_at);
    Vector<Real>* const sums = reinterpret_cast<Vector<Real>*>(own + sums_at);
    const int64_t group = task.group, a0 = task.a0;
    const int64_t begin = first_block(task);
    const int64_t last_block = least(begin + ceil_div(block_count, ranges), block_count);
    const int64_t a_count = least(coarse_part, coarse_channels - a0);
    const int64_t b_end = least(task.b0 + fine_part, fine_channels);
    const int64_t fine_volume = fine_extent[0] * fine_extent[1] * fine_extent[2];
    const int64_t steps = ceil_div(COLUMNS, WIDTH) * segments[0] * segments[1] * (segment / V);
    double* const totals = passes() > 1 ? reinterpret_cast<double*>(own + totals_at) : nullptr;
    partial += task.range * weights();
    for (int64_t first = begin; first < last_block; first += resident) {
      const int64_t last = least(first + resident, last_block);
      for (int64_t i = first; i < last; ++i)
        fill_coarse<M>(coarse + (i - first) * coarse_part * coarse_pitch, call, i, group, a0,
                       a_count, !Problem::RESULT_IS_FINE && bias && task.b0 == 0);
      for (int64_t b = task.b0; b < b_end; b += Problem::FINE_BLOCK) {
        const int64_t b_count = least(Problem::FINE_BLOCK, b_end - b);
        memset(sums, 0, size_t(coarse_part * COLUMNS * VECTOR_BYTES));
        for (int64_t i = first; i < last; ++i) {
          int64_t q0[3];
          const Storage* const from = fine_of(call, group, b, i, q0);
          for (int64_t c = 0; c < b_count; ++c)
            scratch.fill(fine + c * fine_pitch, from + c * fine_volume, fine_extent, q0);
          if (Problem::RESULT_IS_FINE && bias && a0 == 0)
            for (int64_t c = 0; c < b_count; ++c)
              sum_block<true>(call, from + c * fine_volume, i, group * fine_channels + b + c);
          Prefetch later;
          if (M == 1 && blocks[1] * blocks[2] == 1)
            later = after(call, task, next, b, i, last, steps);
          const Real* block_coarse = coarse + (i - first) * coarse_part * coarse_pitch;
          for (int64_t a = 0; a < a_count; a += M) {
            const Columns<M, WIDTH> tile = {
                *this, block_coarse + a * coarse_pitch, fine, offsets, sums + a * COLUMNS, &later};
            Problem::unrolled(tile);
          }
        }
        const int64_t to = ((group * coarse_channels + a0) * fine_channels + b) * TAPS;
        add_lanes(call, sums, partial, to, totals ? totals + (b - task.b0) * TAPS : nullptr,
                  a_count, b_count * TAPS, first == begin, last == last_block);
      }
    }
  }

  // Coarse positions of one block for a task's channels, in whole vectors; zeros elsewhere.
  template <int M>
  void fill_coarse(Real* to, const ConvgenCall& call, int64_t index, int64_t group, int64_t a0,
                   int64_t a_count, bool summed) const {
    int64_t q0[3];
    const int64_t n = place(index, q0);
    const int64_t* extent = coarse_extent;
    const int64_t pitch = segments[1] == block[1] ? segment : scratch.pitch();
    const int64_t planes = least(block[0], extent[0] - q0[0]);
    const int64_t rows = least(block[1], extent[1] - q0[1]);
    const int64_t columns = least(block[2], extent[2] - q0[2]);
    memset(to, 0, size_t(round_up(a_count, M) * coarse_pitch * REAL_BYTES));
    for (int64_t a = 0; a < a_count; ++a, to += coarse_pitch) {
      const int64_t channel = (n * groups + group) * coarse_channels + a0 + a;
      if (summed)
        sum_block<false>(call, static_cast<const Storage*>(call.coarse) +
                                   channel * extent[0] * extent[1] * extent[2],
                         index, group * coarse_channels + a0 + a);
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t line = (channel * extent[0] + q0[0] + plane) * extent[1] + q0[1] + row;
          const Storage* from = static_cast<const Storage*>(call.coarse) + line * extent[2] + q0[2];
          Real* dst = to + plane * segments[1] * segment + row * pitch;
          copy_strided<1>(dst, from, columns);
        }
    }
  }

  // Adds up the lanes of all sums, in place. They are, or with those of a range's other passes in
  // `totals` they make, partial weights from `to` on.
  void add_lanes(const ConvgenCall& call, Vector<Real>* sums, Real* partial, int64_t to,
                 double* totals, int64_t a_count, int64_t columns, bool first_pass,
                 bool last_pass) const {
    const Real* sum = reinterpret_cast<Real*>(sums);
    for (int64_t i = 0; i < a_count * COLUMNS; i += V)
      store(reinterpret_cast<Real*>(sums) + i, sum_lanes<Real>(sums + i));
    for (int64_t a = 0; a < a_count; ++a, to += fine_channels * TAPS, sum += COLUMNS) {
      if (totals) {
        for (int64_t j = 0; j < columns; ++j)
          totals[j] = first_pass ? double(sum[j]) : totals[j] + double(sum[j]);
        if (last_pass)
          for (int64_t j = 0; j < columns; ++j) partial[to + j] = Real(totals[j]);
        totals += fine_part * TAPS;
      } else {
        for (int64_t j = 0; j < columns; ++j) partial[to + j] = sum[j];
      }
      if (last_pass && partial_is_output()) sum_nan_again(call, partial, to, columns);
    }
  }

  // Replaces weights that are NaN by the sums over what they meet.
  void sum_nan_again(const ConvgenCall& call, Real* weight, int64_t first, int64_t count) const {
    bool any = false;
    for (int64_t i = first; i < first + count; ++i) any |= weight[i] != weight[i];
    if (!any) return;
    for (int64_t i = first; i < first + count; ++i)
      if (weight[i] != weight[i]) weight[i] = Real(meeting_sum<Problem>(call, i));
  }

  // M coarse channels against the columns of a fine block.
  template <int M, int WIDTH_>
  struct Columns {
    static constexpr int WIDTH = WIDTH_;  // columns per register tile, at most
    const Reduce& plan;
    const Real* coarse;
    const Real* fine;
    const int64_t* offset;  // of the columns in `fine`
    Vector<Real>* sums;     // [channel][column]
    Prefetch* later;

    // Adds the products of COUNT columns from `first` on.
    template <int COUNT>
    CONVGEN_NOINLINE void correlate(int64_t first) const {
      const Real* f[COUNT];
      Vector<Real> acc[M][COUNT];
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; ++j) f[j] = fine + offset[first + j];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; ++j) acc[m][j] = sums[m * COLUMNS + first + j];
      Prefetch prefetch = *later;
      const Real* c = coarse;
      const int64_t pitch = plan.coarse_pitch, segment = plan.segment;
      for (int64_t plane = 0; plane < plan.segments[0]; ++plane)
        for (int64_t row = 0; row < plan.segments[1]; ++row, c += segment) {
          const int64_t at = plane * plan.scratch.plane() + row * plan.scratch.pitch();
          for (int64_t i = 0; i < segment; i += V) {
            if (M == 1) prefetch.step();
            Vector<Real> in[COUNT];
#pragma GCC unroll 16
            for (int j = 0; j < COUNT; ++j) in[j] = load(f[j] + at + i);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
              Vector<Real> value = load(c + m * pitch + i);
              if (COUNT > 1) keep(value);
#pragma GCC unroll 16
              for (int j = 0; j < COUNT; ++j) acc[m][j] += value * in[j];
            }
          }
        }
      *later = prefetch;
      Vector<Real>* to = sums + first;
      keep(to);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; ++j) to[m * COLUMNS + j] = acc[m][j];
    }
  };
};

}  // namespace
