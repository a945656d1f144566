// Results of the mma engine's gathers: by way of a warp's scratch in shared memory they leave as
// they lie in memory, neighbours side by side.
#pragma once

#include "fragments.cuh"

namespace convgen {

// Words of a warp's scratch: 8 channels of the outputs of 16 positions. The pitch lets the lanes of
// a fragment write different banks.
template <int VARIANTS>
constexpr int OUTPUT_PITCH = MMA_ROWS * VARIANTS + 4;
template <int VARIANTS>
constexpr int OUTPUT_WORDS = MMA_COLUMNS * OUTPUT_PITCH<VARIANTS>;
constexpr int OUTPUT_BATCH = 2;  // products whose outputs are in a warp's scratch at once

// Writes one product's sums of every variant into a warp's scratch, [channel][position][variant].
// PAIRED: a lane's two rows are neighbouring positions.
template <int VARIANTS, bool PAIRED>
__device__ __forceinline__ void spread_outputs(float* scratch, int lane,
                                               const float (&value)[VARIANTS][4]) {
  struct alignas(sizeof(float) * (VARIANTS == 2 || VARIANTS == 4 ? VARIANTS : 1)) Wide {
    float element[VARIANTS];
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wide wide;
#pragma unroll
    for (int v = 0; v < VARIANTS; ++v) wide.element[v] = value[v][i];
    const int position = PAIRED ? lane / 4 * 2 + i / 2 : lane / 4 + i / 2 * 8;
    float* const to = scratch + (lane % 4 * 2 + i % 2) * OUTPUT_PITCH<VARIANTS> +
                      position * VARIANTS;
    *reinterpret_cast<Wide*>(to) = wide;
  }
}

// How the lanes of a warp store 8 channels of a run of 16 positions: WIDTH neighbouring outputs at
// once, lanes side by side along a channel as far as it goes.
template <int VARIANTS, int WIDTH>
struct Storing {
  static constexpr int ACCESSES = MMA_ROWS * VARIANTS / WIDTH;  // of one channel
  // Lanes that a channel gets, whole positions; accesses of each, channels at a time.
  static constexpr int LANES = ACCESSES <= WARP ? ACCESSES : WARP / VARIANTS / 4 * 4 * VARIANTS;
  static constexpr int TURNS = ACCESSES / LANES;
  static constexpr int CHANNELS = ACCESSES <= WARP ? WARP / ACCESSES : 1;
  static_assert(ACCESSES % LANES == 0 && MMA_COLUMNS % CHANNELS == 0, "no partial accesses");

  // Of a lane: its first channel, and its outputs in a turn, counted along the run.
  __device__ static __forceinline__ int channel(int lane) { return lane / LANES; }
  __device__ static __forceinline__ int output(int lane, int turn) {
    return (lane % LANES + turn * LANES) * WIDTH;
  }
  __device__ static __forceinline__ bool active(int lane) { return lane < LANES * CHANNELS; }
};

// Adds every channel's bias to its sums. `first_out` is the first channel of the sums.
template <int VARIANTS, int ROWS, int BLOCKS_N, typename T>
__device__ __forceinline__ void add_bias(float (&acc)[VARIANTS][ROWS][BLOCKS_N][4], const T* bias,
                                         int first_out, int out_channels, int lane) {
#pragma unroll
  for (int n = 0; n < BLOCKS_N; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int out = first_out + n * MMA_COLUMNS + lane % 4 * 2 + c;
      const float offset = out < out_channels ? widen(bias[out]) : 0.0f;
#pragma unroll
      for (int v = 0; v < VARIANTS; ++v) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
          acc[v][m][n][c] += offset;
          acc[v][m][n][c + 2] += offset;
        }
      }
    }
  }
}

// WIDTH neighbouring outputs, as they are stored.
template <int WIDTH, typename T>
struct alignas(WIDTH * sizeof(T)) Run {
  T element[WIDTH];

  __device__ __forceinline__ void load(const float* from) {
    struct alignas(WIDTH * sizeof(float)) Wide {
      float element[WIDTH];
    };
    const Wide wide = *reinterpret_cast<const Wide*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) narrow(element[i], wide.element[i]);
  }
};

