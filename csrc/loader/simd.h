// A row of pixels in registers, as wide as the instruction set that the including file is compiled for.
//
// Arithmetic, comparison and selection come from the compiler's vector extension (g++ and clang); here is only what that
// cannot say: table look-ups, the unpacking of RGB bytes, and minimum and maximum. Little-endian, as all of the package's files.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

static_assert(std::endian::native == std::endian::little);

namespace pairclip::PAIRCLIP_VARIANT {

#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));

#define PAIRCLIP_INLINE static inline __attribute__((always_inline))

template <class Vector>
PAIRCLIP_INLINE Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
PAIRCLIP_INLINE void store(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

// Minus zero: that is folded away, where plus would turn -0 into 0.
PAIRCLIP_INLINE Floats spread(float value) { return value - Floats{}; }
PAIRCLIP_INLINE Ints spread(int value) { return Ints{} + value; }

// Where x is NaN the other argument is the result, so that no index is ever made from a NaN.
PAIRCLIP_INLINE Floats larger(Floats x, Floats least) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, least);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, least);
#elif defined(__SSE2__)
  return _mm_max_ps(x, least);
#else
  return x > least ? x : least;
#endif
}

PAIRCLIP_INLINE Floats smaller(Floats x, Floats most) {
#if defined(__AVX512F__)
  return _mm512_min_ps(x, most);
#elif defined(__AVX2__)
  return _mm256_min_ps(x, most);
#elif defined(__SSE2__)
  return _mm_min_ps(x, most);
#else
  return x < most ? x : most;
#endif
}

PAIRCLIP_INLINE Ints larger(Ints x, Ints least) { return x > least ? x : least; }
PAIRCLIP_INLINE Ints smaller(Ints x, Ints most) { return x < most ? x : most; }
PAIRCLIP_INLINE Floats to_floats(Words x) { return __builtin_convertvector(reinterpret_cast<Ints>(x), Floats); }
PAIRCLIP_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
PAIRCLIP_INLINE Ints truncated(Floats x) { return __builtin_convertvector(x, Ints); }

// 0, 1, 2, ...
PAIRCLIP_INLINE Floats ramp() {
  Floats value{};
  for (int i = 0; i < kLanes; ++i) value[i] = static_cast<float>(i);
  return value;
}

PAIRCLIP_INLINE Words reversed(Words x) {
#if defined(__AVX512F__)
  const __m512i order = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return reinterpret_cast<Words>(_mm512_permutexvar_epi32(order, reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i order = _mm256_set_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return reinterpret_cast<Words>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(x), order));
#else
  Words y{};
  for (int i = 0; i < kLanes; ++i) y[i] = x[kLanes - 1 - i];
  return y;
#endif
}

// kLanes pixels of three bytes as words: R in the lowest byte, 0 in the highest. Reads exactly 3 kLanes bytes.
PAIRCLIP_INLINE Words expand_rgb(const std::uint8_t* pixels) {
#if defined(__AVX512BW__)
  const __m512i spread_quads = _mm512_set_epi32(0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
  const __m512i within_quads = _mm512_broadcast_i32x4(_mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0));
  const __m512i bytes = _mm512_maskz_loadu_epi32(0x0FFF, pixels);
  return reinterpret_cast<Words>(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(spread_quads, bytes), within_quads));
#elif defined(__AVX2__)
  const __m128i first = _mm_set_epi8(-1, 11, 10, 9, -1, 8, 7, 6, -1, 5, 4, 3, -1, 2, 1, 0);
  const __m128i second = _mm_set_epi8(-1, 15, 14, 13, -1, 12, 11, 10, -1, 9, 8, 7, -1, 6, 5, 4);
  const __m128i low = _mm_shuffle_epi8(load<__m128i>(pixels), first);
  const __m128i high = _mm_shuffle_epi8(load<__m128i>(pixels + 8), second);
  return reinterpret_cast<Words>(_mm256_set_m128i(high, low));
#else
  Words words{load<std::uint32_t>(pixels), load<std::uint32_t>(pixels + 3), load<std::uint32_t>(pixels + 6),
              load<std::uint32_t>(pixels + 8) >> 8};
  return words & 0xFFFFFFu;
#endif
}

// There is no gather instruction below: on processors from Skylake to Ice Lake the microcode that stops "gather data
// sampling" (CVE-2022-40982) makes them several times slower than single loads put together, and elsewhere they gain little.

#if defined(__SSE2__)
// Quarters put together in registers: through memory, the wide load would have to wait until the narrow stores have left for
// the cache.
PAIRCLIP_INLINE Words joined(const __m128i* quads) {
#if defined(__AVX512F__)
  const __m256i low = _mm256_set_m128i(quads[1], quads[0]), high = _mm256_set_m128i(quads[3], quads[2]);
  return reinterpret_cast<Words>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_set_m128i(quads[1], quads[0]));
#else
  return reinterpret_cast<Words>(quads[0]);
#endif
}
#endif

// table[index] of every lane.
PAIRCLIP_INLINE Words load_each(const std::uint32_t* table, Ints index) {
  std::int32_t at[kLanes];
  store(at, index);
  std::uint32_t found[kLanes];
  for (int i = 0; i < kLanes; ++i) found[i] = table[at[i]];
  return load<Words>(found);
}

#if defined(__SSE2__)
// table[at] and table[at + 1] of four lanes: four left ones, four right ones.
PAIRCLIP_INLINE void load_four_pairs(const std::uint32_t* table, const std::int32_t* at, __m128i* left, __m128i* right) {
  const auto pair = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + at[i])); };
  const __m128i low = _mm_unpacklo_epi32(pair(0), pair(1)), high = _mm_unpacklo_epi32(pair(2), pair(3));
  *left = _mm_unpacklo_epi64(low, high);
  *right = _mm_unpackhi_epi64(low, high);
}
#endif

// table[index] and table[index + 1] of every lane.
PAIRCLIP_INLINE void load_pairs(const std::uint32_t* table, Ints index, Words* left, Words* right) {
  std::int32_t at[kLanes];
  store(at, index);
#if defined(__SSE2__)
  __m128i lefts[kLanes / 4], rights[kLanes / 4];
  for (int k = 0; k < kLanes / 4; ++k) load_four_pairs(table, at + 4 * k, lefts + k, rights + k);
  *left = joined(lefts);
  *right = joined(rights);
#else
  std::uint32_t lefts[kLanes], rights[kLanes];
  for (int i = 0; i < kLanes; ++i) lefts[i] = table[at[i]], rights[i] = table[at[i] + 1];
  *left = load<Words>(lefts);
  *right = load<Words>(rights);
#endif
}

// Rounded to bfloat16: to nearest, ties to even. The values are finite.
PAIRCLIP_INLINE Halves to_bfloat16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  return __builtin_convertvector((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, Halves);
}

}  // namespace pairclip::PAIRCLIP_VARIANT
