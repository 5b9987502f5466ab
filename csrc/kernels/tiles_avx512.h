// Matrix tiles by products of pairs (AVX-512 BF16, vdpbf16ps), for processors whose products take no longer than a float32
// multiply-add: AMD's from Zen 4 on.
//
// The sums lie in memory, 4 KB in the first-level cache, and pass through the registers eight rows at a time: 16 vectors, each
// loaded and stored once for 16 products, while the next eight rows are already multiplied. Pairs of the left factor are
// broadcast. That reaches what the multipliers can do, so there is no need for blocks that stay in registers, nor for other
// layouts than AMX's.
//
// The odd member of a pair is added first, then the even one, each rounded; denormal numbers count as zero (Intel SDM, volume 2).
#pragma once

#include <immintrin.h>

#include "kernels/tiles_in_memory.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

class Tiles : public TilesInMemory {
 public:
  static constexpr int kRate = 2;
  static constexpr const char* kPrecision = "bfloat16 products of pairs, float32 sums";

  void multiply() { multiply(left_, right_); }

  template <int Rows = 2, int Columns = 2>
  void multiply(const void* left, const void* right, bool /*streamed*/ = false, std::ptrdiff_t apart = kTileBytes) {
    const char *a = static_cast<const char*>(left), *b = static_cast<const char*>(right);
    for (int top = 0; top < 16 * Rows; top += kRowsAtOnce) {
      __m512 sums[kRowsAtOnce][Columns];
#pragma GCC unroll 8
      for (int row = 0; row < kRowsAtOnce; ++row)
#pragma GCC unroll 2
        for (int column = 0; column < Columns; ++column) sums[row][column] = _mm512_load_ps(sums_[top + row] + 16 * column);
      for (int pair = 0; pair < 16; ++pair) {
        __m512bh columns[Columns];
#pragma GCC unroll 2
        for (int column = 0; column < Columns; ++column)
          columns[column] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + column * apart + pair * 64));
#pragma GCC unroll 8
        for (int row = 0; row < kRowsAtOnce; ++row) {
          int members;
          std::memcpy(&members, a + (top + row) * 64 + pair * 4, sizeof members);
          const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(members));
#pragma GCC unroll 2
          for (int column = 0; column < Columns; ++column)
            sums[row][column] = _mm512_dpbf16_ps(sums[row][column], both, columns[column]);
        }
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRowsAtOnce; ++row)
#pragma GCC unroll 2
        for (int column = 0; column < Columns; ++column) _mm512_store_ps(sums_[top + row] + 16 * column, sums[row][column]);
    }
  }

 private:
  static constexpr int kRowsAtOnce = 8;
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
