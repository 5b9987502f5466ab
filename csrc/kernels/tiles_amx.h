// Matrix tiles in the registers that are made for them (Intel AMX).
//
// Registers 0 to 3 hold the sums, 4 and 5 the upper and lower rows of the left factor, 6 and 7 the left and right columns of the
// right factor. The processor has one set of them: of two `Tiles` only one is in use at a time.
#pragma once

#include <immintrin.h>

#include "kernels/packing.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// GCC's tile intrinsics do not tell the compiler that they read memory: the barriers do.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

struct Tiles {
  static constexpr int kRate = 16;
  static constexpr const char* kPrecision = "bfloat16 tiles, float32 sums";

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
    _tile_loadd(1, (from + 16), stride * 4);  // brackets: GCC's is a macro
    _tile_loadd(2, (from + 16 * stride), stride * 4);
    _tile_loadd(3, (from + 16 * stride + 16), stride * 4);
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

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
