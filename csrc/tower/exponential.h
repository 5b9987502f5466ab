// e to the power of x, by the bank kernels' power of four.
#pragma once

#include "kernels/online_softmax.h"
#include "tower/rows.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

// For x <= 88; relative error about |x| * 2^-24, from rounding the product. Denormal results are zero between `begin` and `end`.
inline Vec exponential(Vec x) { return power_of_four(x * kernels::kLog4E); }

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
