// fprop and dgrad of depthwise layers, with channels in the lanes:
//
//   output[q * PHASES + r][c] = sum over taps j of phase r of
//                               weight[j][c] * source[q * SOURCE_STRIDE + offset[j]][c], plus
//                               bias[c]
//
//   task: some planes and rows of an image
//     for each row: its taps along d and h that meet the source, as pointers to rows; and for each
//     phase along w
//       inside     register tiles of positions x vectors of channels, taps along w unrolled:
//                          c0        c1
//                  q0  [ lanes ] [ lanes ]    += source[q * SOURCE_STRIDE + offset[j]][c]
//                  q1  [ lanes ] [ lanes ]         * weight[j][c]
//                  ..                           for all rows of taps, all taps along w
//       at borders a position at a time, over the taps that it meets
//     then what the layer does with its sums (epilogue.h), in the output
//
// Each output is the sum of its products by rising source position, in one chain or, of many taps,
// in several (chains.h); the bias comes last. So results depend neither on tasks nor on threads.
#pragma once

#include "depthwise_tile.h"
#include "epilogue.h"
#include "phases.h"

namespace {

template <class Problem>
class DepthwiseGather
    : Phases<typename Problem::AxisD, typename Problem::AxisH, typename Problem::AxisW> {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  static constexpr int64_t CHANNELS = Problem::GROUPS;
  using Vectors = ChannelVectors<Real, CHANNELS>;
  using Chain = DepthwiseChain<Problem>;
  static constexpr int64_t V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  // From tap to tap: no power of two, whose multiples share the lines of L1.
  static constexpr int64_t WEIGHT_PITCH = round_up(CHANNELS, V) + V;
  using Tile = DepthwiseTile<Problem, CHANNELS, CHANNELS, WEIGHT_PITCH, Storage>;
  static constexpr int MOST_UNROLLED = 16;  // taps along w
  static constexpr int MOST_PHASES = 4;     // along w, with unrolled taps
  static constexpr int64_t TASKS_PER_THREAD = 8, LEAST_ROWS = 4;
  static constexpr int64_t L2_BYTES = 256 << 10, FAR_BYTES = 2 << 20;
  static constexpr bool COMPILED = std::is_same_v<Real, Storage> && Chain::COMPILED;

  int64_t batch;
  int64_t source_extent[3], output_extent[3];
  bool served;
  int64_t block[2], blocks[2];  // output planes and rows of a task, tasks
  int threads;
  int64_t weights_at, bias_at, total_bytes;  // in the workspace

 public:
  DepthwiseGather(const ConvgenCall& call, const int64_t* source, const int64_t* output,
                  int64_t source_channels, int64_t output_channels)
      : batch(call.batch) {
    constexpr int SOURCE = Problem::SOURCE_IS_COARSE ? CONVGEN_COARSE : CONVGEN_FINE;
    constexpr int OUTPUT = Problem::SOURCE_IS_COARSE ? CONVGEN_FINE : CONVGEN_COARSE;
    double terms = double(batch) * double(CHANNELS) * double(TAPS) / double(phases());
    for (int axis = 0; axis < 3; ++axis) {
      source_extent[axis] = source[axis];
      output_extent[axis] = output[axis];
      terms *= double(output[axis]);
    }
    served = source_channels == CHANNELS && output_channels == CHANNELS && COMPILED &&
             call.channels_last & SOURCE && call.channels_last & OUTPUT;
    threads = thread_count(call.device, terms);
    choose_tasks();
    Workspace workspace;
    weights_at = workspace.take(TAPS * WEIGHT_PITCH * REAL_BYTES);
    bias_at = workspace.take(WEIGHT_PITCH * REAL_BYTES);
    total_bytes = workspace.bytes;
  }

  bool suits() const { return served; }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call, const void* source, void* output) const {
    if constexpr (COMPILED) run_tasks(call, source, output);
  }

 private:
  static constexpr int64_t phases() {
    return int64_t(AxisD::PHASES) * AxisH::PHASES * AxisW::PHASES;
  }