// ---- Outputs of 16 bits in lines that are not aligned -----------------------------------------
//
// Words of two outputs begin at even elements of memory: of one line and channel at every other
// output from the first, of the next from the second. Channels that are an even number apart agree.
// An output at an end of its line, or of the run, may have no neighbour to leave with.

// A warp's scratch holds 8 channels of a run as [variant][position][pair of channels], words of two
// channels: the lanes of a fragment have such, and write different banks. Rows of it, of several
// pairs, are read at once; a word to store is made of the same halves of two.
constexpr int CHANNEL_PAIRS = MMA_COLUMNS / 2;
constexpr int PAIR_BATCH = 2 * OUTPUT_BATCH;  // products that are there at once
template <int VARIANTS>
constexpr int PAIR_WORDS = MMA_ROWS * VARIANTS * CHANNEL_PAIRS + 4;

template <class Math, int VARIANTS, bool PAIRED, typename T>
__device__ __forceinline__ void spread_pairs(uint32_t* scratch, int lane,
                                             const float (&value)[VARIANTS][4]) {
  static_assert(PAIR_BATCH * PAIR_WORDS<VARIANTS> <= OUTPUT_BATCH * OUTPUT_WORDS<VARIANTS>);
#pragma unroll
  for (int i = 0; i < 2 * VARIANTS; ++i) {
    const int v = i / 2, half = i % 2;
    const int position = PAIRED ? lane / 4 * 2 + half : lane / 4 + half * 8;
    T low, high;
    narrow(low, value[v][2 * half]), narrow(high, value[v][2 * half + 1]);
    scratch[(v * MMA_ROWS + position) * CHANNEL_PAIRS + lane % 4] = Math::pack(0, low, high);
  }
}

// How the lanes of a warp store 8 channels of a run by words: LANES of them side by side along a
// channel. In each turn a lane has two outputs, 2 w and 2 w + 1, and stores the word that begins at
// one of them, if any does: of PAIRS pairs of channels the even one's, or the odd one's.
template <int VARIANTS>
struct StoringWords {
  static constexpr int WORDS = MMA_ROWS * VARIANTS / 2;  // of one channel
  static constexpr int LANES = VARIANTS % 2 ? 8 : 16;
  static constexpr int TURNS = WORDS / LANES;
  static constexpr int PAIRS = CHANNEL_PAIRS * 2 * LANES / WARP;
  static_assert(WORDS % LANES == 0, "all lanes store");

  // Unsigned, so that divisions are shifts.
  __device__ static __forceinline__ unsigned word(unsigned lane, unsigned turn) {
    return lane % LANES + turn * LANES;
  }
  __device__ static __forceinline__ unsigned first_pair(unsigned lane) {
    return lane / LANES / 2 * PAIRS;
  }
  __device__ static __forceinline__ unsigned parity(unsigned lane) { return lane / LANES % 2; }
  // Of output 2 w + i.
  __device__ static __forceinline__ unsigned variant(unsigned w, unsigned i) {
    return VARIANTS % 2 ? (2 * w + i) % VARIANTS : 2 * w % VARIANTS + i;
  }
  __device__ static __forceinline__ unsigned position(unsigned w, unsigned i) {
    return VARIANTS % 2 ? (2 * w + i) / VARIANTS : w / (VARIANTS / 2);
  }
  // Where its pairs of channels lie in the scratch.
  __device__ static __forceinline__ unsigned place(unsigned w, unsigned i) {
    return (variant(w, i) * MMA_ROWS + position(w, i)) * CHANNEL_PAIRS;
  }
};

// One output of a run.
struct RunOutput {
  bool inside;              // it exists
  bool follows, continues;  // the output before it, or after it, is its neighbour in memory
};

// What becomes of a lane's two outputs: a word begins at one of them, or they leave alone.
constexpr unsigned WORD_FIRST = 1, WORD_SECOND = 2, ALONE_FIRST = 4, ALONE_SECOND = 8;
constexpr int FATE_BITS = 4;

