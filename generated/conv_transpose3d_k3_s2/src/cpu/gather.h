// The gather contractions: fprop and dgrad are the same loop over different axes.
//
//   output[n, m, q * PHASES + r] = sum over k, taps j of phase r of
//                                  weight[m, k, j] * source[n, k, q * SOURCE_STRIDE + offset[j]],
//                                  plus bias[m]
//
// fprop has one phase and a strided source; dgrad has one phase per residue of the output position
// and reads its source at unit stride. m and k are the channels of one group.
//
//   task: a block of positions q (d, h, w) of one group, all m
//     fill     the source block of all k -> scratch (L2), see scratch.h
//     compute  for every M channels m, plane and phase, positions running on through the rows
//              (halo columns are computed too, and dropped) or row by row, where that is less:
//                        v0        v1        v2
//                m0  [ lanes ] [ lanes ] [ lanes ]    += weight[m][k][j] (broadcast)
//                m1  [ lanes ] [ lanes ] [ lanes ]         * scratch[k][offset[j] + position]
//                ..                                      for all k and all taps j of the phase
//              -> row buffer (L1): one strip per w-phase and channel
//     store    rows of the output, w-phases interleaved (epilogue.h)
//
// Scratch and row buffer are a thread's own; weights are packed once, behind a barrier.
//
// Each output is a sum of chains of multiply-adds (chains.h), and the bias comes last. Where a
// chain ends depends on channels and taps alone, so that results do not depend on blocks, register
// tiles or the number of threads.
#pragma once

#include "chains.h"
#include "epilogue.h"
#include "phases.h"
#include "runtime.h"
#include "scratch.h"

namespace {

// acc[m][v] += weight[m] * x[v]: one source channel, one tap.
template <int M, int VECTORS, class Real>
CONVGEN_INLINE void multiply_add(Vector<Real> (&acc)[M][VECTORS], const Real* x,
                                 const Real* weight) {
  keep(x);  // one address for all vectors
  Vector<Real> in[VECTORS];
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; ++v) in[v] = load(x + v * LANES<Real>);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const Real w = weight[m];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) acc[m][v] += in[v] * w;
  }
}

// The taps of a phase in a loop, for the tiles that are not worth unrolled code.
struct AnyTaps {
  static constexpr int UNROLLED = 0;

  template <int M, int VECTORS, class Real>
  static CONVGEN_INLINE void accumulate(Vector<Real> (&acc)[M][VECTORS], const Real* x,
                                        const Real* weight, const int64_t* offset, int64_t taps) {
    for (int64_t j = 0; j < taps; ++j) multiply_add(acc, x + offset[j], weight + j * M);
  }
};

