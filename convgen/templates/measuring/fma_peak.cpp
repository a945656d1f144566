// What a processor multiplies and adds at most: chains of fused operations in vector registers, as
// many side by side as its units and their latency need, on every thread.
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, CHAINS = 24;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, CHAINS = 12;  // of 16 registers
#else
constexpr int VECTOR_BYTES = 16, CHAINS = 24;
#endif

// Takes `steps` in every chain, and returns how many operations that was.
template <class Real>
int64_t multiply_and_add(int threads, int64_t steps, Real* sink) {
  typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
  constexpr int LANES = VECTOR_BYTES / sizeof(Real);
#pragma omp parallel num_threads(threads)
  {
    // Each chain converges to a number that is neither 0 nor denormal.
    Vector sums[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; ++lane) {
      factor[lane] = Real(0.5);
      term[lane] = Real(1 + lane);
    }
#pragma GCC unroll 24
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = term * Real(chain);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = sums[chain] * factor + term;
    }
    Vector total = term;
#pragma GCC unroll 24
    for (int chain = 0; chain < CHAINS; ++chain) total += sums[chain];
    // Nobody reads it, but the compiler cannot know.
#pragma omp critical
    for (int lane = 0; lane < LANES; ++lane) *sink += total[lane];
  }
  return int64_t(threads) * steps * CHAINS * LANES * 2;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t convgen_fma_f32(int threads,
                                                                          int64_t steps,
                                                                          float* sink) {
  return multiply_and_add(threads, steps, sink);
}

extern "C" __attribute__((visibility("default"))) int64_t convgen_fma_f64(int threads,
                                                                          int64_t steps,
                                                                          double* sink) {
  return multiply_and_add(threads, steps, sink);
}
