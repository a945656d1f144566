// Boxes of tensors in and out of shared memory, transposed stores, and products whose operands both
// lie in shared memory. What TMA leaves there is copied out as it lies.
#include "convgen_abi.h"
#include "sm90.cuh"

namespace {

using namespace convgen;

constexpr int THREADS = 128, ATOM = 1024, SHARED_BYTES = 40 * 1024;

// Shared memory from a multiple of 1024 bytes and some rows of 128 further.
__device__ unsigned char* rows_from(int first) {
  unsigned char* const dynamic = dynamic_shared<unsigned char>();
  return dynamic + (ATOM - shared_address(dynamic) % ATOM) % ATOM + first * 128;
}

// ---- Boxes ----------------------------------------------------------------------------------

struct Case {
  int element_bytes;
  TensorView view;
  int at[5];
  int first_row;  // of shared memory
};

// 3-D and 5-D; both swizzles and none; coordinates before and behind the tensor; elements apart; a
// first row that is no multiple of eight. What stores take has no negative coordinates.
constexpr Case CASES[] = {
    {2, {5, {64, 9, 7, 5, 2}, {}, {64, 9, 7, 1, 1}, {1, 1, 1, 1, 1}, 128}, {0, 0, 0, 4, 1}, 0},
    {2, {5, {72, 9, 7, 5, 2}, {}, {64, 10, 6, 1, 1}, {1, 1, 1, 1, 1}, 128}, {16, -1, -2, 3, 1}, 0},
    {2, {5, {72, 9, 7, 5, 2}, {}, {64, 8, 7, 3, 2}, {1, 2, 3, 2, 1}, 128}, {-8, -3, 1, -1, 1}, 0},
    {4, {3, {36, 9, 7, 1, 1}, {}, {32, 5, 3, 1, 1}, {1, 1, 1, 1, 1}, 128}, {-4, 6, -1, 0, 0}, 3},
    {4, {5, {36, 9, 7, 5, 2}, {}, {32, 16, 2, 2, 1}, {1, 3, 1, 1, 1}, 128}, {8, -5, 6, 4, 0}, 1},
    {2, {5, {40, 9, 7, 5, 2}, {}, {32, 8, 3, 1, 2}, {1, 1, 1, 1, 1}, 64}, {8, 3, 5, 0, 0}, 1},
    {2, {3, {40, 9, 7, 1, 1}, {}, {24, 5, 2, 1, 1}, {1, 1, 1, 1, 1}, 0}, {24, 5, -1, 0, 0}, 5},
    {2, {5, {64, 9, 7, 5, 2}, {}, {64, 4, 2, 1, 1}, {1, 1, 1, 1, 1}, 128}, {32, 7, 6, 2, 0}, 2},
};

constexpr int elements(const Case& c, int i) {
  return i == 0 ? static_cast<int>(c.view.box[0])
                : static_cast<int>((c.view.box[i] + c.view.step[i] - 1) / c.view.step[i]);
}

int box_bytes(const Case& c) {
  int bytes = c.element_bytes;
  for (int i = 0; i < c.view.rank; ++i) bytes *= elements(c, i);
  return bytes;
}

int encode(const Case& c, void* address, TensorMap& map) {
  TensorView view = c.view;
  uint64_t stride = static_cast<uint64_t>(c.element_bytes);
  for (int i = 0; i < 5; ++i) view.stride_bytes[i] = stride, stride *= view.extent[i];
  return c.element_bytes == 4 ? encode_tensor_map<float>(map, address, view)
                              : encode_tensor_map<half>(map, address, view);
}

__global__ void load_kernel(const __grid_constant__ TensorMap map, uint32_t* out, const Case c,
                            int bytes) {
  __shared__ uint64_t landed;
  unsigned char* const box = rows_from(c.first_row);
  if (threadIdx.x == 0) {
    mbarrier_init(&landed, 1);
    mbarrier_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&landed, bytes);
    if (c.view.rank == 3) {
      tma_load(box, map, &landed, c.at[0], c.at[1], c.at[2]);
    } else {
      tma_load(box, map, &landed, c.at[0], c.at[1], c.at[2], c.at[3], c.at[4]);
    }
  }
  mbarrier_wait(&landed, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += THREADS) {
    out[i] = reinterpret_cast<const uint32_t*>(box)[i];
  }
}

