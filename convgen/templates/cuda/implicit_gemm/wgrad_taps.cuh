// Gradient of the weight on Hopper, a tap at a time:
//
//   weight[a, b, t] = sum over n, i of
//                     coarse[n, i, a] * fine[n, i * STRIDE + t * DILATION - PADDING, b]
//
// For kernels of one tap, and for strides, where neighbouring taps share little. K are positions,
// 128 bytes of a row of them (K-major: contiguous tensors, one tap) or rows of channels (channels
// side by side): 64 in 16 bits, read as they lie (MN-major), 32 of floats (tap_floats.cuh).
//
// A CTA is three warpgroups. Two consumers multiply 64 coarse channels each (the rows of their
// products) by the same COLUMNS, chunks of 64 fine channels of one tap after the other; of the
// third, a thread loads, and three warps round what has landed to TF32, and turn it. Pairs of
// (coarse block, block of columns) x K blocks are dealt evenly over the CTAs, which leave partial
// sums; another kernel adds these up in order. Or a CTA has all K blocks of its pairs, and stores
// the result.
//
// Positions beyond the output must not meet elements of fine, as in wgrad.cuh: last K blocks end
// with the output, unless what lies beyond it meets nothing. A K block of channels side by side is
// a box of up to 64 positions (32 of floats), whatever its extents; the rows that it leaves are
// zeros. A consumer without channels only releases stages.
#ifndef CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_CUH
#define CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_CUH

#include "tap_floats.cuh"

namespace convgen {

// Of tensors whose channels lie side by side.
template <int COLUMNS, typename Conv>
__device__ __forceinline__ void load_channels(const TapWgradTiling& t,
                                              const CoarseMaps& coarse_maps,
                                              const TensorMap& fine_map, Pipeline ring,
                                              unsigned char* stages) {
  constexpr int CHUNKS = COLUMNS / CHUNK_COLUMNS;
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  const int end = t.first_unit(blockIdx.x + 1);
  while (unit < end) {
    const TapPair<COLUMNS> pair(t, unit / t.positions);
    TapBlock block(t, unit % t.positions);
    const int count = min(end - unit, t.positions - unit % t.positions);
    unit += count;
    const int coarse = pair.group * t.coarse_channels + pair.coarse;
    const int chunks = min(CHUNKS, Conv::TAPS * t.fine_chunks - pair.chunk);
    const int bytes = (CONSUMERS + chunks) * t.rows * ROW_BYTES;
    // Of each chunk, its fine channels, and how far its tap is from the first position's element.
    int fine[CHUNKS], shift_w[CHUNKS], shift_h[CHUNKS], shift_d[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int tap = pair.template tap<Conv::TAPS>(t, i);
      fine[i] = pair.group * t.fine_channels + pair.template fine<Conv::TAPS>(t, i);
      shift_w[i] = tap % Conv::KERNEL_W * Conv::DILATION_W - Conv::PADDING_W;
      shift_h[i] = tap / Conv::KERNEL_W % Conv::KERNEL_H * Conv::DILATION_H - Conv::PADDING_H;
      shift_d[i] = tap / (Conv::KERNEL_W * Conv::KERNEL_H) * Conv::DILATION_D - Conv::PADDING_D;
    }
#pragma unroll 1
    for (int k = 0; k < count; ++k, block.advance(t)) {
      uint64_t* const barrier = ring.producer_acquire(at, bytes);
      unsigned char* const to = stages + at.index * TAP_STAGE_BYTES<COLUMNS>;
      unsigned char* const to_fine = to + TAP_ROWS * ROW_BYTES;
      const bool last_w = block.w == t.tiles_w - 1, last_h = block.h == t.tiles_h - 1;
      const int tile_w = block.w * t.step_w, tile_h = block.h * t.step_h;
      const int w = last_w ? t.last_w : tile_w, h = last_h ? t.last_h : tile_h;
      const int d = block.d * t.step_d, n = block.n * t.step_n;
      // The maps of last tiles begin where the tiles before end.
      const TensorMap& coarse_map = coarse_maps.of[last_w + 2 * last_h];
#pragma unroll
      for (int chunk = 0; chunk < CONSUMERS; ++chunk) {
        tma_load(to + chunk * CHUNK_BYTES, coarse_map, barrier, coarse + chunk * BLOCK_M,
                 last_w ? w - tile_w : w, last_h ? h - tile_h : h, d, n);
      }
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        if (i >= chunks) break;
        tma_load(to_fine + i * CHUNK_BYTES, fine_map, barrier, fine[i],
                 w * Conv::STRIDE_W + shift_w[i], h * Conv::STRIDE_H + shift_h[i],
                 d * Conv::STRIDE_D + shift_d[i], n);
      }
      at.advance(1, t.stages);
    }
  }
}

