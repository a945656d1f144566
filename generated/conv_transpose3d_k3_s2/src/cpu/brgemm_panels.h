// fprop and dgrad of contiguous tensors with positions in the lanes and weights as they lie: for
// layers with many channels.
//
//   source -> lines of positions, one for each channel (lines.h)
//   task: a block of output positions of the batch, some output channels of one group
//     for each chain of terms (a channel of the source and a kernel element each):
//       panels    [tile of positions][term][lanes], from the lines (L2)
//       multiply  each tile by rows of weights, one for each output channel (brgemm.h): the chain's
//                 sums, added up in scratch [output channel][position] (L2)
//     rows of positions: bias, epilogue -> output
//
// It is the register tile of brgemm.h with its operands exchanged: nothing is transposed, where
// brgemm_gather.h transposes the source, the weights and the output. In return, it copies every
// element for every tap. Where a chain ends depends on channels and taps alone, and chains are
// added in order, so that results do not depend on blocks or the number of threads.
#pragma once

#include "brgemm.h"
#include "epilogue.h"
#include "layout.h"
#include "lines.h"
#include "runtime.h"
#include "scratch.h"

namespace {

template <class Problem>
class BrgemmPanels {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  using SourceLines = Lines<AxisD, AxisH, AxisW>;
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr bool CONVERTS = !std::is_same_v<Real, Storage>;
  // All positions meet the same taps.
  static constexpr bool AVAILABLE = AxisD::PHASES * AxisH::PHASES * AxisW::PHASES == 1;
  static constexpr int64_t LEAST_TERMS = 64, MOST_TERMS = 192;  // products in a chain
  static constexpr int64_t BLOCK_BYTES = 384;                   // of a block's row of positions
  static constexpr int64_t SUMS_BYTES = 192 << 10;              // of a task: in L2
  static constexpr int64_t WEIGHT_ROWS = 2 * TILE_MULTIPLE;     // whose chains stay in L2
  static constexpr int64_t MANY_OUTPUTS = 96;  // for which few source channels do not matter
  // Processor clocks, as measured on Zen 3: for an element of a panel that vectors copy, and for
  // others; for an element of packed weights.
  static constexpr double COPIED = 0.35, PLACED = 1.0, PACKED = 0.7;

  int64_t batch, groups;
  int64_t sources, outputs;  // channels of one group: k, m
  int64_t output_volume, terms;
  int64_t positions[3];
  bool contiguous;   // source and output are
  bool weight_last;  // channels_last
  bool by_element;   // terms are counted by element, then channel; else the other way
  bool packs;        // weights are copied to rows of terms
  SourceLines lines;
  int64_t chain;          // terms
  int64_t block, blocks;  // positions
  int64_t part, parts;    // output channels of a task, tasks
  int threads;
  int64_t weights_at, offsets_at, source_at, threads_at, total_bytes;  // in the workspace
  int64_t rows_at, segments_at, panels_at, sums_at, thread_bytes;      // of a thread

  // Positions side by side in a line and in a tile.
  struct Segment {
    const Real* from;
    int64_t lane, count;
    int vectors;  // that may be copied instead: what is too much is overwritten; or 0
  };

