// Products of fragments, as the tensor cores compute them.
#include "tensor_core.h"

#include <math.h>
#include <string.h>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int ROWS = 16, COLUMNS = 8, WORDS = 8;

// What one lane brings; it lies on the lane's stack while it waits.
struct Fragments {
  Product kind;
  float* d;
  const uint32_t *a, *b;
};

double tf32(uint32_t word) { return float_of(word & TF32_BITS); }

// Values of K per word: one, or two with the lower half first.
int values(Product kind, uint32_t word, double (&to)[2]) {
  if (kind == Product::tf32) {
    to[0] = tf32(word);
    return 1;
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
    to[i] = kind == Product::f16 ? half_value(bits) : bfloat16_value(bits);
  }
  return 2;
}

}  // namespace

float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return fabs(static_cast<double>(nearest)) > fabs(x) && isfinite(x) ? nextafterf(nearest, 0.0f)
                                                                     : nearest;
}

// With g = lane / 4 and t = lane % 4, a lane holds of A the rows g and g + 8 at words t and t + 4,
// of B the words t and t + 4 of column g, and of D the columns 2t and 2t + 1 of rows g and g + 8.
void multiply_warp(const std::vector<Fiber*>& lanes) {
  const Fragments* fragments[LANES];
  for (const Fiber* lane : lanes) {
    fragments[lane->rank % LANES] = reinterpret_cast<const Fragments*>(lane->value);
  }
  const Product kind = fragments[0]->kind;
  double a[ROWS][2 * WORDS], b[COLUMNS][2 * WORDS];
  int per_word = 1;
  for (int lane = 0; lane < LANES; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      double word[2];
      per_word = values(kind, fragments[lane]->a[i], word);
      const int at = (t + i / 2 * 4) * per_word;
      for (int j = 0; j < per_word; ++j) a[g + i % 2 * 8][at + j] = word[j];
    }
    for (int i = 0; i < 2; ++i) {
      double word[2];
      values(kind, fragments[lane]->b[i], word);
      const int at = (t + i * 4) * per_word;
      for (int j = 0; j < per_word; ++j) b[g][at + j] = word[j];
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < WORDS * per_word; ++k) sum += a[row][k] * b[column][k];
      float& d = fragments[lane]->d[i];
      d = truncated(d + sum);
    }
  }
}

void multiply_fragments(Product kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        Site site) {
  const Fragments mine = {kind, d, a, b};
  worker->warp_collective(WarpOp::multiply, 0xffffffffu, reinterpret_cast<uint64_t>(&mine),
                          static_cast<int>(kind), site);
}

// ---- ldmatrix and movmatrix -----------------------------------------------------------------

namespace {

// What one lane brings to ldmatrix; it lies on the lane's stack while it waits.
struct Rows {
  const char* row;
  uint32_t* words;
};

}  // namespace

void load_matrices(uint32_t (&words)[4], const void* row, Site site) {
  const Rows mine = {static_cast<const char*>(row), words};
  worker->warp_collective(WarpOp::load_matrices, 0xffffffffu, reinterpret_cast<uint64_t>(&mine), 0,
                          site);
}

void load_matrices_by_warp(const std::vector<Fiber*>& lanes) {
  constexpr size_t ROW = 16;
  for (const Fiber* lane : lanes) {
    const char* const row = reinterpret_cast<const Rows*>(lane->value)->row;
    if (reinterpret_cast<uintptr_t>(row) % ROW != 0 || !is_shared(row, ROW)) {
      return worker->fault(*lane, "load_matrices (" + text(lane->site) + ") from " +
                                      shared_place(row) +
                                      ": 16 bytes of shared memory, at a multiple of 16");
    }
    check::access(*lane, row, ROW, false, lane->site);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const Rows& mine = *reinterpret_cast<const Rows*>(lanes[static_cast<size_t>(lane)]->value);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const Fiber& holder = *lanes[static_cast<size_t>(8 * matrix + lane / 4)];
      const char* const row = reinterpret_cast<const Rows*>(holder.value)->row;
      memcpy(&mine.words[matrix], row + lane % 4 * 4, 4);
    }
  }
}

uint32_t transpose_matrix(uint32_t word, Site site) {
  return static_cast<uint32_t>(
      worker->warp_collective(WarpOp::transpose_matrix, 0xffffffffu, word, 0, site));
}

void transpose_by_warp(const std::vector<Fiber*>& lanes) {
  uint32_t words[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    words[lane] = static_cast<uint32_t>(lanes[static_cast<size_t>(lane)]->value);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    uint32_t word = 0;
    for (int i = 0; i < 2; ++i) {  // row lane / 4 becomes a column
      const int row = lane % 4 * 2 + i, column = lane / 4;
      word |= (words[4 * row + column / 2] >> (column % 2 * 16) & 0xffffu) << (16 * i);
    }
    lanes[static_cast<size_t>(lane)]->value = word;
  }
}

void issue_product(const GroupProduct& product) {
  Fiber& fiber = *worker->running;
  // This lane's words of B, in each block of columns.
  for (int i = 0; product.b && i < 2 * product.blocks; ++i) {
    const uint32_t* block = product.b + i / 2 * product.parts * 2 * LANES;
    check::require_fence(fiber, block + i % 2 * LANES + fiber.rank % LANES, 4, product.site);
  }
  fiber.products.push_back(product);
  fiber.products.back().batch = fiber.committed_products;
}

void commit_products() { ++worker->running->committed_products; }

bool take_product(int pending, GroupProduct& product) {
  Fiber& fiber = *worker->running;
  if (fiber.products.empty()) return false;
  // Products that were not committed belong to no batch that a wait could mean.
  if (fiber.products.front().batch >= fiber.committed_products - pending) return false;
  product = fiber.products.front();
  fiber.products.pop_front();
  return true;
}

}  // namespace host
}  // namespace convgen
