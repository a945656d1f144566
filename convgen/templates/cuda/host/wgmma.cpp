// What a warp does together in shared memory: wgmma with both operands there, and stmatrix.
#include <string.h>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int LANES = 32, WARPS = 4;       // of a warp; of a group
constexpr int WARP_ROWS = 16;              // of a group's 64
constexpr int STEP_BYTES = 32;             // of K in one product
constexpr int ROW_BYTES = 128, VECTOR = 16;
constexpr int MOST_PITCH = 0x3fff * 16 / ROW_BYTES;  // that a descriptor's 14 bits hold

const GroupProduct& product_of(const Fiber& lane) {
  return *reinterpret_cast<const GroupProduct*>(lane.value);
}

int warp_of_group(const Fiber& lane) { return lane.rank / LANES % WARPS; }

// The half of `row`'s 32 bytes of K. Its place follows the address, wherever the operand begins.
const char* vector_of(const SharedRows& rows, int row, int half) {
  const intptr_t offset = static_cast<intptr_t>(row / 8 * rows.pitch + row % 8) * ROW_BYTES;
  const uintptr_t at = reinterpret_cast<uintptr_t>(rows.first) + static_cast<uintptr_t>(offset) +
                       static_cast<uintptr_t>(half * VECTOR);
  return reinterpret_cast<const char*>(at ^ (at >> 7 & 7) << 4);
}

// What one warp reads: its rows, and all columns.
std::vector<const char*> sources_of(const GroupProduct& p, int warp) {
  std::vector<const char*> vectors;
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < WARP_ROWS; ++row) {
      vectors.push_back(vector_of(p.rows, warp * WARP_ROWS + row, half));
    }
    for (int n = 0; n < 8 * p.blocks; ++n) vectors.push_back(vector_of(p.columns, n, half));
  }
  return vectors;
}

bool operator==(const SharedRows& a, const SharedRows& b) {
  return a.first == b.first && a.pitch == b.pitch;
}

bool same(const GroupProduct& a, const GroupProduct& b) {
  return a.kind == b.kind && a.blocks == b.blocks && a.rows == b.rows && a.columns == b.columns &&
         a.accumulates == b.accumulates;
}

// What is wrong with an operand, or nothing.
std::string fault_of(const SharedRows& rows, const char* name) {
  if (reinterpret_cast<uintptr_t>(rows.first) % STEP_BYTES != 0) {
    return std::string("with an unaligned ") + name + " at " + shared_place(rows.first) +
           ": rows are 128 bytes, steps of K 32";
  }
  if (rows.pitch < 0 || rows.pitch > MOST_PITCH) {
    return std::string("with an ") + name + " whose groups of eight rows are " +
           std::to_string(rows.pitch) + " rows apart: 0 to " + std::to_string(MOST_PITCH);
  }
  return "";
}

// All warps of a group issue the same.
std::string record(const Fiber& fiber, const GroupProduct& product) {
  GroupIssues& group = worker->groups[static_cast<size_t>(fiber.rank) / (LANES * WARPS)];
  const int warp = warp_of_group(fiber);
  const uint64_t index = group.count[warp]++ - group.first;
  if (index == group.products.size()) {
    group.products.push_back(product);
  } else if (!same(group.products[index], product)) {
    return "unlike the rest of its group of four warps, whose wgmma (" +
           text(group.products[index].site) + ") has other operands";
  }
  for (const uint64_t count : group.count) {
    if (count == group.first) return "";
  }
  group.products.pop_front();
  ++group.first;
  return "";
}

double value(Product kind, const char* at) {
  if (kind == Product::tf32) {
    uint32_t bits;
    memcpy(&bits, at, sizeof bits);
    return float_of(bits & TF32_BITS);
  }
  uint16_t bits;
  memcpy(&bits, at, sizeof bits);
  return kind == Product::f16 ? half_value(bits) : bfloat16_value(bits);
}

// A row's values of K.
void read_row(const GroupProduct& p, const SharedRows& rows, int row, double* to, int distance) {
  const int size = p.kind == Product::tf32 ? 4 : 2;
  for (int half = 0; half < 2; ++half) {
    const char* at = vector_of(rows, row, half);
    for (int i = 0; i < VECTOR; i += size, to += distance) *to = value(p.kind, at + i);
  }
}

}  // namespace

void begin_products() { worker->running->has_begun_products = true; }

void issue_rows(const GroupProduct& product) {
  worker->warp_collective(WarpOp::issue, 0xffffffffu, reinterpret_cast<uint64_t>(&product),
                          static_cast<int>(product.kind), product.site);
  issue_product(product);
}

void multiply_rows(const GroupProduct& product) {
  worker->warp_collective(WarpOp::group_multiply, 0xffffffffu,
                          reinterpret_cast<uint64_t>(&product), static_cast<int>(product.kind),
                          product.site);
}

