// Hopper's own instructions (sm_90a): the tensor memory accelerator (TMA) and warpgroup products
// (wgmma) whose operands both lie in shared memory.
//
// An environment that stands in for a GPU replaces this file: it defines CONVGEN_SM90_CUH and
// supplies the same names.
#ifndef CONVGEN_SM90_CUH
#define CONVGEN_SM90_CUH

#include <cuda.h>

#include "../mma.cuh"
#include "../pipeline.cuh"

namespace convgen {

// ---- Tensor maps ----------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// A tensor as TMA sees it, innermost dimension first, and the box that one instruction moves.
struct TensorView {
  int rank;
  uint64_t extent[5];
  uint64_t stride_bytes[5];  // of dimensions 1 and up; multiples of 16
  uint32_t box[5];
  uint32_t step[5];  // elements from one that is loaded to the next, 1 to 8; 1 for stores
  int swizzle;       // bytes of a row whose 16-byte vectors are permuted: 128, 64, or 0 for none
};

// A function of the driver, found at its first use: nothing is linked with the driver.
template <typename Function>
cudaError_t driver_function(const char* name, Function*& known, Function*& function) {
  function = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (function != nullptr) return cudaSuccess;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (found == nullptr) return cudaErrorNotSupported;
  // Threads may find it at the same time; they find the same.
  function = reinterpret_cast<Function*>(found);
  __atomic_store_n(&known, function, __ATOMIC_RELAXED);
  return cudaSuccess;
}

// Fills `map` for a tensor of `T`s at `address`, a multiple of 16.
template <typename T>
cudaError_t encode_tensor_map(TensorMap& map, void* address, const TensorView& view) {
  using Encode = decltype(cuTensorMapEncodeTiled);
  static Encode* known = nullptr;
  Encode* encode;
  if (const cudaError_t error = driver_function("cuTensorMapEncodeTiled", known, encode)) {
    return error;
  }
  constexpr bool WIDE = sizeof(T) == 4;
  const CUresult result =
      encode(&map, WIDE ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
             view.rank, address, view.extent, view.stride_bytes + 1, view.box, view.step,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             view.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : view.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                  : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B,  // a box's rows: other K blocks come much later
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Moves a map to another tensor of the same shape, at `address`, a multiple of 16.
inline cudaError_t replace_address(TensorMap& map, void* address) {
  using Replace = decltype(cuTensorMapReplaceAddress);
  static Replace* known = nullptr;
  Replace* replace;
  if (const cudaError_t error = driver_function("cuTensorMapReplaceAddress", known, replace)) {
    return error;
  }
  return replace(&map, address) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---- Copies of boxes --------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// One thread has a map on its way before the first copy needs it. Maps are parameters of kernels,
// which no earlier kernel writes.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// One thread copies a box to `to`, a multiple of 128 bytes; what lies outside of the tensor is
// zeros. The current phase of `barrier` counts the bytes of the whole box.
__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0,
                                         int c1, int c2) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

__device__ __forceinline__ void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0,
                                         int c1, int c2, int c3, int c4) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// One thread copies a box from shared memory; what lies outside of the tensor is left out.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* from, int c0, int c1,
                                          int c2, int c3, int c4) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// Closes the group of stores that this thread has issued since the last call.
__device__ __forceinline__ void tma_store_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's newest groups still read shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
#endif
}

// Waits until all of this thread's stores have been performed.
__device__ __forceinline__ void tma_store_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// The warp stores two 8 x 8 matrices of 16-bit values, as accumulators of 16 rows x 8 columns hold
// them. Lanes 0 to 15 give the addresses of 16 bytes each: with `transposed` of the columns 0 to 7,
// rows 0 to 7 and then rows 8 to 15 of each; else of the rows.
template <bool TRANSPOSED>
__device__ __forceinline__ void store_matrices(void* to, uint32_t upper, uint32_t lower) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (TRANSPOSED) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(to)),
        "r"(upper), "r"(lower)
        : "memory");
  } else {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(to)),
        "r"(upper), "r"(lower)
        : "memory");
  }
#endif
}

// ---- Products of a warpgroup --------------------------------------------------------------------

// An operand in shared memory, of rows of 128 (or 64) bytes with swizzled 16-byte vectors. The
// swizzle follows the absolute address, so that an operand may begin at any row. Eight rows lie
// together, and the next eight `pitch` rows behind the first.
//
// K-major, a row is 64 (32) 16-bit elements of K, and rows are those of the matrix; MN-major, a row
// is as many rows of the matrix, and rows are K: then `chunk_pitch` rows lie between one 64 (32) of
// the matrix's rows and the next.
struct Operand {
  uint64_t descriptor;

  Operand() = default;
  __device__ __forceinline__ Operand(const void* first_row, int pitch, int row_bytes = 128,
                                     int chunk_pitch = 0)
      : descriptor((row_bytes == 128 ? uint64_t{1} : uint64_t{2}) << 62 |
                   static_cast<uint64_t>(pitch * row_bytes >> 4) << 32 |
                   static_cast<uint64_t>(chunk_pitch * row_bytes >> 4) << 16 |
                   (shared_address(first_row) & 0x3ffff) >> 4) {}
  // K-major, without a swizzle: the vectors of eight rows lie together, 128 bytes of them. The next
  // eight rows' are `row_bytes` further, and these rows' next vectors along K `step_bytes`.
  __device__ __forceinline__ static Operand of_vectors(const void* first, int row_bytes,
                                                       int step_bytes) {
    Operand result;
    result.descriptor = static_cast<uint64_t>(row_bytes >> 4) << 32 |
                        static_cast<uint64_t>(step_bytes >> 4) << 16 |
                        (shared_address(first) & 0x3ffff) >> 4;
    return result;
  }
  // An operand so many bytes further.
  __device__ __forceinline__ Operand moved(int bytes) const {
    Operand result;
    result.descriptor = descriptor + (bytes >> 4);
    return result;
  }
};

