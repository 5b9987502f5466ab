// Matrix tiles of float32 by fused multiply-add: the operations of tiles.h on factors without pairs.
//
// The left factor is 32 rows of 32 numbers, the right factor 32 of depth by 32 columns, 4 KB each in one piece. The sums lie in
// the first-level cache and pass through the registers a few rows and two vectors at a time: eight vectors, as many as two
// multipliers of four cycles' latency keep busy, for four broadcasts and two loads a step.
//
// A sum is one chain of multiply-adds in the order of the depth.
#pragma once

#include "kernels/tiles_in_memory.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// Adds to `Rows` rows and so many vectors of the sums; rows of all three matrices are 32 numbers apart.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void multiply_add(const float* left, const float* right, float* to) {
  Vec sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sums[row][v] = load(to + row * 32 + v * kLanes);
#pragma GCC unroll 4
  for (int k = 0; k < 32; ++k) {
    Vec columns[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) columns[v] = load(right + k * 32 + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row) {
      const Vec number = set(left[row * 32 + k]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[row][v] = fma(number, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(to + row * 32 + v * kLanes, sums[row][v]);
}

class Float32Tiles : public TilesInMemory {
 public:
  template <int Rows = 2, int Columns = 2>
  void multiply(const float* left, const float* right, bool /*streamed*/ = false) {
    constexpr int kVectors = 2 * kLanes <= 16 * Columns ? 2 : 1, kRows = 8 / kVectors;
    for (int column = 0; column < 16 * Columns; column += kVectors * kLanes)
      for (int row = 0; row < 16 * Rows; row += kRows)
        multiply_add<kRows, kVectors>(left + row * 32, right + column, sums_[row] + column);
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
