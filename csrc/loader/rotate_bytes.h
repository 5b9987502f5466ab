// Rotation of tiles up to 32 pixels wide by byte look-up and byte dot products (AVX-512 VBMI and VNNI).
//
// The four taps of each of 16 pixels are 64 bytes of a colour's plane. While the angle is small they lie within two to four
// registers from the first byte that any of them needs, and VPERMB fetches all of them from a register at once; VPDPBUSD then
// multiplies the four taps of a pixel by their weights and adds them up, a byte of the weights at a time, without rounding.
// Against the look-up of whole pixels (rotate_rows.h), which steeper angles and mirrored borders still take, nothing has to
// be unpacked, and there are half as many instructions per vector.
#pragma once

#include "loader/byte_planes.h"

namespace pairclip::PAIRCLIP_VARIANT {

constexpr int kMostRegisters = 4;
constexpr int kBytesTurn = 4;  // as kTurn; what is kept in between is larger here
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
// Where a vector's bytes begin is sought this much further out, since it may be rounded differently from the positions of its
// lanes. Enough for positions within a few sides of tiles that are not much higher than wide.
constexpr float kSlack = 0x1p-10f, kMostMoved = 64.0f;
constexpr int kMostHeight = 256;

// One axis of the tile. Positions are counted from a whole pixel near the centre, so that one instruction holds them within
// the overhang on both sides.
struct Middle {
  float whole, reach;

  PAIRCLIP_INLINE Middle of(int side) {
    const int whole = side / 2;
    return {static_cast<float>(whole), static_cast<float>(whole + kOverhang)};
  }
};

PAIRCLIP_INLINE Floats held(Floats position, Middle middle) {
  constexpr int kSmallerSize = 2, kSignOfFirst = 0 << 2;
  return _mm512_range_ps(position, spread(middle.reach), kSmallerSize | kSignOfFirst);
}

// Positions, counted from the middles, that the pixels from `x` on have in a line through the centre.
struct Start {
  Floats x, y;
};

PAIRCLIP_INLINE Start start_of(const TileJob& job, int x, Middle middle_x, Middle middle_y) {
  const float centre_x = 0.5f * static_cast<float>(job.width - 1), centre_y = 0.5f * static_cast<float>(job.height - 1);
  const Floats dx = (ramp() + (static_cast<float>(x) - centre_x)) * (job.flip ? -1.0f : 1.0f) - job.moved_x;
  return {dx * job.cosine + (centre_x - middle_x.whole), dx * job.sine + (centre_y - middle_y.whole)};
}

// Rows and columns as one number, the place in a plane, in the lower bits: kRounder + row pitch + column.
struct Placer {
  float pitch, rounder;

  PAIRCLIP_INLINE Placer make(int pitch, Middle middle_x, Middle middle_y) {
    const float width = static_cast<float>(pitch);
    return {width, kRounder + middle_x.reach + middle_y.reach * width};
  }

