// Matrix tiles of float32 by fused multiply-add: the operations of tiles.h on factors without pairs.
//
// The left factor is 32 rows of 32 numbers, the right factor 32 of depth by 32 columns, 4 KB each in one piece. The sums lie in
// the first-level cache and pass through the registers a few rows and two vectors at a time: with AVX2 eight vectors, as many as
// two multipliers of four cycles' latency keep busy, for four broadcasts and two loads a step.
//
// A sum is one chain of multiply-adds in the order of the depth.
#pragma once

#include "kernels/tiles_in_memory.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// Adds to `Rows` rows and two vectors of the sums; rows of all three matrices are 32 numbers apart.
template <int Rows>
[[gnu::always_inline]] inline void multiply_add(const float* left, const float* right, float* to) {
  Vec sums[Rows][2];
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
    sums[row][0] = load(to + row * 32);
    sums[row][1] = load(to + row * 32 + kLanes);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 32; ++k) {
    const Vec first = load(right + k * 32), second = load(right + k * 32 + kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      const Vec number = set(left[row * 32 + k]);
      sums[row][0] = fma(number, first, sums[row][0]);
      sums[row][1] = fma(number, second, sums[row][1]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < Rows; ++row) {
    store(to + row * 32, sums[row][0]);
    store(to + row * 32 + kLanes, sums[row][1]);
  }
}

class Float32Tiles : public TilesInMemory {
 public:
  template <int Rows = 2, int Columns = 2>
  void multiply(const float* left, const float* right, bool /*streamed*/ = false) {
    static_assert(2 * kLanes <= 16 * Columns, "two vectors lie within the columns");
    for (int column = 0; column < 16 * Columns; column += 2 * kLanes)
      for (int row = 0; row < 16 * Rows; row += 4) multiply_add<4>(left + row * 32, right + column, sums_[row] + column);
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
