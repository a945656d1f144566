// What is known of GPUs, and the constants of the model by which tiles and kernels are chosen, in
// clocks of a multiprocessor. convgen/engines/cost.py states them once, for both sides.
#pragma once

namespace convgen {

// Bytes are per clock and multiprocessor, all at work.
struct GpuRates {
  double clocks_per_ms;
  double product_clocks;          // from one mma.sync (m16n8k8 in TF32) to the next
  double warpgroup_product_clocks;  // the same in wgmma; 0 where there is none
  double fp64_warps;              // warps' multiply-adds per clock
  double level2_bytes, bulk_bytes;  // by loads, by TMA
  double copy_bytes;                // read and written by a copy
  double level2_capacity_bytes;
};

// By ten times the compute capability: of the nearest older GPU that is known, else the oldest.
constexpr GpuRates gpu_rates(int capability) {
  // NVIDIA RTX PRO 6000, by its data sheet
  if (capability >= 120) return {2300000.0, 4.0, 0.0, 0.0625, 24.0, 24.0, 3.7, 134217728};
  // NVIDIA B200, by its data sheet
  if (capability >= 100) return {1850000.0, 1.5, 0.0, 2.0, 28.0, 28.0, 25.6, 132120576};
  // NVIDIA H200, measured
  if (capability >= 90) return {1750000.0, 1.5, 1.0, 2.0, 28.0, 36.0, 18.0, 52428800};
  // NVIDIA L40S, by its data sheet
  if (capability >= 89) return {2200000.0, 4.0, 0.0, 0.0625, 24.0, 24.0, 2.6, 100663296};
  // NVIDIA RTX A6000, by its data sheet
  if (capability >= 86) return {1750000.0, 8.0, 0.0, 0.0625, 24.0, 24.0, 4.8, 6291456};
  // NVIDIA A100, by its data sheet
  if (capability >= 80) return {1410000.0, 2.0, 0.0, 1.0, 28.0, 28.0, 11.2, 41943040};
  // NVIDIA T4, by its data sheet
  return {1350000.0, 4.0, 0.0, 0.0625, 28.0, 28.0, 5.6, 4194304};
}

// A call takes another tile than a simple rule's if it is expected to take so much less.
constexpr double OVERRULES = 0.85;
constexpr double FP32_WARPS = 4;     // warps' multiply-adds per clock
constexpr double WARP_CLOCKS = 6.0;  // from one instruction of a warp to the next
constexpr double OVERLAP = 0.2;      // of all work but the longest, what comes on top
// Of a gather: a tile's barriers and first stage; a step's barriers; bytes per clock of outputs
// side by side, and of those with a stride of several phases.
constexpr double GATHER_TILE_CLOCKS = 600.0, GATHER_STEP_CLOCKS = 60.0;
constexpr double STORED_BYTES = 24.0, SPREAD_BYTES = 12.0;
// Of four warps that multiply together: from the end of their products to the next ones.
constexpr double WARPGROUP_LATENCY = 200;
// Of implicit GEMMs: a tile beside its products; another kernel behind the first; sums that leave
// the tensor cores behind a tap (3xTF32); bytes per clock of packing
// quarters, and of a weight's gradient that is stored without partial sums.
constexpr double GEMM_TILE_CLOCKS = 5000.0, LAUNCH_CLOCKS = 3500.0;
constexpr double GEMM_PROMOTION_CLOCKS = 60.0;
constexpr double QUARTER_COPY_BYTES = 16.0, STORED_TAP_BYTES = 16.0;

}  // namespace convgen