// Of contiguous tensors in 16 bits, by a kernel of one tap: all columns are one load, and those
// that there are not are zeros.
template <int COLUMNS>
__device__ __forceinline__ void load_positions(const TapWgradTiling& t,
                                               const CoarseMaps& coarse_maps,
                                               const TensorMap& fine_map, Pipeline ring,
                                               unsigned char* stages) {
  PipelineState at;
  int unit = t.first_unit(blockIdx.x);
  for (const int end = t.first_unit(blockIdx.x + 1); unit < end; ++unit) {
    const TapPair<COLUMNS> pair(t, unit / t.positions);
    const TapBlock block(t, unit % t.positions);
    const int first = block.w * t.step_w, n = block.n * t.step_n;
    const int coarse = pair.group * t.coarse_channels + pair.coarse;
    const int fine = pair.group * t.fine_channels + pair.chunk * CHUNK_COLUMNS;
    uint64_t* const barrier = ring.producer_acquire(at, TAP_STAGE_BYTES<COLUMNS>);
    unsigned char* const to = stages + at.index * TAP_STAGE_BYTES<COLUMNS>;
    tma_load(to, coarse_maps.of[0], barrier, first, coarse, n);
    tma_load(to + TAP_ROWS * ROW_BYTES, fine_map, barrier, first, fine, n);
    at.advance(1, t.stages);
  }
}

// Eight rows of results on their way out, of each warp of the consumers. A row more of 16 bytes,
// and chunks that are rotated by 16 bytes each, spread what is read together over the banks.
template <int COLUMNS>
constexpr int STAGED_ROW = COLUMNS + 8;
template <int COLUMNS>
constexpr int STAGED_ROWS_BYTES = CONSUMER_WARPS * 8 * STAGED_ROW<COLUMNS> * 2;

template <int COLUMNS>
__device__ __forceinline__ int staged_at(int row, int chunk, int column) {
  return row * STAGED_ROW<COLUMNS> + chunk * CHUNK_COLUMNS + (column + 8 * chunk) % CHUNK_COLUMNS;
}

// A warp copies eight rows of results out, `first` of which is a group's coarse channel. Lanes have
// neighbouring fine channels, WIDTH each, or where TAPS_FIRST the neighbouring taps of one.
template <int WIDTH, bool TAPS_FIRST, int COLUMNS, typename Conv, typename T>
__device__ __forceinline__ void copy_rows(const TapWgradTiling& t, const WeightOutput& out,
                                          const TapPair<COLUMNS>& pair, int first,
                                          const T* staged) {
  constexpr int CHUNKS = COLUMNS / CHUNK_COLUMNS, VECTORS = CHUNK_COLUMNS / WIDTH;
  // Whether a lane has the same chunk throughout.
  constexpr bool OWN_CHUNK = TAPS_FIRST || CHUNKS * VECTORS <= 32;
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int i = lane; i < 8 * CHUNKS * VECTORS; i += 32) {
    const int at = OWN_CHUNK ? lane : i;
    const int chunk = (TAPS_FIRST ? at : at / VECTORS) % CHUNKS;
    const int column = (TAPS_FIRST ? i / CHUNKS : i) % VECTORS * WIDTH;
    const int row = i / (CHUNKS * VECTORS), coarse = first + row;
    const int tap = pair.template tap<Conv::TAPS>(t, chunk);
    const int fine = pair.template fine<Conv::TAPS>(t, chunk) + column;
    if (coarse >= t.coarse_channels || fine >= t.fine_channels || tap >= Conv::TAPS) continue;
    T* const to = static_cast<T*>(out.address) +
                  (int64_t{pair.group} * t.coarse_channels + coarse) * out.stride_coarse +
                  fine * out.stride_fine + tap * out.stride_tap;
    const T* const from = staged + staged_at<COLUMNS>(row, chunk, column);
    if constexpr (WIDTH == 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      *to = *from;
    }
  }
}

