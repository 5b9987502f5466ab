// The mean of a block's rows while the second product adds to it, the same for every way of multiplying.
//
// A whole block of a whole number of panels lies panel by panel, [depth / Width][Rows][Width], and is put in order at the end:
// rows of a power of two apart fall into few sets of the first-level cache and would push each other out of it. Any other
// block is row after row from the beginning; its panels are copied.
#pragma once

#include <cstring>

#include "kernels/engine.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

template <int Rows, int Width>
struct Mean {
  float* numbers;
  int rows, depth;

  bool by_panels() const { return rows == Rows && depth % Width == 0; }

  // Calls add(sums, stride) for the Rows x Width numbers of the panel that starts at column `first`.
  template <class Add>
  void panel(int first, const Add& add) const {
    if (by_panels()) return add(numbers + static_cast<std::ptrdiff_t>(first) * Rows, Width);
    alignas(64) float sums[Rows][Width] = {};
    const std::size_t bytes = sizeof(float) * (depth - first < Width ? depth - first : Width);
    for (int r = 0; r < rows; ++r) std::memcpy(sums[r], numbers + static_cast<std::ptrdiff_t>(r) * depth + first, bytes);
    add(sums[0], Width);
    for (int r = 0; r < rows; ++r) std::memcpy(numbers + static_cast<std::ptrdiff_t>(r) * depth + first, sums[r], bytes);
  }

  void shrink(int row, float factor) const {
    const std::ptrdiff_t along = by_panels() ? Rows * Width : Width, across = by_panels() ? Width : depth;
    for (int first = 0; first < depth; first += Width)
      for (int d = 0; d < Width && first + d < depth; ++d) numbers[first / Width * along + row * across + d] *= factor;
  }

  // Puts the rows one after the other; `copy` has room for all of them.
  void unpack(float* copy) const {
    if (!by_panels()) return;
    std::memcpy(copy, numbers, sizeof(float) * Rows * depth);
    for (int first = 0; first < depth; first += Width)
      for (int r = 0; r < Rows; ++r)
        std::memcpy(numbers + static_cast<std::ptrdiff_t>(r) * depth + first, copy + first * Rows + r * Width,
                    sizeof(float) * Width);
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
