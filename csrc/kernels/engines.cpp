#include "kernels/engines.h"

#include <stdexcept>

#include "core/cpu.h"

namespace pairclip::kernels {
namespace {

const Engine& of_level(Level level, Element type) {
  switch (level) {
#if defined(PAIRCLIP_BUILT_amx)
    case Level::amx:
      return amx::tile_engine(type);
#endif
#if defined(PAIRCLIP_BUILT_avx512_bf16)
    case Level::avx512_bf16:
      return avx512_bf16::tile_engine(type);
#endif
#if defined(PAIRCLIP_BUILT_avx512)
    case Level::avx512:
      return avx512::fma_engine();
#endif
#if defined(PAIRCLIP_BUILT_avx2)
    case Level::avx2:
      return avx2::fma_engine();
#endif
    default:
      static_cast<void>(type);
      return portable::fma_engine();
  }
}

}  // namespace

std::vector<std::string> engine_names() {
  std::vector<std::string> names{"emulated"};
  for (int level = 0; level <= static_cast<int>(best_level()); ++level)
    names.emplace_back(pairclip::name(static_cast<Level>(level)));
  return names;
}

const Engine& engine(const std::string& name, Element type) {
  if (name == "emulated") return portable::tile_engine(type);
  for (int level = 0; level <= static_cast<int>(best_level()); ++level)
    if (name == pairclip::name(static_cast<Level>(level))) return of_level(static_cast<Level>(level), type);
  throw std::invalid_argument("kernels: no engine named '" + name + "' here");
}

}  // namespace pairclip::kernels
