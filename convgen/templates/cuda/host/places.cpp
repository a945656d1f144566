// Where code and constants of the library lie, and which lines of the source they are.
#include "places.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>

#include <utility>
#include <vector>

namespace convgen {
namespace host {
namespace {

// The library's own code and constants.
struct Image {
  std::vector<std::pair<char*, char*>> parts;
  char* base = nullptr;
  bool has(const char* address) const {
    for (const auto& part : parts) {
      if (part.first <= address && address < part.second) return true;
    }
    return false;
  }
};

const Image& image() {
  static const Image* found = [] {
    Image* result = new Image;
    auto visit = [](dl_phdr_info* info, size_t, void* data) {
      Image candidate;
      candidate.base = reinterpret_cast<char*>(info->dlpi_addr);
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        char* low = candidate.base + info->dlpi_phdr[i].p_vaddr;
        candidate.parts.push_back({low, low + info->dlpi_phdr[i].p_memsz});
      }
      if (!candidate.has(reinterpret_cast<char*>(&image))) return 0;
      *static_cast<Image*>(data) = candidate;
      return 1;
    };
    dl_iterate_phdr(visit, result);
    return result;
  }();
  return *found;
}

}  // namespace

bool in_library(const void* address) { return image().has(static_cast<const char*>(address)); }

// addr2line comes with every linker.
std::string source_of(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info) || !info.dli_fname || strchr(info.dli_fname, '\'')) return "";
  const size_t offset = static_cast<size_t>(static_cast<const char*>(code) - image().base) - 1;
  char command[4096 + 64];
  snprintf(command, sizeof command, "LC_ALL=C addr2line -i -e '%s' 0x%zx 2>/dev/null",
           info.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  std::string places;
  char line[4096];
  while (fgets(line, sizeof line, pipe)) {
    char* name = strrchr(line, '/');
    std::string place = name ? name + 1 : line;
    place = place.substr(0, place.find_first_of(" \n"));
    if (place.find('?') != std::string::npos || place.rfind("convgen_host.cuh", 0) == 0) continue;
    places += (places.empty() ? "" : ", called from ") + place;
  }
  pclose(pipe);
  return places;
}

}  // namespace host
}  // namespace convgen