__global__ void store_kernel(const __grid_constant__ TensorMap map, const Case c, int bytes) {
  unsigned char* const box = rows_from(c.first_row);
  for (int i = threadIdx.x; i < bytes / 2; i += THREADS) {
    reinterpret_cast<uint16_t*>(box)[i] = static_cast<uint16_t>(i);
  }
  bulk_fence();
  __syncthreads();
  if (threadIdx.x > 0) return;
  tma_store(map, box, c.at[0], c.at[1], c.at[2], c.at[3], c.at[4]);
  tma_store_commit();
  tma_store_wait_read<0>();
  for (int i = 0; i < bytes / 2; ++i) reinterpret_cast<uint16_t*>(box)[i] = 0xffff;
  tma_store_wait();
}

// ---- Maps that the driver refuses -----------------------------------------------------------

using Change = void (*)(TensorView& view, uintptr_t& address);
constexpr Change REFUSED[] = {
    [](TensorView&, uintptr_t& address) { address += 8; },
    [](TensorView& v, uintptr_t&) { v.rank = 0; },
    [](TensorView& v, uintptr_t&) { v.rank = 6; },
    [](TensorView& v, uintptr_t&) { v.extent[2] = 0; },
    [](TensorView& v, uintptr_t&) { v.extent[2] = (uint64_t{1} << 32) + 1; },
    [](TensorView& v, uintptr_t&) { v.stride_bytes[1] += 8; },
    [](TensorView& v, uintptr_t&) { v.stride_bytes[2] = uint64_t{1} << 40; },
    [](TensorView& v, uintptr_t&) { v.box[1] = 0; },
    [](TensorView& v, uintptr_t&) { v.box[1] = 257; },
    [](TensorView& v, uintptr_t&) { v.box[0] = 60; },
    [](TensorView& v, uintptr_t&) { v.box[0] = 72; },
    [](TensorView& v, uintptr_t&) { v.box[0] = 40, v.swizzle = 64; },
    [](TensorView& v, uintptr_t&) { v.step[1] = 0; },
    [](TensorView& v, uintptr_t&) { v.step[1] = 9; },
};

// ---- stmatrix -------------------------------------------------------------------------------

// Lane l holds row l / 4 and columns 2 (l % 4) and on of two matrices: element = 8 row + column.
template <bool TRANSPOSED>
__global__ void matrices_kernel(uint32_t* out) {
  __shared__ __align__(16) uint16_t rows[16][8];
  const uint32_t first = 2 * threadIdx.x, pair = first | (first + 1) << 16;
  store_matrices<TRANSPOSED>(rows[threadIdx.x % 16], pair, pair + 0x01000100u);
  __syncwarp();
  for (int i = threadIdx.x; i < 64; i += 32) out[i] = reinterpret_cast<const uint32_t*>(rows)[i];
}

// ---- Products -------------------------------------------------------------------------------

// Rows of 128 or 64 bytes, swizzled as TMA would.
__device__ void place_rows(unsigned char* to, const uint4* from, int count, int row_bytes = 128) {
  const int vectors = row_bytes / 16;
  for (int i = threadIdx.x; i < vectors * count; i += THREADS) {
    unsigned char* const row = to + i / vectors * row_bytes;
    const int at = i % vectors ^ static_cast<int>(shared_address(row) / 128 % vectors);
    reinterpret_cast<uint4*>(row)[at] = from[i];
  }
}

