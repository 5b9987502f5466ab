#pragma once

#include <nanobind/nanobind.h>

namespace pairclip::conv {

void bind(nanobind::module_& module);

}  // namespace pairclip::conv
