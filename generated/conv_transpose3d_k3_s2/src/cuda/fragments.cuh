// Fragments of the mma engine's gathers: positions are the rows of the tensor core's products,
// output channels their columns, input words their depth.
#pragma once

#include "gather.cuh"
#include "math.cuh"
#include "pipeline.cuh"
#include "releases.cuh"

namespace convgen {

constexpr int MMA_ROWS = 16, MMA_COLUMNS = 8, MMA_WORDS = 8;

// Whether four warps multiply together. With few output channels mma.sync is faster: a group of
// warps takes 64 positions at a time, whatever the columns.
constexpr int WARPGROUP_LEAST_CHANNELS = 24;
template <int CHANNELS>
constexpr bool BY_WARPGROUPS = HAS_WGMMA && CHANNELS >= WARPGROUP_LEAST_CHANNELS;

// A block's first warps multiply, its last ones stage: copies and their address arithmetic cost the
// tensor cores nothing. 12 warps leave a thread 168 registers. Where warps can trade registers
// (sm_90a), or 128 suffice for few products (of 16 x 8 sums, PRODUCTS rows and phases of them for
// each 8 channels), there are 16. Producers are then two warpgroups, which take turns, so that one
// issues copies while the other's are on their way; or one beside three WARPGROUPS of consumers,
// instead of two: while one of them waits, for fragments or products, two multiply.
constexpr int LONE_CONSUMER_WARPS = 8;  // which multiply each for itself
constexpr int PRODUCER_WARPS = 4;       // of a producer warpgroup
constexpr int MOST_WARPS = 16, FEW_PRODUCTS = 8;
template <int CHANNELS, int WARPGROUPS>
constexpr int CONSUMER_WARPS = BY_WARPGROUPS<CHANNELS> ? 4 * WARPGROUPS : LONE_CONSUMER_WARPS;
template <int CHANNELS, int WARPGROUPS, int PRODUCTS>
constexpr int PRODUCER_WARPGROUPS =
    BY_WARPGROUPS<CHANNELS> || (HAS_WGMMA && PRODUCTS * CHANNELS / MMA_COLUMNS <= FEW_PRODUCTS)
        ? (MOST_WARPS - CONSUMER_WARPS<CHANNELS, WARPGROUPS>) / PRODUCER_WARPS
        : 1;
template <int CHANNELS, int WARPGROUPS, int PRODUCTS>
constexpr int BLOCK_THREADS =
    (CONSUMER_WARPS<CHANNELS, WARPGROUPS> +
     PRODUCER_WARPGROUPS<CHANNELS, WARPGROUPS, PRODUCTS> * PRODUCER_WARPS) *
    WARP;
// What threads keep where warpgroups multiply; 16 warps have 128 for each thread.
template <int WARPGROUPS>
constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 184 : 152;
template <int WARPGROUPS>
constexpr int PRODUCER_REGISTERS =
    (4 * 128 - WARPGROUPS * CONSUMER_REGISTERS<WARPGROUPS>) / (4 - WARPGROUPS);

// Warps whose products are issued together. Those of a group have the same output channels.
template <int CHANNELS>
constexpr int WARPGROUP_WARPS = BY_WARPGROUPS<CHANNELS> ? 4 : 1;

// The constants above depend on the architecture. The host finds those of the code that a device
// runs by its launch bounds.
struct Roles {
  int warpgroup_warps;   // of warps that multiply together
  int warpgroups;        // of them, at most
  int max_warpgroups_c;  // with different output channels
  int producers;         // warpgroups of them

