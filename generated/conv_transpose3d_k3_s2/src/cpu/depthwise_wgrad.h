// wgrad of depthwise layers, with channels in the lanes:
//
//   weight[j][c] = sum over n, q of coarse[n][q][c] * fine[n][q * STRIDE + offset[j]][c]
//
//   task: a range of blocks (some rows of one plane of coarse), some vectors of channels
//     for each block, and each tap along d and h: the rows for which that meets fine
//       for each vector: taps along w in registers, over all positions for which they meet fine:
//                          j0        j1        j2
//                      [ lanes ] [ lanes ] [ lanes ]   += coarse[q] * fine[q * STRIDE + offset[j]]
//                      those beside the positions that all taps meet come first, tap by tap
//       -> sums (L1), of so many positions that the last places that are lost stay few
//          -> totals of the task, in double
//   then, behind a barrier, the totals of all ranges are added in order, in double.
//
// The bias gradient, where it is coarse's sum, is one more tap, which meets ones.
//
// How positions are cut into blocks and ranges depends on the extents alone, so that results have
// the same bits for any number of threads. Only what a tap meets is multiplied.
#pragma once

#include "bias.h"
#include "depthwise.h"

namespace {

template <class Problem>
class DepthwiseWgrad {
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
  static constexpr int64_t LANE_COUNT = Vectors::COUNT * V;
  static constexpr int64_t BLOCK_POSITIONS = 96;  // products of a chain, but for a long row's
  static constexpr int64_t MOST_COLUMNS = 192;    // of a block
  static constexpr int64_t SUM_BLOCKS = 24;       // whose sums add up in Real
  static constexpr int64_t RANGE_POSITIONS = 2048;
  static constexpr int64_t PARTIAL_BYTES = 32 << 20;  // of the totals of all ranges
  static constexpr int64_t CHUNK_BYTES = 64;          // channels of a task, at least
  static constexpr int64_t TASKS_PER_THREAD = 8;
  static constexpr int MOST_TAPS = 8;  // along w, in registers
  static constexpr bool COMPILED =
      std::is_same_v<Real, Storage> && CHANNELS >= V && AxisW::TAPS <= 16 * MOST_TAPS;

  int64_t batch;
  int64_t coarse_extent[3], fine_extent[3];
  bool served, bias;
  int64_t sums;                              // of a channel: taps, and its bias
  int64_t block[2], blocks[2], block_count;  // rows and columns; of the whole batch
  int64_t range, ranges;                     // blocks of a range, ranges
  int64_t chunk, chunks;                     // vectors of channels of a task, tasks
  int threads;
  int64_t partial_at, bias_at, threads_at, total_bytes;  // in the workspace
  int64_t totals_at, thread_bytes;                       // of a thread

 public:
  DepthwiseWgrad(const ConvgenCall& call, bool with_bias)
      : batch(call.batch), bias(with_bias), sums(TAPS + (with_bias && !Problem::RESULT_IS_FINE)) {
    double terms = double(batch) * double(CHANNELS) * double(TAPS);
    for (int axis = 0; axis < 3; ++axis) {
      coarse_extent[axis] = call.coarse_extent[axis];
      fine_extent[axis] = call.fine_extent[axis];
      terms *= double(coarse_extent[axis]);
    }
    served = call.coarse_channels == CHANNELS && call.fine_channels == CHANNELS && COMPILED &&
             call.channels_last & CONVGEN_COARSE && call.channels_last & CONVGEN_FINE;
    threads = thread_count(call.device, terms);
    choose_tasks();
    Workspace workspace;
    partial_at = workspace.take(ranges * sums * LANE_COUNT * int64_t(sizeof(double)));
    totals_at = round_up(sums * chunk * V * REAL_BYTES, 64);
    thread_bytes = round_up(totals_at + sums * chunk * V * int64_t(sizeof(double)), 4096);
    threads_at = workspace.take(thread_bytes * threads);
    bias_at = workspace.take(of_fine() ? Bias(call, true).workspace_bytes() : 0);
    total_bytes = workspace.bytes;
  }

  bool suits() const { return served; }

