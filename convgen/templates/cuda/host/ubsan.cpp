// Undefined behaviour in a CONVGEN_CHECKED build: the handlers that -fsanitize=undefined calls,
// telling block and thread. Their arguments are an interface of the compiler's: every handler is
// given first a structure that starts with a place in the source.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "state.h"

namespace {

struct Place {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  Place place;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

void report(const Place* place, const std::string& what) {
  using namespace convgen::host;
  const Site site = {place->file, static_cast<int>(place->line)};
  const std::string full = "undefined behaviour: " + what + " (" + text(site) + ")";
  if (worker && worker->running) {
    worker->fault(*worker->running, full);
  } else {
    // In host code, around the kernels.
    fprintf(stderr, "convgen interpreter: %s\n", full.c_str());
    abort();
  }
}

}  // namespace

#define CONVGEN_HANDLER(name, what, ...)                                           \
  void __ubsan_handle_##name(Place* place, ##__VA_ARGS__) { report(place, what); } \
  void __ubsan_handle_##name##_abort(Place* place, ##__VA_ARGS__) { report(place, what); }

extern "C" {

CONVGEN_HANDLER(add_overflow, "signed addition overflows", uintptr_t, uintptr_t)
CONVGEN_HANDLER(sub_overflow, "signed subtraction overflows", uintptr_t, uintptr_t)
CONVGEN_HANDLER(mul_overflow, "signed multiplication overflows", uintptr_t, uintptr_t)
CONVGEN_HANDLER(negate_overflow, "signed negation overflows", uintptr_t)
CONVGEN_HANDLER(divrem_overflow, "division by zero, or one that overflows", uintptr_t, uintptr_t)
CONVGEN_HANDLER(shift_out_of_bounds, "shift out of range", uintptr_t, uintptr_t)
CONVGEN_HANDLER(out_of_bounds, "array index out of bounds", uintptr_t)
CONVGEN_HANDLER(builtin_unreachable, "unreachable code reached")
CONVGEN_HANDLER(missing_return, "end of a function without a result")
CONVGEN_HANDLER(vla_bound_not_positive, "array of no or negative size", uintptr_t)
CONVGEN_HANDLER(load_invalid_value, "load of a value that its type does not have", uintptr_t)
CONVGEN_HANDLER(nonnull_arg, "null where a function forbids it")
CONVGEN_HANDLER(pointer_overflow, "pointer arithmetic overflows", uintptr_t, uintptr_t)
CONVGEN_HANDLER(invalid_builtin, "argument that a built-in function forbids")
CONVGEN_HANDLER(function_type_mismatch, "call of a function as another type", uintptr_t)
CONVGEN_HANDLER(alignment_assumption, "assumption of an alignment that is not met", uintptr_t,
                uintptr_t, uintptr_t)
CONVGEN_HANDLER(float_cast_overflow, "conversion to an integer overflows", uintptr_t)

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  report(&data->place, pointer == 0          ? "null pointer"
                       : pointer % alignment ? "unaligned access: address is no multiple of " +
                                                   std::to_string(alignment)
                                             : "access to an object that is too small");
}
void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data, uintptr_t pointer) {
  __ubsan_handle_type_mismatch_v1(data, pointer);
}
void __ubsan_handle_nonnull_return_v1(void*, Place* place) {
  report(place, "null from a function that forbids it");
}
void __ubsan_handle_nonnull_return_v1_abort(void* data, Place* place) {
  __ubsan_handle_nonnull_return_v1(data, place);
}
}
