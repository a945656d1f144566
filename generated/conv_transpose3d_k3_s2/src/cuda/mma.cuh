// The tensor cores, through mma.sync (sm_80 and later) and wgmma (sm_90a), and the roundings that
// go with them.
//
// An environment that stands in for a GPU replaces this file: it defines CONVGEN_MMA_CUH and
// supplies the same names.
#ifndef CONVGEN_MMA_CUH
#define CONVGEN_MMA_CUH

#include "device.cuh"

namespace convgen {

// How a float becomes a TF32 value (8 exponent bits, 10 mantissa bits).
enum class Rounding { NEAREST_AWAY, NEAREST_EVEN };

// The bits of x rounded to TF32; infinities and NaNs stay what they are.
template <Rounding ROUNDING>
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t bits;
  if constexpr (ROUNDING == Rounding::NEAREST_AWAY) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = 0;  // no launch reaches this: see mma_tf32
#endif
  } else {
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = __float_as_uint(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (finite) bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
#endif
  }
  return bits;
}

// d += a * b for one 16 x 8 tile, all lanes of the warp together. With g = lane / 4, t = lane % 4:
//   a: rows g, g + 8 at words t (a[0], a[1]) and t + 4 (a[2], a[3])
//   b: words t (b[0]) and t + 4 (b[1]) of column g
//   d: row g, columns 2t, 2t + 1 (d[0], d[1]); row g + 8 (d[2], d[3])
// A word is one TF32 value (K = 8), or two consecutive 16-bit values of K, lower first (K = 16).
// A library for several architectures compiles these for older ones too, as nothing: its callers
// choose other kernels there.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Matrices of 8 rows x 16 bytes ----------------------------------------------------------

// The warp loads four of them from shared memory: lane l has the address of row l % 8 of the l / 8
// -th, a multiple of 16, and gets of each matrix word l % 4 of row l / 4. So the words of a, above,
// are those of rows 0 to 7 and 8 to 15 at the first 16 bytes, then at the next; b's of a column's.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The warp transposes an 8 x 8 matrix of 16-bit values: lane l has those of row l / 4 in columns
// 2 (l % 4) and on, before and after.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t word) {
  uint32_t transposed = word;
#if __CUDA_ARCH__ >= 800
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
#endif
  return transposed;
}

// ---- Four warps at once (wgmma, sm_90a) -----------------------------------------------------
//
// The first operand is in registers, each warp's 16 rows as above; the second stays in shared
// memory, where the tensor core itself reads it, in two thirds of the time that mma.sync takes. All
// warps of a group (four, the first a multiple of four) issue the same instructions. They run while
// the warps go on:
//
//   wgmma_begin();      // behind the writes of the registers that follow
//   wgmma_tf32(...);    // any number
//   wgmma_commit();
//   wgmma_wait<N>();    // until at most N of the newest batches are under way
//
// Registers of a batch must not change, and its sums must not be read, until it has ended.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

// The second operand of BLOCKS x 8 columns: for each 8 columns PARTS pairs of 8 (columns) x 4
// (words) matrices, words of a column adjacent. Offsets are in words, multiples of 4.
template <int PARTS>
struct SharedColumns {
  uint32_t low;  // of the descriptor: address and distance of a pair's halves, in units of 16 bytes

  SharedColumns() = default;
  __device__ __forceinline__ explicit SharedColumns(const uint32_t* words)
      : low((static_cast<uint32_t>(__cvta_generic_to_shared(words)) >> 4) | (128u >> 4) << 16) {}
  __device__ __forceinline__ SharedColumns operator+(int words) const {
    SharedColumns moved;
    moved.low = low + words / 4;
    return moved;
  }
  __device__ __forceinline__ SharedColumns& operator+=(int words) { return *this = *this + words; }
  __device__ __forceinline__ uint64_t descriptor() const {
    constexpr uint64_t NEXT_COLUMNS = 2 * 128 * PARTS >> 4;
    return NEXT_COLUMNS << 32 | low;
  }
};

