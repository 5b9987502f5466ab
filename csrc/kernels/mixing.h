// The end of the second product, the same for every way of multiplying.
#pragma once

#include "kernels/engine.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// mean = mean * shrink + found, in columns [first, first + Width). The old mean is scaled where it is read anyway, so an online
// softmax costs no pass of its own over its output.
template <int Rows, int Width>
void add_mixed(const Step& step, const SoftmaxRow* rows, const float (&found)[Rows][Width], int first, float* mean) {
  for (int r = 0; r < step.rows; ++r) {
    float* out = mean + static_cast<std::ptrdiff_t>(r) * step.depth + first;
    const float shrink = rows[r].shrink;
    if (step.depth - first >= Width) {
      for (int i = 0; i < Width; ++i) out[i] = out[i] * shrink + found[r][i];
    } else {
      for (int i = 0; i < step.depth - first; ++i) out[i] = out[i] * shrink + found[r][i];
    }
  }
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
