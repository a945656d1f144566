// How the producers of the mma engine's gathers stage tiles: by wide accesses where lines of the
// input allow them, else by way of raw lines.
#pragma once

#include "fragments.cuh"

namespace convgen {

// Where a staged tile begins in the input.
struct TileOrigin {
  int r, y, x;
};

// Stages `count` pairs of 16-bit input channels of a tile as words; `channels` of the channels
// exist. Positions and layout as in stage_lines. A thread has BATCH words on their way at once.
template <int PLANE_STEP, int LINE_STEP, int WIDTH, typename T>
__device__ __forceinline__ void stage_pair_lines(const GatherShape& s, const Producers& producers,
                                                 uint32_t* tile, const T* input, int count,
                                                 int channels, const TileOrigin& at) {
  struct alignas(WIDTH * sizeof(T)) Narrow {
    T element[WIDTH];
  };
  struct alignas(WIDTH * sizeof(uint32_t)) Words {
    uint32_t word[WIDTH];
  };
  constexpr int BATCH = MMA_WORDS / 2;
  const int items = s.planes * s.rows * s.by_columns.divisor;
  for (int item = producers.thread; item < items; item += producers.threads) {
    int line = item;
    const int column = s.by_columns.split(line) * WIDTH;
    int plane = line;
    const int row = s.by_rows.split(plane);
    const int input_r = at.r + plane * PLANE_STEP, input_y = at.y + row * LINE_STEP;
    const bool inside = static_cast<unsigned>(input_r) < static_cast<unsigned>(s.r.input) &&
                        static_cast<unsigned>(input_y) < static_cast<unsigned>(s.y.input) &&
                        static_cast<unsigned>(at.x + column) < static_cast<unsigned>(s.x.input);
    const T* from = input;
    if (inside) from += input_r * s.r.input_stride + input_y * s.y.input_stride + (at.x + column);
    uint32_t* to = tile + line * s.row_pitch + column;
    const int existing = inside ? channels : 0;
    for (int first = 0; first < count; first += BATCH) {
      Narrow low[BATCH] = {}, high[BATCH] = {};
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int channel = 2 * (first + i);
        const T* element = from + channel * s.in_channel_stride;
        if (channel < existing) low[i] = *reinterpret_cast<const Narrow*>(element);
        if (channel + 1 < existing) {
          high[i] = *reinterpret_cast<const Narrow*>(element + s.in_channel_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        Words words;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          words.word[j] = Pairs<T>::pair(low[i].element[j], high[i].element[j]);
        }
        *reinterpret_cast<Words*>(to + (first + i) * s.channel_pitch) = words;
      }
    }
  }
}

// Stages a tile of words by accesses of several elements, as s.load_width says.
template <int PLANE_STEP, int LINE_STEP, class Math, typename T>
__device__ __forceinline__ void stage_aligned(const GatherShape& s, const Producers& producers,
                                              typename Math::Input* tile, const T* input, int count,
                                              int channels, const TileOrigin& at) {
  auto stage = [&](auto width) {
    constexpr int WIDTH = decltype(width)::value;
    if constexpr (Math::CHANNELS == 1) {
      stage_lines<PLANE_STEP, LINE_STEP, 1, WIDTH, MMA_WORDS>(s, producers, tile, input, count,
                                                              channels, at.r, at.y, at.x);
    } else {
      stage_pair_lines<PLANE_STEP, LINE_STEP, WIDTH>(s, producers, tile, input, count, channels,
                                                     at);
    }
  };
  if (s.load_width == 4) {
    stage(std::integral_constant<int, 4>());
  } else {
    stage(std::integral_constant<int, 2>());
  }
}

// ---- Lines that no wide access can copy ------------------------------------------------------
//
// An access for each element would be bound by the number of accesses, and loads through registers
// by how many a thread has room for. So each warp copies the 16-byte vectors that cover its lines
// into a raw buffer of its own, [channel][line][vector], where a line begins at its address modulo
// 16. When they have landed, it moves the elements from there to their places in the tile. A warp
// has several raw buffers, of which all but one are on their way, across steps and tiles too; what
// it moves it has copied itself, so that warps need not meet.

constexpr int RAW_BUFFERS = 3;  // of each producer warp
// Columns of a line beside the input that a vector of the input may cover: they are cleared where
// the vectors have landed. Copies replace by zeros what lies farther out.
template <typename T>
constexpr int NEAR = VECTOR_BYTES / static_cast<int>(sizeof(T));

// Columns of a tile before the input's first and behind its last one.
struct Margins {
  int before, behind;