__device__ __forceinline__ void wgmma_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps what reads or writes x on its side of this place: wgmma_wait says nothing of registers.
__device__ __forceinline__ void wgmma_settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }
// What makes an operand, before wgmma_begin.
__device__ __forceinline__ void wgmma_settle(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CONVGEN_P1 "%0,%1,%2,%3"
#define CONVGEN_P2 CONVGEN_P1 ",%4,%5,%6,%7"
#define CONVGEN_P3 CONVGEN_P2 ",%8,%9,%10,%11"
#define CONVGEN_P4 CONVGEN_P3 ",%12,%13,%14,%15"
#define CONVGEN_P5 CONVGEN_P4 ",%16,%17,%18,%19"
#define CONVGEN_P6 CONVGEN_P5 ",%20,%21,%22,%23"
#define CONVGEN_P7 CONVGEN_P6 ",%24,%25,%26,%27"
#define CONVGEN_P8 CONVGEN_P7 ",%28,%29,%30,%31"
#define CONVGEN_D1 "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3])
#define CONVGEN_D2 CONVGEN_D1, "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3])
#define CONVGEN_D3 CONVGEN_D2, "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3])
#define CONVGEN_D4 CONVGEN_D3, "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
#define CONVGEN_D5 CONVGEN_D4, "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3])
#define CONVGEN_D6 CONVGEN_D5, "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3])
#define CONVGEN_D7 CONVGEN_D6, "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3])
#define CONVGEN_D8 CONVGEN_D7, "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define CONVGEN_AB1 "{%4,%5,%6,%7}, %8"
#define CONVGEN_AB2 "{%8,%9,%10,%11}, %12"
#define CONVGEN_AB3 "{%12,%13,%14,%15}, %16"
#define CONVGEN_AB4 "{%16,%17,%18,%19}, %20"
#define CONVGEN_AB5 "{%20,%21,%22,%23}, %24"
#define CONVGEN_AB6 "{%24,%25,%26,%27}, %28"
#define CONVGEN_AB7 "{%28,%29,%30,%31}, %32"
#define CONVGEN_AB8 "{%32,%33,%34,%35}, %36"
#define CONVGEN_WGMMA_OF(BLOCKS, COLUMNS, TYPES, TRANSPOSED)                     \
  if constexpr (N == BLOCKS) {                                                   \
    asm volatile(                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                               \
        "wgmma.mma_async.sync.aligned.m64n" COLUMNS TYPES " {" CONVGEN_P##BLOCKS \
        "}, " CONVGEN_AB##BLOCKS ", p, 1, 1" TRANSPOSED ";\n}"                   \
        : CONVGEN_D##BLOCKS                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()));      \
  }
#define CONVGEN_WGMMA(TYPES, TRANSPOSED)               \
  static_assert(N >= 1 && N <= 8, "up to 64 columns"); \
  CONVGEN_WGMMA_OF(1, "8", TYPES, TRANSPOSED)          \
  CONVGEN_WGMMA_OF(2, "16", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(3, "24", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(4, "32", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(5, "40", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(6, "48", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(7, "56", TYPES, TRANSPOSED)         \
  CONVGEN_WGMMA_OF(8, "64", TYPES, TRANSPOSED)
#else
#define CONVGEN_WGMMA(TYPES, TRANSPOSED)
#endif

// d[n] += a * b's n-th 8 columns, for the 16 rows of each warp.
template <int N, int PARTS>
__device__ __forceinline__ void wgmma_tf32(float (&d)[N][4], const uint32_t (&a)[4],
                                           SharedColumns<PARTS> b) {
  CONVGEN_WGMMA("k8.f32.tf32.tf32", "")
}

template <int N, int PARTS>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N][4], const uint32_t (&a)[4],
                                           SharedColumns<PARTS> b) {
  CONVGEN_WGMMA("k16.f32.bf16.bf16", ", 0")
}

template <int N, int PARTS>
__device__ __forceinline__ void wgmma_f16(float (&d)[N][4], const uint32_t (&a)[4],
                                          SharedColumns<PARTS> b) {
  CONVGEN_WGMMA("k16.f32.f16.f16", ", 0")
}

}  // namespace convgen

#endif  // CONVGEN_MMA_CUH