// d[64][2 SUMS] = a's rows times b's, 128 bytes of K each, where b's groups of eight begin at row
// `first` and then every `pitch` rows.
template <typename T, int SUMS>
__global__ void rows_kernel(const uint4* a, const uint4* b, float* d, int rows, int first, int pitch) {
  unsigned char* const at = rows_from(0);
  unsigned char* const columns = at + 64 * 128;
  place_rows(at, a, 64);
  place_rows(columns, b, rows);
  bulk_fence();
  __syncthreads();
  const Operand x(at, 8);
  const Operand y = Operand(columns, pitch).moved(128 * first);
  float sums[SUMS];
  wgmma_begin();
  for (int k = 0; k < 4; ++k) wgmma<T>(sums, x.moved(32 * k), y.moved(32 * k), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < SUMS; ++i) {
    wgmma_settle(sums[i]);
    d[(row + i / 2 % 2 * 8) * 2 * SUMS + i / 4 * 8 + column + i % 2] = sums[i];
  }
}

// d[64][2 SUMS] = 32 rows of K of a times as many of b (or, K-major, 64 bytes of K of b's rows).
// Either's groups of eight rows of K begin every `pitch` rows, and 64 (32) of its matrix's rows
// further a chunk further.
template <Major A, Major B, int SUMS>
__global__ void rows_of_k_kernel(const uint4* a, const uint4* b, float* d, int row_bytes,
                                 int a_rows, int b_rows, int pitch, int chunk_pitch) {
  unsigned char* const at = rows_from(0);
  unsigned char* const columns = at + (a_rows * row_bytes + ATOM - 1) / ATOM * ATOM;
  place_rows(at, a, a_rows, row_bytes);
  place_rows(columns, b, b_rows, B == Major::MN ? row_bytes : 128);
  bulk_fence();
  __syncthreads();
  const Operand x = A == Major::MN ? Operand(at, 8, row_bytes, 32) : Operand(at, 8);
  const Operand y = B == Major::MN ? Operand(columns, pitch, row_bytes, chunk_pitch)
                                   : Operand(columns, pitch);
  float sums[SUMS];
  wgmma_begin();
  for (int k = 0; k < 2; ++k) {
    wgmma<bfloat16, A, B>(sums, x.moved(A == Major::MN ? k * 16 * row_bytes : 32 * k),
                          y.moved(B == Major::MN ? k * 2 * pitch * row_bytes : 32 * k), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < SUMS; ++i) {
    wgmma_settle(sums[i]);
    d[(row + i / 2 % 2 * 8) * 2 * SUMS + i / 4 * 8 + column + i % 2] = sums[i];
  }
}

// d[64][2 SUMS] = four vectors of K of a's rows times as many of b's, without a swizzle: a's lie as
// [vector][row], b's v-th begins at row `first` + v * `step`, and rows run on into the next ones.
template <int SUMS>
__global__ void vectors_kernel(const uint4* a, const uint4* b, float* d, int rows, int first,
                               int step) {
  unsigned char* const at = rows_from(0);
  unsigned char* const columns = at + 4 * 64 * 16;
  for (int i = threadIdx.x; i < 4 * 64; i += THREADS) reinterpret_cast<uint4*>(at)[i] = a[i];
  for (int i = threadIdx.x; i < rows; i += THREADS) reinterpret_cast<uint4*>(columns)[i] = b[i];
  bulk_fence();
  __syncthreads();
  const Operand x = Operand::of_vectors(at, 128, 64 * 16);
  const Operand y = Operand::of_vectors(columns, 128, step * 16).moved(first * 16);
  float sums[SUMS];
  wgmma_begin();
  for (int k = 0; k < 2; ++k) {
    wgmma<float>(sums, x.moved(k * 2 * 64 * 16), y.moved(k * 2 * step * 16), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < SUMS; ++i) {
    wgmma_settle(sums[i]);
    d[(row + i / 2 % 2 * 8) * 2 * SUMS + i / 4 * 8 + column + i % 2] = sums[i];
  }
}

}  // namespace

// The case's numbers, for whoever checks it: element bytes, rank, swizzle, first row, bytes of the
// box, then extents, boxes, steps, coordinates.
CONVGEN_EXPORT int describe(int* to, int which) {
  if (which >= static_cast<int>(sizeof CASES / sizeof *CASES)) return -1;
  const Case& c = CASES[which];
  const int head[] = {c.element_bytes, c.view.rank, c.view.swizzle, c.first_row, box_bytes(c)};
  for (int i = 0; i < 5; ++i) {
    to[i] = head[i], to[5 + i] = static_cast<int>(c.view.extent[i]);
    to[10 + i] = static_cast<int>(c.view.box[i]), to[15 + i] = static_cast<int>(c.view.step[i]);
    to[20 + i] = c.at[i];
  }
  return 0;
}

CONVGEN_EXPORT int load(void* x, uint32_t* out, int which) {
  const Case& c = CASES[which];
  TensorMap map;
  if (const int error = encode(c, x, map)) return error;
  return launch<load_kernel>(1, THREADS, SHARED_BYTES, 0, nullptr, map, out, c, box_bytes(c));
}

CONVGEN_EXPORT int store(void* x, int which) {
  const Case& c = CASES[which];
  TensorMap map;
  if (const int error = encode(c, x, map)) return error;
  return launch<store_kernel>(1, THREADS, SHARED_BYTES, 0, nullptr, map, c, box_bytes(c));
}

CONVGEN_EXPORT int refused(void* x, int which) {
  if (which >= static_cast<int>(sizeof REFUSED / sizeof *REFUSED)) return -1;
  TensorView view = CASES[0].view;
  for (int i = 0; i < 5; ++i) view.stride_bytes[i] = 128u << i;
  uintptr_t address = reinterpret_cast<uintptr_t>(x);
  if (which >= 0) REFUSED[which](view, address);
  TensorMap map;
  return encode_tensor_map<half>(map, reinterpret_cast<void*>(address), view);
}

CONVGEN_EXPORT int matrices(uint32_t* out, int transposed) {
  return transposed ? launch<matrices_kernel<true>>(1, 32, 0, 0, nullptr, out)
                    : launch<matrices_kernel<false>>(1, 32, 0, 0, nullptr, out);
}

#define ROWS(T, SUMS)                                                                            \
  CONVGEN_EXPORT int rows_##T##_##SUMS(const uint4* a, const uint4* b, float* d, int rows, int first, \
                                       int pitch) {                                              \
    return launch<rows_kernel<T, SUMS>>(1, THREADS, SHARED_BYTES, 0, nullptr, a, b, d, rows, first,   \
                                        pitch);                                                  \
  }
