// What a warp does together in shared memory: wgmma with both operands there, and stmatrix.
#include <string.h>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int WARP_ROWS = 16;                   // of a group's 64
constexpr int STEP_BYTES = 32;                  // of K in one product, along a row
constexpr int PER_VECTOR = 8;                   // 16-bit elements
constexpr int MOST_DISTANCE = 0x3fff * VECTOR;  // bytes that a descriptor's 14 bits hold

const GroupProduct& product_of(const Fiber& lane) {
  return *reinterpret_cast<const GroupProduct*>(lane.value);
}

int warp_of_group(const Fiber& lane) { return lane.rank / LANES % WARPS; }

// A vector of a row. Its place follows the address, wherever the operand begins.
const char* vector_of(const SharedRows& rows, int row, int chunk, int vector) {
  const bool is_plain = rows.row_bytes == VECTOR;
  const intptr_t index =
      row / 8 * rows.pitch + row % 8 + (is_plain ? vector : chunk) * rows.chunk_pitch;
  const uintptr_t at =
      reinterpret_cast<uintptr_t>(rows.first) +
      static_cast<uintptr_t>(index * rows.row_bytes + (is_plain ? 0 : vector * VECTOR));
  const unsigned swizzled = static_cast<unsigned>(rows.row_bytes / VECTOR - 1);
  return reinterpret_cast<const char*>(at ^ (at >> 7 & swizzled) << 4);
}

// Calls visit(vector, i) for the two vectors of K of each of eight neighbouring rows of the matrix,
// or, MN-major, for the vector that these are in each of sixteen rows of K.
template <typename Visit>
void visit_vectors(const SharedRows& rows, int first, Visit visit) {
  if (rows.is_mn_major) {
    const int chunk = rows.row_bytes / 2;
    for (int k = 0; k < 16; ++k) {
      visit(vector_of(rows, k, first / chunk, first % chunk / PER_VECTOR), k);
    }
  } else {
    for (int i = 0; i < 16; ++i) visit(vector_of(rows, first + i / 2, 0, i % 2), i);
  }
}

// What one warp reads.
std::vector<const char*> sources_of(const SharedRows& rows, int first, int count) {
  std::vector<const char*> vectors;
  for (int row = first; row < first + count; row += 8) {
    visit_vectors(rows, row, [&](const char* vector, int) { vectors.push_back(vector); });
  }
  return vectors;
}

std::vector<const char*> rows_of(const GroupProduct& p, int warp) {
  return sources_of(p.rows, warp * WARP_ROWS, WARP_ROWS);
}

std::vector<const char*> columns_of(const GroupProduct& p) {
  return sources_of(p.columns, 0, 8 * p.blocks);
}

bool operator==(const SharedRows& a, const SharedRows& b) {
  return a.first == b.first && a.pitch == b.pitch && a.row_bytes == b.row_bytes &&
         a.chunk_pitch == b.chunk_pitch && a.is_mn_major == b.is_mn_major;
}

bool same(const GroupProduct& a, const GroupProduct& b) {
  return a.kind == b.kind && a.blocks == b.blocks && a.rows == b.rows && a.columns == b.columns &&
         a.accumulates == b.accumulates;
}

// What is wrong with an operand, or nothing.
std::string fault_of(const SharedRows& rows, const char* name) {
  const bool is_plain = rows.row_bytes == VECTOR && !rows.is_mn_major;
  if (rows.row_bytes != 128 && rows.row_bytes != 64 && !is_plain) {
    return std::string("with an ") + name + " of rows of " + std::to_string(rows.row_bytes) +
           " bytes: 128 or 64";
  }
  const int step = is_plain ? 8 * VECTOR : rows.is_mn_major ? rows.row_bytes : STEP_BYTES;
  if (reinterpret_cast<uintptr_t>(rows.first) % static_cast<unsigned>(step) != 0) {
    return std::string("with an unaligned ") + name + " at " + shared_place(rows.first) +
           ": it begins at a multiple of " + std::to_string(step) + " bytes";
  }
  const int most = MOST_DISTANCE / rows.row_bytes;
  for (const int distance : {rows.pitch, rows.is_mn_major || is_plain ? rows.chunk_pitch : 0}) {
    if (distance >= 0 && distance <= most) continue;
    return std::string("with an ") + name + " whose groups of rows are " +
           std::to_string(distance) + " rows apart: 0 to " + std::to_string(most);
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
    return "unlike the rest of its warpgroup, whose wgmma (" +
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

constexpr int MOST_K = 16;

// Eight neighbouring rows of the matrix, as [k][row].
void read_eight(Product kind, const SharedRows& rows, int first, double (&to)[MOST_K][8]) {
  const int size = kind == Product::tf32 ? 4 : 2, count = VECTOR / size;
  visit_vectors(rows, first, [&](const char* vector, int i) {
    for (int e = 0; e < count; ++e) {
      double& element = rows.is_mn_major ? to[i][e] : to[i % 2 * count + e][i / 2];
      element = value(kind, vector + e * size);
    }
  });
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
  // Columns that lie as K does may be none of the kernel's, whose sums lead nowhere: NaNs then.
  for (const bool is_column : {false, true}) {
    const std::vector<const char*> vectors = is_column ? columns_of(p) : rows_of(p, warp);
    for (const char* at : vectors) {
      if (is_shared(at, VECTOR)) continue;
      refuse(first, "with an operand out of bounds of shared memory: it reads 16 bytes at offset " +
                        std::to_string(at - reinterpret_cast<char*>(worker->dynamic)) +
                        " of dynamic shared memory (" +
                        std::to_string(worker->run.launch.shared_bytes) + " bytes)");
    }
    check::issue_reads(lanes, vectors, is_column && p.columns.is_mn_major, p.site);
  }
}

// Of D, lane l holds rows l / 4 and 8 more, of each block the columns 2 (l % 4) and the next.
void multiply_by_warp(const std::vector<Fiber*>& lanes) {
  const GroupProduct& p = product_of(*lanes.front());
  const int warp = warp_of_group(*lanes.front());
  check::perform_reads(lanes, rows_of(p, warp), p.site);
  check::perform_reads(lanes, columns_of(p), p.site);
  const int depth = p.kind == Product::tf32 ? 8 : MOST_K;
  double a[2][MOST_K][8], b[MOST_K][8];
  for (int half = 0; half < 2; ++half) {
    read_eight(p.kind, p.rows, warp * WARP_ROWS + 8 * half, a[half]);
  }
  for (int block = 0; block < p.blocks; ++block) {
    read_eight(p.kind, p.columns, 8 * block, b);
    for (int row = 0; row < WARP_ROWS; ++row) {
      double sums[8] = {};
      for (int k = 0; k < depth; ++k) {
        for (int n = 0; n < 8; ++n) sums[n] += a[row / 8][k][row % 8] * b[k][n];
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