  // Rows of which the source's part, of all planes that a tap reaches, stays in L2 while d changes.
  void choose_tasks() {
    const int64_t row_bytes = source_extent[2] * CHANNELS * REAL_BYTES;
    const int64_t planes = greatest(least(reach<AxisD>(), source_extent[0]), 1);
    const int64_t rows = L2_BYTES / greatest(planes * row_bytes, 1) - reach<AxisH>() + 1;
    block[0] = greatest(output_extent[0], 1);
    block[1] = output_extent[0] == 1
                   ? greatest(output_extent[1], 1)
                   : even_part(output_extent[1],
                               greatest(rows * AxisH::PHASES / AxisH::SOURCE_STRIDE, LEAST_ROWS));
    while (threads > 1 && task_count() < TASKS_PER_THREAD * threads) {
      const int axis = block[0] >= 2 * LEAST_ROWS ? 0 : 1;
      if (block[axis] < 2 * LEAST_ROWS) break;
      block[axis] = even_part(output_extent[axis], ceil_div(block[axis], 2));
    }
    task_count();
  }

  int64_t task_count() {
    for (int axis = 0; axis < 2; ++axis) blocks[axis] = ceil_div(output_extent[axis], block[axis]);
    return batch * blocks[0] * blocks[1];
  }

  void run_tasks(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    Real* const bias = reinterpret_cast<Real*>(workspace + bias_at);
    const int64_t tasks = batch * blocks[0] * blocks[1];
    if (tasks == 0) return;
    const Pitches from(CHANNELS, source_extent, true), to(CHANNELS, output_extent, true);
    advise_output(output, batch * to.image * int64_t(sizeof(Storage)));
    const Finish<Problem> finish(call, output);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      pack_depthwise<Problem, WEIGHT_PITCH>(call, weights, bias);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t n = task / (blocks[0] * blocks[1]);
        const int64_t d0 = task % blocks[0] * block[0];
        const int64_t h0 = task / blocks[0] % blocks[1] * block[1];
        const int64_t line[3] = {1, 1, output_extent[2]};
        for (int64_t d = d0; d < least(d0 + block[0], output_extent[0]); ++d)
          for (int64_t h = h0; h < least(h0 + block[1], output_extent[1]); ++h) {
            Storage* const out =
                static_cast<Storage*>(output) + n * to.image + d * to.axis[0] + h * to.axis[1];
            run_row(static_cast<const Real*>(source) + n * from.image, weights, bias, d, h, out);
            finish.block(out, to, true, out, to.axis, CHANNELS, line);
          }
      }
    }
  }

  // What the register tiles of one output row have in common.
  struct Row {
    const RowTap<Real>* taps;
    int64_t count;
    const Real* bias;
    Storage* out;
    const Real* ahead;  // the source row that the next rows of outputs read first, or null
  };

  void run_row(const Real* source, const Real* weights, const Real* bias, int64_t od, int64_t oh,
               Storage* out) const {
    RowTap<Real> taps[AxisD::TAPS * AxisH::TAPS];
    const int rd = int(od % AxisD::PHASES), rh = int(oh % AxisH::PHASES);
    const int64_t qd = od / AxisD::PHASES, qh = oh / AxisH::PHASES;
    int64_t count = 0;
    for (int jd = AxisD::FIRST[rd]; jd < AxisD::FIRST[rd + 1]; ++jd) {
      const int64_t z = qd * AxisD::SOURCE_STRIDE + AxisD::TAP[jd].offset;
      if (z < 0 || z >= source_extent[0]) continue;
      for (int jh = AxisH::FIRST[rh]; jh < AxisH::FIRST[rh + 1]; ++jh) {
        const int64_t y = qh * AxisH::SOURCE_STRIDE + AxisH::TAP[jh].offset;
        if (y < 0 || y >= source_extent[1]) continue;
        taps[count++] = {
            source + (z * source_extent[1] + y) * source_extent[2] * CHANNELS,
            weights + (int64_t(AxisD::TAP[jd].tap) * AxisH::TAPS + AxisH::TAP[jh].tap) *
                          AxisW::TAPS * WEIGHT_PITCH};
      }
    }
    const Row row = {taps, count, bias, out, row_ahead(source, qd, qh)};
    if constexpr (AxisW::PHASES <= MOST_PHASES)
      run_phases(row, std::make_integer_sequence<int, AxisW::PHASES>{});
    else
      for (int r = 0; r < AxisW::PHASES; ++r) run_phase<0, 0>(row, r);
  }

  // The row below those that a row of outputs reads. Only where tensors leave the caches: the
  // processor's own prefetching follows few of the lines that register tiles read side by side.
  const Real* row_ahead(const Real* source, int64_t qd, int64_t qh) const {
    const int64_t row = source_extent[2] * CHANNELS;
    if (batch * source_extent[0] * source_extent[1] * row * REAL_BYTES < FAR_BYTES) return nullptr;
    constexpr int64_t LAST_D = least_offset<AxisD>() + reach<AxisD>() - 1;
    constexpr int64_t LAST_H = least_offset<AxisH>() + reach<AxisH>() - 1;
    const int64_t z = greatest(least(qd * AxisD::SOURCE_STRIDE + LAST_D, source_extent[0] - 1), 0);
    const int64_t y = (qh + 1) * AxisH::SOURCE_STRIDE + LAST_H;
    return y < 0 || y >= source_extent[1] ? nullptr : source + (z * source_extent[1] + y) * row;
  }

  template <int... R>
  CONVGEN_INLINE void run_phases(const Row& row, std::integer_sequence<int, R...>) const {
    (run_unrolled<R>(row), ...);
  }

  template <int R>
  CONVGEN_INLINE void run_unrolled(const Row& row) const {
    constexpr int FIRST = AxisW::FIRST[R], COUNT = AxisW::FIRST[R + 1] - FIRST;
    if constexpr (COUNT <= MOST_UNROLLED)
      run_phase<FIRST, COUNT>(row, R);
    else
      run_phase<0, 0>(row, R);
  }

  // Outputs of a row at one residue along w; COUNT taps from FIRST on, or as many as there are.
  template <int FIRST, int COUNT>
  CONVGEN_NOINLINE void run_phase(const Row& row, int residue) const {
    constexpr int S = AxisW::SOURCE_STRIDE;
    const int first = AxisW::FIRST[residue], end = AxisW::FIRST[residue + 1];
    const int64_t positions = ceil_div(output_extent[2] - residue, AxisW::PHASES);
    Storage* const out = row.out + residue * CHANNELS;
    Span inside = {0, positions};
    for (int j = first; j < end; ++j) {
      const Span met = span_of<S>(AxisW::TAP[j].offset, source_extent[2], positions);
      inside = {greatest(inside.first, met.first), least(inside.end, met.end)};
    }
    inside.end = greatest(inside.first, inside.end);
    for (int64_t q = 0; q < inside.first; ++q) at_border(row, out, q, first, end);
    int64_t q = inside.first;
    for (; q + 8 <= inside.end; q += 8) positions_at<FIRST, COUNT, 8, 1>(row, out, q, first, end);
    if (q + 4 <= inside.end) {
      positions_at<FIRST, COUNT, 4, 2>(row, out, q, first, end);
      q += 4;
    }
    for (; q < inside.end; ++q) positions_at<FIRST, COUNT, 1, 4>(row, out, q, first, end);
    for (; q < positions; ++q) at_border(row, out, q, first, end);
  }

  // One position, over the taps that it meets.
  CONVGEN_INLINE void at_border(const Row& row, Storage* out, int64_t q, int first, int end) const {
    const int64_t x = q * AxisW::SOURCE_STRIDE;
    while (first < end && x + AxisW::TAP[first].offset < 0) ++first;
    while (end > first && x + AxisW::TAP[end - 1].offset >= source_extent[2]) --end;
    positions_at<0, 0, 1, 4>(row, out, q, first, end);
  }

  // P positions from q on, all of which meet the taps from `first` to `end`: all vectors.
  template <int FIRST, int COUNT, int P, int VECTORS>
  CONVGEN_INLINE void positions_at(const Row& row, Storage* out, int64_t q, int first,
                                   int end) const {
    const int64_t from = q * AxisW::SOURCE_STRIDE * CHANNELS;
    out += q * AxisW::PHASES * CHANNELS;
    Vectors::template visit<VECTORS>(
        0, Vectors::COUNT, [&](auto vectors, int64_t vector) CONVGEN_INLINE_LAMBDA {
          const int64_t c = Vectors::at(vector);
          if (P > 1 && row.ahead)
#pragma GCC unroll 16
            for (int p = 0; p < P * AxisW::SOURCE_STRIDE; ++p)
              __builtin_prefetch(row.ahead + from + p * CHANNELS + c, 0, 2);
          Tile::template run<FIRST, COUNT, P, decltype(vectors)::value>(
              row.taps, row.count, from + c, c, first, end, row.bias + c, out + c);
        });
  }
};

}  // namespace