 public:
  BrgemmPanels(const ConvgenCall& call, const int64_t* source, const int64_t* output,
               int64_t source_channels, int64_t output_channels)
      : batch(call.batch),
        groups(Problem::GROUPS),
        sources(source_channels / Problem::GROUPS),
        outputs(output_channels / Problem::GROUPS),
        terms(sources * TAPS) {
    int64_t extent[3], source_volume = 1;
    output_volume = 1;
    for (int axis = 0; axis < 3; ++axis) {
      extent[axis] = source[axis];
      positions[axis] = output[axis];
      source_volume *= source[axis];
      output_volume *= output[axis];
    }
    contiguous = !(call.channels_last & (CONVGEN_COARSE | CONVGEN_FINE));
    weight_last = call.channels_last & CONVGEN_WEIGHT;
    by_element = Problem::SOURCE_IS_COARSE || weight_last;
    packs = CONVERTS || Problem::SOURCE_IS_COARSE;
    threads = thread_count(call.device, double(batch) * double(output_volume) *
                                            double(output_channels) * double(terms));
    if (SourceLines::POINTWISE && source_volume == output_volume)
      for (int axis = 0; axis < 3; ++axis)
        extent[axis] = positions[axis] = axis < 2 ? 1 : output_volume;
    lines = SourceLines(positions, source_channels, extent, false, CONVERTS, REAL_BYTES);
    // What a sum of one sign loses grows with its chains; long sums are allowed longer ones.
    chain = even_part(terms, least(greatest(terms / 8, LEAST_TERMS), MOST_TERMS));
    choose_blocks();
    Workspace workspace;
    weights_at = workspace.take(packs ? groups * outputs * terms * REAL_BYTES : 0);
    offsets_at = workspace.take(TAPS * int64_t(sizeof(int64_t)));
    source_at = workspace.take(lines.copy_bytes(batch, REAL_BYTES));
    const int64_t rows = round_up(part, TILE_MULTIPLE), lanes = round_up(block, V);
    rows_at = rows * int64_t(sizeof(Real*));
    segments_at = rows_at + rows * int64_t(sizeof(Real*));
    panels_at = round_up(segments_at + lanes * int64_t(sizeof(Segment)), 64);
    sums_at = panels_at + chain * lanes * REAL_BYTES;
    thread_bytes = round_up(sums_at + (part + 1) * lanes * REAL_BYTES, 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  // Whether it is faster than the GEMM that transposes, where that is faster than others, or than
  // others where a tile is full of output channels.
  template <class Other>
  bool suits(const Other& other) const {
    if (!AVAILABLE || !contiguous || terms == 0) return false;
    if (!other.suits()) return outputs >= MANY_OUTPUTS && terms >= LEAST_TERMS;
    const double n = double(batch) * double(output_volume);
    const double k = double(sources), m = double(outputs), clocks = m * double(terms) * n / (2 * V);
    const bool vectors = SourceLines::STRIDE == 1 && (lines.copied || positions[2] >= V);
    const double used = n / (double(batch * ceil_div(output_volume, V) * V));
    const double panels = (vectors ? COPIED : PLACED) * double(terms) * n * double(parts) +
                          (packs ? PACKED * double(terms) * m : 0.0) + clocks / used;
    const double transposed =
        TRANSPOSED * (k + m) * n + PACKED * double(terms) * m + clocks / other.used_lanes();
    return panels < transposed;
  }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    const int64_t tasks = groups * blocks * parts;
    if (tasks == 0) return;
    int64_t* const offsets = reinterpret_cast<int64_t*>(workspace + offsets_at);
    lines.for_elements([&](int64_t element, int64_t offset) { offsets[element] = offset; });
    advise_output(output, batch * groups * outputs * output_volume * int64_t(sizeof(Storage)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      if (packs) {
        Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < groups * pack_parts(); ++i)
          pack(weights, static_cast<const Storage*>(call.weight), i / pack_parts(),
               i % pack_parts());
      }
      if (lines.copied)
        lines.copy(reinterpret_cast<Real*>(workspace + source_at),
                   static_cast<const Storage*>(source), batch);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) run_task(call, own, source, output, task);
    }
  }

 private:
  void choose_blocks() {
    const int64_t count = batch * output_volume;
    block = BLOCK_BYTES / REAL_BYTES;
    blocks = ceil_div(count, block);
    part = least(outputs, SUMS_BYTES / BLOCK_BYTES);
    parts = ceil_div(outputs, greatest(part, 1));
    while (threads > 1 && groups * blocks * parts < TASKS_PER_THREAD * threads &&
           part >= 2 * WEIGHT_ROWS) {
      part = round_up(ceil_div(part, 2), TILE_MULTIPLE);
      parts = ceil_div(outputs, part);
    }
  }

