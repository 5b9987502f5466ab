// The vectors of the instruction set that this file is compiled for: 16, 8 or 4 floats. Everything above is written once.
//
// Arithmetic uses the compiler's vector types; what those cannot say well (fused multiply-add, maximum, masks as bits) is
// spelt out per instruction set. Included only by files that are compiled per variant: all is in that variant's namespace,
// so that the linker never takes one variant's code for another's. For the same reason no standard containers or algorithms
// on plain types are used in there: their instantiations would be shared between the variants.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pairclip::kernels::PAIRCLIP_VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Ints load(const std::int32_t* from) {
  Ints v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
// The same number, in a register: the compiler would rather read memory at every use. Next to tile products, which read as much
// as the first-level cache gives, every read counts.
template <class Vector>
inline Vector kept(Vector v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}
inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
inline void store(std::int32_t* to, Ints v) { std::memcpy(to, &v, sizeof v); }
inline Vec set(float x) { return x - Vec{}; }  // x - 0 is x for every x, so compilers leave it out; 0 + x is not, for -0
inline Ints set(std::int32_t x) { return x - Ints{}; }
inline Ints bits_of(Vec v) { return reinterpret_cast<Ints>(v); }
inline Vec floats_of(Ints v) { return reinterpret_cast<Vec>(v); }

// high(a, b): the larger; b where either is NaN.
// fma(a, b, c) = a * b + c and fms(a, b, c) = a * b - c, rounded once where the processor can.
// not_less_equal(a, b): a bit per lane; true where either is NaN. bits(truth): a bit per lane of what is 0 or -1.
#if defined(__AVX512F__)
inline Vec high(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline unsigned not_less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline unsigned bits(Ints truth) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(truth)); }
#elif defined(__AVX2__)
inline Vec high(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline unsigned not_less_equal(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
inline unsigned bits(Ints truth) { return _mm256_movemask_ps(reinterpret_cast<__m256>(truth)); }
#else
inline unsigned bits(Ints truth) {
  unsigned found = 0;
  for (int i = 0; i < kLanes; ++i) found |= static_cast<unsigned>(truth[i] & 1) << i;
  return found;
}
inline Vec high(Vec a, Vec b) { return a > b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
inline unsigned not_less_equal(Vec a, Vec b) { return bits(~(a <= b)); }
#endif

// Whether any a is above b, or either NaN.
template <int Count>
inline bool any_not_less_equal(const Vec (&a)[Count], Vec b) {
#if defined(__AVX512F__)
  if constexpr (Count == 2) return !_kortestz_mask16_u8(not_less_equal(a[0], b), not_less_equal(a[1], b));  // one flag, no moves
#endif
  unsigned found = 0;
#pragma GCC unroll 8
  for (int v = 0; v < Count; ++v) found |= not_less_equal(a[v], b);
  return found != 0;
}

// Lane numbers, from memory: compilers build a vector that is filled lane by lane just so.
struct LaneNumbers {
  std::int32_t counted[2 * kLanes];  // 0, 1, 2, ...
  std::int32_t interleaved[kLanes];  // of two vectors' lower halves: 0, kLanes, 1, kLanes + 1, ...
  constexpr LaneNumbers() : counted(), interleaved() {
    for (int i = 0; i < 2 * kLanes; ++i) counted[i] = i;
    for (int i = 0; i < kLanes; ++i) interleaved[i] = i / 2 + i % 2 * kLanes;
  }
};
constexpr LaneNumbers kLaneNumbers;

inline Ints places() { return load(kLaneNumbers.counted); }

// Lane i gets lane i + distance, round in a circle (a shuffle takes its lane numbers modulo kLanes).
template <class Vector>
Vector turned(Vector v, int distance) {
  return __builtin_shuffle(v, load(kLaneNumbers.counted + distance));
}

// Over all lanes, halves first, then their halves: the order is fixed, and the same for every caller.
template <class Vector>
auto sum(Vector v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v += turned(v, half);
  return v[0];
}
inline float highest(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v = high(v, turned(v, half));
  return v[0];
}

// Stores the chosen lanes side by side and returns how many; may write up to kLanes numbers.
inline int compress(std::int32_t* to, Ints v, unsigned chosen) {
#if defined(__AVX512F__)
  store(to, reinterpret_cast<Ints>(_mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), reinterpret_cast<__m512i>(v))));
  return __builtin_popcount(chosen);
#else
  int count = 0;
  for (; chosen != 0; chosen &= chosen - 1) to[count++] = v[__builtin_ctz(chosen)];
  return count;
#endif
}

constexpr unsigned kAllLanes = (1u << kLanes) - 1;

// Of the lanes that start at `first`, those before `end`, as bits.
inline unsigned lanes_before(int first, int end) {
  const int left = end - first;
  return left >= kLanes ? kAllLanes : left <= 0 ? 0 : (1u << left) - 1;
}

// Transposes a square of kLanes vectors: interleaving the first half with the second, log2(kLanes) times, does it.
inline void transpose(Ints (&square)[kLanes]) {
  const Ints low = load(kLaneNumbers.interleaved), upper = low + kLanes / 2;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Ints next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(square[i], square[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(square[i], square[i + kLanes / 2], upper);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
