// Tensor maps, copies of boxes, and wgmma with both operands in shared memory: the names of
// sm90.cuh, for the host.
#pragma once

#include <initializer_list>

#include "half.h"
#include "interpreter.h"
#include "tensor_core.h"

#define CONVGEN_SM90_CUH

namespace convgen {

struct TensorView {
  int rank;
  uint64_t extent[5];
  uint64_t stride_bytes[5];
  uint32_t box[5];
  uint32_t step[5];
  int swizzle;
};

struct alignas(64) TensorMap {
  char* address;
  int element_bytes;  // 0: never encoded
  TensorView view;
};

namespace host {

cudaError_t encode_tensor_map(TensorMap& map, int element_bytes, void* address,
                              const TensorView& view);
cudaError_t replace_address(TensorMap& map, void* address);
void tma_load(void* to, const TensorMap& map, uint64_t* barrier, std::initializer_list<int> at,
              Site site);
void tma_store(const TensorMap& map, const void* from, std::initializer_list<int> at, Site site);
void tma_store_commit();
void tma_store_wait_read(int pending);
void tma_store_wait();
void store_matrices(bool transposed, void* to, uint32_t upper, uint32_t lower, Site site);
uint32_t shared_address(const void* at, Site site);

}  // namespace host

#define CONVGEN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename T>
inline cudaError_t encode_tensor_map(TensorMap& map, void* address, const TensorView& view) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "elements of 16 bits, and floats");
  return host::encode_tensor_map(map, sizeof(T), address, view);
}

inline cudaError_t replace_address(TensorMap& map, void* address) {
  return host::replace_address(map, address);
}

inline void prefetch_map(const TensorMap&) {}

inline uint32_t shared_address(const void* at, CONVGEN_SITE) {
  return host::shared_address(at, {file, line});
}

inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                     CONVGEN_SITE) {
  host::tma_load(to, map, barrier, {c0, c1, c2}, {file, line});
}

inline void tma_load(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                     int c3, int c4, CONVGEN_SITE) {
  host::tma_load(to, map, barrier, {c0, c1, c2, c3, c4}, {file, line});
}

inline void tma_store(const TensorMap& map, const void* from, int c0, int c1, int c2, int c3,
                      int c4, CONVGEN_SITE) {
  host::tma_store(map, from, {c0, c1, c2, c3, c4}, {file, line});
}

inline void tma_store_commit() { host::tma_store_commit(); }

template <int PENDING>
inline void tma_store_wait_read() {
  static_assert(PENDING >= 0, "a number of groups");
  host::tma_store_wait_read(PENDING);
}

inline void tma_store_wait() { host::tma_store_wait(); }

template <bool TRANSPOSED>
inline void store_matrices(void* to, uint32_t upper, uint32_t lower, CONVGEN_SITE) {
  host::store_matrices(TRANSPOSED, to, upper, lower, {file, line});
}

enum class Major { K, MN };

// An address and distances in rows, instead of a descriptor.
struct Operand {
  const char* first;
  int pitch, row_bytes, chunk_pitch;

  Operand() = default;
  Operand(const void* first_row, int pitch, int row_bytes = 128, int chunk_pitch = 0)
      : first(static_cast<const char*>(first_row)),
        pitch(pitch),
        row_bytes(row_bytes),
        chunk_pitch(chunk_pitch) {}
  // Rows of one vector, in groups of eight, and groups of their next vectors.
  static Operand of_vectors(const void* first, int row_bytes, int step_bytes) {
    return Operand(first, row_bytes / 16, 16, step_bytes / 16);
  }
  // Wherever that may be: it is only where it is read that it has to exist.
  Operand moved(int bytes) const {
    Operand result = *this;
    result.first = reinterpret_cast<const char*>(
        reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(static_cast<intptr_t>(bytes)));
    return result;
  }
  host::SharedRows read_as(Major major) const {
    return {first, pitch, row_bytes, chunk_pitch, major == Major::MN};
  }
};

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<half> = true;

template <typename T, Major A = Major::K, Major B = Major::K, int SUMS>
inline void wgmma(float (&d)[SUMS], Operand a, Operand b, int accumulates, CONVGEN_SITE) {
  static_assert(SUMS == 16 || SUMS == 32 || SUMS == 48 || SUMS == 64 || SUMS == 96 || SUMS == 128,
                "columns that exist here");
  static_assert((A == Major::K && B == Major::K) || sizeof(T) == 2, "all that TF32 has");
  constexpr host::Product KIND = sizeof(T) == 4 ? host::Product::tf32
                                 : is_half<T>   ? host::Product::f16
                                                : host::Product::bf16;
  const host::GroupProduct product = {KIND,
                                      reinterpret_cast<float(*)[4]>(&d[0]),
                                      SUMS / 4,
                                      0,
                                      {},
                                      nullptr,
                                      0,
                                      {file, line},
                                      a.read_as(A),
                                      b.read_as(B),
                                      accumulates != 0};
  host::issue_rows(product);
}

#undef CONVGEN_SITE

}  // namespace convgen
