// Binds the kernels as the submodule `kernels`.
#pragma once

#include <nanobind/nanobind.h>

namespace pairclip::kernels {

void bind(nanobind::module_& module);

}  // namespace pairclip::kernels
