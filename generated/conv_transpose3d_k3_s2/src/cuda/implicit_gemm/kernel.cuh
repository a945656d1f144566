// Convolution as an implicit GEMM on Hopper: positions with their channels side by side in shared
// memory, where the tensor cores read both operands themselves.
//
//   out[n, o, c] = bias[c] + sum over taps t, input channels k of
//                  in[n, o * STRIDE + t * DILATION - PADDING, k] * weight[t, c, k]
//
// A CTA is three warpgroups. Two consumers multiply: each has 64 output channels (the rows of its
// products) of 8 * LINES positions (their columns). Either they share the positions and have
// different channels, or they share the channels and have different positions.
// The third warpgroup produces: one thread loads slabs of positions, one loads weights, and two
// warps round what has landed to TF32, or split it, or copy finished tiles out.
//
//   slab     positions x 128 bytes of channels (a K block), swizzled, as TMA loads their box. A
//            halo slab is 8 x LINES positions of one plane with all that its taps reach: a tap is a
//            number of rows to begin at, because the eight rows of a group are neighbours in W and
//            the distance of groups is the pitch of the slab's lines. With a stride it has both
//            consumers' lines, and of the taps those of one residue, or of a phase. A tap slab is
//            the positions of one tap, which serves any stride and any shape of tile. A channel
//            slab is that of a contiguous tensor and one tap, turned around: channels x 128 bytes
//            of positions.
//   weights  64 or 128 output channels x 128 bytes of input channels of one tap
//
// For fp32 accuracy (Conv::PARTS == 2) a stage has both parts of its values, of which a tap has
// three products: see split.cuh.
//
// Both are rings of buffers with full and empty barriers. CTAs are persistent: the next tile's
// loads are under way while this one's sums are stored.
#ifndef CONVGEN_IMPLICIT_GEMM_KERNEL_CUH
#define CONVGEN_IMPLICIT_GEMM_KERNEL_CUH

#include "../tf32.cuh"
#include "epilogue.cuh"
#include "split.cuh"

namespace convgen {

// ---- Producers ----------------------------------------------------------------------------------

template <typename T, typename Conv, typename Slab>
__device__ __forceinline__ void load_slabs(const Tiling& t, const TensorMap& map, Pipeline ring,
                                           unsigned char* slabs) {
  constexpr int BLOCK_K = ROW_BYTES / sizeof(T);
  const Planes<Conv, Slab> planes(t);
  PipelineState at;
  for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
    const Tile first = Tile::of<Slab, Conv::PHASES>(t, index, 0, 0);
    const Units<Conv, Slab> units(t, first);
    if (units.begin == units.end) continue;
    int channel = first.group * t.input_channels + units.begin / units.taps * BLOCK_K;
    if constexpr (!Slab::HALO) {
      const Tile second =
          t.position_groups == 1 ? first : Tile::of<Slab, Conv::PHASES>(t, index, 1, 0);
      TapCursor<Conv> tap(first.phase, units.begin % units.taps);
      for (int unit = units.begin; unit < units.end; ++unit) {
        for (int p = 0; p < t.position_groups; ++p) {
          const Tile tile = p == 0 ? first : second;
          uint64_t* const barrier = ring.producer_acquire(at, t.slab_bytes);
          unsigned char* const to = slabs + at.index * slab_stage_bytes<Slab>(t);
          if constexpr (Slab::MAJOR == Major::MN) {
#pragma unroll
            for (int chunk = 0; chunk < Slab::CHUNKS; ++chunk) {
              // Positions of one line: planes are samples (see GemmChoice::samples_are_planes).
              int n, d, h, w;
              position_of(t, tile, chunk * Slab::CHUNK_ROWS, n, d, h, w);
              tma_load(to + chunk * Slab::CHUNK_ROWS * ROW_BYTES, map, barrier, w, channel, d);
            }
          } else {
            constexpr int STEP_D = Steps<Conv>::INPUT[0], STEP_H = Steps<Conv>::INPUT[1],
                          STEP_W = Steps<Conv>::INPUT[2];
#pragma unroll
            for (int part = 0; part < Slab::PARTS; ++part) {
              if (part > 0 && t.rounds) break;
              tma_load(to + part * SLAB_PART_BYTES<Slab>, map, barrier, channel,
                       tile.w * STEP_W + tap.offset_w(), tile.h * STEP_H + tap.offset_h(),
                       tile.d * STEP_D + tap.offset_d(), tile.n + part * t.lower_sample);
            }
          }
          at.advance(1, t.slab_stages);
        }
        if (tap.advance()) channel += BLOCK_K;
      }
    } else {
      const typename Slab::Window window(first.phase);
      const auto reach = planes.reach(t, first.d, window);
      for (int unit = units.begin; unit < units.end; ++unit, channel += BLOCK_K) {
        int residue = 0;
        for (int i = reach.begin * planes.step, end = i + reach.slabs; i < end;) {
          uint64_t* const barrier = ring.producer_acquire(at, t.slab_bytes);
          unsigned char* const to = slabs + at.index * slab_stage_bytes<Slab>(t);
          const int d = first.d * Slab::STEP_D + window.plane(i, planes.step);
          const typename Slab::Taps tap(window, residue);
          const int w = first.w * Slab::STEP_W + tap.offset_w();
          const int h = first.h * Slab::STEP_H + tap.offset_h();
          const int load_w = Slab::LINEAR ? t.load_w : Slab::LOAD_W;
          for (int load = 0; load < (Slab::LINEAR ? t.loads : 1); ++load) {
            tma_load(to + load * load_w * ROW_BYTES, map, barrier, channel,
                     w + load * load_w * Slab::STEP_W, h, d, first.n);
          }
          at.advance(1, t.slab_stages);
          if (++residue < Slab::RESIDUES) continue;
          residue = 0, ++i;
        }
      }
    }
  }
}

