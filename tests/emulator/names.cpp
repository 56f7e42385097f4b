// The name of a kernel from its address: kernels are static functions, so it stands in the file's own symbol table,
// behind the name of its source.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>

#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "engine.h"

namespace cuda_emulator {

std::string demangled(const char* symbol) {
  int status = 0;
  char* const made = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  const std::string name = made ? made : symbol;
  free(made);
  return name;
}

// "tokenflow_ext::cuda::search<8>(float const*, int)" as "search<8>".
static std::string short_name(const std::string& name) {
  int depth = 0;
  size_t begin = 0, end = name.size();
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth) continue;
    if (name[i] == ' ' || name[i] == ':') begin = i + 1;
    if (name[i] == '(' && name.compare(i, 11, "(anonymous ") != 0) {
      end = i;
      break;
    }
  }
  return name.substr(begin, end - begin);
}

static Symbol symbol_at(const void* kernel) {
  const Symbol unknown = {"", "a kernel"};
  Dl_info info;
  void* extra = nullptr;
  if (!dladdr1(kernel, &info, &extra, RTLD_DL_LINKMAP)) return unknown;
  const char* const path = static_cast<link_map*>(extra)->l_name;
  std::ifstream file(*path ? path : "/proc/self/exe", std::ios::binary);
  const std::string image{std::istreambuf_iterator<char>(file), {}};
  if (image.size() < sizeof(ElfW(Ehdr))) return unknown;
  const auto* const header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
  const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
  const uintptr_t wanted = reinterpret_cast<uintptr_t>(kernel) - static_cast<link_map*>(extra)->l_addr;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* const symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[s].sh_offset);
    const char* const names = image.data() + sections[sections[s].sh_link].sh_offset;
    std::string file;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      const char* const name = names + symbols[i].st_name;
      if ((symbols[i].st_info & 15) == STT_FILE) file = strrchr(name, '/') ? strrchr(name, '/') + 1 : name;
      if (symbols[i].st_value == wanted && (symbols[i].st_info & 15) == STT_FUNC) return {file, demangled(name)};
    }
  }
  return unknown;  // of a stripped file
}

const Symbol& kernel_symbol(const void* kernel) {
  static std::map<const void*, Symbol> known;
  auto found = known.find(kernel);
  if (found == known.end()) found = known.emplace(kernel, symbol_at(kernel)).first;
  return found->second;
}

const char* kernel_name(const void* kernel) { return keep(short_name(kernel_symbol(kernel).name).c_str()); }

}  // namespace cuda_emulator
