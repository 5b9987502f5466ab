// A two by two block of matrix tiles: the only operations the tile kernels use.
//
// `Tiles` holds 32 x 32 float32 sums. The left factor is 32 rows of 32 bfloat16, upper and lower 16 rows apart; the right factor
// is 16 pairs of depth by 32 columns, left and right 16 columns apart. A tile in memory is 1 KB, contiguous. `multiply` adds
// their product, 32,768 multiply-adds; `Rows` and `Columns` of 1 leave out the second half.
//
// Three kinds: registers made for it (AMX), AVX-512's products of pairs, and a software twin of AMX for the tests. Around the
// work of a thread stand `begin` and `end`. `kRate` is how many products take as long as a multiply-add in float32, by the
// manuals.
#pragma once

#include <cstddef>

namespace pairclip::kernels {

constexpr int kTileBytes = 1024;

}  // namespace pairclip::kernels

#if defined(__AMX_BF16__)
#include "kernels/tiles_amx.h"
#elif defined(__AVX512BF16__)
#include "kernels/tiles_avx512.h"
#else
#include "kernels/tiles_software.h"
#endif
