// fprop and dgrad with output channels in the lanes: for layers with many channels.
//
//   source -> rows of channels, one per element (as it lies if it is channels_last)
//   weights -> [phase][chain][block of output channels][tap][channel][lanes]
//   task: a block of output positions of one image and group, some blocks of output channels
//     for each phase, chain:
//       point     at the source rows that its taps meet, or at zeros
//       multiply  each block of output channels (brgemm.h): the chain's sums, added up in the
//                 output, or where that is not channels_last, in scratch (L2)
//     finish      what the layer does with its sums (epilogue.h)
//     transpose   scratch -> output
//
// Where a chain ends depends on channels and taps alone, and chains are added in order, so that
// results do not depend on blocks or the number of threads. The bias comes last.
#pragma once

#include "brgemm.h"
#include "epilogue.h"
#include "layout.h"
#include "phases.h"
#include "runtime.h"
#include "scratch.h"

namespace {

template <class Problem>
class BrgemmGather
    : Phases<typename Problem::AxisD, typename Problem::AxisH, typename Problem::AxisW> {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t PHASES[3] = {AxisD::PHASES, AxisH::PHASES, AxisW::PHASES};
  static constexpr int64_t STRIDE[3] = {AxisD::SOURCE_STRIDE, AxisH::SOURCE_STRIDE,
                                        AxisW::SOURCE_STRIDE};
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr bool CONVERTS = !std::is_same_v<Real, Storage>;
  static constexpr int64_t LEAST_TERMS = 64, MOST_TERMS = 192;  // products in a chain
  static constexpr int64_t TASK_POSITIONS = 128, LEAST_POSITIONS = 48;
  static constexpr int64_t SUMS_BYTES = 192 << 10;  // of a task: in L2, beside what it reads

  int64_t batch, groups;
  int64_t sources, outputs;  // channels of one group: k, m
  int64_t source_extent[3], output_extent[3], positions[3];
  bool channels_last;                   // any tensor is
  bool source_last, output_last;        // as rows of channels
  bool repacked;                        // the source is copied to rows of channels
  bool in_place;                        // sums are added up in the output
  int vectors;                          // of a block of output channels
  int64_t width;                        // output channels of a block
  int64_t channel_blocks, part, parts;  // blocks of output channels, those of a task, tasks
  int64_t chain_channels, chain_taps;
  int64_t block[3], blocks[3];  // positions per block, blocks
  int threads;
  int64_t weights_at, bias_at, zeros_at, places_at, chains_at, source_at, threads_at,
      total_bytes;                                   // in the workspace
  int64_t rows_at, sums_at, spare_at, thread_bytes;  // of a thread

 public:
  BrgemmGather(const ConvgenCall& call, const int64_t* source, const int64_t* output,
               int64_t source_channels, int64_t output_channels)
      : batch(call.batch),
        groups(Problem::GROUPS),
        sources(source_channels / Problem::GROUPS),
        outputs(output_channels / Problem::GROUPS) {
    channels_last = call.channels_last & (CONVGEN_COARSE | CONVGEN_FINE);
    constexpr int SOURCE = Problem::SOURCE_IS_COARSE ? CONVGEN_COARSE : CONVGEN_FINE;
    constexpr int OUTPUT = Problem::SOURCE_IS_COARSE ? CONVGEN_FINE : CONVGEN_COARSE;
    double terms = double(batch) * double(output_channels) * double(sources) * double(TAPS);
    int64_t source_volume = 1, output_volume = 1;
    for (int axis = 0; axis < 3; ++axis) {
      source_extent[axis] = source[axis];
      output_extent[axis] = output[axis];
      positions[axis] = ceil_div(output[axis], PHASES[axis]);
      source_volume *= source[axis];
      output_volume *= output[axis];
      terms *= double(positions[axis]);
    }
    // Where a tensor has one element per channel, or one channel, both formats are one.
    source_last = call.channels_last & SOURCE || source_volume == 1 || source_channels == 1;
    output_last = call.channels_last & OUTPUT || output_volume == 1 || output_channels == 1;
    threads = thread_count(call.device, terms);
    vectors = tile_vectors<Real>(outputs);
    width = vectors * V;
    channel_blocks = ceil_div(outputs, width);
    repacked = CONVERTS || !source_last;
    in_place = !CONVERTS && output_last && outputs % width == 0;
    // What a sum of one sign loses grows with its chains; long sums are allowed longer ones.
    const int64_t chain = least(greatest(sources * TAPS / (8 * phases()), LEAST_TERMS), MOST_TERMS);
    chain_channels = even_part(sources, chain);
    chain_taps = greatest(1, chain / greatest(1, sources));
    choose_blocks();
    Workspace workspace;
    weights_at = workspace.take(groups * sources * TAPS * channel_blocks * width * REAL_BYTES);
    bias_at = workspace.take(groups * channel_blocks * width * REAL_BYTES);
    zeros_at = workspace.take(sources * REAL_BYTES);
    places_at = workspace.take(TAPS * int64_t(sizeof(Place)));
    chains_at = workspace.take(sources * int64_t(sizeof(ChainOf)));
    source_at = workspace.take(repacked ? batch * source_channels * source_volume * REAL_BYTES : 0);
    const int64_t count = block[0] * block[1] * block[2] + MOST_POSITIONS;
    const int64_t taps = least(chain_taps, TAPS);
    rows_at = round_up(count * int64_t(sizeof(Real*)), 64);  // behind the pointers to sums
    spare_at = rows_at + round_up(count * taps * int64_t(sizeof(Real*)), 64);
    sums_at = spare_at + round_up(part * width * REAL_BYTES, 64);
    const int64_t elements = block[0] * PHASES[0] * block[1] * PHASES[1] * block[2] * PHASES[2];
    thread_bytes = round_up(sums_at + (in_place ? 0 : elements * part * width * REAL_BYTES), 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  // Whether it is faster than register tiles with positions in the lanes (gather.h). Those lose
  // where there are many channels, and where they would have to be given contiguous copies; these
  // where lanes or chains are short.
  bool suits() const {
    if (!channels_last) return sources >= 16 && used_lanes() >= 0.7;
    if (used_lanes() >= 0.5) return true;
    // Lanes of which few hold channels, against copies.
    const double clocks = double(sources) * double(TAPS) / (2 * V) * double(outputs);
    const double own = clocks * (vectors == 1 ? ONE_VECTOR_COST : 1.0) / used_lanes();
    const double copied =
        double(sources) * double(source_extent[0] * source_extent[1]) * double(source_extent[2]);
    const double put =
        double(outputs) * double(output_extent[0] * output_extent[1]) * double(output_extent[2]);
    const double count = double(positions[0] * positions[1]) * double(positions[2]);
    return own * count < clocks * count + TRANSPOSED * (copied + put);
  }

  // The part of a register tile's lanes that hold output channels.
  double used_lanes() const { return double(outputs) / double(channel_blocks * width); }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    Real* const bias = reinterpret_cast<Real*>(workspace + bias_at);
    const int64_t tasks = batch * groups * parts * blocks[0] * blocks[1] * blocks[2];
    if (tasks == 0) return;
    Place* const places = reinterpret_cast<Place*>(workspace + places_at);
    ChainOf* const chains = reinterpret_cast<ChainOf*>(workspace + chains_at);
    find_places(places, chains);
    memset(workspace + zeros_at, 0, size_t(sources * REAL_BYTES));
    const int64_t output_volume = output_extent[0] * output_extent[1] * output_extent[2];
    advise_output(output, batch * groups * outputs * output_volume * int64_t(sizeof(Storage)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < groups * channel_blocks; ++i)
        pack(weights, bias, places, chains, call, i / channel_blocks, i % channel_blocks);
      if (repacked)
        to_rows(reinterpret_cast<Real*>(workspace + source_at), static_cast<const Storage*>(source),
                batch, groups * sources, source_extent[0] * source_extent[1] * source_extent[2],
                source_last);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) run_task(call, own, source, output, task);
    }
  }

 private:
  static constexpr int MOST_POSITIONS = TILE_POSITIONS<1>;

  static constexpr int64_t phases() { return PHASES[0] * PHASES[1] * PHASES[2]; }

  int64_t task_count() {
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(positions[axis], block[axis]);
    return batch * groups * parts * blocks[0] * blocks[1] * blocks[2];
  }

  void choose_blocks() {
    const bool line = positions[0] == 1 && positions[1] == 1;
    block[2] = even_part(positions[2], line ? TASK_POSITIONS : BLOCK_COLUMNS);
    block[1] = even_part(positions[1], greatest(1, TASK_POSITIONS / block[2]));
    block[0] = even_part(positions[0], greatest(1, TASK_POSITIONS / (block[2] * block[1])));
    const int64_t row_bytes = block[0] * block[1] * block[2] * phases() * width * REAL_BYTES;
    part = even_part(channel_blocks, greatest(1, SUMS_BYTES / row_bytes));
    parts = ceil_div(channel_blocks, part);
    while (threads > 1 && task_count() < TASKS_PER_THREAD * threads) {
      if (part > 1 && block[0] * block[1] * block[2] <= 2 * LEAST_POSITIONS) {
        part = ceil_div(part, 2);
        parts = ceil_div(channel_blocks, part);
        continue;
      }
      const int axis = block[0] > 1 ? 0 : block[1] > 1 ? 1 : 2;
      if (block[0] * block[1] * block[2] < 2 * LEAST_POSITIONS) break;
      block[axis] = even_part(positions[axis], ceil_div(block[axis], 2));
    }
    task_count();
  }

  // Chains of a phase: visit(first tap, taps, first channel, channels).
  template <class Visit>
  CONVGEN_INLINE void for_chains(const Phase& phase, Visit visit) const {
    for (int64_t tap = 0; tap < phase.taps; tap += chain_taps)
      for (int64_t k = 0; k < sources; k += chain_channels)
        visit(tap, least(chain_taps, phase.taps - tap), k, least(chain_channels, sources - k));
  }

  // Where the weights of a kernel element lie: the chain of its first channels, and in that.
  struct Place {
    int64_t before;    // terms of chains before those of the same taps
    int64_t taps, at;  // of the chain, and which of them it is
  };

  // The chain of a source channel: its first channel, and so many.
  struct ChainOf {
    int64_t first, count;
  };

  void find_places(Place* places, ChainOf* chains) const {
    for (int64_t k = 0, first = 0; k < sources; ++k) {
      if (k == first + chain_channels) first = k;
      chains[k] = {first, least(chain_channels, sources - first)};
    }
    BrgemmGather::for_phases([&](const Phase& phase) {
      int64_t tap = 0;
      BrgemmGather::for_taps(phase, [&](int jd, int jh, int jw) {
        const int64_t first = tap / chain_taps * chain_taps;
        places[BrgemmGather::element(jd, jh, jw)] = {
            (phase.first + first) * sources, least(chain_taps, phase.taps - first), tap - first};
        ++tap;
      });
    });
  }

  // Packs the weights of a block of output channels, zeros beyond the last channel, and their bias.
  void pack(Real* weights, Real* biases, const Place* places, const ChainOf* chains,
            const ConvgenCall& call, int64_t group, int64_t channel_block) const {
    const int64_t m0 = channel_block * width, channels = least(width, outputs - m0);
    const Storage* const values = static_cast<const Storage*>(call.bias);
    Real* const bias = biases + (group * channel_blocks + channel_block) * width;
    for (int64_t m = 0; m < width; ++m)
      bias[m] = values && m < channels ? to_real(values[group * outputs + m0 + m]) : Real(0);
    // Weights are (coarse, fine / groups, taps), or (coarse, taps, fine / groups).
    const bool last = call.channels_last & CONVGEN_WEIGHT;
    const int64_t fine = Problem::SOURCE_IS_COARSE ? outputs : sources;
    const int64_t coarse = Problem::SOURCE_IS_COARSE ? sources : outputs;
    const int64_t pitch_coarse = fine * TAPS, pitch_fine = last ? 1 : TAPS;
    const int64_t pitch_tap = last ? fine : 1;
    const int64_t pitch_m = Problem::SOURCE_IS_COARSE ? pitch_fine : pitch_coarse;
    const int64_t pitch_k = Problem::SOURCE_IS_COARSE ? pitch_coarse : pitch_fine;
    const Storage* const weight =
        static_cast<const Storage*>(call.weight) + group * coarse * pitch_coarse + m0 * pitch_m;
    Real* const packed = weights + group * TAPS * sources * channel_blocks * width;
    const auto lanes_of = [&](int64_t element, int64_t k) {
      const Place& place = places[element];
      const auto [k0, count] = chains[k];
      return packed + ((place.before + k0 * place.taps) * channel_blocks +
                       (channel_block * place.taps + place.at) * count + k - k0) *
                          width;
    };
    if (pitch_m == 1) {
      for (int64_t k = 0; k < sources; ++k)
        for (int64_t element = 0; element < TAPS; ++element) {
          Real* const to = lanes_of(element, k);
          convert<Real>(to, weight + k * pitch_k + element * pitch_tap, channels);
          for (int64_t m = channels; m < width; ++m) to[m] = Real(0);
        }
      return;
    }
    // Elements that lie side by side for one m: those of all taps and k, or of all taps.
    const bool all = pitch_k < pitch_m;
    const int64_t length = all ? TAPS * sources : TAPS;
    for (int64_t outer = 0; outer < (all ? 1 : sources); ++outer) {
      const Storage* const from = weight + outer * pitch_k;
      const auto to = [&](int64_t j) {
        if (!all) return lanes_of(j, outer);
        return last ? lanes_of(j / sources, j % sources) : lanes_of(j % TAPS, j / TAPS);
      };
      // Whole lines of packed weights at a time.
      const int64_t whole = length >= V ? channels / V * V : 0;
      for (int64_t j = 0; whole > 0; j = least(j + V, length - V)) {
        Real* lanes[V];
        for (int i = 0; i < V; ++i) lanes[i] = to(j + i);
        for (int64_t m = 0; m < whole; m += V) {
          Vector<Real> lines[V];
#pragma GCC unroll 16
          for (int i = 0; i < V; ++i) lines[i] = load_real<Real>(from + (m + i) * pitch_m + j);
          transpose_rows<Real>(lines);
#pragma GCC unroll 16
          for (int i = 0; i < V; ++i) store(lanes[i] + m, lines[i]);
        }
        if (j == length - V) break;
      }
      if (whole < width)
        for (int64_t j = 0; j < length; ++j) {
          Real* const lanes = to(j);
          if (all)
            for (int64_t m = whole; m < channels; ++m) lanes[m] = to_real(from[m * pitch_m + j]);
          else  // elements of one channel lie side by side: a distance that compilers know
            for (int64_t m = whole; m < channels; ++m) lanes[m] = to_real(from[m * TAPS + j]);
          for (int64_t m = channels; m < width; ++m) lanes[m] = Real(0);
        }
    }
  }

  // Where the weights of a chain begin, for all blocks of output channels.
  Real* chain_weights(Real* weights, int64_t group, const Phase& phase, int64_t tap0, int64_t taps,
                      int64_t k0) const {
    const int64_t before = (group * TAPS + phase.first + tap0) * sources + k0 * taps;
    return weights + before * channel_blocks * width;
  }

  void run_task(const ConvgenCall& call, char* own, const void* source, void* output,
                int64_t task) const {
    char* const workspace = static_cast<char*>(call.workspace);
    // Tasks of one block of positions follow each other.
    const int64_t part0 = task % parts * part, place = task / parts;
    const int64_t image = place / (blocks[0] * blocks[1] * blocks[2]);
    const int64_t n = image / groups, group = image % groups;
    const int64_t q0[3] = {place / (blocks[1] * blocks[2]) % blocks[0] * block[0],
                           place / blocks[2] % blocks[1] * block[1], place % blocks[2] * block[2]};
    const int64_t channel_parts = least(part, channel_blocks - part0);
    const int64_t m0 = part0 * width, channels = least(channel_parts * width, outputs - m0);
    const Real* const from = repacked ? reinterpret_cast<const Real*>(workspace + source_at)
                                      : static_cast<const Real*>(source);
    const Pitches rows(groups * sources, source_extent, true);
    const Real* const first_row = from + n * rows.image + group * sources;
    const Real* const zeros = reinterpret_cast<const Real*>(workspace + zeros_at);
    int64_t o0[3], extent[3];  // of the block of output elements
    for (int axis = 0; axis < 3; ++axis) {
      o0[axis] = q0[axis] * PHASES[axis];
      extent[axis] = least(block[axis] * PHASES[axis], output_extent[axis] - o0[axis]);
    }
    const Pitches out(groups * outputs, output_extent, output_last);
    const int64_t out_at = n * out.image + (group * outputs + m0) * out.channel +
                           o0[0] * out.axis[0] + o0[1] * out.axis[1] + o0[2] * out.axis[2];
    Storage* const to = static_cast<Storage*>(output) + out_at;
    // Sums of consecutive elements of the block, or the output itself.
    Real* const sums =
        in_place ? reinterpret_cast<Real*>(to) : reinterpret_cast<Real*>(own + sums_at);
    const int64_t row = channel_parts * width;
    const int64_t pitch[3] = {in_place ? out.axis[0] : extent[1] * extent[2] * row,
                              in_place ? out.axis[1] : extent[2] * row,
                              in_place ? out.axis[2] : row};
    Real** const sum_of = reinterpret_cast<Real**>(own);
    const Real** const row_of = reinterpret_cast<const Real**>(own + rows_at);
    Real* const spare = reinterpret_cast<Real*>(own + spare_at);
    const Real* const biases = reinterpret_cast<const Real*>(workspace + bias_at) +
                               (group * channel_blocks + part0) * width;
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    const Multiply<Real> multiply = multiply_of<Real>(vectors);
    const int64_t unit = tile_unit(vectors);
    BrgemmGather::for_phases([&](const Phase& phase) {
      int64_t count[3];
      for (int axis = 0; axis < 3; ++axis)
        count[axis] = greatest(ceil_div(extent[axis] - phase.residue[axis], PHASES[axis]), 0);
      Real** sum = sum_of;
      for (int64_t d = 0; d < count[0]; ++d)
        for (int64_t h = 0; h < count[1]; ++h) {
          Real* line = sums + (d * PHASES[0] + phase.residue[0]) * pitch[0] +
                       (h * PHASES[1] + phase.residue[1]) * pitch[1] + phase.residue[2] * pitch[2];
          for (int64_t w = 0; w < count[2]; ++w, line += PHASES[2] * pitch[2]) *sum++ = line;
        }
      const int64_t used = sum - sum_of, padded = round_up(used, unit);
      if (used == 0) return;
      for (int64_t i = used; i < padded; ++i) sum_of[i] = spare;
      // Positions of which no tap of a chain meets any row are passed over: at small extents these
      // are much of all. Sums that the first chain, or the last, does not reach get their zeros, or
      // their bias, apart.
      Range met = {};
      bool biased = !call.bias;
      if (phase.taps == 0)
        for (int64_t i = 0; i < used; ++i) memset(sum_of[i], 0, size_t(row * REAL_BYTES));
      for_chains(phase, [&](int64_t tap0, int64_t taps, int64_t k0, int64_t chain_sources) {
        if (k0 == 0) {
          met = point(row_of, padded, phase, tap0, taps, q0, count, rows, first_row, zeros);
          met.begin = met.begin / unit * unit;
          met.end = met.begin + round_up(met.end - met.begin, unit);
        }
        const bool all = met.begin == 0 && met.end == padded;
        const bool first = tap0 + k0 == 0;
        const bool last = tap0 + taps == phase.taps && k0 + chain_sources == sources;
        if (first && !all)
          for (int64_t i = 0; i < used; ++i) memset(sum_of[i], 0, size_t(row * REAL_BYTES));
        const bool adds_bias = last && all && !biased;
        // Rows that one tap alone meets come from memory: other taps find them in a cache.
        const Real* const weight = chain_weights(weights, group, phase, tap0, taps, k0);
        for (int64_t b = 0; b < channel_parts; ++b)
          multiply(Chain<Real>{weight + (part0 + b) * taps * chain_sources * width, row_of, padded,
                               taps, k0, chain_sources, sum_of, b * width, !(first && all),
                               adds_bias ? biases + b * width : nullptr, phase.taps == 1 && b == 0},
                   met.begin, met.end);
        biased |= adds_bias;
      });
      if (!biased)
        for (int64_t i = 0; i < used; ++i)
          for (int64_t m = 0; m < row; m += V)
            store(sum_of[i] + m, load(sum_of[i] + m) + load(biases + m));
    });
    Finish<Problem>(call, output).block(to, out, output_last, sums, pitch, channels, extent);
    if (!in_place) put_out(to, out, sums, row, channels, extent);
  }

  // Points at the source rows that a chain's taps meet from a phase's positions; returns the
  // positions from the first to the last that meet any.
  Range point(const Real** to, int64_t padded, const Phase& phase, int64_t tap0, int64_t taps,
              const int64_t* q0, const int64_t* count, const Pitches& rows, const Real* first_row,
              const Real* zeros) const {
    const int64_t taps_h = phase.last_tap[1] - phase.first_tap[1];
    const int64_t taps_w = phase.last_tap[2] - phase.first_tap[2];
    Range met = {padded, 0};
    for (int64_t tap = tap0; tap < tap0 + taps; ++tap) {
      const AxisTap at[3] = {AxisD::TAP[phase.first_tap[0] + tap / (taps_w * taps_h)],
                             AxisH::TAP[phase.first_tap[1] + tap / taps_w % taps_h],
                             AxisW::TAP[phase.first_tap[2] + tap % taps_w]};
      const Real** const end = to + padded;
      to = point_at<AxisW::SOURCE_STRIDE>(to, met, first_row, zeros, rows, source_extent, STRIDE,
                                          at, q0, count);
      while (to < end) *to++ = zeros;
    }
    return met.begin < met.end ? met : Range{};
  }

  // A block's sums to the output: rows of channels, or lines of each channel.
  void put_out(Storage* to, const Pitches& out, const Real* sums, int64_t row, int64_t channels,
               const int64_t* extent) const {
    int64_t lines[3];
    join_lines(lines, extent, output_extent);
    for (int64_t d = 0; d < lines[0]; ++d)
      for (int64_t h = 0; h < lines[1]; ++h, sums += lines[2] * row) {
        Storage* const line = to + d * out.axis[0] + h * out.axis[1];
        if (output_last)
          for (int64_t w = 0; w < lines[2]; ++w)
            convert<Real>(line + w * out.axis[2], sums + w * row, channels);
        else
          transpose<Real, true>(line, out.channel, sums, row, lines[2], channels);
      }
  }
};

}  // namespace