template <class Problem>
class Gather : Phases<typename Problem::AxisD, typename Problem::AxisH, typename Problem::AxisW> {
  using Real = typename Problem::Real;
  using Storage = typename Problem::Storage;
  using AxisD = typename Problem::AxisD;
  using AxisH = typename Problem::AxisH;
  using AxisW = typename Problem::AxisW;
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t PHASES = int64_t(AxisD::PHASES) * AxisH::PHASES * AxisW::PHASES;
  static constexpr int V = LANES<Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);

  // Below this many tasks per thread, threads would wait for the last one.
  static constexpr int64_t TASKS_PER_THREAD = 8;

  int64_t batch, groups;
  int64_t sources, outputs;  // channels of one group: k, m
  int64_t channel_block;     // of a register tile: M
  int64_t tile_positions;    // of a register tile
  int64_t channel_blocks;
  int64_t channel_splits = 1;  // tasks that share the channel blocks of a block of positions
  int64_t source_extent[3], output_extent[3];
  int64_t positions[3];         // q: output extents over phases, rounded up
  int64_t block[3], blocks[3];  // positions per block, blocks
  Scratch<AxisD, AxisH, AxisW> scratch;
  bool by_rows;          // register tiles do not cross rows
  int64_t buffer_pitch;  // of one w-phase and channel in the row buffer
  int threads;
  int64_t weights_at, bias_at, offsets_at, threads_at;  // in the workspace
  int64_t scratch_bytes, thread_bytes, total_bytes;

 public:
  // The call's tensors by role; channels are those of all groups.
  Gather(const ConvgenCall& call, const int64_t* source, const int64_t* output,
         int64_t source_channels, int64_t output_channels)
      : batch(call.batch),
        groups(Problem::GROUPS),
        sources(source_channels / Problem::GROUPS),
        outputs(output_channels / Problem::GROUPS) {
    constexpr int64_t STEP[3] = {AxisD::PHASES, AxisH::PHASES, AxisW::PHASES};
    double terms = double(batch) * double(output_channels) * double(sources) * double(TAPS);
    for (int axis = 0; axis < 3; ++axis) {
      source_extent[axis] = source[axis];
      output_extent[axis] = output[axis];
      positions[axis] = ceil_div(output[axis], STEP[axis]);
      terms *= double(positions[axis]);
    }
    threads = thread_count(call.device, terms);
    const TileSize tile = Problem::Tiles::choose(outputs);
    channel_block = tile.channels;
    tile_positions = int64_t(tile.width) * V;
    channel_blocks = ceil_div(outputs, channel_block);
    choose_blocks();
    Workspace workspace;
    weights_at = workspace.take(groups * channel_blocks * block_weights() * REAL_BYTES);
    bias_at = workspace.take(groups * channel_blocks * channel_block * REAL_BYTES);
    offsets_at = workspace.take(TAPS * int64_t(sizeof(int64_t)));
    // The last register tile of a run reads and writes up to one tile beyond it.
    const int64_t buffer = AxisW::PHASES * channel_block * buffer_pitch + tile_positions;
    scratch_bytes = round_up((sources * scratch.channel() + tile_positions) * REAL_BYTES, 64);
    thread_bytes = round_up(scratch_bytes + buffer * REAL_BYTES, 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call, const void* source, void* output) const {
    Problem::Tiles::visit(channel_block, [&](auto tile) {
      run_blocks<decltype(tile)::CHANNELS, decltype(tile)::WIDTH>(call, source, output);
    });
  }

 private:
  int64_t block_weights() const { return sources * TAPS * channel_block; }

  // Cost of a run of positions in vectors: those of an incomplete tile use the registers badly.
  int64_t tile_cost(int64_t run) const {
    const int64_t count = ceil_div(run, V);
    return count + count % (tile_positions / V) / 2;
  }

  void lay_out() {
    scratch.d = AxisLayout<AxisD>::choose(block[0]);
    scratch.h = AxisLayout<AxisH>::choose(block[1]);
    // Halo columns are computed like any others: for short rows and many output channels, that
    // costs more than copying elements once per tap.
    scratch.w = AxisLayout<AxisW>::choose(block[2], outputs >= 16 && block[2] < 2 * V ? 4 : 1);
    const int64_t run = (block[1] - 1) * scratch.pitch() + block[2];
    by_rows = block[1] * tile_cost(block[2]) <= tile_cost(run);
    buffer_pitch = round_up(run + tile_positions, V);
  }

  bool scratch_fits() {
    lay_out();
    return sources * scratch.channel() * REAL_BYTES <= Problem::SCRATCH_BYTES;
  }

  void halve(int axis) { block[axis] = even_part(positions[axis], ceil_div(block[axis], 2)); }

  int64_t tasks() {
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(positions[axis], block[axis]);
    return batch * groups * channel_splits * blocks[0] * blocks[1] * blocks[2];
  }

  void choose_blocks() {
    const int64_t tile = tile_positions;
    const int64_t run =
        greatest(tile, Problem::BUFFER_BYTES / REAL_BYTES / (channel_block * AxisW::PHASES));
    block[0] = block[1] = 1;
    // Rows as long as the row buffer allows, as many as fit in it, as many planes (which share
    // their halo) as fit in scratch. A run of two tiles is worth more than scratch in L2.
    block[2] = even_part(positions[2], run);
    while (block[2] > 2 * tile && !scratch_fits()) halve(2);
    lay_out();
    block[1] = even_part(positions[1], greatest(1, run / scratch.pitch()));
    while (block[1] > 1 && block[1] * block[2] > 2 * tile && !scratch_fits()) halve(1);
    block[0] = greatest(positions[0], 1);
    while (block[0] > 1 && !scratch_fits()) halve(0);
    while (threads > 1 && tasks() < TASKS_PER_THREAD * threads) {
      if (block[0] > 1) {
        halve(0);
      } else if (block[1] > 1 && block[1] * block[2] > 4 * tile) {
        halve(1);
      } else if (block[2] > 4 * tile) {
        halve(2);
      } else if (channel_splits * 2 <= channel_blocks) {
        channel_splits *= 2;
      } else {
        break;
      }
    }
    tasks();
    lay_out();
  }

  // What a task computes: some channel blocks, an image (n * groups + group), first positions.
  struct Place {
    int64_t split, image, q0[3];
  };

  Place place_of(int64_t task) const {
    const int64_t split = task % channel_splits;
    const int64_t index = task / channel_splits;
    return {split,
            index / (blocks[0] * blocks[1] * blocks[2]),
            {index / (blocks[1] * blocks[2]) % blocks[0] * block[0],
             index / blocks[2] % blocks[1] * block[1], index % blocks[2] * block[2]}};
  }

  template <int M, int VECTORS>
  void run_blocks(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    Real* const bias = reinterpret_cast<Real*>(workspace + bias_at);
    int64_t* const offsets = reinterpret_cast<int64_t*>(workspace + offsets_at);
    const int64_t task_count = batch * groups * channel_splits * blocks[0] * blocks[1] * blocks[2];
    const int64_t source_volume = source_extent[0] * source_extent[1] * source_extent[2];
    const int64_t output_volume = output_extent[0] * output_extent[1] * output_extent[2];
    if (task_count == 0) return;
    const Finish<Problem> finish(call, output);
    advise_output(output, batch * groups * outputs * output_volume * int64_t(sizeof(Storage)));
    Gather::for_phases([&](const Phase& phase) {
      int64_t* to = offsets + phase.first;
      Gather::for_taps(phase, [&](int jd, int jh, int jw) { *to++ = scratch.offset(jd, jh, jw); });
    });
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      Real* const x = reinterpret_cast<Real*>(own);
      Real* const buffer = reinterpret_cast<Real*>(own + scratch_bytes);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < groups * channel_blocks; ++i)
        pack<M>(weights + i * block_weights(), bias + i * M, call, i / channel_blocks,
                i % channel_blocks * M);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < task_count; ++task) {
        const Place place = place_of(task);
        const Storage* const from = static_cast<const Storage*>(source);
        for (int64_t k = 0; k < sources; ++k)
          scratch.fill(x + k * scratch.channel(),
                       from + (place.image * sources + k) * source_volume, source_extent, place.q0);
        Prefetch later;
        if (M == 1 && sources == 1 && blocks[1] * blocks[2] == 1 && task + threads < task_count) {
          const Place next = place_of(task + threads);
          const int64_t tiles = ceil_div(block[1] * scratch.pitch(), tile_positions);
          later = scratch.planes_of(from + next.image * source_volume, source_extent, next.q0,
                                    block[0] * PHASES * tiles);
        }
        for (int64_t b = place.split * channel_blocks / channel_splits;
             b < (place.split + 1) * channel_blocks / channel_splits; ++b) {
          const int64_t packed = place.image % groups * channel_blocks + b;
          Storage* const to =
              static_cast<Storage*>(output) + (place.image * outputs + b * M) * output_volume;
          compute<M, VECTORS>(x, weights + packed * block_weights(), bias + packed * M, offsets,
                              buffer, to, least(M, outputs - b * M), place.q0, later, finish);
        }
      }
    }
  }

  // Packs the weights of M channels as [phase][k][tap of the phase][m], zeros beyond the last
  // channel, and their bias.
  template <int M>
  void pack(Real* to, Real* bias, const ConvgenCall& call, int64_t group, int64_t m0) const {
    const Storage* weight = static_cast<const Storage*>(call.weight);
    const Storage* values = static_cast<const Storage*>(call.bias);
    const int64_t channels = least(M, outputs - m0);
    for (int64_t m = 0; m < M; ++m)
      bias[m] = values && m < channels ? to_real(values[group * outputs + m0 + m]) : Real(0);
    // Weights are (coarse, fine / groups, taps).
    const int64_t pitch_m = Problem::SOURCE_IS_COARSE ? TAPS : sources * TAPS;
    const int64_t pitch_k = Problem::SOURCE_IS_COARSE ? outputs * TAPS : TAPS;
    weight += group * outputs * sources * TAPS + m0 * pitch_m;
    Gather::for_phases([&](const Phase& phase) {
      for (int64_t k = 0; k < sources; ++k)
        Gather::for_taps(phase, [&](int jd, int jh, int jw) {
          const Storage* const from = weight + k * pitch_k + Gather::element(jd, jh, jw);
          if (channels == M) {
#pragma GCC unroll 16
            for (int64_t m = 0; m < M; ++m) to[m] = to_real(from[m * pitch_m]);
          } else {
            for (int64_t m = 0; m < M; ++m)
              to[m] = m < channels ? to_real(from[m * pitch_m]) : Real(0);
          }
          to += M;
        });
    });
  }

  // All outputs of a block of positions for M channels, of which `channels` exist.
  template <int M, int VECTORS>
  void compute(const Real* x, const Real* weight, const Real* bias, const int64_t* offsets,
               Real* buffer, Storage* output, int64_t channels, const int64_t* q0, Prefetch& later,
               const Finish<Problem>& finish) const {
    const int64_t planes = least(block[0], positions[0] - q0[0]);
    const int64_t volume = output_extent[0] * output_extent[1] * output_extent[2];
    const int64_t ow = q0[2] * AxisW::PHASES;
    const int64_t columns = least(block[2] * AxisW::PHASES, output_extent[2] - ow);
    for (int64_t plane = 0; plane < planes; ++plane)
      Gather::for_phases([&](const Phase& phase) {
        const int64_t od = (q0[0] + plane) * AxisD::PHASES + phase.residue[0];
        const int64_t oh = q0[1] * AxisH::PHASES + phase.residue[1];
        const int64_t rows = least(block[1], ceil_div(output_extent[1] - oh, AxisH::PHASES));
        if (od >= output_extent[0] || rows <= 0) return;
        Real* strip = buffer + phase.residue[2] * M * buffer_pitch;
        const Run run = {x + plane * scratch.plane(),
                         weight + phase.first * sources * M,
                         bias,
                         offsets + phase.first,
                         phase.taps,
                         chains_of(phase),
                         strip,
                         rows,
                         &later};
        if constexpr (Problem::Tiles::unrolled(M))
          Problem::unrolled(phase.index,
                            [&](auto taps) { compute_phase<decltype(taps), M, VECTORS>(run); });
        else
          compute_phase<AnyTaps, M, VECTORS>(run);
        if (phase.residue[2] != AxisW::PHASES - 1) return;
        for (int64_t m = 0; m < channels; ++m)
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t line = od * output_extent[1] + oh + row * AxisH::PHASES;
            Storage* const out = output + m * volume + line * output_extent[2] + ow;
            Real* const strips = buffer + m * buffer_pitch + row * scratch.pitch();
            finish.template row<AxisW::PHASES>(out, strips, M * buffer_pitch, columns);
            interleave<AxisW::PHASES>(out, strips, M * buffer_pitch, columns);
          }
      });
  }

  Chains chains_of(const Phase& phase) const {
    const int64_t along_w = phase.last_tap[2] - phase.first_tap[2];
    return Chains::choose(sources, phase.taps, Problem::taps_together(phase.taps, along_w),
                          Problem::CHAIN_TERMS);
  }

  // What the register tiles of one phase, plane and channel block have in common.
  struct Run {
    const Real* x;
    const Real* weight;
    const Real* bias;
    const int64_t* offset;
    int64_t taps;
    Chains chains;
    Real* strip;  // [m][position], buffer_pitch apart
    int64_t rows;
    Prefetch* later;
  };

  template <class Taps, int M, int VECTORS>
  CONVGEN_NOINLINE void compute_phase(const Run& run) const {
    const int64_t runs = by_rows ? run.rows : 1;
    const int64_t length = by_rows ? block[2] : (run.rows - 1) * scratch.pitch() + block[2];
    for (int64_t i = 0; i < runs; ++i) {
      int64_t at = i * scratch.pitch();
      const int64_t end = at + length;
      for (; at + (VECTORS - 1) * V < end; at += VECTORS * V) {
        if (M == 1) run.later->step();
        compute_tile<Taps, M, VECTORS>(run, at);
      }
      for (; at < end; at += V) compute_tile<AnyTaps, M, 1>(run, at);
    }
  }

  template <class Taps, int M, int VECTORS>
  CONVGEN_INLINE void compute_tile(const Run& run, int64_t at) const {
    using Sums = ChainSums<Real, M, VECTORS>;
    const Chains chains = run.chains;
    const Real* x = run.x + at;
    const Real* weight = run.weight;
    Vector<Real> acc[M][VECTORS];
    Sums memory;
    Real* const sums = memory.at();
    int64_t k = 0, j = 0, done = 0;
    for (;;) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) acc[m][v] = Vector<Real>{};
      const int64_t channels = least(chains.channels, sources - k);
      const int64_t taps = least(chains.taps, run.taps - j);
      for (int64_t i = 0; i < channels; ++i) {
        // Of which compilers know nothing: for a chain of few channels it does not pay to find
        // all taps' addresses beforehand.
        const int64_t* offset = run.offset + j;
        if (Taps::UNROLLED > 1) keep(offset);
        Taps::accumulate(acc, x, weight, offset, taps);
        x += scratch.channel();
        weight += taps * M;
      }
      if (++done == chains.count) break;
      Sums::add(sums, acc, done);
      j += taps;
      if (j < run.taps) {
        x -= scratch.channel();  // the same channel's next taps
      } else {
        j = 0;
        k += channels;
      }
    }
    if (done > 1) Sums::complete(acc, sums, done - 1);
    Real* out = run.strip + at;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, out += buffer_pitch)
#pragma GCC unroll 16
      for (int v = 0; v < VECTORS; ++v) store(out + v * V, acc[m][v] + run.bias[m]);
  }
};

}  // namespace