  int64_t workspace_bytes() const { return total_bytes; }

  void run(const ConvgenCall& call) const {
    if constexpr (COMPILED) run_tasks(call);
  }

 private:
  using Bias = BiasGradient<Storage, Real>;

  bool of_fine() const { return bias && Problem::RESULT_IS_FINE; }

  void choose_tasks() {
    block[1] = even_part(coarse_extent[2], MOST_COLUMNS);
    block[0] = even_part(coarse_extent[1], greatest(1, BLOCK_POSITIONS / block[1]));
    for (int axis = 0; axis < 2; ++axis)
      blocks[axis] = ceil_div(coarse_extent[axis + 1], block[axis]);
    block_count = batch * coarse_extent[0] * blocks[0] * blocks[1];
    // By the extents alone.
    const int64_t most = greatest(1, PARTIAL_BYTES / (sums * LANE_COUNT * int64_t(sizeof(double))));
    range = greatest(ceil_div(RANGE_POSITIONS, block[0] * block[1]), ceil_div(block_count, most));
    ranges = ceil_div(block_count, range);
    chunk = Vectors::COUNT;
    const auto tasks = [this] { return ranges * ceil_div(Vectors::COUNT, chunk); };
    while (threads > 1 && tasks() < TASKS_PER_THREAD * threads &&
           chunk * V * REAL_BYTES >= 2 * CHUNK_BYTES)
      chunk = ceil_div(chunk, 2);
    chunks = ceil_div(Vectors::COUNT, chunk);
  }

