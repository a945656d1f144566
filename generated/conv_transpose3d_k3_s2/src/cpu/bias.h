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

// bgrad: sums over the batch and all positions of one channel. Pieces of fixed size are summed
// in lanes, then in double, in order.
template <class Storage, class Real>
class BiasGradient {
  static constexpr int64_t PIECE = 1 << 15;
  int64_t batch, channels, volume, pieces;
  int threads;

 public:
  explicit BiasGradient(const ConvgenCall& call)
      : batch(call.batch),
        channels(call.coarse_channels),
        volume(call.coarse_extent[0] * call.coarse_extent[1] * call.coarse_extent[2]),
        pieces(ceil_div(volume, PIECE)) {
    threads = thread_count(call.device, double(batch) * double(channels) * double(volume));
  }

  int64_t workspace_bytes() const { return batch * channels * pieces * int64_t(sizeof(double)); }

  void run(const ConvgenCall& call) const {
    const Storage* values = static_cast<const Storage*>(call.coarse);
    Storage* bias = static_cast<Storage*>(call.bias);
    double* partial = static_cast<double*>(call.workspace);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < batch * channels * pieces; ++i) {
        const int64_t first = i % pieces * PIECE;
        partial[i] =
            sum_of<Real>(values + i / pieces * volume + first, least(PIECE, volume - first));
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t n = 0; n < batch; ++n)
          for (int64_t i = 0; i < pieces; ++i) total += partial[(n * channels + c) * pieces + i];
        from_real(Real(total), bias[c]);
      }
    }
  }
};

}  // namespace