  __device__ __forceinline__ Margins(const GatherShape& s, int x)
      : before(min(max(-x, 0), s.row_pitch)),
        behind(min(max(x + s.row_pitch - s.x.input, 0), s.row_pitch)) {}
};

// Words of a chunk that have channels.
template <class Math>
__device__ __forceinline__ int existing_words(const GatherShape& s, int chunk) {
  const int words = (s.in_channels + Math::CHANNELS - 1) / Math::CHANNELS;
  return min(words - chunk * s.chunk, s.chunk);
}

// Clears the words of a tile from `words` to `count`, which have no channels.
template <typename Word>
__device__ __forceinline__ void clear_words(const GatherShape& s, const Producers& producers,
                                            Word* tile, int words, int count) {
  struct alignas(16) Four {
    Word element[4];
  };
  const int elements = count * s.channel_pitch;
#pragma unroll 1
  for (int i = words * s.channel_pitch + producers.thread * 4; i < elements;
       i += producers.threads * 4) {
    *reinterpret_cast<Four*>(tile + i) = Four{};
  }
}

// The raw lines of a warp. Items are the parts of planes of words that a buffer holds; the warps of
// a producer warpgroup take turns at them.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, class Math, typename T>
class RawLines {
 public:
  using Word = typename Math::Input;

  // The buffers of this warp, at an offset in shared memory; `warp` is that of a warpgroup. `input`
  // is the whole tensor.
  __device__ __forceinline__ RawLines(const GatherShape& s, void* shared, int buffers, int warp,
                                      int lane, const T* input)
      : s_(s),
        shared_(static_cast<unsigned char*>(shared)),
        buffers_(opaque(buffers)),
        input_(input),
        warp_(warp),
        lane_(lane) {}

  // Sets the step whose lines are copied next: `words` words of a tile at `origin`, of whose
  // channels `channels` exist, from `from` on.
  __device__ __forceinline__ void begin_step(const T* from, int words, int channels,
                                             const TileOrigin& origin) {
    from_ = reinterpret_cast<uint64_t>(from) + int64_t{origin.x} * SIZE;
    channels_ = channels;
    origin_ = origin;
    item_ = warp_;
    items_ = words * s_.planes * static_cast<int>(s_.raw_parts.divisor);
    plain_ = origin.x >= -NEAR<T> && origin.x + s_.row_pitch <= s_.x.input + NEAR<T> &&
             s_.x.input >= 3 * NEAR<T>;
  }

  // Stages this warp's items of the oldest step that has been copied, at the offset of its tile.
  // `next_step` calls begin_step for the next one, and returns false after the last. Returns the
  // number of items, each of which has closed a group of copies.
  template <class NextStep>
  __device__ __forceinline__ int stage(int tile, int words, int x, NextStep&& next_step) {
    const Margins margins(s_, x);
    const int all = words * s_.planes * static_cast<int>(s_.raw_parts.divisor);
    const int items = (all - warp_ + PRODUCER_WARPS - 1) / PRODUCER_WARPS;
#pragma unroll 1
    for (int left = items + missing_; left > 0; --left) {
      copy_wait<RAW_BUFFERS - 2>();
      __syncwarp();  // all lanes' copies have landed, and all have moved the elements before
      const uint32_t note = copy_next(next_step);
      if (left > items) continue;
      const int raw = opaque(buffers_ + buffer_ * s_.raw_bytes);
      const int lines = note >> 4 & RAW_MOST_LINES;
      const uint32_t shift = note % VECTOR_BYTES;
      if (margins.before + margins.behind > 0) {
        clear_margins(raw, shift, lines, margins);
        __syncwarp();
      }
      move(opaque(tile + static_cast<int>(note >> 10) * WORD), raw, shift, lines);
    }
    missing_ = 0;
    return items;
  }

 private:
  static constexpr int SIZE = sizeof(T), WORD = sizeof(Word), CHANNELS = Math::CHANNELS;
  // Neighbouring columns that a lane moves: where two residues take turns, one of each, so that
  // lanes write neighbouring words.
  static constexpr bool PAIRS = STEP_X == 2;

  // Copies the next item into the buffer that has become free, and returns a note of the item that
  // is to be moved next: its place in the tile, its lines, and the first address modulo 16.
  template <class NextStep>
  __device__ __forceinline__ uint32_t copy_next(NextStep&& next_step) {
    while (item_ >= items_) {
      if (!next_step()) break;
    }
    uint32_t copied = 0;
    if (item_ < items_) {
      copied = copy_item(buffers_ + buffer_ * s_.raw_bytes);
      item_ += PRODUCER_WARPS;
    }
    copy_commit();
    buffer_ = buffer_ + 1 == RAW_BUFFERS ? 0 : buffer_ + 1;
    const uint32_t note = notes_[0];
#pragma unroll
    for (int i = 1; i < RAW_BUFFERS - 1; ++i) notes_[i - 1] = notes_[i];
    notes_[RAW_BUFFERS - 2] = copied;
    return note;
  }

