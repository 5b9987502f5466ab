// Which engine computes what, of those that this build and this processor have.
#pragma once

#include <string>
#include <vector>

#include "kernels/engine.h"

namespace pairclip::kernels {

#define PAIRCLIP_DECLARE_ENGINES(variant)  \
  namespace variant {                      \
  const Engine& fma_engine();              \
  const Engine& tile_engine(Element type); \
  }
PAIRCLIP_DECLARE_ENGINES(portable)
PAIRCLIP_DECLARE_ENGINES(avx2)
PAIRCLIP_DECLARE_ENGINES(avx512)
PAIRCLIP_DECLARE_ENGINES(avx512_bf16)
PAIRCLIP_DECLARE_ENGINES(amx)
#undef PAIRCLIP_DECLARE_ENGINES

// The names that `engine` takes here, best last: instruction sets, and "emulated", the tile kernels with tiles in software.
std::vector<std::string> engine_names();

// Throws std::invalid_argument for a name that is not among them.
const Engine& engine(const std::string& name, Element type);

}  // namespace pairclip::kernels