enum class Major { K, MN };

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<half> = true;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CONVGEN_PLACES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define CONVGEN_PLACES_32                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CONVGEN_PLACES_48 \
  CONVGEN_PLACES_32       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define CONVGEN_PLACES_64                                            \
  CONVGEN_PLACES_32                                                  \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CONVGEN_PLACES_96                                            \
  CONVGEN_PLACES_64                                                  \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define CONVGEN_PLACES_128                                                       \
  CONVGEN_PLACES_96                                                              \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define CONVGEN_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CONVGEN_SUMS_16(i) \
  CONVGEN_SUMS_4(i), CONVGEN_SUMS_4(i + 4), CONVGEN_SUMS_4(i + 8), CONVGEN_SUMS_4(i + 12)
#define CONVGEN_SUMS_32(i) CONVGEN_SUMS_16(i), CONVGEN_SUMS_16(i + 16)
#define CONVGEN_SUMS_48(i) CONVGEN_SUMS_32(i), CONVGEN_SUMS_16(i + 32)
#define CONVGEN_SUMS_64(i) CONVGEN_SUMS_32(i), CONVGEN_SUMS_32(i + 32)
#define CONVGEN_SUMS_96(i) CONVGEN_SUMS_64(i), CONVGEN_SUMS_32(i + 64)
#define CONVGEN_SUMS_128(i) CONVGEN_SUMS_64(i), CONVGEN_SUMS_64(i + 64)
// d is that of this product alone where `accumulates` is 0.
#define CONVGEN_WGMMA_SS(SUMS, SHAPE, A_PLACE, B_PLACE, FLAG_PLACE, MAJOR)          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " FLAG_PLACE                       \
               ", 0;\n"                                                             \
               "wgmma.mma_async.sync.aligned.m64n" SHAPE " {" CONVGEN_PLACES_##SUMS \
               "}, " A_PLACE ", " B_PLACE ", p, 1, 1" MAJOR ";\n}"                  \
               : CONVGEN_SUMS_##SUMS(0)                                             \
               : "l"(a.descriptor), "l"(b.descriptor), "r"(accumulates))
#define CONVGEN_WGMMA_N(TYPES, MAJOR)                                  \
  if constexpr (SUMS == 16) {                                          \
    CONVGEN_WGMMA_SS(16, "32" TYPES, "%16", "%17", "%18", MAJOR);      \
  } else if constexpr (SUMS == 32) {                                   \
    CONVGEN_WGMMA_SS(32, "64" TYPES, "%32", "%33", "%34", MAJOR);      \
  } else if constexpr (SUMS == 48) {                                   \
    CONVGEN_WGMMA_SS(48, "96" TYPES, "%48", "%49", "%50", MAJOR);      \
  } else if constexpr (SUMS == 64) {                                   \
    CONVGEN_WGMMA_SS(64, "128" TYPES, "%64", "%65", "%66", MAJOR);     \
  } else if constexpr (SUMS == 96) {                                   \
    CONVGEN_WGMMA_SS(96, "192" TYPES, "%96", "%97", "%98", MAJOR);     \
  } else {                                                             \
    static_assert(SUMS == 128, "columns that exist here");             \
    CONVGEN_WGMMA_SS(128, "256" TYPES, "%128", "%129", "%130", MAJOR); \
  }
#else
#define CONVGEN_WGMMA_N(TYPES, MAJOR)
#endif

// d (+)= a * b over 16 elements of K (8 for TF32): 64 rows of a, 2 * SUMS rows of b. With
// g = lane / 4 and t = lane % 4, warp i of the warpgroup has rows 16 i + g (d[4 j] and d[4 j + 1])
// and 16 i + g + 8 (d[4 j + 2] and d[4 j + 3]) of the columns 8 j + 2 t and 8 j + 2 t + 1.
// `T` is half, bfloat16, or float for TF32, of which the lower 13 bits are not read and both
// operands are K-major.
template <typename T, Major A = Major::K, Major B = Major::K, int SUMS>
__device__ __forceinline__ void wgmma(float (&d)[SUMS], Operand a, Operand b, int accumulates) {
  if constexpr (sizeof(T) == 4) {
    static_assert(A == Major::K && B == Major::K, "all that TF32 has");
    CONVGEN_WGMMA_N("k8.f32.tf32.tf32", "")
  } else if constexpr (is_half<T>) {
    if constexpr (A == Major::MN && B == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.f16.f16", ", 1, 1")
    } else if constexpr (B == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.f16.f16", ", 0, 1")
    } else if constexpr (A == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.f16.f16", ", 1, 0")
    } else {
      CONVGEN_WGMMA_N("k16.f32.f16.f16", ", 0, 0")
    }
  } else {
    if constexpr (A == Major::MN && B == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.bf16.bf16", ", 1, 1")
    } else if constexpr (B == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.bf16.bf16", ", 0, 1")
    } else if constexpr (A == Major::MN) {
      CONVGEN_WGMMA_N("k16.f32.bf16.bf16", ", 1, 0")
    } else {
      CONVGEN_WGMMA_N("k16.f32.bf16.bf16", ", 0, 0")
    }
  }
}

}  // namespace convgen

#endif  // CONVGEN_SM90_CUH