  // Weights are packed in parts of channels of the operand whose weights lie together.
  static constexpr int64_t PACK_CHANNELS = 32;
  int64_t pack_parts() const {
    return ceil_div(Problem::SOURCE_IS_COARSE ? sources : outputs, PACK_CHANNELS);
  }

  // Weights to [output channel][term].
  void pack(Real* to, const Storage* weight, int64_t group, int64_t index) const {
    to += group * outputs * terms;
    weight += group * outputs * terms;
    const int64_t c0 = index * PACK_CHANNELS;
    if constexpr (!Problem::SOURCE_IS_COARSE) {
      const int64_t count = least(PACK_CHANNELS, outputs - c0) * terms;
      convert<Real>(to + c0 * terms, weight + c0 * terms, count);
    } else {
      // From rows of a source channel: (output channel, element), or (element, output channel).
      const int64_t count = least(PACK_CHANNELS, sources - c0);
      if (weight_last)
        for (int64_t element = 0; element < TAPS; ++element)
          transpose<Real, true>(to + element * sources + c0, terms,
                                weight + (c0 * TAPS + element) * outputs, TAPS * outputs, count,
                                outputs);
      else
        transpose<Real, true>(to + c0, sources, weight + c0 * outputs * TAPS, outputs * TAPS, count,
                              outputs * TAPS);
    }
  }

  void run_task(const ConvgenCall& call, char* own, const void* source, void* output,
                int64_t task) const {
    char* const workspace = static_cast<char*>(call.workspace);
    const int64_t m0 = task % parts * part, group = task / parts / blocks;
    const int64_t q0 = task / parts % blocks * block;
    const int64_t count = least(block, batch * output_volume - q0),
                  rows = least(part, outputs - m0);
    const int64_t pitch = round_up(count, V);  // of sums
    Real* const sums = reinterpret_cast<Real*>(own + sums_at);
    Real** const sum_of = reinterpret_cast<Real**>(own);
    const Real** const row_of = reinterpret_cast<const Real**>(own + rows_at);
    Segment* const segments = reinterpret_cast<Segment*>(own + segments_at);
    Real* const panels = reinterpret_cast<Real*>(own + panels_at);
    const Real* const weights = packs ? reinterpret_cast<const Real*>(workspace + weights_at)
                                      : static_cast<const Real*>(call.weight);
    const int64_t padded = round_up(rows, TILE_MULTIPLE);
    for (int64_t m = 0; m < padded; ++m) {  // beyond the last, it is repeated
      row_of[m] = weights + (group * outputs + m0 + least(m, rows - 1)) * terms;
      sum_of[m] = sums + least(m, rows) * pitch;
    }
    const Real* const from = lines.copied ? reinterpret_cast<const Real*>(workspace + source_at)
                                          : static_cast<const Real*>(source);
    const int64_t found =
        find_segments(segments, from + group * sources * lines.channel, q0, count);
    for (int64_t t0 = 0; t0 < terms; t0 += chain) {
      const int64_t length = least(chain, terms - t0);
      put_panels(panels, segments, found, reinterpret_cast<const int64_t*>(workspace + offsets_at),
                 t0, length, pitch);
      for (int64_t m = 0; m < rows; m += WEIGHT_ROWS)
        for (int64_t lane = 0; lane < pitch; lane += TILE) {
          const int vectors = int(least(TILE, pitch - lane) / V);
          // A single "tap", whose rows of weights do not move; the bias comes with the output.
          const int64_t taps = 1, from_tap_to_tap = 0;
          const bool adds = t0 > 0;
          const Chain<Real> tile{panels + lane * length,
                                 row_of + m,
                                 from_tap_to_tap,
                                 taps,
                                 t0,
                                 length,
                                 sum_of + m,
                                 lane,
                                 adds,
                                 nullptr,
                                 false};
          multiply_of<Real>(vectors)(tile, 0,
                                     round_up(least(WEIGHT_ROWS, rows - m), tile_unit(vectors)));
        }
    }
    put_out(call, static_cast<Storage*>(output), sums, pitch, group, m0, rows, q0, count);
  }

  static constexpr int64_t TILE = MOST_VECTORS * V;  // positions

