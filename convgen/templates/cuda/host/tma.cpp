// Tensor maps and the copies of boxes by TMA.
//
// A load lands as late as it may, as other bulk copies do. A store reads its box when its thread
// waits for that, and writes the tensor when the thread waits for all or ends.
#include <string.h>

#include "state.h"

namespace convgen {
namespace host {
namespace {

constexpr int DIMENSIONS = 5;

int elements(const TensorView& v, int dimension) {
  // The innermost dimension's step is ignored.
  const int step = dimension == 0 ? 1 : static_cast<int>(v.step[dimension]);
  return (static_cast<int>(v.box[dimension]) + step - 1) / step;
}

int row_bytes(const TensorMap& map) {
  return static_cast<int>(map.view.box[0]) * map.element_bytes;
}

int box_bytes(const TensorMap& map) {
  int bytes = row_bytes(map);
  for (int i = 1; i < map.view.rank; ++i) bytes *= elements(map.view, i);
  return bytes;
}

// Where 16 bytes lie that would be at `at` without a swizzle: it follows the address itself.
char* swizzled(char* at, int swizzle) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  if (swizzle == 0) return at;
  return reinterpret_cast<char*>(address ^ (address >> 7 & (swizzle / 16 - 1)) << 4);
}

// The part of a row of the box that lies inside of the tensor; bytes = 0 if there is none.
struct Row {
  char* shared;   // of its first byte, without the swizzle
  int first;      // byte that is inside
  int bytes;
  char* global;   // of the first byte that is inside
};

// Calls visit(Row) for all rows of a box, in the order in which they lie in shared memory.
template <typename Visit>
void visit_rows(const Box& box, Visit visit) {
  const TensorView& v = box.map.view;
  const int bytes = row_bytes(box.map), count = box_bytes(box.map) / bytes;
  const int64_t begin = box.at[0], end = begin + v.box[0];
  const int64_t inside = begin < 0 ? 0 : begin;
  const int64_t outside = end < static_cast<int64_t>(v.extent[0])
                              ? end
                              : static_cast<int64_t>(v.extent[0]);
  for (int index = 0; index < count; ++index) {
    Row row = {box.shared + static_cast<ptrdiff_t>(index) * bytes, 0, 0, nullptr};
    bool is_inside = inside < outside;
    int64_t offset = inside * box.map.element_bytes;
    int rest = index;
    for (int i = 1; i < v.rank; ++i) {
      const int64_t at = box.at[i] + int64_t{rest % elements(v, i)} * v.step[i];
      rest /= elements(v, i);
      is_inside = is_inside && at >= 0 && at < static_cast<int64_t>(v.extent[i]);
      offset += at * static_cast<int64_t>(v.stride_bytes[i]);
    }
    if (is_inside) {
      row.first = static_cast<int>(inside - begin) * box.map.element_bytes;
      row.bytes = static_cast<int>(outside - inside) * box.map.element_bytes;
      row.global = box.map.address + offset;
    }
    visit(row);
  }
}

// Calls visit(place in shared memory, byte of the row, bytes) for pieces that a swizzle leaves whole.
template <typename Visit>
void visit_pieces(const Row& row, int swizzle, Visit visit) {
  const int end = row.first + row.bytes;
  for (int byte = row.first; byte < end;) {
    const int vector = byte & ~static_cast<int>(VECTOR - 1);
    const int next = vector + static_cast<int>(VECTOR) < end ? vector + static_cast<int>(VECTOR)
                                                             : end;
    visit(swizzled(row.shared + vector, swizzle) + (byte - vector), byte, next - byte);
    byte = next;
  }
}

Box make_box(const char* name, const TensorMap& map, const void* shared,
             std::initializer_list<int> at, Site site) {
  auto refuse = [&](const std::string& why) {
    worker->fault(*worker->running, std::string(name) + " (" + text(site) + ") " + why);
  };
  const TensorView& v = map.view;
  if (map.element_bytes == 0) {
    refuse("with a tensor map that was never encoded");
  }
  if (static_cast<size_t>(v.rank) != at.size()) {
    refuse("with " + std::to_string(at.size()) + " coordinates and the map of a tensor of " +
           std::to_string(v.rank) + " dimensions");
  }
  if (v.swizzle != 0 && row_bytes(map) != v.swizzle) {
    refuse("of a box whose rows are " + std::to_string(row_bytes(map)) + " bytes, less than the " +
           std::to_string(v.swizzle) + " of its swizzle: the interpreter knows full rows alone");
  }
  if (reinterpret_cast<uintptr_t>(shared) % 128 != 0) {
    refuse("with an unaligned box at " + shared_place(shared) +
           ": its address is a multiple of 128 bytes");
  }
  if (!is_shared(shared, static_cast<size_t>(box_bytes(map)))) {
    refuse("of a box of " + std::to_string(box_bytes(map)) + " bytes at " + shared_place(shared) +
           ", beyond its end");
  }
  Box box = {map, {}, static_cast<char*>(const_cast<void*>(shared))};
  int i = 0;
  for (const int coordinate : at) box.at[i++] = coordinate;
  // An illegal instruction on an H200, whatever the swizzle.
  if (box.at[0] * int64_t{map.element_bytes} % static_cast<int64_t>(VECTOR) != 0) {
    refuse("of a box that begins at element " + std::to_string(box.at[0]) +
           " of the innermost dimension: that is no multiple of 16 bytes");
  }
  return box;
}

// The vectors of the box that a store has to read.
std::vector<const char*> sources_of(const Box& box) {
  std::vector<const char*> vectors;
  visit_rows(box, [&](const Row& row) {
    visit_pieces(row, box.map.view.swizzle, [&](const char* at, int byte, int) {
      vectors.push_back(at - byte % static_cast<int>(VECTOR));
    });
  });
  return vectors;
}

void read_store(Fiber& fiber, BoxStore& store) {
  if (store.is_read) return;
  store.is_read = true;
  store.contents.resize(static_cast<size_t>(box_bytes(store.box.map)));
  check::perform_reads({&fiber}, sources_of(store.box), store.site);
  visit_rows(store.box, [&](const Row& row) {
    char* const contents = store.contents.data() + (row.shared - store.box.shared);
    visit_pieces(row, store.box.map.view.swizzle, [&](const char* at, int byte, int bytes) {
      memcpy(contents + byte, at, static_cast<size_t>(bytes));
    });
  });
}

void write_store(const Fiber& fiber, const BoxStore& store) {
  visit_rows(store.box, [&](const Row& row) {
    if (row.bytes == 0) return;
    const size_t bytes = static_cast<size_t>(row.bytes);
    check::access(fiber, row.global, bytes, true, store.site);
    memcpy(row.global, store.contents.data() + (row.shared - store.box.shared) + row.first, bytes);
  });
}

}  // namespace

// What cuTensorMapEncodeTiled refuses, without an interleaved layout.
cudaError_t encode_tensor_map(TensorMap& map, int element_bytes, void* address,
                              const TensorView& view) {
  const uint64_t row = uint64_t{view.box[0]} * static_cast<unsigned>(element_bytes);
  const bool fits = view.rank >= 1 && view.rank <= DIMENSIONS &&
                    reinterpret_cast<uintptr_t>(address) % 16 == 0 && row % 16 == 0 &&
                    (view.swizzle == 0 || view.swizzle == 64 || view.swizzle == 128) &&
                    (view.swizzle == 0 || row <= static_cast<uint64_t>(view.swizzle));
  if (!fits) return cudaErrorInvalidValue;
  for (int i = 0; i < view.rank; ++i) {
    if (view.extent[i] == 0 || view.extent[i] > uint64_t{1} << 32) return cudaErrorInvalidValue;
    if (view.box[i] == 0 || view.box[i] > 256) return cudaErrorInvalidValue;
    if (view.step[i] == 0 || view.step[i] > 8) return cudaErrorInvalidValue;
    if (i == 0) continue;
    if (view.stride_bytes[i] % 16 != 0 || view.stride_bytes[i] >= uint64_t{1} << 40) {
      return cudaErrorInvalidValue;
    }
  }
  map = {static_cast<char*>(address), element_bytes, view};
  return cudaSuccess;
}

cudaError_t replace_address(TensorMap& map, void* address) {
  if (map.element_bytes == 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  map.address = static_cast<char*>(address);
  return cudaSuccess;
}

void tma_load(void* to, const TensorMap& map, uint64_t* barrier, std::initializer_list<int> at,
              Site site) {
  Fiber& fiber = *worker->running;
  require_copies_barrier(barrier, "tma_load", site);
  const Box box = make_box("tma_load", map, to, at, site);
  visit_rows(box, [&](const Row& row) {
    if (row.bytes > 0) {
      check::access(fiber, row.global, static_cast<size_t>(row.bytes), false, site);
    }
  });
  issue_bulk({{to, nullptr, box_bytes(map), 0}, barrier, &fiber, site, true, box});
}

// What lies outside of the tensor is zeros.
void fill_box(const Box& box) {
  memset(box.shared, 0, static_cast<size_t>(box_bytes(box.map)));
  visit_rows(box, [&](const Row& row) {
    visit_pieces(row, box.map.view.swizzle, [&](char* at, int byte, int bytes) {
      memcpy(at, row.global + (byte - row.first), static_cast<size_t>(bytes));
    });
  });
}

void tma_store(const TensorMap& map, const void* from, std::initializer_list<int> at, Site site) {
  Fiber& fiber = *worker->running;
  const Box box = make_box("tma_store", map, from, at, site);
  for (int i = 0; i < map.view.rank; ++i) {
    if (box.at[i] < 0) {  // an illegal instruction on an H200
      worker->fault(fiber, "tma_store (" + text(site) + ") of a box that begins at coordinate " +
                               std::to_string(box.at[i]) +
                               ": stores clip what lies behind the tensor, not what lies before it");
    }
    if (i == 0) continue;
    if (map.view.step[i] == 1) continue;
    worker->fault(fiber, "tma_store (" + text(site) + ") with a map whose elements are apart: the " +
                             "steps of a store's are 1");
  }
  check::issue_reads({&fiber}, sources_of(box), false, site);
  fiber.stores.push_back({box, fiber.committed_stores, site, false, {}});
}

void tma_store_commit() { ++worker->running->committed_stores; }

void tma_store_wait_read(int pending) {
  Fiber& fiber = *worker->running;
  for (BoxStore& store : fiber.stores) {
    if (store.group < fiber.committed_stores - pending) read_store(fiber, store);
  }
}

void tma_store_wait() {
  Fiber& fiber = *worker->running;
  tma_store_wait_read(0);
  while (!fiber.stores.empty() && fiber.stores.front().is_read) {
    write_store(fiber, fiber.stores.front());
    fiber.stores.pop_front();
  }
}

void end_stores(Fiber& fiber) {
  for (; !fiber.stores.empty(); fiber.stores.pop_front()) {
    const BoxStore& store = fiber.stores.front();
    if (!store.is_read) {
      worker->fault(fiber, "it ended before its store (" + text(store.site) +
                               ") had read shared memory: tma_store_wait is missing");
    }
    write_store(fiber, store);
  }
}

}  // namespace host
}  // namespace convgen