// Weights lie as (tap, output channel, input channel) or, MN-major, as (tap, input channel, output
// channel), of which a box has the 64 output channels of one consumer.
template <typename T, typename Conv, typename Slab>
__device__ __forceinline__ void load_weights(const Tiling& t, const TensorMap& map, Pipeline ring,
                                             unsigned char* weights, int stage_bytes) {
  constexpr int BLOCK_K = ROW_BYTES / sizeof(T);
  const Planes<Conv, Slab> planes(t);
  PipelineState at;
  for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
    const Tile tile = Tile::of<Slab, Conv::PHASES>(t, index, 0, 0);
    const Units<Conv, Slab> units(t, tile);
    const int row = tile.group * t.output_channels + tile.channel;
    if (units.begin == units.end) continue;
    const typename Slab::Window window(tile.phase);
    const auto reach = planes.reach(t, tile.d, window);
    int channel = units.begin / units.taps * BLOCK_K;
    TapCursor<Conv> tap(tile.phase, Slab::HALO ? 0 : units.begin % units.taps);
    for (int unit = units.begin; unit < units.end; ++unit) {
      int plane = reach.begin, residue = 0;
      typename Slab::Taps of_slab(window, residue);
      while (plane < reach.end) {
        uint64_t* const barrier = ring.producer_acquire(at, stage_bytes);
        unsigned char* const to = weights + at.index * stage_bytes;
        const int of_kernel = Slab::HALO ? of_slab.tap(plane) : tap.tap();
        const int at_tap = t.first_tap + of_kernel * t.tap_step;
        if constexpr (Conv::WEIGHTS == Major::K) {
#pragma unroll
          for (int part = 0; part < Conv::PARTS; ++part) {
            tma_load(to + part * (stage_bytes / Conv::PARTS), map, barrier, channel, row,
                     at_tap + part * t.lower_tap);
          }
        } else {
          for (int m = 0; m * BLOCK_M * ROW_BYTES < stage_bytes; ++m) {
            tma_load(to + m * BLOCK_M * ROW_BYTES, map, barrier, tile.channel + m * BLOCK_M,
                     tile.group * t.input_channels + channel, at_tap);
          }
        }
        at.advance(1, t.weight_stages);
        of_slab.advance();
        if (of_slab.more()) continue;
        if (++residue == Slab::RESIDUES) residue = 0, ++plane;
        of_slab.restart(window, residue);
      }
      if (Slab::HALO || tap.advance()) channel += BLOCK_K;
    }
  }
}

// To TF32, to nearest, halves away from zero: to even would take two instructions more for each,
// and strided layers 5 to 10 % longer.
__device__ __forceinline__ uint4 round_vector(uint4 x) {
  return make_uint4(nearest_tf32(x.x), nearest_tf32(x.y), nearest_tf32(x.z), nearest_tf32(x.w));
}