  PAIRCLIP_INLINE Floats place(const Placer& placer, Floats x, Floats row) {
    return row * placer.pitch + _mm512_add_round_ps(x, spread(placer.rounder), kDown);
  }
};

PAIRCLIP_INLINE Floats fraction(Floats x) { return _mm512_reduce_ps(x, kDown); }

// Fills in what `planes` knows of lines and vectors.
static void plan_lines(const TileJob& job, Planes planes) {
  const Middle middle_x = Middle::of(job.width), middle_y = Middle::of(job.height);
  const Placer placer = Placer::make(planes.pitch, middle_x, middle_y);
  const float centre_y = 0.5f * static_cast<float>(job.height - 1);
  const __m512i offsets = tap_offsets(planes.pitch);
  for (int x = 0; x < job.width; x += kLanes) {
    const Start start = start_of(job, x, middle_x, middle_y);
    const float least_x = start.x[0] < start.x[kLanes - 1] ? start.x[0] : start.x[kLanes - 1];
    const float least_y = start.y[0] < start.y[kLanes - 1] ? start.y[0] : start.y[kLanes - 1];
    for (int y = 0; y < job.height; y += kLanes) {
      const Floats dy = ramp() + (static_cast<float>(y) - centre_y - job.moved_y);
      const Floats across = dy * -job.sine, down = dy * job.cosine;
      store(planes.across + y, across);
      store(planes.down + y, down);
      const Floats first_x = held(across + (least_x - kSlack), middle_x), first_y = held(down + (least_y - kSlack), middle_y);
      const Ints first =
          reinterpret_cast<Ints>(Placer::place(placer, first_x, first_y - fraction(first_y))) - static_cast<int>(kRounderBits);
      const int at = x / kLanes * loader::whole_vectors(job.height) + y;
      store(planes.first + at, first);
      store(planes.offsets + at, _mm512_sub_epi8(offsets, lowest_bytes(reinterpret_cast<__m512i>(first))));
    }
  }
}

template <bool kBf16, bool kRecoloured, int kRegisters, int kBytes>
static void rotate_planes(const TileJob& job, Planes planes) {
  const int height = job.height, width = job.width;
  const Middle middle_x = Middle::of(width), middle_y = Middle::of(height);
  const Placer placer = Placer::make(planes.pitch, middle_x, middle_y);
  const auto writer = Writer<kBf16, kRecoloured>::make(job, kWeighed<kBytes>);
  const int turns = (height + kBytesTurn - 1) / kBytesTurn * ((width + kLanes - 1) / kLanes);
  Fetcher fetcher = Fetcher::make(job, turns);
  for (int x = 0; x < width; x += kLanes) {
    const int count = width - x < kLanes ? width - x : kLanes, vectors = x / kLanes * loader::whole_vectors(height);
    const Start start = start_of(job, x, middle_x, middle_y);
    for (int y = 0; y < height; y += kBytesTurn) {
      const int turn = height - y < kBytesTurn ? height - y : kBytesTurn;
      ByteTaps found[kBytesTurn];
      fetcher.part();
      for (int k = 0; k < turn; ++k) {
        const Floats at_x = held(start.x + planes.across[y + k], middle_x), at_y = held(start.y + planes.down[y + k], middle_y);
        const Floats below = fraction(at_y), place = Placer::place(placer, at_x, at_y - below);
        found[k].at =
            _mm512_add_epi8(lowest_bytes(reinterpret_cast<__m512i>(place)), _mm512_set1_epi32(planes.offsets[vectors + y + k]));
        weigh<kBytes>(fraction(at_x), below, found + k);
      }
      for (int k = 0; k < turn; ++k) {
        const std::uint8_t* const first = planes.pixels + planes.first[vectors + y + k];
        const auto colour = [&](int c) { return blended<kRegisters, kBytes>(first + c * planes.bytes, found[k]); };
        writer.write({colour(0), colour(1), colour(2)}, y + k, x, count);
      }
    }
  }
}

// Registers that hold all taps of any vector; more than kMostRegisters: the angle is too steep.
PAIRCLIP_INLINE int registers_for(const TileJob& job) {
  const float steepness = __builtin_fabsf(job.sine), moved = __builtin_fabsf(job.moved_x) + __builtin_fabsf(job.moved_y);
  if (!(steepness <= 1.0f && moved <= kMostMoved && job.height <= kMostHeight)) return kMostRegisters + 1;
  const int rows = static_cast<int>(steepness * (kLanes - 1) + 2.0f * kSlack) + 1, columns = kLanes;
  const int bytes = (rows + 1) * (job.width + 2 * kOverhang) + columns + 2;
  return (bytes + kRegisterBytes - 1) / kRegisterBytes;
}

// What a difference of one level can become.
PAIRCLIP_INLINE float stretch(const TileJob& job) {
  float most = 0.0f;
  for (int c = 0; c < 3; ++c) {
    const float here = (__builtin_fabsf(job.gain[c]) + __builtin_fabsf(job.grey[c])) * 255.0f / (job.high[c] - job.low[c]);
    most = here > most ? here : most;
  }
  return most;
}

template <bool kBf16, bool kRecoloured, int kRegisters>
static void rotate_weighed(const TileJob& job, Planes planes) {
  if constexpr (kRecoloured)
    if (!(stretch(job) <= kMostStretch)) return rotate_planes<kBf16, kRecoloured, kRegisters, 3>(job, planes);
  rotate_planes<kBf16, kRecoloured, kRegisters, 2>(job, planes);
}

// Whether it was done.
template <bool kBf16, bool kRecoloured>
static bool rotate_bytes(const TileJob& job, std::uint32_t* scratch) {
  const int registers = registers_for(job);
  if (registers > kMostRegisters) return false;
  const Planes planes = Planes::in(scratch, job);
  fill_planes(job, planes);
  plan_lines(job, planes);
  if (registers <= 2)
    rotate_weighed<kBf16, kRecoloured, 2>(job, planes);
  else if (registers == 3)
    rotate_weighed<kBf16, kRecoloured, 3>(job, planes);
  else
    rotate_weighed<kBf16, kRecoloured, 4>(job, planes);
  return true;
}

}  // namespace pairclip::PAIRCLIP_VARIANT