  int consumer_warps() const { return warpgroups * warpgroup_warps; }
};

inline Roles roles_of(int launch_bound, int channels, int warpgroups) {
  const bool most = launch_bound >= MOST_WARPS * WARP;
  // Three warpgroups cannot be shared out among two blocks of channels.
  if (most && channels >= WARPGROUP_LEAST_CHANNELS) {
    return {4, warpgroups, warpgroups == 2 ? 2 : 1, MOST_WARPS / PRODUCER_WARPS - warpgroups};
  }
  return {1, LONE_CONSUMER_WARPS, 6,
          most ? (MOST_WARPS - LONE_CONSUMER_WARPS) / PRODUCER_WARPS : 1};
}

// Named barriers of the buffers: a producer warpgroup arrives at FULL, consumers at EMPTY. A buffer
// always belongs to the same producers. These meet at COPIED, of which each warpgroup has its own.
constexpr int MOST_STAGES = 4;
constexpr int BARRIER_FULL = 1, BARRIER_EMPTY = BARRIER_FULL + MOST_STAGES;
constexpr int BARRIER_COPIED = BARRIER_EMPTY + MOST_STAGES;

// Weights are staged by bulk copies, which write 128 bytes of shared memory at a time, where copies
// of 16 bytes take 2.5 times as long, and a thread for each.
constexpr bool BULK_COPIES = HAS_WGMMA;
constexpr int LANDED_WORDS = 2 * MOST_STAGES;  // of shared memory: an mbarrier for each buffer

// Producers: tells the consumers that a buffer is full, once all of this thread's copies but the
// PENDING newest batches have landed. `fills` is as in release_buffer.
template <int CHANNELS, int PENDING>
__device__ __forceinline__ void announce_full(uint32_t* fills, int buffer, int threads) {
  copy_wait<PENDING>();
  if constexpr (BY_WARPGROUPS<CHANNELS>) bulk_fence();  // wgmma reads by the way of bulk copies
  release_buffer<BARRIER_FULL>(fills, buffer, threads);
}

// Words of packed weights for one slot and MMA_WORDS input words.
template <class Math, int CHANNELS>
constexpr int SLOT_WORDS = CHANNELS / MMA_COLUMNS * WARP * Math::PACKED;

// The tile that this block takes in its turn. Neighbouring tiles differ in phase, and phases in
// work: each turn deals the tiles one block further, so that every block gets some of each.
__device__ __forceinline__ int tile_of_turn(int turn) {
  const int blocks = gridDim.x;
  return turn * blocks + (static_cast<int>(blockIdx.x) + turn) % blocks;
}

// A word of the input from the staged tile: as it lies there, or if the tile holds channels apart,
// this one's and that of the `next` element.
template <class Math, typename Staged>
__device__ __forceinline__ typename Math::Input load_word(const Staged* at, int next) {
  if constexpr (sizeof(Staged) == sizeof(typename Math::Input)) {
    return *at;
  } else {
    return __byte_perm(at[0], at[next], 0x5410);
  }
}

// x[j] = the fragment of row j of a column, for the set bits j of USED. `at` are the offsets of
// this lane's two positions, `quarter` is four input words further; `next` as above.
template <class Math, uint64_t USED, int COUNT, typename Staged>
__device__ __forceinline__ void load_fragments(typename Math::A (&x)[COUNT], const Staged* column,
                                               const int (&at)[2], int pitch, int quarter,
                                               int next = 0) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int offset = at[i % 2] + i / 2 * quarter + j * pitch;
        Math::set(x[j], i, load_word<Math>(column + offset, next));
      }
    }
  }
}

// The same where a lane's two positions are neighbours: two neighbouring columns of a line at once,
// from an even offset. `pitch` and `quarter` are even.
template <class Math, uint64_t USED, int COUNT>
__device__ __forceinline__ void load_pairs(typename Math::A (&x)[COUNT],
                                           const typename Math::Input* from, int pitch,
                                           int quarter) {
  struct alignas(2 * sizeof(typename Math::Input)) Pair {
    typename Math::Input word[2];
  };
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pair pair = *reinterpret_cast<const Pair*>(from + (half * quarter + j * pitch));
        Math::set(x[j], 2 * half, pair.word[0]);
        Math::set(x[j], 2 * half + 1, pair.word[1]);
      }
    }
  }
}

