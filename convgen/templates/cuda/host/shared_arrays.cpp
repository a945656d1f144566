// Which static `__shared__` arrays a library has: read from its own symbol table.
//
// On the host they are thread-local variables with a tag in their names (see `__shared__` in
// convgen_host.cuh), so the table gives each one's place in the library's thread-local block, its
// size and its name.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "state.h"

namespace convgen {
namespace host {
namespace {

__thread char anchor;
constexpr const char* ANCHOR = "_ZN7convgen4host12_GLOBAL__N_16anchorE";

std::vector<char> contents_of_this_library() {
  Dl_info info;
  std::vector<char> bytes;
  if (!dladdr(reinterpret_cast<void*>(&shared_anchor), &info) || !info.dli_fname) return bytes;
  FILE* file = fopen(info.dli_fname, "rb");
  if (!file) file = fopen("/proc/self/exe", "rb");
  if (!file) return bytes;
  char buffer[1 << 16];
  for (size_t count; (count = fread(buffer, 1, sizeof buffer, file)) > 0;) {
    bytes.insert(bytes.end(), buffer, buffer + count);
  }
  fclose(file);
  return bytes;
}

// "(anonymous namespace)::kernel<8>(float*)::tile[abi:convgen_shared]" -> "tile".
std::string variable_name(const char* symbol) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : symbol;
  free(demangled);
  name = name.substr(0, name.find("[abi:"));
  const size_t at = name.rfind("::");
  return at == std::string::npos ? name : name.substr(at + 2);
}

std::vector<SharedArray> read() {
  std::vector<SharedArray> arrays;
  const std::vector<char> bytes = contents_of_this_library();
  using Header = ElfW(Ehdr);
  using Section = ElfW(Shdr);
  using Symbol = ElfW(Sym);
  if (bytes.size() < sizeof(Header) || memcmp(bytes.data(), ELFMAG, SELFMAG) != 0) return arrays;
  const Header* header = reinterpret_cast<const Header*>(bytes.data());
  const Section* sections = reinterpret_cast<const Section*>(bytes.data() + header->e_shoff);
  ptrdiff_t anchor_offset = -1;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const Symbol* symbols = reinterpret_cast<const Symbol*>(bytes.data() + sections[i].sh_offset);
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof(Symbol); ++j) {
      if ((symbols[j].st_info & 0xf) != STT_TLS) continue;
      const char* name = names + symbols[j].st_name;
      const ptrdiff_t offset = static_cast<ptrdiff_t>(symbols[j].st_value);
      if (!strcmp(name, ANCHOR)) anchor_offset = offset;
      if (strstr(name, "B14convgen_shared") && symbols[j].st_size > 0) {
        arrays.push_back({offset, symbols[j].st_size, variable_name(name)});
      }
    }
  }
  if (anchor_offset < 0) arrays.clear();
  for (SharedArray& array : arrays) array.offset -= anchor_offset;
  std::sort(arrays.begin(), arrays.end(),
            [](const SharedArray& a, const SharedArray& b) { return a.offset < b.offset; });
  return arrays;
}

}  // namespace

const std::vector<SharedArray>& shared_arrays() {
  static const std::vector<SharedArray>* arrays = new std::vector<SharedArray>(read());
  return *arrays;
}

char* shared_anchor() {
  // _FORTIFY_SOURCE, which some distributions' compilers define, would take what lies around the
  // anchor for an overflow of it.
  char* at = &anchor;
  asm("" : "+r"(at));
  return at;
}

}  // namespace host
}  // namespace convgen