// It for each alignment of theirs, which planes and channels differ in: the first at an even
// element and the second at an odd one, the reverse, and, of outputs that need not be neighbours,
// both at even ones and both at odd ones.
template <int VARIANTS>
__device__ __forceinline__ unsigned find_fates(const RunOutput (&output)[2], unsigned w) {
  unsigned fates = 0;
#pragma unroll
  for (int alignment = 0; alignment < (VARIANTS % 2 ? 4 : 2); ++alignment) {
    const bool odd[2] = {alignment % 2 != 0, alignment == 0 || alignment == 3};
    const bool first = output[0].inside && output[0].continues && !odd[0];
    const bool second = output[1].inside && output[1].continues && !odd[1] &&
                        w + 1 < StoringWords<VARIANTS>::WORDS;
    const bool taken = output[0].follows && odd[0] && w > 0;  // by the word before
    unsigned fate = first ? WORD_FIRST : second ? WORD_SECOND : 0;
    if (output[0].inside && !first && !taken) fate |= ALONE_FIRST;
    if (output[1].inside && !first && !second) fate |= ALONE_SECOND;
    fates |= fate << (alignment * FATE_BITS);
  }
  return fates;
}

// The bits of the alignment that the two have.
template <int VARIANTS, typename T>
__device__ __forceinline__ unsigned choose_fate(unsigned fates, const T* first, const T* second) {
  auto is_odd = [](const T* at) { return reinterpret_cast<uintptr_t>(at) / sizeof(T) % 2; };
  unsigned alignment = is_odd(first);
  if constexpr (VARIANTS % 2) {
    if (alignment == is_odd(second)) alignment += 2;
  }
  return fates >> (alignment * FATE_BITS);
}

// Of one output COUNT pairs of channels, from the scratch.
template <int COUNT>
struct alignas(COUNT * sizeof(uint32_t)) RunPairs {
  uint32_t pair[COUNT];
};

// Stores outputs that leave alone, one after the other: each lane that of its channel of the batch.
template <int VARIANTS, typename T>
__device__ __forceinline__ void store_alone(T* channel, bool exists, const uint32_t* scratch,
                                            unsigned lane, int turn, unsigned fate,
                                            int first_offset, int second_offset) {
  using Lanes = StoringWords<VARIANTS>;
  static_assert(PAIR_BATCH * MMA_COLUMNS == WARP && sizeof(T) == 2);
  constexpr unsigned EACH = (1u << Lanes::LANES) - 1;
  // Of the first LANES lanes, which have channels of the one parity; then of those of the other.
  const unsigned first = __ballot_sync(0xffffffffu, fate & ALONE_FIRST);
  const unsigned second = __ballot_sync(0xffffffffu, fate & ALONE_SECOND);
  auto either = [](unsigned votes) { return (votes | votes >> Lanes::LANES) & EACH; };
  const unsigned own = exists ? lane : 0;
  const T* const from_own =
      reinterpret_cast<const T*>(scratch + own / MMA_COLUMNS * PAIR_WORDS<VARIANTS> +
                                 own % MMA_COLUMNS / 2) +
      own % 2;
  const unsigned shift = lane % 2 * Lanes::LANES;
  const unsigned own_first = exists ? first >> shift : 0, own_second = exists ? second >> shift : 0;
  T* const to = opaque(channel);
  for (unsigned left = either(first) | either(second) << Lanes::LANES; left != 0;
       left &= left - 1) {
    const unsigned item = __ffs(static_cast<int>(left)) - 1, from = item % Lanes::LANES;
    const bool is_second = item >= Lanes::LANES;
    const int offset = __shfl_sync(0xffffffffu, is_second ? second_offset : first_offset, from);
    const unsigned w = Lanes::word(from, turn);
    const T value = from_own[2 * (is_second ? Lanes::place(w, 1) : Lanes::place(w, 0))];
    if ((is_second ? own_second : own_first) >> from & 1) to[offset] = value;
  }
}

}  // namespace convgen