// Two warps round slabs of floats in place, or split them.
template <typename Conv, typename Slab>
__device__ __forceinline__ void round_slabs(const Tiling& t, Pipeline ring, uint64_t* rounded,
                                            unsigned char* slabs, int thread) {
  const Planes<Conv, Slab> planes(t);
  PipelineState at;
  for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
    const Tile tile = Tile::of<Slab, Conv::PHASES>(t, index, 0, 0);
    const Units<Conv, Slab> units(t, tile);
    const int count = (units.end - units.begin) *
                      planes.reach(t, tile.d, typename Slab::Window(tile.phase)).slabs *
                      Slab::RESIDUES;
    for (int i = 0; i < count; ++i) {
      ring.consumer_wait(at);
      const int stage_bytes = slab_stage_bytes<Slab>(t);
      uint4* const slab = reinterpret_cast<uint4*>(slabs + at.index * stage_bytes);
#pragma unroll 8
      for (int v = thread; v < t.slab_bytes / 16; v += 64) {
        if constexpr (Slab::PARTS == 2) {
          uint4 x = slab[v];
          slab[v] = split_vector(x);
          slab[v + stage_bytes / Slab::PARTS / 16] = x;
        } else {
          slab[v] = round_vector(slab[v]);
        }
      }
      bulk_fence();
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(&rounded[at.index]);
      at.advance(1, t.slab_stages);
    }
  }
}

// ---- Consumers ----------------------------------------------------------------------------------

template <typename Slab>
__device__ __forceinline__ Operand slab_operand(const unsigned char* slab) {
  if constexpr (Slab::MAJOR == Major::K) {
    return Operand(slab, Slab::PITCH);
  } else {
    return Operand(slab, Slab::PITCH, ROW_BYTES, Slab::CHUNK_ROWS);
  }
}

// The products of one tap with STEPS x 32 bytes of K, as one batch.
template <int STEPS, typename T, Major WEIGHTS, Major POSITIONS, int SUMS>
__device__ __forceinline__ void multiply_steps(float (&sums)[SUMS], Operand weights,
                                               Operand positions, int accumulates) {
  // Along a row, or over 16 rows.
  constexpr int NEXT_WEIGHTS = WEIGHTS == Major::K ? STEP_BYTES : 16 * ROW_BYTES;
  constexpr int NEXT = POSITIONS == Major::K ? STEP_BYTES : 16 * ROW_BYTES;
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < STEPS; ++k) {
    wgmma<T, WEIGHTS, POSITIONS>(sums, weights.moved(k * NEXT_WEIGHTS), positions.moved(k * NEXT),
                                 k == 0 ? accumulates : 1);
  }
  wgmma_commit();
}

// The same of `steps`, 1 to 4: of a group's last channels there may be fewer. In a loop each
// product would be a batch of its own, which the next tap's would wait for.
template <typename T, Major WEIGHTS, Major POSITIONS, int SUMS>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], Operand weights, Operand positions,
                                         int steps, int accumulates) {
  static_assert(ROW_BYTES / STEP_BYTES == 4, "the steps of a K block");
  if (steps == 4) {
    multiply_steps<4, T, WEIGHTS, POSITIONS>(sums, weights, positions, accumulates);
  } else if (steps == 3) {
    multiply_steps<3, T, WEIGHTS, POSITIONS>(sums, weights, positions, accumulates);
  } else if (steps == 2) {
    multiply_steps<2, T, WEIGHTS, POSITIONS>(sums, weights, positions, accumulates);
  } else {
    multiply_steps<1, T, WEIGHTS, POSITIONS>(sums, weights, positions, accumulates);
  }
}