void issue_by_warp(const std::vector<Fiber*>& lanes) {
  const Fiber& first = *lanes.front();
  const GroupProduct& p = product_of(first);
  const int warp = warp_of_group(first);
  auto refuse = [&](const Fiber& lane, const std::string& why) {
    worker->fault(lane, "wgmma (" + text(p.site) + ") " + why);
  };
  for (const Fiber* lane : lanes) {
    if (!same(product_of(*lane), p)) refuse(*lane, "with other operands than the rest of its warp");
    if (!lane->has_begun_products) refuse(*lane, "before any wgmma_begin");
  }
  const size_t group_end = (static_cast<size_t>(first.rank) / (LANES * WARPS) + 1) * LANES * WARPS;
  if (group_end > worker->fibers.size()) refuse(first, "by a group of fewer than four warps");
  for (const std::string& why :
       {fault_of(p.rows, "operand A"), fault_of(p.columns, "operand B"), record(first, p)}) {
    if (!why.empty()) refuse(first, why);
  }
  const std::vector<const char*> vectors = sources_of(p, warp);
  for (const char* at : vectors) {
    if (!is_shared(at, VECTOR)) {
      refuse(first, "with an operand out of bounds of shared memory: it reads 16 bytes at offset " +
                        std::to_string(at - reinterpret_cast<char*>(worker->dynamic)) +
                        " of dynamic shared memory (" +
                        std::to_string(worker->run.launch.shared_bytes) + " bytes)");
    }
  }
  check::issue_reads(lanes, vectors, p.site);
}

// Of D, lane l holds rows l / 4 and 8 more, of each block the columns 2 (l % 4) and the next.
void multiply_by_warp(const std::vector<Fiber*>& lanes) {
  const GroupProduct& p = product_of(*lanes.front());
  const int warp = warp_of_group(*lanes.front());
  check::perform_reads(lanes, sources_of(p, warp), p.site);
  constexpr int MOST_K = 16;
  const int depth = p.kind == Product::tf32 ? 8 : MOST_K;
  double a[WARP_ROWS][MOST_K], b[MOST_K][8];
  for (int row = 0; row < WARP_ROWS; ++row) {
    read_row(p, p.rows, warp * WARP_ROWS + row, a[row], 1);
  }
  for (int block = 0; block < p.blocks; ++block) {
    for (int n = 0; n < 8; ++n) read_row(p, p.columns, 8 * block + n, &b[0][n], 8);
    for (int row = 0; row < WARP_ROWS; ++row) {
      double sums[8] = {};
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < 8; ++n) sums[n] += a[row][k] * b[k][n];
      }
      for (int n = 0; n < 8; ++n) {
        const GroupProduct& own = product_of(*lanes[static_cast<size_t>(row % 8 * 4 + n / 2)]);
        float& d = own.d[block][row / 8 * 2 + n % 2];
        d = truncated(p.accumulates ? d + sums[n] : sums[n]);
      }
    }
  }
}

// ---- stmatrix -------------------------------------------------------------------------------

namespace {

// What one lane brings; it lies on the lane's stack while it waits.
struct Matrices {
  char* to;
  uint32_t words[2];  // of the upper and the lower matrix: row lane / 4, columns 2 (lane % 4) and on
};

}  // namespace

void store_matrices(bool transposed, void* to, uint32_t upper, uint32_t lower, Site site) {
  const Matrices mine = {static_cast<char*>(to), {upper, lower}};
  worker->warp_collective(WarpOp::matrices, 0xffffffffu, reinterpret_cast<uint64_t>(&mine),
                          transposed, site);
}

void store_matrices_by_warp(const std::vector<Fiber*>& lanes) {
  const bool transposed = lanes.front()->source != 0;
  auto of_lane = [&](int lane) -> const Matrices& {
    return *reinterpret_cast<const Matrices*>(lanes[static_cast<size_t>(lane)]->value);
  };
  for (int line = 0; line < 16; ++line) {
    const Fiber& fiber = *lanes[static_cast<size_t>(line)];
    char* const to = of_lane(line).to;
    if (reinterpret_cast<uintptr_t>(to) % VECTOR != 0 || !is_shared(to, VECTOR)) {
      worker->fault(fiber, "store_matrices (" + text(fiber.site) + ") to " + shared_place(to) +
                               ": 16 bytes of shared memory, at a multiple of 16");
    }
    uint16_t row[8];
    for (int i = 0; i < 8; ++i) {
      const int r = transposed ? i : line % 8, c = transposed ? line % 8 : i;
      row[i] = static_cast<uint16_t>(of_lane(4 * r + c / 2).words[line / 8] >> (c % 2 * 16));
    }
    check::access(fiber, to, VECTOR, true, fiber.site);
    memcpy(to, row, VECTOR);
  }
}

// ---- Addresses ------------------------------------------------------------------------------

uint32_t shared_address(const void* at, Site site) {
  if (!is_shared(at, 1)) {
    worker->fault(*worker->running,
                  "shared_address (" + text(site) + ") of " + shared_place(at));
  }
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at));
}

}  // namespace host
}  // namespace convgen
