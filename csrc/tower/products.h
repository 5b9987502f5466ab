// Products of some strips of rows with a packed weight, finished row by row while the tiles are busy with the next block.
//
// The tile unit and the vector unit work at the same time only if their instructions stand close together: a whole block's
// activation is longer than what a core looks ahead. So the rows of the last block are finished a few per step of depth.
//
// Panel by panel of the weight: 32 KB of it stay in the first-level cache while the strips, which fill the second-level cache,
// pass by. Depth beyond `kPiece` blocks is summed up in pieces, in float32 sums in memory.
#pragma once

#include "tower/rows.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

template <class T>
struct Product {
  const T* left;  // first strip of a matrix in blocks
  int left_panels;
  int strips;
  const T* weight;    // packed
  int weight_blocks;  // of its depth
  int panels;
  float* sums;  // [panels][most_strips] blocks; used where depth comes in pieces
};

// A part of the depth, in blocks: of the left factor from `left`, of the weight from `weight` on.
struct Depth {
  int left, weight, blocks;
  bool first, last;
};

// finish(strip, panel, row, sums): the 32 sums of one row. Called for every row if this is the last part of the depth.
template <class T, class Finish>
void multiply(const Product<T>& product, Depth depth, Finish finish) {
  alignas(64) float finished[2][kBlockNumbers];
  const std::size_t left_stride = static_cast<std::size_t>(product.left_panels) * kBlockNumbers;
  const std::size_t weight_stride = static_cast<std::size_t>(product.weight_blocks) * kBlockNumbers;
  const int rows_per_step = (kBlock + depth.blocks - 1) / depth.blocks;
  constexpr int kLines = kBlockNumbers * sizeof(T) / 64;
  const int lines_per_step = (kLines + product.strips - 1) / product.strips;  // of a block of the next panel
  int waiting = -1, turn = 0;
  int waiting_strip = 0, waiting_panel = 0;
  const auto finish_rows = [&](int from, int to) {
    const float* sums = finished[turn ^ 1];
    for (int r = from; r < to; ++r) finish(waiting_strip, waiting_panel, r, sums + r * kBlock);
  };
  for (int panel = 0; panel < product.panels; ++panel) {
    const T* right = product.weight + panel * weight_stride + static_cast<std::size_t>(depth.weight) * kBlockNumbers;
    for (int strip = 0; strip < product.strips; ++strip) {
      const T* left = product.left + strip * left_stride + static_cast<std::size_t>(depth.left) * kBlockNumbers;
      float* sums = product.sums + (static_cast<std::size_t>(panel) * most_strips(sizeof(T)) + strip) * kBlockNumbers;
      TilesOf<T> tiles;
      if (depth.first) {
        tiles.clear();
      } else {
        tiles.load(sums, kBlock);
      }
      const char* next = reinterpret_cast<const char*>(right + weight_stride) + strip * lines_per_step * 64;
      int row = waiting >= 0 ? 0 : kBlock;
      for (int k = 0; k < depth.blocks; ++k) {
        for (int line = 0; line < lines_per_step; ++line) prefetch(next + k * kBlockNumbers * sizeof(T) + line * 64);
        tiles.multiply(left + k * kBlockNumbers, right + k * kBlockNumbers, true);
        if (row < kBlock) {
          const int end = row + rows_per_step < kBlock ? row + rows_per_step : kBlock;
          finish_rows(row, end);
          row = end;
        }
      }
      if (depth.last) {
        tiles.store(finished[turn], kBlock);
        waiting = 0, waiting_strip = strip, waiting_panel = panel, turn ^= 1;
      } else {
        tiles.store(sums, kBlock);
      }
    }
  }
  if (waiting >= 0) finish_rows(0, kBlock);
}

// The whole depth, in pieces, of `kPiece` panels at a time. finish(strip, panel, row, sums) as above.
template <class T, class Finish>
void multiply_whole(Product<T> product, Finish finish) {
  const int blocks = product.weight_blocks, panels = product.panels;
  const int group = blocks > kPiece ? kPiece : panels;
  const T* weight = product.weight;
  for (int panel = 0; panel < panels; panel += group) {
    product.weight = weight + static_cast<std::size_t>(panel) * blocks * kBlockNumbers;
    product.panels = panels - panel < group ? panels - panel : group;
    for (int from = 0; from < blocks; from += kPiece) {
      const int count = blocks - from < kPiece ? blocks - from : kPiece;
      multiply(product, {.left = from, .weight = from, .blocks = count, .first = from == 0, .last = from + count == blocks},
               [&](int strip, int found, int row, const float* sums) { finish(strip, panel + found, row, sums); });
    }
  }
}

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
