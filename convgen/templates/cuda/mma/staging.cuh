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
__device__ __forceinline__ void stage_pair_lines(const GatherShape& s, const Crew& crew,
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
  for (int item = crew.thread; item < items; item += crew.threads) {
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
__device__ __forceinline__ void stage_aligned(const GatherShape& s, const Crew& crew,
                                              typename Math::Input* tile, const T* input, int count,
                                              int channels, const TileOrigin& at) {
  auto stage = [&](auto width) {
    constexpr int WIDTH = decltype(width)::value;
    if constexpr (Math::CHANNELS == 1) {
      stage_lines<PLANE_STEP, LINE_STEP, 1, WIDTH, MMA_WORDS>(s, crew, tile, input, count, channels,
                                                              at.r, at.y, at.x);
    } else {
      stage_pair_lines<PLANE_STEP, LINE_STEP, WIDTH>(s, crew, tile, input, count, channels, at);
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
// by how many a thread has room for. So each warp copies the 16-byte granules that cover its lines
// into a raw buffer of its own, [channel][line][granule], where a line begins at its address modulo
// 16. When they have landed, it moves the elements from there to their places in the tile. A warp
// has several raw buffers, of which all but one are on their way, across steps and tiles too; what
// it moves it has copied itself, so that warps need not meet.

constexpr int RAW_BUFFERS = 3;  // of each warp that stages
// Columns of a line beside the input that a granule of the input may cover: they are cleared where
// the granules have landed. Copies replace by zeros what lies farther out.
template <typename T>
constexpr int NEAR = GRANULE_BYTES / static_cast<int>(sizeof(T));

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
__device__ __forceinline__ void clear_words(const GatherShape& s, const Crew& crew, Word* tile,
                                            int words, int count) {
  struct alignas(16) Four {
    Word element[4];
  };
  const int elements = count * s.channel_pitch;
#pragma unroll 1
  for (int i = words * s.channel_pitch + crew.thread * 4; i < elements; i += crew.threads * 4) {
    *reinterpret_cast<Four*>(tile + i) = Four{};
  }
}

// The raw lines of a warp. Items are the parts of planes of words that a buffer holds; the warps of
// a crew take turns at them.
template <int PLANE_STEP, int LINE_STEP, int STEP_X, class Math, typename T>
class RawLines {
 public:
  using Word = typename Math::Input;

  // `buffers` are those of all warps; `input` is the whole tensor.
  __device__ __forceinline__ RawLines(const GatherShape& s, void* buffers, int warp_of_block,
                                      int warp, int lane, const T* input)
      : s_(s),
        buffers_(static_cast<unsigned char*>(buffers) + warp_of_block * RAW_BUFFERS * s.raw_bytes),
        input_(input),
        warp_(warp),
        lane_(lane) {}

  // Sets the step whose lines are copied next: `words` words of a tile at `origin`, of whose
  // channels `channels` exist, from `from` on.
  __device__ __forceinline__ void begin_step(const T* from, int words, int channels,
                                             const TileOrigin& origin) {
    from_ = reinterpret_cast<uint64_t>(from) + origin.x * SIZE;
    channels_ = channels;
    origin_ = origin;
    item_ = warp_;
    items_ = words * s_.planes * static_cast<int>(s_.raw_parts.divisor);
  }

  // Stages this warp's items of the oldest step that has been copied. `next_step` calls begin_step
  // for the next one, and returns false after the last. Returns the number of items, each of which
  // has closed a group of copies.
  template <class NextStep>
  __device__ __forceinline__ int stage(Word* tile, int words, int x, NextStep&& next_step) {
    const Margins margins(s_, x);
    const int all = words * s_.planes * static_cast<int>(s_.raw_parts.divisor);
    const int items = (all - warp_ + CREW_WARPS - 1) / CREW_WARPS;
#pragma unroll 1
    for (int left = items + missing_; left > 0; --left) {
      copy_wait<RAW_BUFFERS - 2>();
      __syncwarp();  // all lanes' copies have landed, and all have moved the elements before
      const uint32_t note = copy_next(next_step);
      if (left > items) continue;
      unsigned char* const raw = buffers_ + buffer_ * s_.raw_bytes;
      const int lines = note >> 4 & RAW_MOST_LINES;
      const uint32_t shift = note % GRANULE_BYTES;
      if (margins.before + margins.behind > 0) {
        clear_margins(raw, shift, lines, margins);
        __syncwarp();
      }
      move(tile + (note >> 10), raw, shift, lines);
    }
    missing_ = 0;
    return items;
  }

 private:
  static constexpr int SIZE = sizeof(T), CHANNELS = Math::CHANNELS;
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
      item_ += CREW_WARPS;
    }
    copy_commit();
    buffer_ = buffer_ + 1 == RAW_BUFFERS ? 0 : buffer_ + 1;
    const uint32_t note = notes_[0];
#pragma unroll
    for (int i = 1; i < RAW_BUFFERS - 1; ++i) notes_[i - 1] = notes_[i];
    notes_[RAW_BUFFERS - 2] = copied;
    return note;
  }

  __device__ __forceinline__ uint32_t copy_item(unsigned char* raw) const {
    int word = item_;
    const int first = s_.raw_parts.split(word) * s_.raw_lines;
    const int plane = s_.raw_planes.split(word);
    const int lines = min(s_.raw_lines, s_.rows - first);
    const int r = origin_.r + plane * PLANE_STEP, y = origin_.y + first * LINE_STEP;
    // Offsets within a channel are 32-bit.
    const uint32_t line_stride = LINE_STEP * static_cast<uint32_t>(s_.y.input_stride);
    const uint32_t offset = static_cast<uint32_t>(r) * static_cast<uint32_t>(s_.r.input_stride) +
                            static_cast<uint32_t>(y) * static_cast<uint32_t>(s_.y.input_stride);
    const uint64_t channel_bytes = uint64_t{static_cast<uint32_t>(s_.in_channel_stride)} * SIZE;
    const uint64_t of_word = from_ + static_cast<uint32_t>(word * CHANNELS) * channel_bytes;
    const uint64_t from = of_word + uint64_t{offset} * SIZE;

    const Margins margins(s_, origin_.x);
    const bool plane_inside = static_cast<unsigned>(r) < static_cast<unsigned>(s_.r.input) &&
                              margins.before < s_.row_pitch && margins.behind < s_.row_pitch;
    // Of most items, all granules lie within the tensor, and all that the tile needs of them within
    // lines of the input.
    const uint64_t begin = reinterpret_cast<uint64_t>(input_);
    const uint64_t end = begin + static_cast<uint64_t>(s_.input_elements) * SIZE;
    const uint64_t last = from + (CHANNELS - 1) * channel_bytes +
                          uint64_t{(lines - 1) * line_stride} * SIZE + s_.raw_line_bytes;
    const bool plain = plane_inside && y >= 0 && y + (lines - 1) * LINE_STEP < s_.y.input &&
                       margins.before <= NEAR<T> && margins.behind <= NEAR<T> &&
                       (from & -uint64_t{GRANULE_BYTES}) >= begin && last <= end && word * CHANNELS + CHANNELS <= channels_;
    const int granules = lines * static_cast<int>(s_.raw_granules.divisor);
    if (plain) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
#pragma unroll 2
        for (int i = lane_; i < granules; i += WARP) {
          int line = i;
          const int granule = s_.raw_granules.split(line) * GRANULE_BYTES;
          const uint64_t at = from + c * channel_bytes + uint64_t{line * line_stride} * SIZE;
          const uint64_t address = (at & -uint64_t{GRANULE_BYTES}) + granule;
          copy_async<GRANULE_BYTES>(raw + c * channel_bytes_of_buffer() + i * GRANULE_BYTES,
                                    reinterpret_cast<const void*>(address), true);
        }
      }
    } else {
#pragma unroll 1
      for (int c = 0; c < CHANNELS; ++c) {
        const bool channel_inside = plane_inside && word * CHANNELS + c < channels_;
#pragma unroll 1
        for (int i = lane_; i < granules; i += WARP) {
          int line = i;
          const int granule = s_.raw_granules.split(line) * GRANULE_BYTES;
          const uint64_t at = from + c * channel_bytes + uint64_t{line * line_stride} * SIZE;
          const uint64_t address = (at & -uint64_t{GRANULE_BYTES}) + granule;
          const bool line_inside =
              static_cast<unsigned>(y + line * LINE_STEP) < static_cast<unsigned>(s_.y.input);
          // Of the columns inside: the first one's place, and the last one's end, in the granule.
          const int shift = static_cast<int>(at % GRANULE_BYTES) - granule;
          const int low = shift + margins.before * SIZE;
          const int high = shift + (s_.row_pitch - margins.behind) * SIZE;
          const bool inside = channel_inside && line_inside && low < GRANULE_BYTES && high > 0;
          copy_granule(raw + c * channel_bytes_of_buffer() + i * GRANULE_BYTES,
                       reinterpret_cast<const void*>(address), inside ? min(high, GRANULE_BYTES) : 0, input_);
        }
      }
    }
    const int to = word * s_.channel_pitch + plane * s_.plane_pitch + first * s_.row_pitch;
    return static_cast<uint32_t>(to) << 10 | static_cast<uint32_t>(lines) << 4 |
           static_cast<uint32_t>(from % GRANULE_BYTES);
  }

  __device__ __forceinline__ int channel_bytes_of_buffer() const {
    return s_.raw_lines * s_.raw_line_bytes;
  }

  // The first column of a channel's line in a buffer.
  __device__ __forceinline__ unsigned char* find_line(unsigned char* raw, uint32_t shift, int line,
                                                      int channel) const {
    return raw + channel * channel_bytes_of_buffer() + line * s_.raw_line_bytes +
           find_shift(shift, line, channel);
  }

  __device__ __forceinline__ uint32_t find_shift(uint32_t shift, int line, int channel) const {
    const uint32_t elements = line * LINE_STEP * static_cast<uint32_t>(s_.y.input_stride) +
                              channel * static_cast<uint32_t>(s_.in_channel_stride);
    return (shift + elements * SIZE) % GRANULE_BYTES;
  }

  __device__ __forceinline__ void clear_margins(unsigned char* raw, uint32_t shift, int lines,
                                                const Margins& margins) const {
    using Bits = std::conditional_t<SIZE == 4, float, uint16_t>;
    const int before = min(margins.before, NEAR<T>), behind = min(margins.behind, NEAR<T>);
#pragma unroll 1
    for (int line = lane_; line < lines; line += WARP) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        Bits* const columns = reinterpret_cast<Bits*>(find_line(raw, shift, line, c));
#pragma unroll 1
        for (int i = 1; i <= before; ++i) columns[margins.before - i] = 0;
#pragma unroll 1
        for (int i = 0; i < behind; ++i) columns[s_.row_pitch - margins.behind + i] = 0;
      }
    }
  }

  // Moves an item's elements to the tile, from `to` on: as many lanes as fit side by side along a
  // line, and what is left of all lines together.
  __device__ __forceinline__ void move(Word* to, unsigned char* raw, uint32_t shift,
                                       int lines) const {
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
  __device__ __forceinline__ void move_units(Word* to, unsigned char* raw, uint32_t shift, int line,
                                             int line_step, int lines, int unit) const {
    if constexpr (PAIRS) {
#pragma unroll 2
      for (; line < lines; line += line_step) {
        // Pairs are aligned in the buffer: in every other line they begin a column early.
        const uint32_t at = find_shift(shift, line, 0);
        const int odd = at / SIZE % 2;
        const int column = 2 * unit - odd;
        const unsigned char* const low =
            raw + line * s_.raw_line_bytes + (at - odd * SIZE) + unit * (2 * SIZE);
        [[maybe_unused]] const unsigned char* const high =
            find_line(raw, shift, line, CHANNELS - 1) + column * SIZE;
        Word* const to_line = to + line * s_.row_pitch + unit;
        Word* const to_first = to_line + (odd ? s_.residue_pitch - 1 : 0);
        Word* const to_second = to_line + (odd ? 0 : s_.residue_pitch);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          const bool second = !ENDS || column + 1 < s_.row_pitch;
          const bool first = (i > 0 || column >= 0) && (!ENDS || column < s_.row_pitch);
          Pair pair;
          load_pair(pair, low + i * (WARP * 2 * SIZE), high + i * (WARP * 2 * SIZE), second);
          if (first) to_first[i * WARP] = pair.first;
          if (second) to_second[i * WARP] = pair.second;
        }
      }
    } else {
      const int place =
          STEP_X == 1 ? unit : unit % STEP_X * s_.residue_pitch + unit / STEP_X;
#pragma unroll 2
      for (; line < lines; line += line_step) {
        const unsigned char* const low = find_line(raw, shift, line, 0) + unit * SIZE;
        [[maybe_unused]] const unsigned char* const high =
            find_line(raw, shift, line, CHANNELS - 1) + unit * SIZE;
        Word* const to_line = to + line * s_.row_pitch + place;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          to_line[i * (WARP / STEP_X)] = load_word(low + i * (WARP * SIZE), high + i * (WARP * SIZE));
        }
      }
    }
  }

  struct alignas(2 * sizeof(Word)) Pair {
    Word first, second;
  };

  __device__ static __forceinline__ Word load_word(const unsigned char* low,
                                                   const unsigned char* high) {
    if constexpr (CHANNELS == 1) {
      return *reinterpret_cast<const Word*>(low);
    } else {
      return *reinterpret_cast<const uint16_t*>(low) |
             static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(high)) << 16;
    }
  }

  // The words of two neighbouring columns, aligned as a pair in the first channel; of the second
  // column only if it is needed: it may lie behind the buffer.
  __device__ static __forceinline__ void load_pair(Pair& pair, const unsigned char* low,
                                                   const unsigned char* high, bool second) {
    if constexpr (CHANNELS == 1) {
      pair = *reinterpret_cast<const Pair*>(low);
    } else {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(low);
      const uint16_t* const halves = reinterpret_cast<const uint16_t*>(high);
      pair.first = __byte_perm(both, halves[0], 0x5410);
      if (second) pair.second = __byte_perm(both, halves[1], 0x5432);
    }
  }

  const GatherShape& s_;
  unsigned char* const buffers_;
  const T* const input_;
  const int warp_, lane_;
  int buffer_ = 0;                 // that is filled next
  int missing_ = RAW_BUFFERS - 1;  // items by which copies are not yet ahead
  uint32_t notes_[RAW_BUFFERS - 1] = {};
  // The step whose lines are being copied.
  uint64_t from_ = 0;
  int channels_ = 0, item_ = 0, items_ = 0;
  TileOrigin origin_ = {};
};

}  // namespace convgen