template <typename T, int LINES, typename Conv, typename Slab, typename... Finishes>
__device__ __forceinline__ void consume(const Tiling& t, const Output& out,
                                        const OutputMaps<Conv::PHASES>& output_maps,
                                        SharedStorage& shared, Pipeline slab_ring,
                                        Pipeline weight_ring, unsigned char* slabs,
                                        unsigned char* weights, int weight_bytes,
                                        unsigned char* staged, const Finishes&... finishes) {
  constexpr int SUMS = 4 * LINES, PARTS = Conv::PARTS;
  const int consumer = threadIdx.x / WARPGROUP, lane = threadIdx.x % 32;
  const int p = t.position_groups == 2 ? consumer : 0, m = consumer - p;
  const Planes<Conv, Slab> planes(t);
  PipelineState slab, weight;
  slab.advance(Slab::STRIDED ? 0 : p * t.fold, t.slab_stages);
  int released = 0;    // the slab that is released next
  int to_release = 0;  // slabs whose products have been issued
  uint32_t staged_phase = 1;
  float sums[SUMS];
  [[maybe_unused]] float products[PARTS == 2 ? SUMS : 1];  // of a tap
  const auto release_slabs = [&] {
#pragma unroll 1
    for (; to_release > 0; --to_release) {
      if (lane == 0) slab_ring.consumer_release(released);
      if (++released == t.slab_stages) released = 0;
    }
  };
  for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
    const Tile tile = Tile::of<Slab, Conv::PHASES>(t, index, p, m);
    const Units<Conv, Slab> units(t, tile);
    const typename Slab::Window window(tile.phase);
    const auto reach = planes.reach(t, Slab::STRIDED ? tile.d : tile.d - p * t.fold, window);
    int previous = -1;  // the weights whose products may still be under way
    int accumulates = 0;
    if constexpr (PARTS == 2) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i] = 0;
    }
    const int last_block = (t.blocks - 1) * units.taps;  // the first unit of the last K block
    for (int unit = units.begin; unit < units.end; ++unit) {
      const int steps = unit >= last_block ? t.last_steps : ROW_BYTES / STEP_BYTES;
      int residue = 0;
#pragma unroll 1
      for (int plane = reach.begin; plane < reach.end;) {
        slab_ring.consumer_wait(slab);
        const int stage_bytes = slab_stage_bytes<Slab>(t);
        const unsigned char* const stage = slabs + slab.index * stage_bytes;
        const int first_row = Slab::STRIDED ? p * LINES * Slab::PITCH : 0;
        const Operand positions = slab_operand<Slab>(stage + first_row * ROW_BYTES);
#pragma unroll 1
        for (typename Slab::Taps tap(window, residue); tap.more(); tap.advance()) {
          weight_ring.consumer_wait(weight);
          const Operand w(weights + weight.index * weight_bytes + m * BLOCK_M * ROW_BYTES, 8);
          if constexpr (PARTS == 2) {
            const Operand x = positions.moved(tap.row() * ROW_BYTES);
            add_products(sums, products, {w, w.moved(weight_bytes / 2)},
                         {x, x.moved(stage_bytes / PARTS)}, steps);
            if (lane == 0) weight_ring.consumer_release(weight.index);
            weight.advance(1, t.weight_stages);
            continue;
          }
          multiply<T, Conv::WEIGHTS, Slab::MAJOR>(sums, w, positions.moved(tap.row() * ROW_BYTES),
                                                  steps, accumulates);
          accumulates = 1;
          wgmma_wait<1>();
          // All but the products just issued have ended: what they read may be overwritten.
          if (lane == 0 && previous >= 0) weight_ring.consumer_release(previous);
          release_slabs();
          previous = weight.index;
          weight.advance(1, t.weight_stages);
        }
        int onward = 1;
        if (++residue == Slab::RESIDUES) {
          onward = plane == reach.end - 1 ? planes.next : planes.step;
          residue = 0, ++plane;
        }
        slab.advance(onward, t.slab_stages);
        to_release += onward;
        if constexpr (PARTS == 2) release_slabs();
      }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) wgmma_settle(sums[i]);
    if (lane == 0 && previous >= 0) weight_ring.consumer_release(previous);
    release_slabs();
    if constexpr (PARTS == 1 && (Conv::PHASES > 1 || (Slab::HALO && Conv::KERNEL_D > 1))) {
      // A phase may meet no tap, and a tile's planes nothing but padding.
      if (accumulates == 0) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[i] = 0;
      }
    }

    if (out.epilogue == Epilogue::PARTIAL) {
      store_strided<float, LINES, Conv, Slab>(t, out, tile,
                                              out.partials + tile.split * out.elements, sums);
      continue;
    }
    if (out.saw_nonfinite != nullptr) {
      // Infinities and NaNs make a NaN of the sum of zeros.
      float zero = 0;
#pragma unroll
      for (int i = 0; i < SUMS; ++i) zero += sums[i] * 0.0f;
      if (zero != 0.0f) raise_flag(out.saw_nonfinite);
    }
    if (out.bias != nullptr) {
      const int row = Rows(t).first;
      const T* const bias = static_cast<const T*>(out.bias) + tile.group * t.output_channels;
      float upper = 0, lower = 0;
      if (tile.channel + row < t.output_channels) upper = widen(bias[tile.channel + row]);
      if (tile.channel + row + 8 < t.output_channels) lower = widen(bias[tile.channel + row + 8]);
#pragma unroll
      for (int j = 0; j < LINES; ++j) {
        sums[4 * j] += upper, sums[4 * j + 1] += upper;
        sums[4 * j + 2] += lower, sums[4 * j + 3] += lower;
      }
    }
    (finish_sums<T, LINES, Conv, Slab>(t, phase_of<Conv>(out, tile), tile, finishes, sums), ...);
    if (out.epilogue == Epilogue::STRIDED) {
      store_strided<T, LINES, Conv, Slab>(t, phase_of<Conv>(out, tile), tile,
                                          static_cast<T*>(out.address), sums);
    } else if constexpr (sizeof(T) == 2) {
      if (out.epilogue == Epilogue::TMA) {
        store_by_tma<T, LINES>(t, output_maps.of[tile.phase], tile,
                               staged + consumer * 2 * STORE_BYTES, sums);
      } else {
        mbarrier_wait(&shared.staged_empty[consumer], staged_phase);
        staged_phase ^= 1;
        stage_output<T, LINES>(staged + consumer * BLOCK_M * STAGED_PITCH<LINES> * 16, sums);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.staged_full[consumer]);
      }
    }
  }
  if (threadIdx.x % WARPGROUP == 0) tma_store_wait();
}