// Stores a pair's sums, which are whole. `staged` is 16 bits' alone.
template <typename T, int COLUMNS, typename Conv>
__device__ __forceinline__ void store_result(const TapWgradTiling& t, const WeightOutput& out,
                                             const TapPair<COLUMNS>& pair, unsigned char* staged,
                                             const float (&sums)[COLUMNS / 2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {  // rows 0 to 7 and 8 to 15 of the warp's
    const auto sum = [&](int i) { return half == 0 ? sums[i] : sums[i + 2]; };
    const int first = pair.coarse + warp * 16 + 8 * half;
    if constexpr (sizeof(T) == 2) {
      T* const rows = reinterpret_cast<T*>(staged) + warp * 8 * STAGED_ROW<COLUMNS>;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        constexpr int GROUPS = CHUNK_COLUMNS / 8;
        T* const at =
            rows + staged_at<COLUMNS>(lane / 4, j / GROUPS, j % GROUPS * 8) + lane % 4 * 2;
        T two[2];
        narrow(two[0], sum(4 * j)), narrow(two[1], sum(4 * j + 1));
        uint32_t bits;
        memcpy(&bits, two, 4);
        *reinterpret_cast<uint32_t*>(at) = bits;
      }
      __syncwarp();
      if (t.taps_first) {
        if constexpr (Conv::TAPS > 1) copy_rows<1, true, COLUMNS, Conv>(t, out, pair, first, rows);
      } else if (out.vector == 8) {
        copy_rows<8, false, COLUMNS, Conv>(t, out, pair, first, rows);
      } else {
        copy_rows<1, false, COLUMNS, Conv>(t, out, pair, first, rows);
      }
    } else {
      // One tap: neighbouring fine channels.
      const int coarse = first + lane / 4, fine = pair.chunk * CHUNK_COLUMNS + lane % 4 * 2;
      const int left = t.fine_channels - fine;
      if (coarse >= t.coarse_channels) continue;
      T* const to = static_cast<T*>(out.address) +
                    (int64_t{pair.group} * t.coarse_channels + coarse) * out.stride_coarse + fine;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j) {
        const float x = sum(4 * j), y = sum(4 * j + 1);
        if (out.vector > 1 && 8 * j < left) {
          *reinterpret_cast<float2*>(to + 8 * j) = make_float2(x, y);
        } else {
          if (8 * j < left) to[8 * j] = x;
          if (8 * j + 1 < left) to[8 * j + 1] = y;
        }
      }
    }
  }
}

