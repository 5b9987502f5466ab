// Rotation of tiles up to 32 pixels wide by byte look-up and byte dot products (AVX-512 VBMI and VNNI).
//
// Each colour is a plane of bytes with zeros around it, one line after the other with two zeros in between. The four taps of
// each of 16 pixels are 64 bytes of a plane; while the angle is small they lie within two to four registers from the vector's
// first byte on, and VPERMB fetches all of a colour from a register at once. VPDPBUSD then multiplies the four taps of a pixel
// by their weights and adds them up, a byte of the weights at a time, without rounding. Against the look-up of whole pixels
// (rotate_rows.h) nothing has to be unpacked, and there are half as many instructions per vector.
#pragma once

#include "loader/pixels.h"

namespace pairclip::PAIRCLIP_VARIANT {

constexpr int kRegisterBytes = 64, kMostRegisters = 4;
constexpr int kOverhang = 1;  // pixels of zeros on each side; a position further out looks like that
// Dot products take unsigned weights and signed pixels, so planes hold pixel - 128; the writer adds it again, as the weights
// of a pixel add up to one. Zeros beyond the tile are pixels like any other.
constexpr float kMiddle = 128.0f;
constexpr char kNothing = static_cast<char>(0x80);
// 2^23: a float from here to 2^24 is a whole number, in its lower bits, and to add to it is to round.
constexpr float kRounder = 0x1p23f;
constexpr std::uint32_t kRounderBits = 0x4B000000;
constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
// Scalar and vector arithmetic may round differently: where a vector begins is sought this much further out.
constexpr float kSlack = 0x1p-10f;
constexpr float kMostMoved = 64.0f;  // the slack is enough for positions within a few sides
constexpr int kBytesTurn = 4;        // as kTurn; what is kept in between is larger here
constexpr int kMostHeight = 1 << 12;

PAIRCLIP_INLINE Ints bits_of(Floats x) { return reinterpret_cast<Ints>(x); }

// Weights of two bytes are off by 2^-17 each: with 4 taps 1/256 of a level at most, 1/128 where colours are stretched twice.
// Stretched further, three bytes.
constexpr float kMostStretch = 2.0f;

template <int kBytes>
constexpr int kWhole = kBytes == 2 ? 0xFFFF : 0x7FFFFF;  // one, as a weight

template <int kBytes>
constexpr Units kWeighed = {{1.0f / kWhole<kBytes>, 1.0f / kWhole<kBytes>, 1.0f / kWhole<kBytes>}, kMiddle};

// The bytes of each group of four that `which` names, from the given ones of `from`; the others stay.
template <int kFirst, int kSecond, int kThird, int kFourth>
PAIRCLIP_INLINE __m512i bytes_from(__m512i stay, __mmask64 which, __m512i from) {
  constexpr int order = kFirst | kSecond << 8 | kThird << 16 | kFourth << 24;
  const __m512i within = _mm512_broadcast_i32x4(_mm_set_epi32(order + 0x0C0C0C0C, order + 0x08080808, order + 0x04040404, order));
  return _mm512_mask_shuffle_epi8(stay, which, from, within);
}

PAIRCLIP_INLINE __m512i lowest_bytes(__m512i from) { return bytes_from<0, 0, 0, 0>(from, ~__mmask64{0}, from); }

// Where the taps of 16 pixels are, counted from the first byte that any of them needs, and their weights, a byte of each at a
// time. The order of taps is that of `tap_offsets`.
struct ByteTaps {
  __m512i at, high, middle, low;
};

// Bytes from the top left tap to each: top right, low right, top left, low left.
PAIRCLIP_INLINE __m512i tap_offsets(int pitch) { return _mm512_set1_epi32(1 | (pitch + 1) << 8 | pitch << 24); }

template <int kBytes>
PAIRCLIP_INLINE void weigh(Floats right_share, Floats low_share, ByteTaps* taps) {
  constexpr __mmask64 kOdd = 0xAAAAAAAAAAAAAAAA, kEven = ~kOdd, kUpper = 0xCCCCCCCCCCCCCCCC, kLower = ~kUpper;
  constexpr float kOne = static_cast<float>(kWhole<kBytes>);
  const Floats right = right_share * kOne, left = kOne - right, top_share = 1.0f - low_share;
  const auto bits = [](Floats side, Floats share) { return reinterpret_cast<__m512i>(side * share + kRounder); };
  const __m512i top_right = bits(right, top_share), top_left = bits(left, top_share);
  const __m512i low_right = bits(right, low_share), low_left = bits(left, low_share);
  const __m512i top = bytes_from<0, 0, 0, 1>(top_right, kUpper, top_left);
  const __m512i low = bytes_from<0, 0, 0, 1>(low_right, kUpper, low_left);
  taps->low = bytes_from<0, 0, 0, 2>(top, kOdd, low);
  taps->middle = bytes_from<1, 0, 3, 0>(low, kEven, top);
  if constexpr (kBytes == 3) {
    const __m512i top_high = bytes_from<2, 3, 0, 0>(top_left, kLower, top_right);
    const __m512i low_high = bytes_from<2, 3, 0, 0>(low_left, kLower, low_right);
    taps->high = bytes_from<0, 0, 0, 2>(top_high, kOdd, low_high);
  }
}

// 16 pixels of one colour, as in `kWeighed`.
template <int kRegisters, int kBytes>
PAIRCLIP_INLINE Floats blended(const std::uint8_t* plane, const ByteTaps& taps) {
  const auto bytes = [&](int k) { return _mm512_loadu_si512(plane + k * kRegisterBytes); };
  const __mmask64 odd = _mm512_test_epi8_mask(taps.at, _mm512_set1_epi8(0x40));
  __m512i pixels = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(taps.at, bytes(0)), odd, taps.at, bytes(1));
  if constexpr (kRegisters > 2) {
    const __mmask64 far = _mm512_movepi8_mask(taps.at);
    pixels = _mm512_mask_permutexvar_epi8(pixels, far, taps.at, bytes(2));
    if constexpr (kRegisters > 3) pixels = _mm512_mask_permutexvar_epi8(pixels, far & odd, taps.at, bytes(3));
  }
  __m512i sum = _mm512_setzero_si512();
  if constexpr (kBytes == 3) sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, taps.high, pixels), 8);
  sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(sum, taps.middle, pixels), 8);
  return to_floats(reinterpret_cast<Ints>(_mm512_dpbusd_epi32(sum, taps.low, pixels)));
}

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
      const Ints first = bits_of(Placer::place(placer, first_x, first_y - fraction(first_y))) - static_cast<int>(kRounderBits);
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
  for (int x = 0; x < width; x += kLanes) {
    const int count = width - x < kLanes ? width - x : kLanes, vectors = x / kLanes * loader::whole_vectors(height);
    const Start start = start_of(job, x, middle_x, middle_y);
    for (int y = 0; y < height; y += kBytesTurn) {
      const int turn = height - y < kBytesTurn ? height - y : kBytesTurn;
      ByteTaps found[kBytesTurn];
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