// What a thread keeps. A claim waits until so many are free, and no more ever are than what a CTA
// is started with.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                  (CONSUMERS + 1) * (65536 / GEMM_THREADS / 8 * 8),
              "registers that a CTA has");

// ---- The kernel ---------------------------------------------------------------------------------

// Of a layer with an epilogue, one Finish says what it does with its sums (../epilogue.cuh).
template <typename T, int LINES, typename Conv, typename Slab, typename... Finishes>
__global__ void __launch_bounds__(COMPILED_THREADS<GEMM_THREADS>, 1)
    implicit_gemm_kernel(const __grid_constant__ TensorMap slab_map,
                         const __grid_constant__ TensorMap weight_map,
                         const __grid_constant__ OutputMaps<Conv::PHASES> output_maps,
                         const Tiling t, const Output out, Finishes... finishes) {
  if constexpr (HAS_WGMMA) {
    unsigned char* const dynamic = dynamic_shared<unsigned char>();
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    unsigned char* const slabs = dynamic + aligned_offset(dynamic, sizeof(SharedStorage));
    const int weight_bytes = weight_stage_bytes<Conv>(t);
    unsigned char* const weights = slabs + t.slab_stages * slab_stage_bytes<Slab>(t);
    unsigned char* const staged = weights + t.weight_stages * weight_bytes;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

    if (threadIdx.x == 32) prefetch_map(slab_map), prefetch_map(weight_map);
    if (threadIdx.x == 0) {
      for (int i = 0; i < t.slab_stages; ++i) {
        mbarrier_init(&shared.slab_full[i], 1);
        mbarrier_init(&shared.slab_rounded[i], 2);
        mbarrier_init(&shared.slab_empty[i], CONSUMER_WARPS);
      }
      for (int i = 0; i < t.weight_stages; ++i) {
        mbarrier_init(&shared.weight_full[i], 1);
        mbarrier_init(&shared.weight_empty[i], CONSUMER_WARPS);
      }
      for (int i = 0; i < CONSUMERS; ++i) {
        mbarrier_init(&shared.staged_full[i], 4);
        mbarrier_init(&shared.staged_empty[i], 1);
      }
      mbarrier_fence();
    }
    __syncthreads();
    await_earlier_kernel();
    if (out.only_if != nullptr && *out.only_if == 0) return;

    const Pipeline slab_ring = {shared.slab_full, shared.slab_empty};
    const Pipeline weight_ring = {shared.weight_full, shared.weight_empty};
    if (warp >= CONSUMER_WARPS) {
      warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
      const int role = warp - CONSUMER_WARPS;
      if (role == 0) {
        if (lane == 0) load_slabs<T, Conv, Slab>(t, slab_map, slab_ring, slabs);
      } else if (role == 1) {
        if (lane == 0)
          load_weights<T, Conv, Slab>(t, weight_map, weight_ring, weights, weight_bytes);
      } else if constexpr (sizeof(T) == 4) {
        if (t.rounds) {
          round_slabs<Conv, Slab>(t, slab_ring, shared.slab_rounded, slabs, threadIdx.x % 64);
        }
      } else if (out.epilogue == Epilogue::STAGED) {
        copy_out<T, LINES, Conv, Slab>(
            t, out, shared, staged + (role - 2) * BLOCK_M * STAGED_PITCH<LINES> * 16, role - 2);
      }
    } else {
      warpgroup_reg_alloc<CONSUMER_REGISTERS>();
      const Pipeline ready = {t.rounds ? shared.slab_rounded : shared.slab_full, shared.slab_empty};
      consume<T, LINES, Conv, Slab>(t, out, output_maps, shared, ready, weight_ring, slabs, weights,
                                    weight_bytes, staged, finishes...);
    }
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_KERNEL_CUH
