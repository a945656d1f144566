// Calls the functions of a library on tensors that are allocated exactly, so that
// AddressSanitizer sees the first byte outside. Usage: driver LIBRARY REQUEST RESPONSE
//
// A request is a sequence of calls, a response the same tensors after them. Each call:
//   int64: length of the symbol's name; the name
//   int64: batch, coarse channels, fine channels, coarse extent (3), fine extent (3)
//   int64: bytes of coarse, fine, weight, bias (-1: null), and then the contents of each
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "convgen_abi.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

const char* (*whereabouts)();

[[noreturn]] void die(const std::string& message) {
  fprintf(stderr, "%s\n", message.c_str());
  exit(2);
}

void read(FILE* file, void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, file) != bytes) die("the request is cut short");
}

int64_t read_number(FILE* file) {
  int64_t number;
  read(file, &number, sizeof number);
  return number;
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  if (bytes < 0) return nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(bytes))) die("out of memory");
  return memory;
}

void* symbol(void* library, const std::string& name) {
  void* found = dlsym(library, name.c_str());
  if (!found) die(name + " is not in the library");
  return found;
}

// After a sanitizer's report: where in the grid it happened.
void tell_whereabouts() { fprintf(stderr, "convgen interpreter: %s\n", whereabouts()); }

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) die(dlerror());
  whereabouts = reinterpret_cast<const char* (*)()>(symbol(library, "convgen_interpret_where"));
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(tell_whereabouts);
#endif
  auto error_string =
      reinterpret_cast<const char* (*)(int)>(symbol(library, "convgen_error_string"));
  FILE* request = fopen(arguments[2], "rb");
  FILE* response = fopen(arguments[3], "wb");
  if (!request || !response) die("the request or the response cannot be opened");
  for (int64_t length; fread(&length, sizeof length, 1, request) == 1;) {
    std::string name(static_cast<size_t>(length), '\0');
    read(request, &name[0], name.size());
    ConvgenCall call = {};
    call.batch = read_number(request);
    call.coarse_channels = read_number(request);
    call.fine_channels = read_number(request);
    for (int64_t& extent : call.coarse_extent) extent = read_number(request);
    for (int64_t& extent : call.fine_extent) extent = read_number(request);
    int64_t bytes[4];
    for (int64_t& size : bytes) size = read_number(request);
    void** const tensors[4] = {&call.coarse, &call.fine, &call.weight, &call.bias};
    for (int i = 0; i < 4; ++i) {
      *tensors[i] = allocate(bytes[i]);
      if (bytes[i] > 0) read(request, *tensors[i], static_cast<size_t>(bytes[i]));
    }
    const int64_t workspace_bytes = reinterpret_cast<int64_t (*)(const ConvgenCall*)>(
        symbol(library, name + "_workspace"))(&call);
    call.workspace = allocate(workspace_bytes);
    if (workspace_bytes > 0) memset(call.workspace, 0xff, static_cast<size_t>(workspace_bytes));
    const int code = reinterpret_cast<int (*)(const ConvgenCall*)>(symbol(library, name))(&call);
    if (code) die(name + ": " + error_string(code));
    for (int i = 0; i < 4; ++i) {
      if (bytes[i] > 0) fwrite(*tensors[i], 1, static_cast<size_t>(bytes[i]), response);
      free(*tensors[i]);
    }
    free(call.workspace);
  }
  fclose(request);
  return fclose(response) == 0 ? 0 : 2;
}
