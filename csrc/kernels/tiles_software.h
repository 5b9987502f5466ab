// Matrix tiles in software: the twin of AMX, with which the kernels above are tested on any machine. It is slow.
//
// It repeats what the processor documents for tdpbf16ps (Intel SDM, volume 2): even and odd members of the pairs are summed apart
// from zero, then added, then added to the sums; denormal numbers count as zero everywhere. (It rounds product and sum as one;
// the product of two bfloat16 is exact in float32, so that needs no fused instruction here.)
#pragma once

#include "kernels/tiles_in_memory.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

class Tiles : public TilesInMemory {
 public:
  static constexpr int kRate = 16;
  static constexpr const char* kPrecision = "bfloat16 tiles, float32 sums";

  void multiply() { multiply(left_, right_); }

  template <int Rows = 2, int Columns = 2>
  void multiply(const void* left, const void* right, bool /*streamed*/ = false, std::ptrdiff_t apart = kTileBytes) {
    std::uint16_t rows[32][32], pairs[16][32];
    std::memcpy(rows, left, Rows * kTileBytes);
    for (int half = 0; half < Columns; ++half) {
      std::memcpy(pairs, static_cast<const char*>(right) + half * apart, kTileBytes);
      float numbers[16][2][16];  // pair of depth, member, column
      for (int pair = 0; pair < 16; ++pair)
        for (int i = 0; i < 32; ++i) numbers[pair][i % 2][i / 2] = flushed(widened(pairs[pair][i]));
      for (int row = 0; row < 16 * Rows; ++row) {
        float members[2][16] = {};
        for (int k = 0; k < 32; ++k) {
          const float a = flushed(widened(rows[row][k]));
          float* sums = members[k % 2];
          for (int column = 0; column < 16; ++column) sums[column] = flushed(sums[column] + a * numbers[k / 2][k % 2][column]);
        }
        float* sums = sums_[row] + 16 * half;
        for (int column = 0; column < 16; ++column)
          sums[column] = flushed(sums[column] + flushed(members[0][column] + members[1][column]));
      }
    }
  }

 private:
  static float flushed(float x) { return x > -0x1p-126f && x < 0x1p-126f ? 0.0f : x; }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
