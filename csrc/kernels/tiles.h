// A two by two block of matrix tiles (Intel AMX): the only operations the tile kernels use, on the processor and in software.
//
// Registers 0 to 3 hold the 32 x 32 float32 sums, 4 and 5 the upper and lower 16 rows of the left factor (32 bfloat16 each),
// 6 and 7 the left and right 16 columns of the right factor (16 pairs of depth by 16 columns). A tile in memory is 1 KB,
// contiguous. `multiply` adds the four products of 16 x 32 by 32 x 16: 65,536 multiply-adds in four instructions.
//
// The software twin repeats what the processor documents for tdpbf16ps (Intel SDM, volume 2): even and odd members of the
// pairs are summed apart from zero, then added, then added to the sums; denormal numbers count as zero everywhere. (It rounds
// product and sum as one; the product of two bfloat16 is exact in float32, so that needs no fused instruction here.) The twin
// is slow and exists so that the kernels above it can be tested on any machine.
#pragma once

#include "kernels/packing.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace pairclip::kernels::PAIRCLIP_VARIANT {

constexpr int kTileBytes = 1024;

#if defined(__AMX_BF16__)

// GCC's tile intrinsics do not tell the compiler that they read memory: the barriers do.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
  static void begin() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  static void end() { _tile_release(); }
  template <int Rows = 2, int Columns = 2>
  static void clear() {
    _tile_zero(0);
    if constexpr (Columns == 2) _tile_zero(1);
    if constexpr (Rows == 2) _tile_zero(2);
    if constexpr (Rows == 2 && Columns == 2) _tile_zero(3);
  }
  static void load(const float* from, std::ptrdiff_t stride) {
    memory_barrier();
    _tile_loadd(0, from, stride * 4);
    _tile_loadd(1, from + 16, stride * 4);
    _tile_loadd(2, from + 16 * stride, stride * 4);
    _tile_loadd(3, from + 16 * stride + 16, stride * 4);
  }
  static void left(const void* tiles) {
    _tile_loadd(4, tiles, 64);
    _tile_loadd(5, static_cast<const char*>(tiles) + kTileBytes, 64);
  }
  static void right(const void* tiles) {
    _tile_stream_loadd(6, tiles, 64);
    _tile_stream_loadd(7, static_cast<const char*>(tiles) + kTileBytes, 64);
  }
  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  // Loads both factors and multiplies. Each load stands just before its first use, so that the tile unit waits for none but the
  // first; a `streamed` left factor is not worth keeping in the first-level cache. The right factor's halves are `apart` bytes.
  template <int Rows = 2, int Columns = 2>
  static void multiply(const void* left, const void* right, bool streamed = false, std::ptrdiff_t apart = kTileBytes) {
    const char *a = static_cast<const char*>(left), *b = static_cast<const char*>(right);
    memory_barrier();
    if (streamed) {
      _tile_stream_loadd(4, a, 64);
    } else {
      _tile_loadd(4, a, 64);
    }
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns == 2) {
      _tile_loadd(7, b + apart, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows == 2) {
      if (streamed) {
        _tile_stream_loadd(5, a + kTileBytes, 64);
      } else {
        _tile_loadd(5, a + kTileBytes, 64);
      }
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Columns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  template <int Rows = 2, int Columns = 2>
  static void store(float* out, std::ptrdiff_t stride) {
    _tile_stored(0, out, stride * 4);
    if constexpr (Columns == 2) _tile_stored(1, out + 16, stride * 4);
    if constexpr (Rows == 2) _tile_stored(2, out + 16 * stride, stride * 4);
    if constexpr (Rows == 2 && Columns == 2) _tile_stored(3, out + 16 * stride + 16, stride * 4);
    memory_barrier();
  }
};

#else

struct Tiles {
  struct State {
    float sums[32][32];
    std::uint16_t left[2][16][32];   // half, row, depth
    std::uint16_t right[2][16][32];  // half, pair of depth, column and member of the pair
  };
  static State& state() {
    static thread_local State tiles;
    return tiles;
  }
  static void begin() {}
  static void end() {}
  template <int Rows = 2, int Columns = 2>
  static void clear() {
    std::memset(state().sums, 0, sizeof state().sums);
  }
  static void left(const void* tiles) { std::memcpy(state().left, tiles, sizeof state().left); }
  static void right(const void* tiles) { std::memcpy(state().right, tiles, sizeof state().right); }

  static float flushed(float x) { return x > -0x1p-126f && x < 0x1p-126f ? 0.0f : x; }

  static void multiply() {
    State& s = state();
    for (int half = 0; half < 2; ++half) {
      float pairs[16][2][16];  // pair of depth, member, column
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 32; ++i) pairs[k][i % 2][i / 2] = flushed(widened(s.right[half][k][i]));
      for (int row = 0; row < 32; ++row) {
        float members[2][16] = {};
        for (int k = 0; k < 32; ++k) {
          const float a = flushed(widened(s.left[row / 16][row % 16][k]));
          float* sums = members[k % 2];
          for (int column = 0; column < 16; ++column) sums[column] = flushed(sums[column] + a * pairs[k / 2][k % 2][column]);
        }
        float* sums = s.sums[row] + 16 * half;
        for (int column = 0; column < 16; ++column)
          sums[column] = flushed(sums[column] + flushed(members[0][column] + members[1][column]));
      }
    }
  }
  static void load(const float* from, std::ptrdiff_t stride) {
    for (int row = 0; row < 32; ++row) std::memcpy(state().sums[row], from + row * stride, sizeof state().sums[row]);
  }
  template <int Rows = 2, int Columns = 2>
  static void multiply(const void* left, const void* right, bool /*streamed*/ = false, std::ptrdiff_t apart = kTileBytes) {
    std::memcpy(state().left, left, Rows * kTileBytes);
    for (int half = 0; half < Columns; ++half)
      std::memcpy(state().right[half], static_cast<const char*>(right) + half * apart, kTileBytes);
    multiply();  // what is left out of the factors gives sums that nobody stores
  }
  template <int Rows = 2, int Columns = 2>
  static void store(float* out, std::ptrdiff_t stride) {
    for (int row = 0; row < 16 * Rows; ++row) std::memcpy(out + row * stride, state().sums[row], Columns * 16 * sizeof(float));
  }
};

#endif

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