  // The segments of a block of positions, tile by tile.
  int64_t find_segments(Segment* segments, const Real* from, int64_t q0, int64_t count) const {
    Segment* to = segments;
    for (int64_t i = 0; i < count;) {
      const int64_t q = (q0 + i) % output_volume, n = (q0 + i) / output_volume;
      const int64_t w = q % positions[2], lane = i % TILE;
      const int64_t length = least(least(positions[2] - w, TILE - lane), count - i);
      const int64_t tile = round_up(least(TILE, count - (i - lane)), V);
      const bool whole = SourceLines::STRIDE == 1 && lane + round_up(length, V) <= tile;
      *to++ = {from + n * lines.image +
                   lines.at(q / positions[2] / positions[1], q / positions[2] % positions[1], w),
               i, length,
               whole && (lines.copied || length % V == 0) ? int(ceil_div(length, V)) : 0};
      i += length;
    }
    return to - segments;
  }

  // The panels of a chain: a row of lanes for each term, tile by tile. Lanes behind the last
  // position hold anything.
  void put_panels(Real* panels, const Segment* segments, int64_t found, const int64_t* offsets,
                  int64_t t0, int64_t length, int64_t lanes) const {
    using Put = void (BrgemmPanels::*)(Real*, const Segment&, const int64_t*, int64_t, int64_t,
                                       int64_t) const;
    constexpr Put PUT[] = {&BrgemmPanels::put<0>, &BrgemmPanels::put<1>, &BrgemmPanels::put<2>,
                           &BrgemmPanels::put<3>, &BrgemmPanels::put<MOST_VECTORS>};
    for (int64_t i = 0; i < found; ++i) {
      const Segment& segment = segments[i];
      const int64_t first = segment.lane / TILE * TILE, width = least(TILE, lanes - first);
      (this->*PUT[segment.vectors])(panels + first * length + segment.lane - first, segment,
                                    offsets, t0, length, width);
    }
  }

  template <int VECTORS>
  CONVGEN_NOINLINE void put(Real* to, const Segment& segment, const int64_t* offsets, int64_t t0,
                            int64_t length, int64_t width) const {
    // Term t0 + j: channel k, element e.
    int64_t k = by_element ? t0 % sources : t0 / TAPS;
    int64_t e = by_element ? t0 / sources : t0 % TAPS;
    const Real* channel = segment.from + k * lines.channel;
    for (int64_t j = 0; j < length; ++j, to += width) {
      const Real* const x = channel + offsets[e];
      if constexpr (VECTORS > 0) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) store(to + v * V, load(x + v * V));
      } else {
#pragma GCC unroll 1
        for (int64_t i = 0; i < segment.count; ++i) to[i] = x[i * SourceLines::STRIDE];
      }
      if (by_element) {
        channel += lines.channel;
        if (++k == sources) k = 0, ++e, channel = segment.from;
      } else if (++e == TAPS) {
        e = 0, channel += lines.channel;
      }
    }
  }

  // Sums to the output, image by image.
  void put_out(const ConvgenCall& call, Storage* output, Real* sums, int64_t pitch, int64_t group,
               int64_t m0, int64_t rows, int64_t q0, int64_t count) const {
    const Storage* const bias = static_cast<const Storage*>(call.bias);
    const Finish<Problem> finish(call, output);
    for (int64_t m = 0; m < rows; ++m, sums += pitch) {
      const int64_t channel = group * outputs + m0 + m;
      if (bias) {
        const Real value = to_real(bias[channel]);
        for (int64_t i = 0; i < pitch; ++i) sums[i] += value;
      }
      for (int64_t i = 0; i < count;) {
        const int64_t n = (q0 + i) / output_volume, q = (q0 + i) % output_volume;
        const int64_t length = least(output_volume - q, count - i);
        Storage* const to = output + (n * groups * outputs + channel) * output_volume + q;
        finish.template row<1>(to, sums + i, length, length);
        convert<Real>(to, sums + i, length);
        i += length;
      }
    }
  }
};

}  // namespace