  __device__ __forceinline__ uint32_t copy_item(int raw) const {
    int word = item_;
    const int first = s_.raw_parts.split(word) * s_.raw_lines;
    const int plane = s_.raw_planes.split(word);
    const int lines = min(s_.raw_lines, s_.rows - first);
    const int r = origin_.r + plane * PLANE_STEP, y = origin_.y + first * LINE_STEP;
    // Offsets within a channel are 32-bit: those of lines inside fit, and others are not used.
    const uint32_t line_stride = line_elements();
    const uint32_t offset = static_cast<uint32_t>(r) * static_cast<uint32_t>(s_.r.input_stride) +
                            static_cast<uint32_t>(y) * static_cast<uint32_t>(s_.y.input_stride);
    const uint64_t channel_bytes = uint64_t{static_cast<uint32_t>(s_.in_channel_stride)} * SIZE;
    const uint64_t of_word = from_ + static_cast<uint32_t>(word * CHANNELS) * channel_bytes;

    // The address of the first line's first column, as far as it tells the place in a vector.
    const uint32_t shift_of_item = static_cast<uint32_t>(of_word) + offset * SIZE;

    const bool plane_inside = static_cast<unsigned>(r) < static_cast<unsigned>(s_.r.input);
    // Of most items, all vectors lie within the tensor, of which only a channel's first and last
    // lines may be the ends, and all that the tile needs of them within lines of the input.
    const int last = y + (lines - 1) * LINE_STEP;
    const bool plain = plain_ && plane_inside && y >= 0 && last < s_.y.input && (y > 0 || r > 0) &&
                       (last < s_.y.input - 1 || r < s_.r.input - 1) &&
                       (CHANNELS == 1 || word * CHANNELS + CHANNELS <= channels_);
    unsigned char* const to = shared_ + raw;
    const int vectors = lines * static_cast<int>(s_.raw_vectors.divisor);
    // The vector of a line of a channel.
    auto find = [&](uint32_t line, int vector, int c) {
      const uint64_t at =
          of_word + c * channel_bytes + uint64_t{offset + line * line_stride} * SIZE;
      return (at & -uint64_t{VECTOR_BYTES}) + vector;
    };
    if (plain) {
#pragma unroll 2
      for (int i = lane_; i < vectors; i += WARP) {
        int line = i;
        const int vector = s_.raw_vectors.split(line) * VECTOR_BYTES;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          copy_async<VECTOR_BYTES>(to + c * raw_channel_bytes() + i * VECTOR_BYTES,
                                   reinterpret_cast<const void*>(find(line, vector, c)), true);
        }
      }
    } else {
      const Margins margins(s_, origin_.x);
      const bool any_inside =
          plane_inside && margins.before < s_.row_pitch && margins.behind < s_.row_pitch;
#pragma unroll 1
      for (int i = lane_; i < vectors; i += WARP) {
        int line = i;
        const int vector = s_.raw_vectors.split(line) * VECTOR_BYTES;
        const bool line_inside = any_inside && static_cast<unsigned>(y + line * LINE_STEP) <
                                                   static_cast<unsigned>(s_.y.input);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          // Of the columns inside: the first one's place, and the last one's end, in the vector.
          const uint32_t at =
              shift_of_item + c * static_cast<uint32_t>(channel_bytes) + line * line_stride * SIZE;
          const int shift = static_cast<int>(at % VECTOR_BYTES) - vector;
          const int low = shift + margins.before * SIZE;
          const int high = shift + (s_.row_pitch - margins.behind) * SIZE;
          const bool inside =
              line_inside && word * CHANNELS + c < channels_ && low < VECTOR_BYTES && high > 0;
          copy_vector(to + c * raw_channel_bytes() + i * VECTOR_BYTES,
                      reinterpret_cast<const void*>(find(line, vector, c)),
                      inside ? min(high, VECTOR_BYTES) : 0, input_);
        }
      }
    }
    const int place = word * s_.channel_pitch + plane * s_.plane_pitch + first * s_.row_pitch;
    return static_cast<uint32_t>(place) << 10 | static_cast<uint32_t>(lines) << 4 |
           shift_of_item % VECTOR_BYTES;
  }

  // Of the input, modulo 2^32; of a buffer.
  __device__ __forceinline__ uint32_t line_elements() const {
    return LINE_STEP * static_cast<uint32_t>(s_.y.input_stride);
  }
  __device__ __forceinline__ uint32_t channel_bytes() const {
    return static_cast<uint32_t>(s_.in_channel_stride) * SIZE;
  }
  __device__ __forceinline__ int raw_channel_bytes() const {
    return s_.raw_lines * s_.raw_line_bytes;
  }

  __device__ __forceinline__ void clear_margins(int raw, uint32_t shift, int lines,
                                                const Margins& margins) const {
    using Bits = std::conditional_t<SIZE == 4, float, uint16_t>;
    const int before = min(margins.before, NEAR<T>), behind = min(margins.behind, NEAR<T>);
#pragma unroll 1
    for (int line = lane_; line < lines; line += WARP) {
      const uint32_t of_line = shift + line * line_elements() * SIZE;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        Bits* const columns = reinterpret_cast<Bits*>(
            shared_ + raw + c * raw_channel_bytes() + line * s_.raw_line_bytes +
            (of_line + c * channel_bytes()) % VECTOR_BYTES);
#pragma unroll 1
        for (int i = 1; i <= before; ++i) columns[margins.before - i] = 0;
#pragma unroll 1
        for (int i = 0; i < behind; ++i) columns[s_.row_pitch - margins.behind + i] = 0;
      }
    }
  }

  // Moves an item's elements to the tile, from offset `to` on: as many lanes as fit side by side
  // along a line, and what is left of all lines together.
  __device__ __forceinline__ void move(int to, int raw, uint32_t shift, int lines) const {
    // Units of a lane, of which the first may begin a column early.
    const int units = PAIRS ? s_.row_pitch / 2 + 1 : s_.row_pitch;
    const int full = (PAIRS ? s_.row_pitch / 2 : s_.row_pitch) / WARP * WARP;
    constexpr int COUNT = WARP % STEP_X == 0 ? 2 : 1;  // at constant distances
    int unit = 0;
#pragma unroll 1
    for (; unit + COUNT * WARP <= full; unit += COUNT * WARP) {
      move_units<COUNT, false>(to, raw, shift, 0, 1, lines, unit + lane_);
    }
    if (COUNT > 1 && unit < full) {
      move_units<1, false>(to, raw, shift, 0, 1, lines, unit + lane_);
    }
    const int rest = units - full;
    if (rest == 0) return;
    const int log2 = rest > 1 ? 32 - __clz(rest - 1) : 0;
    const int own = full + (lane_ & ((1 << log2) - 1));
    if (own < units) {
      move_units<1, true>(to, raw, shift, lane_ >> log2, WARP >> log2, lines, own);
    }
  }

  // COUNT units of a lane, WARP apart, of the lines `line`, `line` + `line_step`, ... Where ENDS,
  // they may reach beyond the tile's line.
  template <int COUNT, bool ENDS>
  __device__ __forceinline__ void move_units(int to, int raw, uint32_t shift, int line,
                                             int line_step, int lines, int unit) const {
    constexpr int TOGETHER = ENDS ? 1 : 2;
    Walk walk;
    walk.to_step = line_step * s_.row_pitch * WORD;
    walk.raw_step = line_step * s_.raw_line_bytes;
    walk.shift_step = line_step * line_elements() * SIZE;
    int place = unit;
    if (!PAIRS && STEP_X > 1) place = unit % STEP_X * s_.residue_pitch + unit / STEP_X;
    walk.to = to + line * s_.row_pitch * WORD + place * WORD;
    walk.raw = raw + line * s_.raw_line_bytes + unit * (PAIRS ? 2 * SIZE : SIZE);
    walk.shift = shift + line * line_elements() * SIZE;
#pragma unroll 1
    for (; line + (TOGETHER - 1) * line_step < lines; line += TOGETHER * line_step) {
      move_lines<TOGETHER, COUNT, ENDS>(walk, unit);
    }
    if (TOGETHER > 1 && line < lines) move_lines<1, COUNT, ENDS>(walk, unit);
  }

  // A lane's place in a line of the tile and of the buffer, the address of the line's first column
  // in the input, and how far the lane's next line is.
  struct Walk {
    int to, raw, to_step, raw_step;
    uint32_t shift, shift_step;
  };

  // So many lines are loaded before they are stored.
  template <int LINES, int COUNT, bool ENDS>
  __device__ __forceinline__ void move_lines(Walk& walk, int unit) const {
    Units<COUNT> loaded[LINES];
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      load<ENDS>(loaded[i], walk.raw + i * walk.raw_step, walk.shift + i * walk.shift_step, unit);
    }
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      store<ENDS>(loaded[i], walk.to + i * walk.to_step, walk.shift + i * walk.shift_step, unit);
    }
    walk.to += LINES * walk.to_step;
    walk.raw += LINES * walk.raw_step;
    walk.shift += LINES * walk.shift_step;
  }

  // What a lane moves of a line: columns or pairs of them.
  struct alignas(PAIRS ? 2 * WORD : WORD) Unit {
    Word word[PAIRS ? 2 : 1];
  };
  template <int COUNT>
  struct Units {
    Unit unit[COUNT];
  };

  // Whether a line's first column is the second one of a pair that is aligned in the buffer.
  __device__ static __forceinline__ bool is_odd(uint32_t shift) { return (shift & SIZE) != 0; }

  // `raw` is the place of the lane's unit in a line that begins at a vector, `shift` the address
  // of the line's first column. Columns that the line does not have may lie beside it.
  template <bool ENDS, int COUNT>
  __device__ __forceinline__ void load(Units<COUNT>& to, int raw, uint32_t shift, int unit) const {
    const uint32_t in_vector = shift % VECTOR_BYTES;
    const uint32_t odd_bytes = PAIRS ? shift & SIZE : 0;
    const unsigned char* const low = shared_ + raw + (in_vector - odd_bytes);
    [[maybe_unused]] const unsigned char* const high =
        shared_ + raw + raw_channel_bytes() +
        static_cast<int>((shift + channel_bytes()) % VECTOR_BYTES - odd_bytes);
    [[maybe_unused]] const bool first = unit > 0 || odd_bytes == 0;
    [[maybe_unused]] const bool second = !ENDS || 2 * unit - is_odd(shift) + 1 < s_.row_pitch;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      constexpr int STEP = WARP * SIZE * (PAIRS ? 2 : 1);
      if constexpr (CHANNELS == 1) {
        to.unit[i] = *reinterpret_cast<const Unit*>(low + i * STEP);
      } else {
        const uint16_t* const halves = reinterpret_cast<const uint16_t*>(high + i * STEP);
        if constexpr (PAIRS) {
          const uint32_t both = *reinterpret_cast<const uint32_t*>(low + i * STEP);
          to.unit[i].word[0] = __byte_perm(both, i > 0 || first ? halves[0] : 0, 0x5410);
          to.unit[i].word[1] = __byte_perm(both, second ? halves[1] : 0, 0x5432);
        } else {
          const uint32_t of_low = *reinterpret_cast<const uint16_t*>(low + i * STEP);
          to.unit[i].word[0] = __byte_perm(of_low, halves[0], 0x5410);
        }
      }
    }
  }

  // `to` is the place of a single column, or of a pair's first one were it not odd.
  template <bool ENDS, int COUNT>
  __device__ __forceinline__ void store(const Units<COUNT>& from, int to, uint32_t shift,
                                        int unit) const {
    if constexpr (PAIRS) {
      const bool odd = is_odd(shift);
      const int residue = s_.residue_pitch * WORD;
      [[maybe_unused]] const int column = 2 * unit - odd;
      const int first = to + (odd ? residue - WORD : 0), second = to + (odd ? 0 : residue);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        if ((i > 0 || unit > 0 || !odd) && (!ENDS || column < s_.row_pitch)) {
          *find_word(first + i * WARP * WORD) = from.unit[i].word[0];
        }
        if (!ENDS || column + 1 < s_.row_pitch) {
          *find_word(second + i * WARP * WORD) = from.unit[i].word[1];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        *find_word(to + i * (WARP / STEP_X) * WORD) = from.unit[i].word[0];
      }
    }
  }

  __device__ __forceinline__ Word* find_word(int offset) const {
    return reinterpret_cast<Word*>(shared_ + offset);
  }

  const GatherShape& s_;
  unsigned char* const shared_;  // offsets, in bytes, count from here
  const int buffers_;
  const T* const input_;
  const int warp_, lane_;
  int buffer_ = 0;                 // that is filled next
  int missing_ = RAW_BUFFERS - 1;  // items by which copies are not yet ahead
  uint32_t notes_[RAW_BUFFERS - 1] = {};
  // The step whose lines are being copied.
  uint64_t from_ = 0;
  int channels_ = 0, item_ = 0, items_ = 0;
  // Whether vectors of its lines reach less than a line beyond a line inside.
  bool plain_ = false;
  TileOrigin origin_ = {};
};

}  // namespace convgen
