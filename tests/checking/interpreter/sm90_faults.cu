// One kernel for each fault that the interpreter finds in what sm90.cuh offers. Every one is wrong.
#include "convgen_abi.h"
#include "sm90.cuh"

namespace {

using namespace convgen;

constexpr int THREADS = 128, ATOM = 1024, ATOMS = 12;
constexpr int BOX_BYTES = 8 * 128;  // of `map`: 8 rows of 64 values of 16 bits

struct Maps {
  TensorMap map, apart, beyond, small;  // of `out`: as above; of every other row; too large; 3-D
};

// Shared memory at a multiple of 1024 bytes.
__device__ unsigned char* atoms() {
  unsigned char* const dynamic = dynamic_shared<unsigned char>();
  return dynamic + (ATOM - shared_address(dynamic) % ATOM) % ATOM;
}

// An mbarrier of one arrival that all threads may use.
__device__ uint64_t* make_barrier() {
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_fence();
  }
  __syncthreads();
  return &barrier;
}

// Each thread writes its part of some atoms: the values of bfloat16 are 1.
__device__ void fill(unsigned char* at, int count) {
  for (int i = threadIdx.x; i < count * ATOM / 4; i += THREADS) {
    reinterpret_cast<uint32_t*>(at)[i] = 0x3f803f80u;
  }
}

__device__ void fill_and_fence(unsigned char* at, int count) {
  fill(at, count);
  bulk_fence();
  __syncthreads();
}

// Rows 0 to 63 times columns 64 to 127.
__device__ void multiply(float (&sums)[32], const unsigned char* at, int pitch) {
  wgmma_begin();
  wgmma<bfloat16>(sums, Operand(at, 8), Operand(at + 8 * ATOM, pitch), 0);
  wgmma_commit();
}

// ---- Loads ----------------------------------------------------------------------------------

__global__ void unaligned_destination(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms() + 64, m.map, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void box_beyond_shared_memory(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms() + ATOMS * ATOM, m.map, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void box_beyond_the_tensor(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.beyond, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void coordinates_of_another_rank(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.small, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void box_at_an_odd_element(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 4, 0, 0, 0, 0);
  }
}

__global__ void map_never_encoded(const Maps, float*) {
  uint64_t* const barrier = make_barrier();
  const TensorMap map = {};
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), map, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void box_larger_than_expected(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES - 128);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
  mbarrier_wait(barrier, 0);
}

// What is clipped counts as well.
__global__ void bytes_inside_alone(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES / 2);
    tma_load(atoms(), m.map, barrier, 0, -4, 0, 0, 0);
  }
  mbarrier_wait(barrier, 0);
}

__global__ void more_bytes_than_a_phase_counts(const Maps, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, 1 << 20);
}

__global__ void barrier_not_fenced(const Maps m, float*) {
  __shared__ uint64_t barrier;
  if (threadIdx.x > 0) return;
  mbarrier_init(&barrier, 1);
  mbarrier_arrive_expect(&barrier, BOX_BYTES);
  tma_load(atoms(), m.map, &barrier, 0, 0, 0, 0, 0);
}

__global__ void box_not_waited_for(const Maps m, float* out) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const float*>(atoms())[threadIdx.x];
}

__global__ void ended_before_it_landed(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
}

__global__ void load_over_unfenced_writes(const Maps m, float*) {
  uint64_t* const barrier = make_barrier();
  fill(atoms(), 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
  mbarrier_wait(barrier, 0);
}

// ---- Stores ---------------------------------------------------------------------------------

__device__ void store_box(const TensorMap& map) {
  tma_store(map, atoms(), 0, 0, 0, 0, 0);
  tma_store_commit();
}

__global__ void store_not_fenced(const Maps m, float*) {
  fill(atoms(), 1);
  __syncthreads();
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait();
}

__global__ void fence_by_another_thread(const Maps m, float*) {
  fill(atoms(), 1);
  __syncthreads();
  if (threadIdx.x > 0) return;
  bulk_fence();
  store_box(m.map);
  tma_store_wait();
}

__global__ void fence_before_the_writes(const Maps m, float*) {
  bulk_fence();
  fill(atoms(), 1);
  __syncthreads();
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait();
}

__global__ void store_without_a_barrier(const Maps m, float*) {
  fill(atoms(), 1);
  bulk_fence();
  if (threadIdx.x == 127) store_box(m.map), tma_store_wait();
}

__global__ void store_of_unwritten_memory(const Maps m, float*) {
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait();
}

__global__ void source_overwritten_too_early(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.map);
  __syncthreads();
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) tma_store_wait();
}

__global__ void source_of_the_newest_group_overwritten(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait_read<1>();
  __syncthreads();
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) tma_store_wait();
}

__global__ void source_overwritten_without_a_barrier(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait();
  if (threadIdx.x == 32) fill(atoms(), 1);
}

__global__ void store_not_waited_for(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.map);
}

__global__ void store_not_committed(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) tma_store(m.map, atoms(), 0, 0, 0, 0, 0), tma_store_wait();
}

__global__ void store_with_steps(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.apart), tma_store_wait();
}

__global__ void store_before_the_tensor(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) tma_store(m.map, atoms(), 0, -1, 0, 0, 0);
}

__global__ void store_beyond_the_tensor(const Maps m, float*) {
  fill_and_fence(atoms(), 1);
  if (threadIdx.x == 0) store_box(m.beyond), tma_store_wait();
}

__global__ void matrices_at_odd_places(const Maps, float*) {
  store_matrices<true>(atoms() + threadIdx.x % 16 * 24, 0, 0);
}