// And of the columns between those of two pairs.
template <class Math, uint64_t USED, bool SETTLE, int COUNT>
__device__ __forceinline__ void join_pairs(typename Math::A (&x)[COUNT],
                                           const typename Math::A (&left)[COUNT],
                                           const typename Math::A (&right)[COUNT]) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Math::copy(x[j], 2 * half, left[j], 2 * half + 1);
        Math::copy(x[j], 2 * half + 1, right[j], 2 * half);
      }
      // Operands first: between products there is no place for what makes them.
      if constexpr (SETTLE) Math::settle(x[j]);
    }
  }
}

// x[m] = the fragment of this warp's m-th positions, where they are scattered over the plane.
template <class Math, int COUNT, typename Staged>
__device__ __forceinline__ void load_scattered_fragments(typename Math::A (&x)[COUNT],
                                                         const Staged* column,
                                                         const int (&at)[COUNT][2], int quarter,
                                                         int next = 0) {
#pragma unroll
  for (int m = 0; m < COUNT; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = at[m][i % 2] + i / 2 * quarter;
      Math::set(x[m], i, load_word<Math>(column + offset, next));
    }
  }
}

// Where a warp's products find packed weights.
template <class Math, int CHANNELS>
using Weights =
    std::conditional_t<BY_WARPGROUPS<CHANNELS>, SharedColumns<Math::PACKED / 2>, const uint32_t*>;

template <class Math, int CHANNELS>
__device__ __forceinline__ Weights<Math, CHANNELS> find_weights(const uint32_t* staged, int lane) {
  if constexpr (BY_WARPGROUPS<CHANNELS>) {
    return Weights<Math, CHANNELS>(staged);
  } else {
    return staged + lane * Math::PACKED;
  }
}

// An offset within the staged tile that all lanes share. Warps that multiply each for themselves
// find it anew at each use: beside their sums they cannot keep a hundred of them. Warpgroups
// leave all of it to the compiler, which has addresses of several registers and a constant.
template <int CHANNELS>
__device__ __forceinline__ int tile_offset(int offset) {
  return BY_WARPGROUPS<CHANNELS> ? offset : opaque(offset);
}

// One tap: acc[m][n] += x[FIRST + m * STEP] * weight[n], 16 positions x 8 channels each.
template <class Math, int FIRST, int STEP, int ROWS, int BLOCKS_N, int COUNT>
__device__ __forceinline__ void multiply_tap(float (&acc)[ROWS][BLOCKS_N][4],
                                             const typename Math::A (&x)[COUNT],
                                             Weights<Math, BLOCKS_N * MMA_COLUMNS> weight) {
  if constexpr (BY_WARPGROUPS<BLOCKS_N * MMA_COLUMNS>) {
#pragma unroll
    for (int m = 0; m < ROWS; ++m) Math::multiply_group(acc[m], x[FIRST + m * STEP], weight);
  } else {
#pragma unroll
    for (int n = 0; n < BLOCKS_N; ++n) {
      typename Math::B b;
      Math::load(b, weight + n * WARP * Math::PACKED);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) Math::multiply(acc[m][n], x[FIRST + m * STEP], b);
    }
  }
}

// Whether a column of COUNT fragments leaves no registers for a second one beside the sums of so
// many products, where columns of two residues come again: a fragment takes four in each of the two
// columns, and as many for its addresses in each residue. With more than this ptxas spills.
template <int PRODUCTS, int COUNT>
constexpr bool FILLS_REGISTERS = 4 * PRODUCTS + 16 * COUNT > CONSUMER_REGISTERS<2> - 12;

// Around the taps of one column, whose fragments have been loaded. Where registers hold the
// fragments of two columns, a column's products go on while the next fragments are loaded, and
// those of the column before it end here. They hold only one in 3xTF32 (PROMOTES), of 16-bit
// channels beside the sums of several phases, and of the third part of three warpgroups, whose
// products go on while the other two load; or because a column fills them (ALONE). After the last
// column before a loop goes round (ALONE, too) all products have ended: ptxas keeps the registers
// that they read only as far as there is no branch, and gives them to the next column's fragments
// beyond it.
template <int CHANNELS>
__device__ __forceinline__ void begin_column() {
  if constexpr (BY_WARPGROUPS<CHANNELS>) wgmma_begin();
}

