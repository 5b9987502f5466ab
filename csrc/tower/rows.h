// Rows of 32 numbers, and how a block of 32 of them becomes a factor of a tile product. Numbers are bfloat16, a cache line a row,
// or float32: `T` here and in all that follows.
//
// As the left factor of a product over its columns a block is what it is. The other three ways are here: left over its rows
// (transposed), right with its rows as depth, right with its rows as columns.
#pragma once

#include <type_traits>

#include "kernels/tiles.h"
#include "kernels/tiles_float32.h"
#include "tower/engine.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

using namespace kernels::PAIRCLIP_VARIANT;

constexpr int kVecs = kBlock / kLanes;

template <class T>
using TilesOf = std::conditional_t<std::is_same_v<T, float>, Float32Tiles, Tiles>;

// Into the second-level cache.
inline void prefetch(const void* where) { __builtin_prefetch(where, 0, 2); }

struct Row {
  Vec part[kVecs];
};

inline Row read_row(const float* from) {
  Row row;
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) row.part[i] = load(from + i * kLanes);
  return row;
}

inline void write_row(float* to, const Row& row) {
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) store(to + i * kLanes, row.part[i]);
}

inline Row read_row(const bf16* from) {
  Row row;
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) row.part[i] = widened(from + i * kLanes);
  return row;
}

inline void write_row(bf16* to, const Row& row) { narrow(row.part, to); }

template <class Of>
inline Row each(Of of) {
  Row row;
#pragma GCC unroll 8
  for (int i = 0; i < kVecs; ++i) row.part[i] = of(i);
  return row;
}

inline float total(const Row& row) {
  Vec found = row.part[0];
#pragma GCC unroll 8
  for (int i = 1; i < kVecs; ++i) found += row.part[i];
  return sum(found);
}

inline Row operator+(const Row& a, const Row& b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}
inline Row operator*(const Row& a, const Row& b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}

template <class T>
T* block_at(T* matrix, int panels, int strip, int panel) {
  return matrix + (static_cast<std::size_t>(strip) * panels + panel) * kBlockNumbers;
}

// Row `row` of a matrix in blocks, in one of its panels.
template <class T>
T* row_at(T* matrix, int panels, std::int64_t row, int panel) {
  return block_at(matrix, panels, static_cast<int>(row / kBlock), panel) + row % kBlock * kBlock;
}

// Rows 2 i and 2 i + 1 in pairs, columns 0 to 15 and 16 to 31 apart: [half][16 pairs of rows][16 columns][2].
inline void pair_rows(const bf16* block, bf16* low, bf16* high, int i) {
  typedef bf16 Line __attribute__((vector_size(64)));
  constexpr Line kLow = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  constexpr Line kHigh = kLow + 16;
  Line even, odd;
  std::memcpy(&even, block + 2 * i * kBlock, sizeof even);
  std::memcpy(&odd, block + (2 * i + 1) * kBlock, sizeof odd);
  const Line first = __builtin_shuffle(even, odd, kLow), second = __builtin_shuffle(even, odd, kHigh);
  std::memcpy(low + i * kBlock, &first, sizeof first);
  std::memcpy(high + i * kBlock, &second, sizeof second);
}

// Right factor with the block's rows as depth.
inline void pack_rows_as_depth(const float* block, float* out) { std::memcpy(out, block, kBlockNumbers * sizeof(float)); }
inline void pack_rows_as_depth(const bf16* block, bf16* out) {
  for (int i = 0; i < kBlock / 2; ++i) pair_rows(block, out, out + kBlockNumbers / 2, i);
}

// Right factor with the block's rows as columns.
inline void pack_rows_as_columns(const float* block, float* out) { transpose(block, kBlock, kBlock, kBlock, out, kBlock); }
inline void pack_rows_as_columns(const bf16* block, bf16* out) {
  for (int half = 0; half < kBlockNumbers; half += kBlockNumbers / 2) transpose(block + half, 16, 16, 16, out + half, 16);
}

// The sums of a block's columns, row after row.
template <class T>
void add_rows(const T* block, float* sums) {
  for (int r = 0; r < kBlock; ++r) write_row(sums, read_row(sums) + read_row(block + r * kBlock));
}

// Left factor with the block's rows as depth. Adds the sums of its columns to `sums` if they are wanted.
inline void pack_transposed(const float* block, float* out, float* sums) {
  pack_rows_as_columns(block, out);
  if (sums != nullptr) add_rows(block, sums);
}
inline void pack_transposed(const bf16* block, bf16* out, float* sums) {
  alignas(64) bf16 pairs[kBlockNumbers];
  pack_rows_as_depth(block, pairs);
  pack_rows_as_columns(pairs, out);
  if (sums == nullptr) return;
#if defined(__AVX512BF16__)
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  for (int half = 0; half < 2; ++half) {
    __m512 found = load(sums + 16 * half);
    for (int i = 0; i < 16; ++i) {
      __m512bh pair;
      std::memcpy(&pair, pairs + (16 * half + i) * kBlock, sizeof pair);
      found = _mm512_dpbf16_ps(found, pair, ones);
    }
    store(sums + 16 * half, found);
  }
#else
  add_rows(block, sums);
#endif
}

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
