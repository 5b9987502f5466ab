#pragma once

#include <nanobind/nanobind.h>

namespace pairclip::tower {

void bind(nanobind::module_& module);

}  // namespace pairclip::tower
