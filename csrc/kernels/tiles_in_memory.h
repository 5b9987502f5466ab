// What kinds of matrix tiles share whose sums lie in memory: everything but the product.
#pragma once

#include "kernels/packing.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

class TilesInMemory {
 public:
  static void begin() {}
  static void end() {}

  template <int Rows = 2, int Columns = 2>
  void clear() {
    if constexpr (Columns == 2) return void(std::memset(sums_, 0, Rows * sizeof sums_ / 2));
    for (int row = 0; row < 16 * Rows; ++row) std::memset(sums_[row], 0, Columns * 16 * sizeof(float));
  }
  void load(const float* from, std::ptrdiff_t stride) {
    if (stride == 32) return void(std::memcpy(sums_, from, sizeof sums_));
    for (int row = 0; row < 32; ++row) std::memcpy(sums_[row], from + row * stride, sizeof sums_[row]);
  }
  template <int Rows = 2, int Columns = 2>
  void store(float* out, std::ptrdiff_t stride) const {
    if (Columns == 2 && stride == 32) return void(std::memcpy(out, sums_, Rows * sizeof sums_ / 2));
    for (int row = 0; row < 16 * Rows; ++row) std::memcpy(out + row * stride, sums_[row], Columns * 16 * sizeof(float));
  }
  // Remembered for `multiply` without factors.
  void left(const void* tiles) { left_ = tiles; }
  void right(const void* tiles) { right_ = tiles; }

 protected:
  alignas(64) float sums_[32][32];
  const void *left_ = nullptr, *right_ = nullptr;
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