template <typename T, int COLUMNS, Major MAJOR, typename Conv>
__device__ __forceinline__ void consume_tap_wgrad(const TapWgradTiling& t, const WeightOutput& out,
                                                  Pipeline ring, const unsigned char* stages,
                                                  unsigned char* staged, float* partials) {
  constexpr int SUMS = COLUMNS / 2;
  constexpr int NEXT = MAJOR == Major::K ? STEP_BYTES : 16 * ROW_BYTES;
  constexpr int CHUNK_PITCH = MAJOR == Major::K ? 0 : CHUNK_ROWS;
  const int consumer = threadIdx.x / WARPGROUP, lane = threadIdx.x % 32;
  PipelineState at;
  float sums[SUMS];
  int unit = t.first_unit(blockIdx.x);
  const int end = t.first_unit(blockIdx.x + 1);
  while (unit < end) {
    const int index = unit / t.positions;
    const int pair_end = end - index * t.positions < t.positions ? end : (index + 1) * t.positions;
    if (TapPair<COLUMNS>(t, index).coarse + consumer * BLOCK_M >= t.coarse_channels) {
#pragma unroll 1
      for (; unit < pair_end; ++unit) {  // none of its rows is a channel
        ring.consumer_wait(at);
        if (lane == 0) ring.consumer_release(at.index);
        at.advance(1, t.stages);
      }
      continue;
    }
    int previous = -1, accumulates = 0;
#pragma unroll 1
    for (; unit < pair_end; ++unit) {
      ring.consumer_wait(at);
      const unsigned char* const stage = stages + at.index * TAP_STAGE_BYTES<COLUMNS>;
      const Operand coarse(stage + consumer * CHUNK_BYTES, 8, ROW_BYTES, CHUNK_PITCH);
      const Operand fine(stage + TAP_ROWS * ROW_BYTES, 8, ROW_BYTES, CHUNK_PITCH);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < ROW_BYTES / STEP_BYTES; ++k) {
        wgmma<T, MAJOR, MAJOR>(sums, coarse.moved(k * NEXT), fine.moved(k * NEXT),
                               k == 0 ? accumulates : 1);
      }
      wgmma_commit();
      accumulates = 1;
      wgmma_wait<1>();
      if (lane == 0 && previous >= 0) ring.consumer_release(previous);
      previous = at.index;
      at.advance(1, t.stages);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) wgmma_settle(sums[i]);
    if (lane == 0) ring.consumer_release(previous);

    if (t.is_whole) {
      store_result<T, COLUMNS, Conv>(t, out, TapPair<COLUMNS>(t, index), staged, sums);
      continue;
    }
    // Where each CTA's sums of each pair lie, [coarse][fine]: no two have the same place.
    const int row = consumer * BLOCK_M + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    float* const to = partials + (int64_t{blockIdx.x} + index) * TAP_PARTIALS<COLUMNS> +
                      row * COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < SUMS / 4; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(sums[4 * j], sums[4 * j + 1]);
      *reinterpret_cast<float2*>(to + 8 * COLUMNS + 8 * j) =
          make_float2(sums[4 * j + 2], sums[4 * j + 3]);
    }
  }
}

// All threads clear the rows of K that no box fills: of a K block with fewer positions than rows.
template <int COLUMNS>
__device__ __forceinline__ void clear_rows(const TapWgradTiling& t, unsigned char* stages) {
  constexpr int VECTORS = ROW_BYTES / 16;
  const int chunks = t.stages * (TAP_STAGE_BYTES<COLUMNS> / CHUNK_BYTES);
  const int count = (CHUNK_ROWS - t.rows) * VECTORS;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint4* const first =
        reinterpret_cast<uint4*>(stages + chunk * CHUNK_BYTES + t.rows * ROW_BYTES);
    for (int i = threadIdx.x; i < count; i += GEMM_THREADS) first[i] = make_uint4(0, 0, 0, 0);
  }
  bulk_fence();
}