template <class Math, int CHANNELS, int WARPGROUPS, int VARIANTS, bool ALONE>
__device__ __forceinline__ void end_column() {
  if constexpr (BY_WARPGROUPS<CHANNELS>) {
    constexpr bool ONE =
        ALONE || Math::PROMOTES || WARPGROUPS > 2 || (Math::CHANNELS > 1 && VARIANTS > 1);
    wgmma_commit();
    wgmma_wait<ONE ? 0 : 1>();
  }
}

// Keeps what reads or writes sums on its side of this place.
template <int VARIANTS, int ROWS, int BLOCKS_N>
__device__ __forceinline__ void settle(float (&acc)[VARIANTS][ROWS][BLOCKS_N][4]) {
  if constexpr (BY_WARPGROUPS<BLOCKS_N * MMA_COLUMNS>) {
#pragma unroll
    for (int i = 0; i < VARIANTS * ROWS * BLOCKS_N * 4; ++i) {
      const int n = i / 4 % BLOCKS_N;
      const int m = i / 4 / BLOCKS_N % ROWS, v = i / 4 / BLOCKS_N / ROWS;
      wgmma_settle(acc[v][m][n][i % 4]);
    }
  }
}

// Until all products have ended: sums may be read, and what they read of shared memory replaced.
template <int VARIANTS, int ROWS, int BLOCKS_N>
__device__ __forceinline__ void end_products(float (&acc)[VARIANTS][ROWS][BLOCKS_N][4]) {
  if constexpr (BY_WARPGROUPS<BLOCKS_N * MMA_COLUMNS>) wgmma_wait<0>();
  settle(acc);
}

// ---- Words of neighbours ------------------------------------------------------------------
//
// From vectors lanes load words of two 16-bit inputs as they lie in memory (math.cuh). Which half
// of its word a line begins in follows from the tensor's address and extents: strides are even, so
// that it is the same for all positions, and differs between channels and taps alone. The weights
// are packed accordingly, once for tensors whose first line begins in a low half, and once for the
// others (a batch's samples and groups may be either); products have channels that are alike.

constexpr int WORD_SETS = 2;  // of packed weights

// Of a call: whether lines of neighbouring channels, planes along R and lines along Y begin in
// different halves; and the order of channels, see block8_channel.
struct WordOrder {
  int odd_channel, odd_r, odd_y;  // 0 or 1
  int lane_channels, half_channels;

  WordOrder() = default;
  explicit WordOrder(const GatherShape& s)
      : odd_channel(s.in_channel_stride & 1),
        odd_r(s.r.input_stride & 1),
        odd_y(s.y.input_stride & 1),
        lane_channels(s.lane_channels),
        half_channels(s.half_channels) {}

  // The channel of a product's word.
  __device__ __forceinline__ int channel(int product, int word) const {
    return block8_channel(lane_channels, product) + word % 4 * lane_channels +
           word / 4 * half_channels;
  }
};

// Where lanes find words: a tile, and one of its elements.
struct WordTile {
  const uint32_t* words;
  int element;

  __device__ __forceinline__ WordTile operator+(int elements) const {
    return {words, element + elements};
  }
  // The word that holds an element so much further.
  __device__ __forceinline__ const unsigned char* find(int elements) const {
    return reinterpret_cast<const unsigned char*>(words) + ((element + elements) * 2 & -4);
  }
};

// As load_fragments, of several words of a line. Offsets of positions and `half`, of half the
// channels, are in bytes, `pitch` in elements.
template <class Math, uint64_t USED, int... WORDS, int COUNT>
__device__ __forceinline__ void load_words(typename Math::A (&x)[sizeof...(WORDS)][COUNT],
                                           const WordTile& line, const int (&at)[2], int pitch,
                                           int half) {
  constexpr int WORD[] = {WORDS...};
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if ((USED >> j) & 1) {
      const unsigned char* const from = line.find(j * pitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto* const first =
            reinterpret_cast<const uint32_t*>(from + (at[i % 2] + i / 2 * half));
#pragma unroll
        for (int w = 0; w < sizeof...(WORDS); ++w) Math::set(x[w][j], i, first[WORD[w]]);
      }
    }
  }
}