ROWS(half, 32)
ROWS(bfloat16, 64)
ROWS(float, 96)
ROWS(half, 128)
ROWS(float, 32)

#define VECTORS(SUMS)                                                                           \
  CONVGEN_EXPORT int vectors_##SUMS(const uint4* a, const uint4* b, float* d, int rows,         \
                                    int first, int step) {                                      \
    return launch<vectors_kernel<SUMS>>(1, THREADS, SHARED_BYTES, 0, nullptr, a, b, d, rows,    \
                                        first, step);                                           \
  }
VECTORS(32)
VECTORS(96)

#define ROWS_OF_K(NAME, A, B, SUMS)                                                            \
  CONVGEN_EXPORT int rows_of_k_##NAME(const uint4* a, const uint4* b, float* d, int row_bytes, \
                                      int a_rows, int b_rows, int pitch, int chunk_pitch) {    \
    return launch<rows_of_k_kernel<A, B, SUMS>>(1, THREADS, SHARED_BYTES, 0, nullptr, a, b, d, \
                                             row_bytes, a_rows, b_rows, pitch, chunk_pitch);   \
  }
ROWS_OF_K(one_16, Major::MN, Major::K, 16)
ROWS_OF_K(both_48, Major::MN, Major::MN, 48)
ROWS_OF_K(both_96, Major::MN, Major::MN, 96)
ROWS_OF_K(other_64, Major::K, Major::MN, 64)

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
