// A tile as three planes of bytes, one line after the other with zeros in between, above and below.
#pragma once

#include "loader/byte_taps.h"

namespace pairclip::PAIRCLIP_VARIANT {

constexpr int kOverhang = 1;  // pixels of zeros on each side; a position further out looks like that

// Where things are in the scratch memory of a tile.
struct Planes {
  int pitch, bytes;
  std::uint8_t* pixels;  // three planes
  // Of each line of the output: what to add to a position across and down; of each vector: the first byte that it needs, and
  // what turns the last byte of a tap's place into one that counts from there, for four taps.
  float *across, *down;
  std::int32_t *first, *offsets;

  PAIRCLIP_INLINE Planes in(std::uint32_t* scratch, const TileJob& job) {
    Planes planes;
    const int lines = loader::whole_vectors(job.height), vectors = loader::kRowWords / kLanes * lines;
    planes.pitch = job.width + 2 * kOverhang;
    planes.bytes = loader::plane_bytes(job.height);
    planes.pixels = reinterpret_cast<std::uint8_t*>(scratch);
    planes.across = reinterpret_cast<float*>(planes.pixels + 3 * planes.bytes);
    planes.down = planes.across + lines;
    planes.first = reinterpret_cast<std::int32_t*>(planes.down + lines);
    planes.offsets = planes.first + vectors;
    return planes;
  }
};

// Which byte of a line's RGB bytes each pixel of a plane is.
struct Picks {
  alignas(kRegisterBytes) std::uint8_t from[3][kRegisterBytes];
  std::uint64_t beyond[3];  // pixels that are in the second register of the line

  constexpr Picks() : from{}, beyond{} {
    for (int c = 0; c < 3; ++c)
      for (int x = 0; x < loader::kRowWords; ++x) {
        from[c][x] = static_cast<std::uint8_t>((3 * x + c) % kRegisterBytes);
        if (3 * x + c >= kRegisterBytes) beyond[c] |= std::uint64_t{1} << x;
      }
  }
};

static constexpr Picks kPicks;

// The planes of a tile. Each line is written with zeros to its right, and the next one over some of them.
static void fill_planes(const TileJob& job, Planes planes) {
  const __m512i nothing = _mm512_set1_epi8(kNothing);
  const int height = job.height, row_bytes = 3 * job.width;
  const std::uint64_t pixels = (std::uint64_t{1} << job.width) - 1;
  const __mmask64 first = ~std::uint64_t{0} >> (row_bytes < kRegisterBytes ? kRegisterBytes - row_bytes : 0);
  const __mmask64 second = row_bytes > kRegisterBytes ? (std::uint64_t{1} << (row_bytes - kRegisterBytes)) - 1 : 0;
  for (int c = 0; c < 3; ++c) _mm512_storeu_si512(planes.pixels + c * planes.bytes, nothing);
  std::uint8_t* to = planes.pixels + planes.pitch * kOverhang + kOverhang;
  for (int y = 0; y < height; ++y, to += planes.pitch) {
    const std::uint8_t* const row = job.source.pixels + y * job.source.row_bytes;
    const __m512i a = _mm512_xor_si512(_mm512_maskz_loadu_epi8(first, row), nothing);
    const __m512i b = _mm512_xor_si512(_mm512_maskz_loadu_epi8(second, row + kRegisterBytes), nothing);
    for (int c = 0; c < 3; ++c) {
      const __m512i from = _mm512_load_si512(kPicks.from[c]);
      const __m512i near = _mm512_mask_permutexvar_epi8(nothing, pixels, from, a);
      _mm512_storeu_si512(to + c * planes.bytes, _mm512_mask_permutexvar_epi8(near, pixels & kPicks.beyond[c], from, b));
    }
  }
  // Rows below: a position at most one pixel out has taps two pixels out.
  for (int at = 0; at < 3 * planes.pitch; at += kRegisterBytes)
    for (int c = 0; c < 3; ++c) _mm512_storeu_si512(to + c * planes.bytes + at, nothing);
}

}  // namespace pairclip::PAIRCLIP_VARIANT
