// The tensor cores: the names of mma.cuh, for the host.
#pragma once

#include "half.h"
#include "interpreter.h"

#define CONVGEN_MMA_CUH

namespace convgen {

enum class Rounding { NEAREST_AWAY, NEAREST_EVEN };

template <Rounding ROUNDING>
inline uint32_t round_tf32(float x) {
  uint32_t bits = host::bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  bits += ROUNDING == Rounding::NEAREST_AWAY ? 0x1000u : 0xfffu + ((bits >> 13) & 1u);
  return bits & 0xffffe000u;
}

namespace host {

enum class Product { tf32, bf16, f16 };

constexpr uint32_t TF32_BITS = 0xffffe000u;  // of a float, that a tensor core sees

// Sums leave the tensor core truncated, not rounded.
float truncated(double x);

// d += a * b for one 16 x 8 tile, by all lanes of the warp; fragments as mma.sync lays them out.
void multiply_fragments(Product kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        Site site);

// ldmatrix of four matrices, movmatrix: by all lanes of the warp.
void load_matrices(uint32_t (&words)[4], const void* row, Site site);
uint32_t transpose_matrix(uint32_t word, Site site);

// An operand in shared memory: see Operand in sm90.h. Rows of 16 bytes are vectors without a swizzle,
// of which chunk_pitch rows lie between one of K and the next.
struct SharedRows {
  const char* first;
  int pitch, row_bytes, chunk_pitch;
  bool is_mn_major;  // a row is one of K, not of the matrix
};

// What one lane brings to a wgmma: products of its warp's 16 rows with `blocks` x 8 columns.
struct GroupProduct {
  Product kind;
  float (*d)[4];
  int blocks, parts;
  uint32_t a[4];
  const uint32_t* b;  // null where both operands are rows in shared memory
  int batch;
  Site site;
  SharedRows rows, columns;
  bool accumulates;
};

// Products happen as late as they may: when the thread waits for their batch. Their second operand
// is read then, and their sums are as before until then.
void issue_product(const GroupProduct& product);
void commit_products();
// The oldest product that a wait for all but the `pending` newest batches has to perform; removes
// it. False if there is none.
bool take_product(int pending, GroupProduct& product);
void begin_products();

// Products of rows in shared memory, by all lanes of a warp: before and after issue_product().
void issue_rows(const GroupProduct& product);
void multiply_rows(const GroupProduct& product);

}  // namespace host

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::tf32, d, a, b, {file, line});
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::bf16, d, a, b, {file, line});
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::multiply_fragments(host::Product::f16, d, a, b, {file, line});
}

inline void load_matrices(uint32_t (&words)[4], const void* row,
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::load_matrices(words, row, {file, line});
}

inline uint32_t transpose_matrix(uint32_t word, const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
  return host::transpose_matrix(word, {file, line});
}

#ifdef CONVGEN_HOST_SM_90A
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

template <int PARTS>
struct SharedColumns {
  const uint32_t* words;

  SharedColumns() = default;
  explicit SharedColumns(const uint32_t* words) : words(words) {}
  SharedColumns operator+(int count) const { return SharedColumns(words + count); }
  SharedColumns& operator+=(int count) { return *this = *this + count; }
};

inline void wgmma_begin() { host::begin_products(); }
inline void wgmma_commit() { host::commit_products(); }

// The second operand is read here, where the interpreter sees what the kernel accesses.
template <int PENDING>
inline void wgmma_wait() {
  host::GroupProduct product;
  while (host::take_product(PENDING, product)) {
    if (product.b == nullptr) {
      host::multiply_rows(product);
      continue;
    }
    const int lane = static_cast<int>(host::lane_index());
    for (int n = 0; n < product.blocks; ++n) {
      const uint32_t* columns = product.b + n * product.parts * 64;
      const uint32_t b[2] = {columns[lane], columns[32 + lane]};
      host::multiply_fragments(product.kind, product.d[n], product.a, b, product.site);
    }
  }
}

inline void wgmma_settle(float&) {}
inline void wgmma_settle(uint32_t&) {}

template <int N, int PARTS>
inline void wgmma_tf32(float (&d)[N][4], const uint32_t (&a)[4], SharedColumns<PARTS> b,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::issue_product(
      {host::Product::tf32, d, N, PARTS, {a[0], a[1], a[2], a[3]}, b.words, 0, {file, line}, {}, {}, true});
}

template <int N, int PARTS>
inline void wgmma_bf16(float (&d)[N][4], const uint32_t (&a)[4], SharedColumns<PARTS> b,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::issue_product(
      {host::Product::bf16, d, N, PARTS, {a[0], a[1], a[2], a[3]}, b.words, 0, {file, line}, {}, {}, true});
}

template <int N, int PARTS>
inline void wgmma_f16(float (&d)[N][4], const uint32_t (&a)[4], SharedColumns<PARTS> b,
                      const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::issue_product(
      {host::Product::f16, d, N, PARTS, {a[0], a[1], a[2], a[3]}, b.words, 0, {file, line}, {}, {}, true});
}

}  // namespace convgen