  void run_tasks(const ConvgenCall& call) const {
    char* const workspace = static_cast<char*>(call.workspace);
    double* const partial = reinterpret_cast<double*>(workspace + partial_at);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      char* const own = workspace + threads_at + omp_get_thread_num() * thread_bytes;
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < ranges * chunks; ++task)
        run_task(call, own, partial, task / chunks, task % chunks * chunk);
#pragma omp for schedule(static)
      for (int64_t vector = 0; vector < Vectors::COUNT; ++vector)
        put_weights(call, partial, vector);
    }
    if (of_fine()) Bias(call, true).run(workspace + bias_at, call.bias);
  }

  // Rows of a block for which a tap along d and h meets fine.
  struct Rows {
    const Real* coarse;
    const Real* fine;
    int64_t count, coarse_pitch, fine_pitch;
  };

  void run_task(const ConvgenCall& call, char* own, double* partial, int64_t index,
                int64_t vector0) const {
    Real* const sum = reinterpret_cast<Real*>(own);
    double* const total = reinterpret_cast<double*>(own + totals_at);
    const int64_t count = least(chunk, Vectors::COUNT - vector0), lanes = count * V;
    const int64_t end = least((index + 1) * range, block_count);
    for (int64_t i = 0; i < sums * lanes; ++i) total[i] = 0;
    for (int64_t first = index * range; first < end; first += SUM_BLOCKS) {
      memset(sum, 0, size_t(sums * lanes * REAL_BYTES));
      for (int64_t i = first; i < least(first + SUM_BLOCKS, end); ++i)
        add_block(call, sum, i, vector0, count);
      for (int64_t i = 0; i < sums * lanes; ++i) total[i] += double(sum[i]);
    }
    double* to = partial + index * sums * LANE_COUNT + vector0 * V;
    for (int64_t j = 0; j < sums; ++j)
      memcpy(to + j * LANE_COUNT, total + j * lanes, size_t(lanes) * sizeof(double));
  }

  void add_block(const ConvgenCall& call, Real* sum, int64_t index, int64_t vector0,
                 int64_t count) const {
    const Pitches of_coarse(CHANNELS, coarse_extent, true), of_fine(CHANNELS, fine_extent, true);
    const int64_t w0 = index % blocks[1] * block[1], h0 = index / blocks[1] % blocks[0] * block[0];
    const int64_t d = index / (blocks[1] * blocks[0]) % coarse_extent[0];
    const int64_t n = index / (blocks[1] * blocks[0] * coarse_extent[0]);
    const int64_t rows = least(block[0], coarse_extent[1] - h0);
    const Span columns = {w0, least(w0 + block[1], coarse_extent[2])};
    const Real* const coarse = static_cast<const Real*>(call.coarse) + n * of_coarse.image +
                               d * of_coarse.axis[0] + h0 * of_coarse.axis[1];
    const Real* const fine = static_cast<const Real*>(call.fine) + n * of_fine.image;
    for (int jd = 0; jd < AxisD::TAPS; ++jd) {
      const int64_t z = d * AxisD::SOURCE_STRIDE + AxisD::TAP[jd].offset;
      if (z < 0 || z >= fine_extent[0]) continue;
      for (int jh = 0; jh < AxisH::TAPS; ++jh) {
        const int64_t y = h0 * AxisH::SOURCE_STRIDE + AxisH::TAP[jh].offset;
        const Span met = span_of<AxisH::SOURCE_STRIDE>(y, fine_extent[1], rows);
        if (met.first == met.end) continue;
        const Rows part = {
            coarse + met.first * of_coarse.axis[1],
            fine + z * of_fine.axis[0] + (y + met.first * AxisH::SOURCE_STRIDE) * of_fine.axis[1],
            met.end - met.first, of_coarse.axis[1], AxisH::SOURCE_STRIDE * of_fine.axis[1]};
        Real* const to = sum + (jd * AxisH::TAPS + jh) * AxisW::TAPS * count * V;
        add_parts(part, columns, to, vector0, count, std::make_integer_sequence<int, PARTS>{});
      }
    }
    if (sums > TAPS) {
      const Rows all = {coarse, nullptr, rows, of_coarse.axis[1], 0};
      add_bias(all, columns, sum + TAPS * count * V, vector0, count);
    }
  }

  // The taps along w in even parts of at most MOST_TAPS.
  static constexpr int PARTS = int(ceil_div(AxisW::TAPS, MOST_TAPS));
  static constexpr int part_at(int part) { return part * AxisW::TAPS / PARTS; }

  template <int... PART>
  CONVGEN_INLINE void add_parts(const Rows& rows, Span columns, Real* to, int64_t vector0,
                                int64_t count, std::integer_sequence<int, PART...>) const {
    (add_taps<part_at(PART), part_at(PART + 1) - part_at(PART)>(rows, columns, to, vector0, count),
     ...);
  }

  // COUNT taps along w from FIRST on, over rows of positions.
  template <int FIRST, int COUNT>
  CONVGEN_NOINLINE void add_taps(const Rows& rows, Span columns, Real* to, int64_t vector0,
                                 int64_t vectors) const {
    constexpr int S = AxisW::SOURCE_STRIDE;
    // Sums of each tap, of positions in turn: enough that none waits for the one before it.
    constexpr int TURNS = COUNT >= 5 ? 1 : COUNT >= 4 ? 2 : COUNT == 3 ? 3 : COUNT == 2 ? 4 : 8;
    Span met[COUNT], inside = columns;
    for (int j = 0; j < COUNT; ++j) {
      met[j] = span_of<S>(AxisW::TAP[FIRST + j].offset, fine_extent[2], coarse_extent[2]);
      met[j] = {greatest(met[j].first, columns.first), least(met[j].end, columns.end)};
      inside = {greatest(met[j].first, inside.first), least(met[j].end, inside.end)};
    }
    inside.first = least(inside.first, columns.end);
    inside.end = greatest(inside.first, inside.end);
    for (int64_t vector = 0; vector < vectors; ++vector, to += V) {
      const int64_t c = Vectors::at(vector0 + vector);
      const Real* const coarse = rows.coarse + c;
      const Real* const fine = rows.fine + c;
      Vector<Real> acc[TURNS][COUNT] = {};
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; ++j) {
        const int64_t offset = AxisW::TAP[FIRST + j].offset;
        const Real *a = coarse, *b = fine;
        if (met[j].first < inside.first || met[j].end > inside.end)
          for (int64_t row = 0; row < rows.count;
               ++row, a += rows.coarse_pitch, b += rows.fine_pitch) {
            for (int64_t q = met[j].first; q < least(inside.first, met[j].end); ++q)
              acc[0][j] += load(a + q * CHANNELS) * load(b + (q * S + offset) * CHANNELS);
            for (int64_t q = greatest(inside.end, met[j].first); q < met[j].end; ++q)
              acc[0][j] += load(a + q * CHANNELS) * load(b + (q * S + offset) * CHANNELS);
          }
      }
      const Real* a = coarse + inside.first * CHANNELS;
      const Real* b = fine + inside.first * S * CHANNELS;
      for (int64_t row = 0; row < rows.count; ++row, a += rows.coarse_pitch, b += rows.fine_pitch) {
        const Real *x = a, *y = b;
        int64_t q = inside.first;
        for (; q + TURNS <= inside.end;
             q += TURNS, x += TURNS * CHANNELS, y += TURNS * S * CHANNELS)
#pragma GCC unroll 8
          for (int turn = 0; turn < TURNS; ++turn)
            multiply<FIRST>(acc[turn], x + turn * CHANNELS, y + turn * S * CHANNELS);
        for (; q < inside.end; ++q, x += CHANNELS, y += S * CHANNELS) multiply<FIRST>(acc[0], x, y);
      }
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; ++j) {
#pragma GCC unroll 8
        for (int turn = 1; turn < TURNS; ++turn) acc[0][j] += acc[turn][j];
        Real* const at = to + (FIRST + j) * vectors * V;
        store(at, load(at) + acc[0][j]);
      }
    }
  }

  template <int FIRST, int COUNT>
  static CONVGEN_INLINE void multiply(Vector<Real> (&acc)[COUNT], const Real* coarse,
                                      const Real* fine) {
    Vector<Real> value = load(coarse);
    if (COUNT > 1) keep(value);
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; ++j)
      acc[j] += value * load(fine + AxisW::TAP[FIRST + j].offset * CHANNELS);
  }

  CONVGEN_NOINLINE void add_bias(const Rows& rows, Span columns, Real* to, int64_t vector0,
                                 int64_t vectors) const {
    constexpr int TURNS = 4;
    for (int64_t vector = 0; vector < vectors; ++vector, to += V) {
      const Real* a = rows.coarse + Vectors::at(vector0 + vector) + columns.first * CHANNELS;
      Vector<Real> acc[TURNS] = {};
      for (int64_t row = 0; row < rows.count; ++row, a += rows.coarse_pitch) {
        const Real* x = a;
        int64_t q = columns.first;
        for (; q + TURNS <= columns.end; q += TURNS, x += TURNS * CHANNELS)
#pragma GCC unroll 4
          for (int turn = 0; turn < TURNS; ++turn) acc[turn] += load(x + turn * CHANNELS);
        for (; q < columns.end; ++q, x += CHANNELS) acc[0] += load(x);
      }
      store(to, load(to) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
    }
  }

  // The weights of a vector of channels, and their bias, from the totals of all ranges.
  void put_weights(const ConvgenCall& call, const double* partial, int64_t vector) const {
    partial += vector * V;
    const int64_t c = Vectors::at(vector);
    const int repeated = int(vector * V - c);  // lanes that the vector before has, too
    Storage* const weight = static_cast<Storage*>(call.weight) + c * TAPS;
    for (int64_t j = 0; j < sums; ++j, partial += LANE_COUNT) {
      double total[V] = {};
      for (int64_t r = 0; r < ranges; ++r)
        for (int lane = 0; lane < V; ++lane) total[lane] += partial[r * sums * LANE_COUNT + lane];
      const int64_t element =
          (AxisD::TAP[j / (AxisH::TAPS * AxisW::TAPS) % AxisD::TAPS].tap * AxisH::TAPS +
           AxisH::TAP[j / AxisW::TAPS % AxisH::TAPS].tap) *
              AxisW::TAPS +
          AxisW::TAP[j % AxisW::TAPS].tap;
      for (int lane = repeated; lane < V; ++lane)
        from_real(Real(total[lane]), j < TAPS ? weight[lane * TAPS + element]
                                              : static_cast<Storage*>(call.bias)[c + lane]);
    }
  }
};

}  // namespace
