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
  static constexpr int64_t STAGED_BYTES = 160 << 10;  // of a task: in L2
  static constexpr int64_t L1_BYTES = 24 << 10;
  static constexpr int64_t CHUNK_BYTES = 64;  // channels of a task, at least
  static constexpr int64_t TASKS_PER_THREAD = 8;
  static constexpr int MOST_TAPS = 8;  // along w, in registers

  int64_t batch;
  int64_t coarse_extent[3], fine_extent[3];
  bool served, bias;
  bool coarse_last, fine_last, direct;       // channels_last; read where they lie
  int64_t sums;                              // of a channel: taps, and its bias
  int64_t block[2], blocks[2], block_count;  // rows and columns; of the whole batch
  int64_t range, ranges;                     // blocks of a range, ranges
  int64_t stripe;                            // blocks that are staged together
  int64_t chunk, chunks;                     // vectors of channels of a task, tasks
  int threads;
  int64_t partial_at, bias_at, threads_at, total_bytes;  // in the workspace
  int64_t totals_at, staged_at, thread_bytes;            // of a thread

 public:
  static constexpr bool COMPILED =
      CHANNELS >= V && AxisW::TAPS <= 16 * MOST_TAPS && AxisD::TAPS <= 1024;

  DepthwiseWgrad(const ConvgenCall& call, bool with_bias)
      : batch(call.batch), bias(with_bias), sums(TAPS + (with_bias && !Problem::RESULT_IS_FINE)) {
    double terms = double(batch) * double(CHANNELS) * double(TAPS);
    for (int axis = 0; axis < 3; ++axis) {
      coarse_extent[axis] = call.coarse_extent[axis];
      fine_extent[axis] = call.fine_extent[axis];
      terms *= double(coarse_extent[axis]);
    }
    coarse_last = call.channels_last & CONVGEN_COARSE;
    fine_last = call.channels_last & CONVGEN_FINE;
    direct = std::is_same_v<Real, Storage> && coarse_last && fine_last;
    served = call.coarse_channels == CHANNELS && call.fine_channels == CHANNELS && COMPILED;
    threads = thread_count(call.device, terms);
    choose_tasks();
    Workspace workspace;
    partial_at = workspace.take(ranges * sums * LANE_COUNT * int64_t(sizeof(double)));
    totals_at = round_up(sums * chunk * V * REAL_BYTES, 64);
    staged_at = totals_at + round_up(sums * chunk * V * int64_t(sizeof(double)), 64);
    const int64_t staged =
        direct ? 0 : chunk * (coarse_vector() + AxisD::TAPS * fine_plane()) * REAL_BYTES;
    thread_bytes = round_up(staged_at + staged, 4096);
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
    stripe = 1;
    if (!direct) {
      // Lines of memory where channels lie side by side. A stripe is of whole rows.
      const int64_t line = greatest(1, 64 / (V * int64_t(sizeof(Storage))));
      chunk = coarse_last || fine_last ? even_part(Vectors::COUNT, line) : 1;
      while (blocks[1] == 1 && stripe < blocks[0] &&
             chunk * (coarse_vector(stripe + 1) + AxisD::TAPS * fine_plane(stripe + 1)) *
                     REAL_BYTES <=
                 STAGED_BYTES)
        ++stripe;
      chunks = ceil_div(Vectors::COUNT, chunk);
      return;
    }
    // Of these channels, the rows of a block stay in L1 while taps change.
    const int64_t rows = block[0] + (block[0] - 1) * AxisH::SOURCE_STRIDE + reach<AxisH>();
    const int64_t lane_bytes = rows * greatest(block[1], fine_extent[2]) * VECTOR_BYTES;
    const int64_t least_chunk = greatest(CHUNK_BYTES / VECTOR_BYTES, 1);
    chunk = even_part(Vectors::COUNT, greatest(L1_BYTES / greatest(lane_bytes, 1), least_chunk));
    chunk = least(round_up(chunk, least_chunk), Vectors::COUNT);
    const auto tasks = [this] { return ranges * ceil_div(Vectors::COUNT, chunk); };
    while (threads > 1 && tasks() < TASKS_PER_THREAD * threads &&
           chunk * V * REAL_BYTES >= 2 * CHUNK_BYTES)
      chunk = ceil_div(chunk, 2);
    chunks = ceil_div(Vectors::COUNT, chunk);
  }

  // Elements of scratch of one vector of channels: of coarse, and of a plane of fine, staged.
  int64_t coarse_vector(int64_t count) const { return count * block[0] * block[1] * V; }
  int64_t coarse_vector() const { return coarse_vector(stripe); }
  int64_t fine_plane(int64_t count) const {
    const int64_t rows = (count * block[0] - 1) * AxisH::SOURCE_STRIDE + reach<AxisH>();
    const int64_t columns = (block[1] - 1) * AxisW::SOURCE_STRIDE + reach<AxisW>();
    return least(rows, fine_extent[1]) * (blocks[1] == 1 ? fine_extent[2] : columns) * V;
  }
  int64_t fine_plane() const { return fine_plane(stripe); }

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

  // Rows of a block for which a tap along d and h meets fine, from the block's first column on.
  struct Rows {
    const Real* coarse;
    const Real* fine;
    int64_t count, coarse_pitch, fine_pitch;
    int64_t coarse_step, fine_step;  // from vector to vector of channels, where these are staged
  };

  // Where blocks of a plane lie: in the tensors, or staged.
  struct Place {
    int64_t d, h0, y0, w0, x0;  // the first elements of coarse and fine
    const Real* coarse;
    const Real* planes[AxisD::TAPS];   // of fine that taps along d meet, or null
    int64_t coarse_pitch, fine_pitch;  // from row to row
  };

  void run_task(const ConvgenCall& call, char* own, double* partial, int64_t index,
                int64_t vector0) const {
    Real* const sum = reinterpret_cast<Real*>(own);
    double* const total = reinterpret_cast<double*>(own + totals_at);
    const int64_t count = least(chunk, Vectors::COUNT - vector0), lanes = count * V;
    const int64_t end = least((index + 1) * range, block_count);
    Place place = {};
    for (int64_t i = 0; i < sums * lanes; ++i) total[i] = 0;
    for (int64_t first = index * range; first < end; first += SUM_BLOCKS) {
      memset(sum, 0, size_t(sums * lanes * REAL_BYTES));
      for (int64_t i = first; i < least(first + SUM_BLOCKS, end); ++i) {
        if (direct)
          locate(call, place, i);
        else if (i == index * range || i % blocks_of_plane() % stripe == 0)
          stage(call, own, place, i, end, vector0, count);
        if (direct)
          add_block<true>(place, sum, i, vector0, count);
        else
          add_block<false>(place, sum, i, vector0, count);
      }
      for (int64_t i = 0; i < sums * lanes; ++i) total[i] += double(sum[i]);
    }
    double* to = partial + index * sums * LANE_COUNT + vector0 * V;
    for (int64_t j = 0; j < sums; ++j)
      memcpy(to + j * LANE_COUNT, total + j * lanes, size_t(lanes) * sizeof(double));
  }

  int64_t blocks_of_plane() const { return blocks[0] * blocks[1]; }

  // The plane of a block: its image and d.
  int64_t plane_of(int64_t index, int64_t* d) const {
    *d = index / blocks_of_plane() % coarse_extent[0];
    return index / (blocks_of_plane() * coarse_extent[0]);
  }

  // A block in the tensors.
  void locate(const ConvgenCall& call, Place& place, int64_t index) const {
    const Pitches of_coarse(CHANNELS, coarse_extent, true), of_fine(CHANNELS, fine_extent, true);
    const int64_t n = plane_of(index, &place.d);
    place.coarse =
        static_cast<const Real*>(call.coarse) + n * of_coarse.image + place.d * of_coarse.axis[0];
    place.coarse_pitch = of_coarse.axis[1];
    place.fine_pitch = of_fine.axis[1];
    for (int j = 0; j < AxisD::TAPS; ++j) {
      const int64_t z = place.d * AxisD::SOURCE_STRIDE + AxisD::TAP[j].offset;
      place.planes[j] = z < 0 || z >= fine_extent[0] ? nullptr
                                                     : static_cast<const Real*>(call.fine) +
                                                           n * of_fine.image + z * of_fine.axis[0];
    }
  }

  // Copies the blocks from `index` on that are staged together, up to `end`, to scratch.
  void stage(const ConvgenCall& call, char* own, Place& place, int64_t index, int64_t end,
             int64_t vector0, int64_t vectors) const {
    constexpr int64_t S = AxisH::SOURCE_STRIDE;
    const Pitches of_coarse(CHANNELS, coarse_extent, coarse_last);
    const Pitches of_fine(CHANNELS, fine_extent, fine_last);
    const Span all = {vector0, vector0 + vectors};
    const int64_t n = plane_of(index, &place.d), first = index % blocks_of_plane();
    const int64_t last = least(end - index, stripe - first % stripe) + first;
    place.h0 = first / blocks[1] * block[0];
    place.w0 = first % blocks[1] * block[1];
    const int64_t rows = least(ceil_div(last, blocks[1]) * block[0], coarse_extent[1]) - place.h0;
    const int64_t columns = least(block[1], coarse_extent[2] - place.w0);
    Real* const coarse = reinterpret_cast<Real*>(own + staged_at);
    stage_rows<Vectors>(coarse, coarse_vector(),
                        static_cast<const Storage*>(call.coarse) + n * of_coarse.image +
                            place.d * of_coarse.axis[0] + place.h0 * of_coarse.axis[1] +
                            place.w0 * of_coarse.axis[2],
                        of_coarse, rows, columns, blocks[1] == 1, all);
    place.coarse = coarse;
    place.coarse_pitch = columns * V;
    // Of fine, what taps meet along h; along w whole rows, or what they meet.
    const Span y = span_of<1>(place.h0 * S + least_offset<AxisH>(), fine_extent[1],
                              (rows - 1) * S + reach<AxisH>());
    place.y0 = place.h0 * S + least_offset<AxisH>() + y.first;
    Span x = {0, fine_extent[2]};
    if (blocks[1] > 1) {
      const int64_t left = place.w0 * AxisW::SOURCE_STRIDE + least_offset<AxisW>();
      const Span met =
          span_of<1>(left, fine_extent[2], (columns - 1) * AxisW::SOURCE_STRIDE + reach<AxisW>());
      x = {left + met.first, left + met.end};
    }
    place.x0 = x.first;
    place.fine_pitch = (x.end - x.first) * V;
    Real* fine = coarse + chunk * coarse_vector();
    for (int j = 0; j < AxisD::TAPS; ++j, fine += fine_plane()) {
      const int64_t z = place.d * AxisD::SOURCE_STRIDE + AxisD::TAP[j].offset;
      place.planes[j] = nullptr;
      if (z < 0 || z >= fine_extent[0] || y.first == y.end || x.first == x.end) continue;
      place.planes[j] = fine;
      stage_rows<Vectors>(fine, AxisD::TAPS * fine_plane(),
                          static_cast<const Storage*>(call.fine) + n * of_fine.image +
                              z * of_fine.axis[0] + place.y0 * of_fine.axis[1] +
                              x.first * of_fine.axis[2],
                          of_fine, y.end - y.first, x.end - x.first, blocks[1] == 1, all);
    }
  }

  template <bool DIRECT>
  void add_block(const Place& place, Real* sum, int64_t index, int64_t vector0,
                 int64_t count) const {
    constexpr int64_t PITCH = DIRECT ? CHANNELS : V;
    const int64_t w0 = index % blocks[1] * block[1], h0 = index / blocks[1] % blocks[0] * block[0];
    const int64_t rows = least(block[0], coarse_extent[1] - h0);
    const Span columns = {w0, least(w0 + block[1], coarse_extent[2])};
    const Real* const coarse =
        place.coarse + (h0 - place.h0) * place.coarse_pitch + (w0 - place.w0) * PITCH;
    for (int jd = 0; jd < AxisD::TAPS; ++jd) {
      if (!place.planes[jd]) continue;
      for (int jh = 0; jh < AxisH::TAPS; ++jh) {
        const int64_t y = h0 * AxisH::SOURCE_STRIDE + AxisH::TAP[jh].offset;
        const Span met = span_of<AxisH::SOURCE_STRIDE>(y, fine_extent[1], rows);
        if (met.first == met.end) continue;
        const Rows part = {
            coarse + met.first * place.coarse_pitch,
            place.planes[jd] +
                (y + met.first * AxisH::SOURCE_STRIDE - place.y0) * place.fine_pitch +
                (w0 * AxisW::SOURCE_STRIDE - place.x0) * PITCH,
            met.end - met.first,
            place.coarse_pitch,
            AxisH::SOURCE_STRIDE * place.fine_pitch,
            coarse_vector(),
            AxisD::TAPS * fine_plane()};
        Real* const to = sum + (jd * AxisH::TAPS + jh) * AxisW::TAPS * count * V;
        add_parts<DIRECT>(part, columns, to, vector0, count,
                          std::make_integer_sequence<int, PARTS>{});
      }
    }
    if (sums > TAPS) {
      const Rows all = {coarse, nullptr, rows, place.coarse_pitch, 0, coarse_vector(), 0};
      add_bias<DIRECT>(all, columns.end - columns.first, sum + TAPS * count * V, vector0, count);
    }
  }

  // The taps along w in even parts of at most MOST_TAPS.
  static constexpr int PARTS = int(ceil_div(AxisW::TAPS, MOST_TAPS));
  static constexpr int part_at(int part) { return part * AxisW::TAPS / PARTS; }

  template <bool DIRECT, int... PART>
  CONVGEN_INLINE void add_parts(const Rows& rows, Span columns, Real* to, int64_t vector0,
                                int64_t count, std::integer_sequence<int, PART...>) const {
    (add_taps<DIRECT, part_at(PART), part_at(PART + 1) - part_at(PART)>(rows, columns, to, vector0,
                                                                        count),
     ...);
  }

  // COUNT taps along w from FIRST on, over rows of positions; in the tensors, or staged.
  template <bool DIRECT, int FIRST, int COUNT>
  CONVGEN_NOINLINE void add_taps(const Rows& rows, Span columns, Real* to, int64_t vector0,
                                 int64_t vectors) const {
    constexpr int S = AxisW::SOURCE_STRIDE;
    constexpr int64_t PITCH = DIRECT ? CHANNELS : V;
    // Sums of each tap, of positions in turn: enough that none waits for the one before it.
    constexpr int TURNS = COUNT >= 5 ? 1 : COUNT >= 4 ? 2 : COUNT == 3 ? 3 : COUNT == 2 ? 4 : 8;
    // Positions are counted from the block's first column on.
    const int64_t length = columns.end - columns.first;
    Span met[COUNT], inside = {0, length};
    for (int j = 0; j < COUNT; ++j) {
      met[j] = span_of<S>(columns.first * S + AxisW::TAP[FIRST + j].offset, fine_extent[2], length);
      inside = {greatest(met[j].first, inside.first), least(met[j].end, inside.end)};
    }
    inside.end = greatest(inside.first, inside.end);
    for (int64_t vector = 0; vector < vectors; ++vector, to += V) {
      const int64_t c = Vectors::at(vector0 + vector);
      const Real* const coarse = rows.coarse + (DIRECT ? c : vector * rows.coarse_step);
      const Real* const fine = rows.fine + (DIRECT ? c : vector * rows.fine_step);
      Vector<Real> acc[TURNS][COUNT] = {};
#pragma GCC unroll 16
      for (int j = 0; j < COUNT; ++j) {
        const int64_t offset = AxisW::TAP[FIRST + j].offset;
        const Real *a = coarse, *b = fine;
        if (met[j].first < inside.first || met[j].end > inside.end)
          for (int64_t row = 0; row < rows.count;
               ++row, a += rows.coarse_pitch, b += rows.fine_pitch) {
            for (int64_t q = met[j].first; q < least(inside.first, met[j].end); ++q)
              acc[0][j] += load(a + q * PITCH) * load(b + (q * S + offset) * PITCH);
            for (int64_t q = greatest(inside.end, met[j].first); q < met[j].end; ++q)
              acc[0][j] += load(a + q * PITCH) * load(b + (q * S + offset) * PITCH);
          }
      }
      const Real* a = coarse + inside.first * PITCH;
      const Real* b = fine + inside.first * S * PITCH;
      for (int64_t row = 0; row < rows.count; ++row, a += rows.coarse_pitch, b += rows.fine_pitch) {
        const Real *x = a, *y = b;
        int64_t q = inside.first;
        for (; q + TURNS <= inside.end; q += TURNS, x += TURNS * PITCH, y += TURNS * S * PITCH)
#pragma GCC unroll 8
          for (int turn = 0; turn < TURNS; ++turn)
            multiply<PITCH, FIRST>(acc[turn], x + turn * PITCH, y + turn * S * PITCH);
        for (; q < inside.end; ++q, x += PITCH, y += S * PITCH)
          multiply<PITCH, FIRST>(acc[0], x, y);
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

  template <int64_t PITCH, int FIRST, int COUNT>
  static CONVGEN_INLINE void multiply(Vector<Real> (&acc)[COUNT], const Real* coarse,
                                      const Real* fine) {
    Vector<Real> value = load(coarse);
    if (COUNT > 1) keep(value);
#pragma GCC unroll 16
    for (int j = 0; j < COUNT; ++j)
      acc[j] += value * load(fine + AxisW::TAP[FIRST + j].offset * PITCH);
  }

  template <bool DIRECT>
  CONVGEN_NOINLINE void add_bias(const Rows& rows, int64_t columns, Real* to, int64_t vector0,
                                 int64_t vectors) const {
    constexpr int TURNS = 4;
    constexpr int64_t PITCH = DIRECT ? CHANNELS : V;
    for (int64_t vector = 0; vector < vectors; ++vector, to += V) {
      const Real* a =
          rows.coarse + (DIRECT ? Vectors::at(vector0 + vector) : vector * rows.coarse_step);
      Vector<Real> acc[TURNS] = {};
      for (int64_t row = 0; row < rows.count; ++row, a += rows.coarse_pitch) {
        const Real* x = a;
        int64_t q = 0;
        for (; q + TURNS <= columns; q += TURNS, x += TURNS * PITCH)
#pragma GCC unroll 4
          for (int turn = 0; turn < TURNS; ++turn) acc[turn] += load(x + turn * PITCH);
        for (; q < columns; ++q, x += PITCH) acc[0] += load(x);
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
