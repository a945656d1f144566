// fprop and dgrad of depthwise layers whose tensors are not rows of channels as they are computed:
// contiguous ones, and such of 16 bits.
//
//   task: a block of positions, some vectors of channels of one image
//     stage     source rows -> scratch (L2), for each vector [d][h][w][lanes], in the type of the
//               sums: transposed or converted once, zeros beyond the borders along w
//     compute   register tiles of positions (depthwise_tile.h) -> a plane of outputs [h][w][lanes];
//               the last tile of a row runs into the next one, which is computed later
//     put out   planes of outputs, finished (epilogue.h), transposed or converted again
//
// Each output is the sum of its products by rising source position, in one chain or, of many taps,
// in several; the bias comes last. So results depend neither on blocks nor on threads.
#pragma once

#include "depthwise_tile.h"
#include "epilogue.h"
#include "phases.h"

namespace {

template <class Problem>
class DepthwiseBlocks
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
  using Tile = DepthwiseTile<Problem, V, V, V, Real>;
  static constexpr int64_t REAL_BYTES = sizeof(Real);
  static constexpr int64_t TAPS = int64_t(AxisD::TAPS) * AxisH::TAPS * AxisW::TAPS;
  static constexpr int64_t WEIGHT_PITCH = round_up(CHANNELS, V);
  static constexpr int64_t STRIDE[3] = {AxisD::SOURCE_STRIDE, AxisH::SOURCE_STRIDE,
                                        AxisW::SOURCE_STRIDE};
  static constexpr int64_t PHASES[3] = {AxisD::PHASES, AxisH::PHASES, AxisW::PHASES};
  static constexpr int64_t BEFORE[3] = {least_offset<AxisD>(), least_offset<AxisH>(),
                                        least_offset<AxisW>()};
  static constexpr int64_t REACH[3] = {reach<AxisD>(), reach<AxisH>(), reach<AxisW>()};
  static constexpr int MOST_UNROLLED = 16;  // taps along w
  static constexpr int MOST_PHASES = 4;     // along w, with unrolled taps
  static constexpr int TILE = 8;            // positions
  static constexpr int64_t SCRATCH_BYTES = 160 << 10, LEAST_COLUMNS = 64;
  static constexpr int64_t TASKS_PER_THREAD = 8;

  int64_t batch;
  int64_t source_extent[3], output_extent[3], positions[3];
  bool served, source_last, output_last;
  int64_t chunk, chunks;        // vectors of channels of a task, tasks
  int64_t block[3], blocks[3];  // positions per block, blocks
  int threads;
  int64_t weights_at, bias_at, threads_at, total_bytes;        // in the workspace
  int64_t planes_at, own_weights_at, joined_at, thread_bytes;  // of a thread, behind its source

 public:
  DepthwiseBlocks(const ConvgenCall& call, const int64_t* source, const int64_t* output,
                  int64_t source_channels, int64_t output_channels)
      : batch(call.batch) {
    constexpr int SOURCE = Problem::SOURCE_IS_COARSE ? CONVGEN_COARSE : CONVGEN_FINE;
    constexpr int OUTPUT = Problem::SOURCE_IS_COARSE ? CONVGEN_FINE : CONVGEN_COARSE;
    double terms = double(batch) * double(CHANNELS) * double(TAPS);
    for (int axis = 0; axis < 3; ++axis) {
      source_extent[axis] = source[axis];
      output_extent[axis] = output[axis];
      positions[axis] = ceil_div(output[axis], PHASES[axis]);
      terms *= double(positions[axis]);
    }
    source_last = call.channels_last & SOURCE;
    output_last = call.channels_last & OUTPUT;
    served = source_channels == CHANNELS && output_channels == CHANNELS && Chain::COMPILED;
    threads = thread_count(call.device, terms);
    // Lines of memory where channels lie side by side.
    chunk = source_last || output_last
                ? even_part(Vectors::COUNT, greatest(1, 64 / (V * int64_t(sizeof(Storage)))))
                : 1;
    chunks = ceil_div(Vectors::COUNT, chunk);
    choose_blocks();
    Workspace workspace;
    weights_at = workspace.take(TAPS * WEIGHT_PITCH * REAL_BYTES);
    bias_at = workspace.take(WEIGHT_PITCH * REAL_BYTES);
    planes_at = round_up(chunk * source_vector() * REAL_BYTES, 64);
    own_weights_at = planes_at + round_up(chunk * plane_vector() * REAL_BYTES, 64);
    joined_at = own_weights_at + chunk * TAPS * VECTOR_BYTES;
    const int64_t joined = joins() ? reached(1) * source_extent[2] * VECTOR_BYTES : 0;
    thread_bytes = round_up(joined_at + joined, 4096);
    threads_at = workspace.take(thread_bytes * threads);
    total_bytes = workspace.bytes;
  }