template <typename T, int COLUMNS, Major MAJOR, typename Conv>
__global__ void __launch_bounds__(COMPILED_THREADS<GEMM_THREADS>, 1)
    tap_wgrad_kernel(const __grid_constant__ CoarseMaps coarse_maps,
                     const __grid_constant__ TensorMap fine_map, const TapWgradTiling t,
                     const WeightOutput out, float* partials) {
  if constexpr (HAS_WGMMA) {
    constexpr bool ROUNDS = sizeof(T) == 4;
    unsigned char* const dynamic = dynamic_shared<unsigned char>();
    TapWgradStorage& shared = *reinterpret_cast<TapWgradStorage*>(dynamic);
    unsigned char* const stages = dynamic + aligned_offset(dynamic, sizeof(TapWgradStorage));
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 32) prefetch_map(coarse_maps.of[0]), prefetch_map(fine_map);
    if (threadIdx.x == 0) {
      for (int i = 0; i < t.stages; ++i) {
        mbarrier_init(&shared.full[i], 1);
        mbarrier_init(&shared.rounded[i], ROUNDING_WARPS);
        mbarrier_init(&shared.empty[i], CONSUMER_WARPS);
      }
      mbarrier_fence();
    }
    if (MAJOR == Major::MN && t.rows < CHUNK_ROWS) clear_rows<COLUMNS>(t, stages);
    if (ROUNDS) clear_blocks<COLUMNS>(t, stages);
    __syncthreads();
    await_earlier_kernel();
    const Pipeline ring = {shared.full, shared.empty};
    if (warp >= CONSUMER_WARPS) {
      warpgroup_reg_dealloc<PRODUCER_REGISTERS>();
      if (warp == CONSUMER_WARPS) {
        if (lane == 0) {
          if constexpr (ROUNDS) {
            load_floats<COLUMNS, Conv>(t, coarse_maps, fine_map, ring, stages);
          } else if constexpr (MAJOR == Major::K) {
            load_positions<COLUMNS>(t, coarse_maps, fine_map, ring, stages);
          } else {
            load_channels<COLUMNS, Conv>(t, coarse_maps, fine_map, ring, stages);
          }
        }
      } else if (ROUNDS) {
        round_stages<COLUMNS>(t, ring, shared.rounded, stages, warp - CONSUMER_WARPS - 1, lane);
      }
    } else {
      warpgroup_reg_alloc<CONSUMER_REGISTERS>();
      const Pipeline ready = {ROUNDS ? shared.rounded : shared.full, shared.empty};
      consume_tap_wgrad<T, COLUMNS, MAJOR, Conv>(
          t, out, ready, stages, stages + t.stages * TAP_STAGE_BYTES<COLUMNS>, partials);
    }
  }
}

// Adds up the partial sums: a thread has four fine channels of a coarse one.
template <typename T, int COLUMNS, int TAPS>
__global__ void __launch_bounds__(PACK_THREADS)
    add_tap_wgrad_kernel(const TapWgradTiling t, const float* __restrict__ partials,
                         const WeightOutput out, int pairs) {
  await_earlier_kernel();
  constexpr int CHUNKS = COLUMNS / CHUNK_COLUMNS;
  const int fours = COLUMNS / 4, at = blockIdx.x * PACK_THREADS + threadIdx.x;
  // Neighbouring threads have neighbouring taps where these lie side by side.
  const int four =
      t.taps_first ? at % CHUNKS * (CHUNK_COLUMNS / 4) + at % fours / CHUNKS : at % fours;
  const int column = 4 * four, within = at / fours * COLUMNS + column;
  for (int index = blockIdx.y; index < pairs; index += gridDim.y) {
    const TapPair<COLUMNS> pair(t, index);
    const int coarse = pair.coarse + within / COLUMNS;
    const int tap = pair.template tap<TAPS>(t, column / CHUNK_COLUMNS);
    const int fine = pair.template fine<TAPS>(t, column / CHUNK_COLUMNS) + column % CHUNK_COLUMNS;
    if (coarse >= t.coarse_channels || fine >= t.fine_channels || tap >= TAPS) continue;
    // The CTAs that had units of the pair.
    const int cta = t.cta_of(index * t.positions);
    const int count = t.cta_of((index + 1) * t.positions - 1) - cta + 1;
    const float* const from = partials + (int64_t{cta} + index) * TAP_PARTIALS<COLUMNS> + within;
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 8
    for (int more = 1; more < count; ++more) {
      const float4 x =
          *reinterpret_cast<const float4*>(from + int64_t{more} * TAP_PARTIALS<COLUMNS>);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    T* const to = static_cast<T*>(out.address) +
                  (int64_t{pair.group} * t.coarse_channels + coarse) * out.stride_coarse +
                  fine * out.stride_fine + tap * out.stride_tap;
    const float each[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (fine + i < t.fine_channels) narrow(to[i * out.stride_fine], each[i]);
    }
  }
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_WGRAD_TAPS_CUH
