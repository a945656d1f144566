// How the units of a wgrad are dealt out: K blocks of all pairs of blocks of channels and taps.
#ifndef CONVGEN_IMPLICIT_GEMM_DEAL_CUH
#define CONVGEN_IMPLICIT_GEMM_DEAL_CUH

#include "turned.cuh"

namespace convgen {

// Channels of a group, of the tensor with fewer, times taps: what packs are weighed against.
template <typename Conv>
int64_t least_products(const ConvgenCall& call) {
  const int64_t coarse = call.coarse_channels, fine = call.fine_channels;
  return (coarse < fine ? coarse : fine) / Conv::GROUPS * Conv::TAPS;
}

// What the kernels that read contiguous tensors as they lie are expected to take for a wgrad. With
// few positions they are slow: of 16-bit layers of stride 1, an H200 made 430 products per clock
// and multiprocessor with 100352 positions, 85 with 6272, and 20 or less with 1568 and fewer.
template <typename T, typename Conv>
double other_wgrad_ms(const ConvgenCall& call, int multiprocessors) {
  constexpr double POSITIONS = 20000, MOST = 25;
  const int64_t* const e = call.coarse_extent;
  const double slower = 1 + POSITIONS / (double(call.batch) * e[0] * e[1] * e[2] + 1);
  const double ms = other_ms<T, Conv>(call, multiprocessors) * (slower < MOST ? slower : MOST);
  const double few = call.channels_last ? transposed_ms<T, Conv>(call, multiprocessors) : 0;
  return ms > few ? ms : few;
}

struct Deal {
  int ctas;
  double clocks;  // of the products and of the partial sums
  bool whole;     // whether each CTA has all of its pairs' units, and no sums are partial
};

// Pairs whose CTAs do not begin with them meet the same positions at different times, and what
// level 2 does not keep is read from memory again: about so much longer it takes.
constexpr double UNALIGNED_CLOCKS = 1.1;

// The quickest: either all multiprocessors have the same number of units, and a pair's sums are
// those of several CTAs, which have parts of two pairs; or each pair has CTAs of its own, which
// leaves fewer sums to be written and read again; or, where a kernel can store results, in
// `store_clocks` for a pair, each CTA has pairs of its own, and no other kernel adds anything up.
inline Deal deal_units(int64_t pairs, int64_t positions, double unit_clocks, double partial_bytes,
                       int multiprocessors, double store_clocks = -1) {
  const int64_t units = pairs * positions;
  Deal best = {0, 1e30, false};
  if (units == 0) return best;
  double added = LAUNCH_CLOCKS;
  if (store_clocks >= 0) {
    const int64_t ctas = pairs < multiprocessors ? pairs : multiprocessors;
    const double clocks = ceil_div(pairs, ctas) * (positions * unit_clocks + store_clocks);
    best = {static_cast<int>(ctas), clocks, true};
    added += pairs * store_clocks / multiprocessors;
  }
  const auto consider = [&](int64_t ctas, int64_t partials, double longer) {
    const double clocks =
        longer * ceil_div(units, ctas) * unit_clocks + added +
        2 * partials * partial_bytes / (LEVEL2_BYTES_PER_CLOCK / 2 * multiprocessors);
    if (clocks < best.clocks) best = {static_cast<int>(ctas), clocks, false};
  };
  const int64_t all = units < multiprocessors ? units : multiprocessors;
  consider(all, all + pairs, UNALIGNED_CLOCKS);
  for (int64_t own = 1; own <= positions && own * pairs <= multiprocessors; ++own) {
    consider(own * pairs, own * pairs, 1);
  }
  return best;
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_DEAL_CUH