  bool suits() const { return served; }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call, const void* source, void* output) const {
    if constexpr (Chain::COMPILED) run_tasks(call, source, output);
  }

 private:
  // Source elements along an axis that a block reaches.
  int64_t reached(int axis) const { return (block[axis] - 1) * STRIDE[axis] + REACH[axis]; }

  // Elements of scratch of one vector of channels: tiles run beyond the last position.
  int64_t source_vector() const {
    return (reached(0) * reached(1) * reached(2) + TILE * STRIDE[2]) * V;
  }
  int64_t plane_vector() const {
    return (block[1] * PHASES[1] * block[2] * PHASES[2] + TILE * PHASES[2]) * V;
  }

  // Whether rows are transposed together, since one does not fill a vector.
  bool joins() const { return !source_last && source_extent[2] < V && blocks[2] == 1; }

  int64_t task_count() {
    for (int axis = 0; axis < 3; ++axis) blocks[axis] = ceil_div(positions[axis], block[axis]);
    return batch * chunks * blocks[0] * blocks[1] * blocks[2];
  }

  // Along the longer of d and h, so that blocks share little of what they reach.
  bool halve() {
    int axis = block[0] > block[1] ? 0 : 1;
    if (block[axis] < 2) axis = 2;
    if (axis == 2 && block[2] < 2 * LEAST_COLUMNS) return false;
    block[axis] = even_part(positions[axis], ceil_div(block[axis], 2));
    return true;
  }

  void choose_blocks() {
    for (int axis = 0; axis < 3; ++axis) block[axis] = greatest(positions[axis], 1);
    while (chunk * (source_vector() + plane_vector()) * REAL_BYTES > SCRATCH_BYTES && halve()) {
    }
    while (threads > 1 && task_count() < TASKS_PER_THREAD * threads &&
           block[0] * block[1] * block[2] > 2 * LEAST_COLUMNS && halve()) {
    }
    task_count();
  }

  void run_tasks(const ConvgenCall& call, const void* source, void* output) const {
    char* const workspace = static_cast<char*>(call.workspace);
    Real* const weights = reinterpret_cast<Real*>(workspace + weights_at);
    Real* const bias = reinterpret_cast<Real*>(workspace + bias_at);
    const int64_t tasks = batch * chunks * blocks[0] * blocks[1] * blocks[2];
    if (tasks == 0) return;
    const Pitches to(CHANNELS, output_extent, output_last);
    advise_output(output, batch * to.image * int64_t(sizeof(Storage)));
    const Finish<Problem> finish(call, output);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
      pack_depthwise<Problem, WEIGHT_PITCH>(call, weights, bias);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task)
        run_task(own, static_cast<const Storage*>(source), weights, bias,
                 static_cast<Storage*>(output), task, finish);
    }
  }

  // What a task computes.
  struct Block {
    int64_t n, vector0, vectors;
    int64_t q0[3], x0[3];        // its first position, and the first element that this may reach
    Span inside[3];              // what is reached inside of the source, from x0 on
    int64_t out0[3], extent[3];  // its outputs
  };

  void run_task(char* own, const Storage* source, const Real* weights, const Real* bias,
                Storage* output, int64_t task, const Finish<Problem>& finish) const {
    Block b = {};
    const int64_t place = task % (blocks[0] * blocks[1] * blocks[2]);
    const int64_t image = task / (blocks[0] * blocks[1] * blocks[2]);
    b.vector0 = image % chunks * chunk;
    b.vectors = least(chunk, Vectors::COUNT - b.vector0);
    b.n = image / chunks;
    const int64_t index[3] = {place / (blocks[1] * blocks[2]), place / blocks[2] % blocks[1],
                              place % blocks[2]};
    for (int axis = 0; axis < 3; ++axis) {
      b.q0[axis] = index[axis] * block[axis];
      b.x0[axis] = b.q0[axis] * STRIDE[axis] + BEFORE[axis];
      b.inside[axis] = span_of<1>(b.x0[axis], source_extent[axis], reached(axis));
      b.out0[axis] = b.q0[axis] * PHASES[axis];
      b.extent[axis] = least(block[axis] * PHASES[axis], output_extent[axis] - b.out0[axis]);
    }
    Real* const scratch = reinterpret_cast<Real*>(own);
    Real* const planes = reinterpret_cast<Real*>(own + planes_at);
    Real* const own_weights = reinterpret_cast<Real*>(own + own_weights_at);
    for (int64_t v = 0; v < b.vectors; ++v)
      for (int64_t tap = 0; tap < TAPS; ++tap)
        store(own_weights + (v * TAPS + tap) * V,
              load(weights + tap * WEIGHT_PITCH + Vectors::at(b.vector0 + v)));
    stage(b, scratch, source, reinterpret_cast<Real*>(own + joined_at));
    for (int64_t d = 0; d < b.extent[0]; ++d) {
      for (int64_t h = 0; h < b.extent[1]; ++h)
        run_row(b, scratch, own_weights, bias, d, h, planes + h * b.extent[2] * V);
      put_out(b, planes, output, d, finish);
    }
  }

  // What the block reaches of the source, by vectors of channels.
  void stage(const Block& b, Real* scratch, const Storage* source, Real* joined) const {
    const Pitches from(CHANNELS, source_extent, source_last);
    const int64_t width = reached(2), columns = b.inside[2].end - b.inside[2].first;
    const int64_t rows = b.inside[1].end - b.inside[1].first;
    const bool join = joins() && rows * columns >= V;
    for (int64_t z = b.inside[0].first; z < b.inside[0].end; ++z) {
      const Storage* const plane = source + b.n * from.image + (b.x0[0] + z) * from.axis[0] +
                                   (b.x0[1] + b.inside[1].first) * from.axis[1] +
                                   (b.x0[2] + b.inside[2].first) * from.axis[2];
      Real* const to = scratch + (z * reached(1) + b.inside[1].first) * width * V;
      for (int64_t v = 0; v < b.vectors; ++v) {
        Real* line = to + v * source_vector();
        const Storage* x = plane + Vectors::at(b.vector0 + v) * from.channel;
        if (join) transpose<Real>(joined, V, x, from.channel, V, rows * columns);
        for (int64_t y = 0; y < rows; ++y, line += width * V, x += from.axis[1]) {
          Real* const first = line + b.inside[2].first * V;
          memset(line, 0, size_t(b.inside[2].first) * VECTOR_BYTES);
          if (join)
            memcpy(first, joined + y * columns * V, size_t(columns) * VECTOR_BYTES);
          else if (source_last)
            for (int64_t i = 0; i < columns; ++i)
              store(first + i * V, load_real<Real>(x + i * CHANNELS));
          else
            transpose<Real>(first, V, x, from.channel, V, columns);
          memset(line + b.inside[2].end * V, 0, size_t(width - b.inside[2].end) * VECTOR_BYTES);
        }
      }
    }
  }

  // A row of outputs, d and h in the block, for all vectors of channels.
  void run_row(const Block& b, const Real* scratch, const Real* weights, const Real* bias,
               int64_t d, int64_t h, Real* out) const {
    RowTap<Real> taps[AxisD::TAPS * AxisH::TAPS];
    const int rd = int(d % PHASES[0]), rh = int(h % PHASES[1]);
    int64_t count = 0;
    for (int jd = AxisD::FIRST[rd]; jd < AxisD::FIRST[rd + 1]; ++jd) {
      const int64_t z = d / PHASES[0] * STRIDE[0] + AxisD::TAP[jd].offset - BEFORE[0];
      if (z < b.inside[0].first || z >= b.inside[0].end) continue;
      for (int jh = AxisH::FIRST[rh]; jh < AxisH::FIRST[rh + 1]; ++jh) {
        const int64_t y = h / PHASES[1] * STRIDE[1] + AxisH::TAP[jh].offset - BEFORE[1];
        if (y < b.inside[1].first || y >= b.inside[1].end) continue;
        // A tap's offset along w is counted from the row's first column.
        taps[count++] = {
            scratch + ((z * reached(1) + y) * reached(2) - BEFORE[2]) * V,
            weights +
                (int64_t(AxisD::TAP[jd].tap) * AxisH::TAPS + AxisH::TAP[jh].tap) * AxisW::TAPS * V};
      }
    }
    for (int64_t v = 0; v < b.vectors; ++v) {
      const Line line = {taps,
                         count,
                         v * source_vector(),
                         v * TAPS * V,
                         b.extent[2],
                         bias + Vectors::at(b.vector0 + v),
                         out + v * plane_vector()};
      if constexpr (AxisW::PHASES <= MOST_PHASES)
        run_phases(line, std::make_integer_sequence<int, AxisW::PHASES>{});
      else
        for (int r = 0; r < AxisW::PHASES; ++r) run_phase<0, 0>(line, r);
    }
  }

  // A row of outputs of one vector of channels.
  struct Line {
    const RowTap<Real>* taps;
    int64_t count, source_at, weight_at, length;
    const Real* bias;
    Real* out;
  };

  template <int... R>
  CONVGEN_INLINE static void run_phases(const Line& line, std::integer_sequence<int, R...>) {
    (run_unrolled<R>(line), ...);
  }

  template <int R>
  CONVGEN_INLINE static void run_unrolled(const Line& line) {
    constexpr int FIRST = AxisW::FIRST[R], COUNT = AxisW::FIRST[R + 1] - FIRST;
    if constexpr (COUNT <= MOST_UNROLLED)
      run_phase<FIRST, COUNT>(line, R);
    else
      run_phase<0, 0>(line, R);
  }

  template <int FIRST, int COUNT>
  CONVGEN_NOINLINE static void run_phase(const Line& line, int residue) {
    const int first = AxisW::FIRST[residue], end = AxisW::FIRST[residue + 1];
    const int64_t count = ceil_div(line.length - residue, PHASES[2]);
    int64_t q = 0;
    for (; q + TILE / 2 < count; q += TILE)
      run_tile<FIRST, COUNT, TILE>(line, residue, q, first, end);
    if (q < count) run_tile<FIRST, COUNT, TILE / 2>(line, residue, q, first, end);
  }

  template <int FIRST, int COUNT, int P>
  CONVGEN_INLINE static void run_tile(const Line& line, int residue, int64_t q, int first,
                                      int end) {
    Tile::template run<FIRST, COUNT, P, 1>(
        line.taps, line.count, line.source_at + q * STRIDE[2] * V, line.weight_at, first, end,
        line.bias, line.out + (q * PHASES[2] + residue) * V);
  }

  // A plane of the block's outputs.
  void put_out(const Block& b, Real* planes, Storage* output, int64_t d,
               const Finish<Problem>& finish) const {
    const Pitches to(CHANNELS, output_extent, output_last);
    // Whole rows follow each other.
    const bool whole = b.extent[2] == output_extent[2];
    const int64_t lines = whole ? 1 : b.extent[1];
    const int64_t length = whole ? b.extent[1] * b.extent[2] : b.extent[2];
    Storage* const first = output + b.n * to.image + (b.out0[0] + d) * to.axis[0] +
                           b.out0[1] * to.axis[1] + b.out0[2] * to.axis[2];
    const int64_t pitch[3] = {0, b.extent[2] * V, V}, extent[3] = {1, b.extent[1], b.extent[2]};
    for (int64_t v = 0; v < b.vectors; ++v) {
      const int64_t c = (b.vector0 + v) * V, lane = c - Vectors::at(b.vector0 + v);
      finish.block(first + c * to.channel, to, output_last, planes + v * plane_vector() + lane,
                   pitch, V - lane, extent);
    }
    for (int64_t line = 0; line < lines; ++line) {
      Storage* const out = first + line * to.axis[1];
      const Real* const from = planes + line * length * V;
      for (int64_t v = 0; v < b.vectors; ++v) {
        // Lanes that the vector before has, too, are another task's.
        const int64_t vector = b.vector0 + v, c = Vectors::at(vector), lane = vector * V - c;
        const Real* const x = from + v * plane_vector() + lane;
        if (!output_last)
          transpose<Real>(out + (c + lane) * to.channel, to.channel, x, V, length, V - lane);
        else if (lane == 0)
          for (int64_t i = 0; i < length; ++i)
            store_real<Real>(out + c + i * CHANNELS, load(x + i * V));
        else
          for (int64_t i = 0; i < length; ++i)
            convert<Real>(out + c + lane + i * CHANNELS, x + i * V, V - lane);
      }
    }
  }
};

}  // namespace
