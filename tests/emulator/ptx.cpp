// Kernels from PTX: which there are, and what they cannot do.
#include "ptx.h"

#include <map>
#include <utility>

namespace cuda_emulator {

using Names = std::pair<std::string, std::string>;

static std::map<Names, Translation>& translations() {
  static std::map<Names, Translation> all;
  return all;
}

// nvcc and the host's compiler mangle names alike but for the mark of a static function, which is not in what they mean.
void Translations::add(const Translation* first, int count) {
  for (const Translation* each = first; each != first + count; ++each)
    translations()[{each->file, demangled(each->symbol)}] = *each;
}

bool any_translations() { return !translations().empty(); }

const Translation* translation_of(const void* kernel) {
  const Symbol& symbol = kernel_symbol(kernel);
  const auto found = translations().find({symbol.file, symbol.name});
  return found == translations().end() ? nullptr : &found->second;
}

std::vector<Coverage> coverage() {
  std::vector<Coverage> all;
  for (const auto& each : translations()) {
    const Translation& kernel = each.second;
    Coverage of = {each.first.second, 0, 0, {}};
    for (int b = 0; b < kernel.block_count; ++b) {
      of.all += kernel.blocks[b].instructions;
      if (kernel.seen[b])
        of.ran += kernel.blocks[b].instructions;
      else
        of.missed.push_back(kernel.blocks[b].site);
    }
    all.push_back(of);
  }
  return all;
}

void no_address(const char* site, const char* what, uint64_t address, int bytes) {
  fail("%s: %d bytes at 0x%llx: %s", site, bytes, static_cast<unsigned long long>(address), what);
}

void no_quotient(const char* site) { fail("%s: division by zero", site); }

}  // namespace cuda_emulator
