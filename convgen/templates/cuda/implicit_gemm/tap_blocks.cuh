// What CTAs of the weight's gradient a tap at a time compute, and where: see wgrad_taps.cuh.
#ifndef CONVGEN_IMPLICIT_GEMM_TAP_BLOCKS_CUH
#define CONVGEN_IMPLICIT_GEMM_TAP_BLOCKS_CUH

#include "wgrad.cuh"

namespace convgen {

constexpr int TAP_ROWS = CONSUMERS * BLOCK_M;  // coarse channels of a CTA

// How a call is dealt out.
struct TapWgradTiling : DealtUnits {
  int tiles_w, tiles_h, tiles_d, tiles_n;      // K blocks of a pair
  int step_w, step_h, step_d, step_n;          // positions from one to the next
  int rows;                                    // positions of one
  int last_w, last_h;                          // where the last ones begin
  bool coarse_last, fine_last;                 // what arrives as rows of channels
  int coarse_rows, fine_rows;                  // and, of rows of positions, how many
  int groups, coarse_channels, fine_channels;  // of a group
  int coarse_blocks;                           // of a group's channels
  int fine_chunks;                             // of them and a tap
  int column_blocks;                           // of all taps' chunks
  bool taps_first;  // whether all taps of a chunk of fine channels precede the next chunk
  bool is_whole;    // whether a CTA has all K blocks of a pair: it stores the result
  int stages;
};

constexpr int CHUNK_COLUMNS = 64;

// What one pair is: its first coarse channel, of a group, and its first chunk of columns.
template <int COLUMNS>
struct TapPair {
  int group, coarse, chunk;

  __device__ __forceinline__ TapPair(const TapWgradTiling& t, int index) {
    chunk = index % t.column_blocks * (COLUMNS / CHUNK_COLUMNS), index /= t.column_blocks;
    coarse = index % t.coarse_blocks * TAP_ROWS, group = index / t.coarse_blocks;
  }
  template <int TAPS>
  __device__ __forceinline__ int tap(const TapWgradTiling& t, int i) const {
    return t.taps_first ? (chunk + i) % TAPS : (chunk + i) / t.fine_chunks;
  }
  template <int TAPS>
  __device__ __forceinline__ int fine(const TapWgradTiling& t, int i) const {
    return (t.taps_first ? (chunk + i) / TAPS : (chunk + i) % t.fine_chunks) * CHUNK_COLUMNS;
  }
};

// A stage: TAP_ROWS rows of 128 bytes for coarse, then COLUMNS for fine; MN-major, chunks of 64
// rows of K for each 64 channels.
template <int COLUMNS>
constexpr int TAP_STAGE_BYTES = (TAP_ROWS + COLUMNS) * ROW_BYTES;
template <int COLUMNS>
constexpr int TAP_PARTIALS = TAP_ROWS * COLUMNS;  // of a CTA and pair
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_BYTES = CHUNK_ROWS * ROW_BYTES;

struct TapWgradStorage {
  uint64_t full[MOST_STAGES], rounded[MOST_STAGES], empty[MOST_STAGES];
};

// Where a K block lies, in tiles along each axis. One after the other is found by counting: a
// thread that divides for each block takes longer than its products.
struct TapBlock {
  int w, h, d, n;

  __device__ __forceinline__ TapBlock(const TapWgradTiling& t, int index) {
    w = index % t.tiles_w, index /= t.tiles_w;
    h = index % t.tiles_h, index /= t.tiles_h;
    d = index % t.tiles_d, n = index / t.tiles_d;
  }
  __device__ __forceinline__ void advance(const TapWgradTiling& t) {
    if (++w < t.tiles_w) return;
    w = 0;
    if (++h < t.tiles_h) return;
    h = 0;
    if (++d < t.tiles_d) return;
    d = 0, ++n;
  }
};

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_TAP_BLOCKS_CUH
