// Bilinear taps as bytes: fetched by VPERMB, weighed and added up by VPDPBUSD (AVX-512 VBMI and VNNI).
#pragma once

#include "loader/pixels.h"

namespace pairclip::PAIRCLIP_VARIANT {

constexpr int kRegisterBytes = 64;
// Dot products take unsigned weights and signed pixels, so planes hold pixel - 128; the writer adds it again, as the weights
// of a pixel add up to one. Zeros beyond the tile are pixels like any other.
constexpr float kMiddle = 128.0f;
constexpr char kNothing = static_cast<char>(0x80);
// 2^23: a float from here to 2^24 is a whole number, in its lower bits, and to add to it is to round.
constexpr float kRounder = 0x1p23f;
constexpr std::uint32_t kRounderBits = 0x4B000000;

// Weights of two bytes are off by 2^-17 at most, and pixels are at most 128: four taps are off by 1/256 of a level at most,
// by 1/128 where colours are stretched twice. Where they are stretched further, weights have three bytes.
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

}  // namespace pairclip::PAIRCLIP_VARIANT