// As load_scattered_fragments.
template <class Math, int... WORDS, int COUNT>
__device__ __forceinline__ void load_scattered_words(typename Math::A (&x)[sizeof...(WORDS)][COUNT],
                                                     const WordTile& line,
                                                     const int (&at)[COUNT][2], int half) {
  constexpr int WORD[] = {WORDS...};
  const unsigned char* const from = line.find(0);
#pragma unroll
  for (int m = 0; m < COUNT; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* const first =
          reinterpret_cast<const uint32_t*>(from + (at[m][i % 2] + i / 2 * half));
#pragma unroll
      for (int w = 0; w < sizeof...(WORDS); ++w) Math::set(x[w][m], i, first[WORD[w]]);
    }
  }
}

// Whose weight a value of a packed word is: an input channel's and a kernel element's, -1 for none.
struct PackedValue {
  int channel, tap;
};

// Weights (coarse, fine / groups, taps) -> [group][block of CHANNELS outputs][region]
// [8 input words][slot of the region][8 outputs][lane][Math::PACKED], the words that the lanes of a
// product hold (wgmma: [Math::PACKED][lane], see SharedColumns); zero beyond the channels. Regions
// and slots as in pack_weight. value_of(slot, step, word, i) is whose weight the i-th value is of a
// word of a product.
template <class Math, int CHANNELS, bool OUTPUT_IS_COARSE, typename T, typename ValueOf>
__device__ __forceinline__ void pack_fragments(uint32_t* packed, const T* weight,
                                               const int* region_first, int regions, int taps,
                                               int slots, int steps, int in_channels,
                                               int out_channels, int64_t index,
                                               ValueOf&& value_of) {
  const int blocks = (out_channels + CHANNELS - 1) / CHANNELS;
  const int64_t slot_elements = int64_t{steps} * SLOT_WORDS<Math, CHANNELS>;
  // `index` counts packed words: undo the layout from the outside in.
  const int64_t outer = index / (slots * slot_elements);
  int64_t rest = index % (slots * slot_elements);
  const int group = static_cast<int>(outer / blocks);
  const int block = static_cast<int>(outer % blocks);
  const int region = find_region(region_first, regions, slot_elements, rest);
  rest -= region_first[region] * slot_elements;
  const int region_slots = region_first[region + 1] - region_first[region];
  // mma.sync: a lane's words are adjacent. wgmma: those of a part of the word are.
  constexpr bool TOGETHER = BY_WARPGROUPS<CHANNELS>;
  const int lane = static_cast<int>(TOGETHER ? rest % WARP : rest / Math::PACKED % WARP);
  const int i = static_cast<int>(TOGETHER ? rest / WARP % Math::PACKED : rest % Math::PACKED);
  rest /= WARP * Math::PACKED;
  const int n = static_cast<int>(rest % (CHANNELS / MMA_COLUMNS));
  rest /= CHANNELS / MMA_COLUMNS;
  const int slot = region_first[region] + static_cast<int>(rest % region_slots);
  const int step = static_cast<int>(rest / region_slots);
  const int word = lane % 4 + 4 * (i % 2);
  const int out = block * CHANNELS + n * MMA_COLUMNS + lane / 4;
  T value[2] = {};
#pragma unroll
  for (int c = 0; c < Math::VALUES; ++c) {
    const auto [in, tap] = value_of(slot, step, word, c);
    if (out < out_channels && in < in_channels && tap >= 0) {
      const int64_t coarse = int64_t{group} * (OUTPUT_IS_COARSE ? out_channels : in_channels) +
                             (OUTPUT_IS_COARSE ? out : in);
      const int64_t fine = OUTPUT_IS_COARSE ? in : out;
      const int64_t fine_channels = OUTPUT_IS_COARSE ? in_channels : out_channels;
      value[c] = weight[(coarse * fine_channels + fine) * taps + tap];
    }
  }
  packed[index] = Math::pack(i, value[0], value[1]);
}

}  // namespace convgen
