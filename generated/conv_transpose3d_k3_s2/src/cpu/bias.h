// bgrad, and the sums of it that wgrad makes on its way.
#pragma once

#include "runtime.h"

namespace {

// The sum of consecutive elements: in lanes, chain by chain, then in double.
template <class Real, class Storage>
CONVGEN_NOINLINE double sum_of(const Storage* from, int64_t count) {
  constexpr int WIDTH = 4 * LANES<Real>;
  constexpr int64_t CHAIN = 32 * WIDTH;
  alignas(VECTOR_BYTES) Real sums[WIDTH] = {};
  int64_t i = 0;
  while (i + WIDTH <= count) {
    alignas(VECTOR_BYTES) Real lanes[WIDTH] = {};
    for (const int64_t end = least(i + CHAIN, count - WIDTH + 1); i < end; i += WIDTH)
      for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] += to_real(from[i + lane]);
    for (int lane = 0; lane < WIDTH; ++lane) sums[lane] += lanes[lane];
  }
  double total = 0;
  for (const Real sum : sums) total += double(sum);
  for (; i < count; ++i) total += double(to_real(from[i]));
  return total;
}

// Adds rows of channels up, chain by chain, then in double: totals[c] = sum over i of from[i][c].
template <class Real, class Storage>
CONVGEN_NOINLINE void sum_rows(double* totals, const Storage* from, int64_t rows,
                               int64_t channels) {
  constexpr int WIDTH = 64;
  constexpr int64_t CHAIN = 16;
  for (int64_t c0 = 0; c0 < channels; c0 += WIDTH) {
    const int64_t width = least(WIDTH, channels - c0);
    for (int64_t c = 0; c < width; ++c) totals[c0 + c] = 0;
    for (int64_t i = 0; i < rows;) {
      Real sums[WIDTH] = {};
      for (const int64_t end = least(i + CHAIN, rows); i < end; ++i) {
        const Storage* const row = from + i * channels + c0;
        if (width == WIDTH)
          for (int c = 0; c < WIDTH; ++c) sums[c] += to_real(row[c]);
        else
          for (int64_t c = 0; c < width; ++c) sums[c] += to_real(row[c]);
      }
      for (int64_t c = 0; c < width; ++c) totals[c0 + c] += double(sums[c]);
    }
  }
}

// bgrad: sums over the batch and all positions of one channel. Pieces of fixed size are summed
// in lanes, then in double, in order.
template <class Storage, class Real>
class BiasGradient {
  static constexpr int64_t PIECE = 1 << 15, PIECE_ROWS = 1 << 10;
  const Storage* values;
  int64_t batch, channels, volume, pieces;
  bool last;  // channels_last
  int threads;

 public:
  // Of the coarse tensor, or of the fine one.
  explicit BiasGradient(const ConvgenCall& call, bool of_fine = false)
      : values(static_cast<const Storage*>(of_fine ? call.fine : call.coarse)),
        batch(call.batch),
        channels(of_fine ? call.fine_channels : call.coarse_channels),
        last(call.channels_last & (of_fine ? CONVGEN_FINE : CONVGEN_COARSE)) {
    const int64_t* const extent = of_fine ? call.fine_extent : call.coarse_extent;
    volume = extent[0] * extent[1] * extent[2];
    pieces = last ? ceil_div(batch * volume, PIECE_ROWS) : ceil_div(volume, PIECE);
    threads = thread_count(call.device, double(batch) * double(channels) * double(volume));
  }

  int64_t workspace_bytes() const {
    return (last ? 1 : batch) * channels * pieces * int64_t(sizeof(double));
  }

  void run(void* workspace, void* to) const {
    Storage* const bias = static_cast<Storage*>(to);
    double* const partial = static_cast<double*>(workspace);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      if (last) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pieces; ++i)
          sum_rows<Real>(partial + i * channels, values + i * PIECE_ROWS * channels,
                         least(PIECE_ROWS, batch * volume - i * PIECE_ROWS), channels);
      } else {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * channels * pieces; ++i) {
          const int64_t first = i % pieces * PIECE;
          partial[i] =
              sum_of<Real>(values + i / pieces * volume + first, least(PIECE, volume - first));
        }
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        if (last)
          for (int64_t i = 0; i < pieces; ++i) total += partial[i * channels + c];
        else
          for (int64_t n = 0; n < batch; ++n)
            for (int64_t i = 0; i < pieces; ++i) total += partial[(n * channels + c) * pieces + i];
        from_real(Real(total), bias[c]);
      }
    }
  }
};

}  // namespace
