// fprop and dgrad of depthwise layers, with channels in the lanes:
//
//   output[q * PHASES + r][c] = sum over taps j of phase r of
//                               weight[j][c] * source[q * SOURCE_STRIDE + offset[j]][c], plus
//                               bias[c]
//
//   task: some rows of an image, some vectors of channels
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

#include "chains.h"
#include "depthwise.h"
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
  static constexpr int64_t V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t WEIGHT_PITCH = round_up(CHANNELS, V);  // from tap to tap
  static constexpr int MOST_UNROLLED = 16;                        // taps along w
  static constexpr int64_t MOST_ROWS = 1024;                      // of taps
  static constexpr int MOST_PHASES = 4;                           // along w, with unrolled taps
  static constexpr int64_t TASKS_PER_THREAD = 8;
  // Rows of taps whose products are added up in registers; a phase's, if all of them may be.
  static constexpr int64_t TAPS_ALONG_W = most_taps<AxisW>();
  static constexpr int64_t CHAIN_ROWS =
      greatest(Problem::CHAIN_TERMS / greatest(TAPS_ALONG_W, 1), 1);
  static constexpr bool COMPILED = std::is_same_v<Real, Storage> && CHANNELS >= V &&
                                   TAPS_ALONG_W <= Problem::CHAIN_TERMS &&
                                   int64_t(AxisD::TAPS) * AxisH::TAPS <= MOST_ROWS;
  static constexpr bool CHAINED = most_taps<AxisD>() * most_taps<AxisH>() > CHAIN_ROWS;

  int64_t batch;
  int64_t source_extent[3], output_extent[3];
  bool served;
  int64_t chunk, chunks;    // vectors of channels of a task, tasks
  int64_t rows, row_parts;  // output rows of a task (of all planes), tasks
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

  void choose_tasks() {
    chunk = Vectors::COUNT;
    chunks = 1;
    const int64_t all = output_extent[0] * output_extent[1];
    rows = greatest(all, 1);
    while (rows > 4 &&
           (threads > 1 && batch * chunks * ceil_div(all, rows) < TASKS_PER_THREAD * threads))
      rows = ceil_div(rows, 2);
    row_parts = ceil_div(all, rows);
  }

  // Weights as [kernel element][channel], and the bias, or zeros.
  void pack(const ConvgenCall& call, Real* weights, Real* bias) const {
    constexpr int64_t PIECE = 64;
    const Storage* const from = static_cast<const Storage*>(call.weight);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < ceil_div(CHANNELS, PIECE); ++i) {
      const int64_t c = i * PIECE, count = least(PIECE, CHANNELS - c);
      transpose<Real>(weights + c, WEIGHT_PITCH, from + c * TAPS, TAPS, count, TAPS);
      if (call.bias)
        convert<Real>(bias + c, static_cast<const Storage*>(call.bias) + c, count);
      else
        memset(bias + c, 0, size_t(count * REAL_BYTES));
    }
  }

  void run_tasks(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    Real* const bias = reinterpret_cast<Real*>(workspace + bias_at);
    const int64_t all = output_extent[0] * output_extent[1];
    const int64_t tasks = batch * chunks * row_parts;
    if (tasks == 0) return;
    const Pitches from(CHANNELS, source_extent, true), to(CHANNELS, output_extent, true);
    advise_output(output, batch * to.image * int64_t(sizeof(Storage)));
    const Finish<Problem> finish(call, output);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      pack(call, weights, bias);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % row_parts * rows, part = task / row_parts % chunks;
        const int64_t n = task / (row_parts * chunks);
        const Span vectors = {part * chunk, least((part + 1) * chunk, Vectors::COUNT)};
        for (int64_t row = first; row < least(first + rows, all); ++row) {
          Storage* const out = static_cast<Storage*>(output) + n * to.image + row * to.axis[1];
          run_row(static_cast<const Real*>(source) + n * from.image, weights, bias, vectors,
                  row / output_extent[1], row % output_extent[1], out);
          const int64_t line[3] = {1, 1, output_extent[2]};
          const int64_t c = vectors.first * V;
          finish.block(out + c, to, true, out + c, to.axis, least(vectors.end * V, CHANNELS) - c,
                       line);
        }
      }
    }
  }

  // A tap along d and h of an output row: its row of the source, its weights.
  struct RowTap {
    const Real* source;
    const Real* weight;
  };

  // What the register tiles of one output row have in common.
  struct Row {
    const RowTap* taps;
    int64_t count;
    const Real* bias;
    Storage* out;
    Span vectors;
  };

  void run_row(const Real* source, const Real* weights, const Real* bias, Span vectors, int64_t od,
               int64_t oh, Storage* out) const {
    RowTap taps[AxisD::TAPS * AxisH::TAPS];
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
    const Row row = {taps, count, bias, out, vectors};
    if constexpr (AxisW::PHASES <= MOST_PHASES)
      run_phases(row, std::make_integer_sequence<int, AxisW::PHASES>{});
    else
      for (int r = 0; r < AxisW::PHASES; ++r) run_phase<0, 0>(row, r);
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
    Vectors::template visit<VECTORS>(row.vectors.first, row.vectors.end,
                                     [&](auto vectors, int64_t vector) CONVGEN_INLINE_LAMBDA {
                                       const int64_t c = Vectors::at(vector);
                                       tile<FIRST, COUNT, P, decltype(vectors)::value>(
                                           row, from + c, c, first, end, out + c);
                                     });
  }

  template <int FIRST, int COUNT, int P, int VECTORS>
  CONVGEN_INLINE void tile(const Row& row, int64_t from, int64_t channel, int first, int end,
                           Storage* out) const {
    Vector<Real> acc[P][VECTORS] = {};
    if constexpr (!CHAINED) {
      add_rows<FIRST, COUNT>(acc, row.taps, row.count, from, channel, first, end);
    } else {
      using Sums = ChainSums<Real, P, VECTORS>;
      Sums memory;
      Real* const sums = memory.at();
      int64_t done = 0, r = 0;
      for (; r + CHAIN_ROWS < row.count; r += CHAIN_ROWS) {
        add_rows<FIRST, COUNT>(acc, row.taps + r, CHAIN_ROWS, from, channel, first, end);
        Sums::add(sums, acc, ++done);
#pragma GCC unroll 16
        for (int i = 0; i < P * VECTORS; ++i) acc[i / VECTORS][i % VECTORS] = Vector<Real>{};
      }
      add_rows<FIRST, COUNT>(acc, row.taps + r, row.count - r, from, channel, first, end);
      if (done > 0) Sums::complete(acc, sums, done);
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v)
        store_real<Real>(out + p * AxisW::PHASES * CHANNELS + v * V,
                         acc[p][v] + load(row.bias + channel + v * V));
  }

  // The products of some rows of taps.
  template <int FIRST, int COUNT, int P, int VECTORS>
  static CONVGEN_INLINE void add_rows(Vector<Real> (&acc)[P][VECTORS], const RowTap* taps,
                                      int64_t count, int64_t from, int64_t channel, int first,
                                      int end) {
    for (const RowTap* tap = taps; tap < taps + count; ++tap) {
      const Real* const x = tap->source + from;
      const Real* const weight = tap->weight + channel;
      if constexpr (COUNT > 0) {
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; ++j) add_tap(acc, x, weight, AxisW::TAP[FIRST + j]);
      } else {
#pragma GCC unroll 1
        for (int j = first; j < end; ++j) add_tap(acc, x, weight, AxisW::TAP[j]);
      }
    }
  }

  template <int P, int VECTORS>
  static CONVGEN_INLINE void add_tap(Vector<Real> (&acc)[P][VECTORS], const Real* x,
                                     const Real* weight, AxisTap at) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      Vector<Real> w = load(weight + at.tap * WEIGHT_PITCH + v * V);
      if (P > 1) keep(w);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
        acc[p][v] += w * load(x + (p * AxisW::SOURCE_STRIDE + at.offset) * CHANNELS + v * V);
    }
  }
};

}  // namespace
