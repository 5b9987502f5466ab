// The module `pairclip_fast._native`. Each room binds its own functions.
#include "kernels/bindings.h"

#include <nanobind/nanobind.h>

#include "conv/bindings.h"
#include "core/cpu.h"
#include "tower/bindings.h"

namespace nb = nanobind;

namespace pairclip::loader {
void bind(nb::module_& module);
}

NB_MODULE(_native, module) {
  module.doc() = "C++ core of pairclip-fast; `pairclip_fast.native` is its one importer.";
  module.def(
      "isa", [] { return pairclip::name(pairclip::best_level()); },
      "Instruction set in use: portable, avx2, avx512, avx512_bf16 or amx.");
  nb::module_ kernels = module.def_submodule("kernels");
  pairclip::kernels::bind(kernels);
  nb::module_ tower = module.def_submodule("tower");
  pairclip::tower::bind(tower);
  nb::module_ conv = module.def_submodule("conv");
  pairclip::conv::bind(conv);
  pairclip::loader::bind(module);
}
