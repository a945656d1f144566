// Tensor maps of calls: encoded once for each shape, and given another address from then on.
#ifndef CONVGEN_IMPLICIT_GEMM_MAPS_CUH
#define CONVGEN_IMPLICIT_GEMM_MAPS_CUH

#include "sm90.cuh"

namespace convgen {

inline bool same_view(const TensorView& a, const TensorView& b) {
  if (a.rank != b.rank || a.swizzle != b.swizzle) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.extent[i] != b.extent[i] || a.box[i] != b.box[i] || a.step[i] != b.step[i]) return false;
    if (i > 0 && a.stride_bytes[i] != b.stride_bytes[i]) return false;
  }
  return true;
}

// The maps that this thread has encoded lately: encoding one takes 6 us. Nothing in a map but its
// address depends on where a tensor lies.
class MapCache {
 public:
  // The entry for a view, and whether it holds a map of it already.
  TensorMap& find(const TensorView& view, int device, bool& known) {
    uint64_t hash = static_cast<uint64_t>(view.rank * 256 + view.swizzle);
    const auto mix = [&](uint64_t value) { hash = (hash ^ value) * 0x9E3779B97F4A7C15u; };
    for (int i = 0; i < view.rank; ++i) {
      mix(view.extent[i]), mix(view.stride_bytes[i]);
      mix(uint64_t{view.box[i]} << 8 | view.step[i]);
    }
    const size_t first = hash >> 57;
    known = true;
    for (size_t i = 0; i < WAYS; ++i) {
      Entry& entry = entries_[(first + i) % ENTRIES];
      if (entry.device == device && same_view(entry.view, view)) return entry.map;
    }
    known = false;
    Entry& entry = entries_[(first + next_++ % WAYS) % ENTRIES];
    entry.view = view, entry.device = device;
    return entry.map;
  }

  // Forgets the entry that find() returned, whose map could not be made.
  void forget(TensorMap& map) { reinterpret_cast<Entry*>(&map)->device = NONE; }

 private:
  static constexpr size_t ENTRIES = 128, WAYS = 4;
  static constexpr int NONE = -1;
  struct Entry {
    TensorMap map;  // first: forget() finds the entry by it
    TensorView view;
    int device = NONE;
  };
  Entry entries_[ENTRIES];
  size_t next_ = 0;
};

// Fills `map` for a tensor of `T`s at `address`, a multiple of 16, of the current device.
template <typename T>
cudaError_t make_tensor_map(TensorMap& map, const void* address, const TensorView& view,
                            int device) {
  thread_local MapCache cache;
  void* const at = const_cast<void*>(address);
  bool known;
  TensorMap& cached = cache.find(view, device, known);
  if (!known) {
    if (const cudaError_t error = encode_tensor_map<T>(cached, at, view)) {
      cache.forget(cached);
      return error;
    }
  }
  map = cached;
  return known ? replace_address(map, at) : cudaSuccess;
}

}  // namespace convgen

#endif  // CONVGEN_IMPLICIT_GEMM_MAPS_CUH