__global__ void matrices_not_fenced(const Maps m, float*) {
  store_matrices<false>(atoms() + threadIdx.x / 32 * 256 + threadIdx.x % 16 * 16, 0, 0);
  __syncthreads();
  if (threadIdx.x == 0) store_box(m.map), tma_store_wait();
}

// ---- Products -------------------------------------------------------------------------------

__global__ void operand_not_fenced(const Maps, float*) {
  float sums[32];
  fill(atoms(), 12);
  __syncthreads();
  multiply(sums, atoms(), 3);
  wgmma_wait<0>();
}

__global__ void pitch_beyond_what_is_written(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 11);
  multiply(sums, atoms(), 3);
  wgmma_wait<0>();
}

__global__ void operand_beyond_shared_memory(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), 8);
  wgmma_wait<0>();
}

__global__ void pitch_beyond_a_descriptor(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), 2048);
  wgmma_wait<0>();
}

__global__ void unaligned_operand(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms() + 16, 0);
  wgmma_wait<0>();
}

__global__ void operand_without_a_barrier(const Maps, float*) {
  float sums[32];
  fill(atoms(), 12);
  bulk_fence();
  multiply(sums, atoms(), 3);
  wgmma_wait<0>();
}

__global__ void box_multiplied_before_it_landed(const Maps m, float*) {
  float sums[32];
  uint64_t* const barrier = make_barrier();
  fill_and_fence(atoms(), 12);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
  __syncthreads();
  multiply(sums, atoms(), 3);
  mbarrier_wait(barrier, 0);
  wgmma_wait<0>();
}

// A stage is released while products still read it; the box lands before they are waited for.
__global__ void stage_released_too_early(const Maps m, float*) {
  float sums[32];
  uint64_t* const barrier = make_barrier();
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), 3);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, BOX_BYTES);
    tma_load(atoms(), m.map, barrier, 0, 0, 0, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  wgmma_wait<0>();
}

// The same after the wait, which other warps do not know of.
__global__ void stage_refilled_without_a_barrier(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), 3);
  wgmma_wait<0>();
  if (threadIdx.x == 127) fill(atoms(), 12);
}

__global__ void products_never_waited_for(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), 3);
  wgmma_wait<1>();
}

__global__ void products_of_three_warps(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  if (threadIdx.x < 96) {
    multiply(sums, atoms(), 3);
    wgmma_wait<0>();
  }
}

__global__ void products_of_different_operands(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  multiply(sums, atoms(), threadIdx.x < 64 ? 3 : 2);
  wgmma_wait<0>();
}

__global__ void products_before_wgmma_begin(const Maps, float*) {
  float sums[32];
  fill_and_fence(atoms(), 12);
  wgmma<bfloat16>(sums, Operand(atoms(), 8), Operand(atoms(), 8), 0);
}

// ---- Whatever reads shared memory through a library function --------------------------------

__global__ void copied_by_memcpy(const Maps, float* out) {
  __shared__ float box[THREADS];
  if (threadIdx.x < 100) box[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) memcpy(out, box, sizeof box);
}

}  // namespace

#define FAULT(name)                                                                     \
  CONVGEN_EXPORT int fault_##name(float* out) {                                         \
    Maps m = {};                                                                        \
    TensorView v = {5, {64, 8, 1, 1, 1}, {2, 128, 1024, 1024, 1024}, {64, 8, 1, 1, 1},  \
                    {1, 1, 1, 1, 1}, 128};                                              \
    int error = encode_tensor_map<half>(m.map, out, v);                                 \
    v.step[1] = 2, error += encode_tensor_map<half>(m.apart, out, v), v.step[1] = 1;    \
    v.rank = 3, error += encode_tensor_map<half>(m.small, out, v), v.rank = 5;          \
    v.stride_bytes[1] = 256, error += encode_tensor_map<half>(m.beyond, out, v);        \
    if (error) return error;                                                            \
    return launch<name>(2, THREADS, (ATOMS + 1) * ATOM, 0, nullptr, m, out);            \
  }
FAULT(unaligned_destination)
FAULT(box_beyond_shared_memory)
FAULT(box_beyond_the_tensor)
FAULT(coordinates_of_another_rank)
FAULT(box_at_an_odd_element)
FAULT(map_never_encoded)
FAULT(box_larger_than_expected)
FAULT(bytes_inside_alone)
FAULT(more_bytes_than_a_phase_counts)
FAULT(barrier_not_fenced)
FAULT(box_not_waited_for)
FAULT(ended_before_it_landed)
FAULT(load_over_unfenced_writes)
FAULT(store_not_fenced)
FAULT(fence_by_another_thread)
FAULT(fence_before_the_writes)
FAULT(store_without_a_barrier)
FAULT(store_of_unwritten_memory)
FAULT(source_overwritten_too_early)
FAULT(source_of_the_newest_group_overwritten)
FAULT(source_overwritten_without_a_barrier)
FAULT(store_not_waited_for)
FAULT(store_not_committed)
FAULT(store_with_steps)
FAULT(store_before_the_tensor)
FAULT(store_beyond_the_tensor)
FAULT(matrices_at_odd_places)
FAULT(matrices_not_fenced)
FAULT(operand_not_fenced)
FAULT(pitch_beyond_what_is_written)
FAULT(operand_beyond_shared_memory)
FAULT(pitch_beyond_a_descriptor)
FAULT(unaligned_operand)
FAULT(operand_without_a_barrier)
FAULT(box_multiplied_before_it_landed)
FAULT(stage_released_too_early)
FAULT(stage_refilled_without_a_barrier)
FAULT(products_never_waited_for)
FAULT(products_of_three_warps)
FAULT(products_of_different_operands)
FAULT(products_before_wgmma_begin)
FAULT(copied_by_memcpy)

CONVGEN_EXPORT const char* convgen_error_string(int code) { return error_name(code); }
