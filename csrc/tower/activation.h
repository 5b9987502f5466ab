// The activations of the MLP, each with its derivative, which the forward pass computes at once and keeps.
#pragma once

#include <type_traits>

#include "tower/exponential.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

struct Activated {
  Vec value, slope;
};

inline Vec magnitude(Vec x) { return floats_of(bits_of(x) & 0x7fffffff); }
inline Vec choose(Ints truth, Vec yes, Vec no) { return truth ? yes : no; }

// 1 / x for x of ordinary size, to about float32's rounding.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = _mm512_rcp14_ps(x);
  return guess * fma(-x, guess, set(2.0f));
#else
  return 1.0f / x;
#endif
}

// x * Phi(x) and Phi(x) + x * phi(x) (Hendrycks and Gimpel 2016).
//
// The formula: the error function by 7.1.26 of Abramowitz and Stegun (1964), off by at most 1.5e-7, whose exponential is the
// density's too.
struct GeluByFormula {
  Activated operator()(Vec x) const {
    constexpr float kRootHalf = 0x1.6a09e6p-1f, kDensity = 0x1.988454p-2f;  // sqrt(1 / 2), 1 / sqrt(2 pi)
    const Vec z = magnitude(x) * kRootHalf;
    const Vec e = exponential(-z * z);
    const Vec t = reciprocal(fma(z, set(0.3275911f), set(1.0f)));
    Vec p = set(1.061405429f);
    p = fma(p, t, set(-1.453152027f));
    p = fma(p, t, set(1.421413741f));
    p = fma(p, t, set(-0.284496736f));
    p = fma(p, t, set(0.254829592f));
    const Vec tail = 0.5f * p * t * e;  // 1 - Phi(|x|)
    const Vec phi = choose(x < 0.0f, tail, 1.0f - tail);
    return {x * phi, fma(x * e, set(kDensity), phi)};
  }
};

#if defined(__AVX512F__)

// Cubics for Phi(x) - 1/2 and the derivative - 1/2 in 32 pieces of [0, 6), through Chebyshev's nodes: off by at most 2e-6, for
// results that are rounded to bfloat16, with half of the formula's instructions, which are what a product with GELU waits for.
// Both functions are odd. The last piece is constant, so that what is far away is exactly 0 or x.
struct GeluTable {
  static constexpr int kPieces = 32;
  static constexpr float kPerUnit = kPieces / 6.0f;
  alignas(64) float value[4][kPieces], slope[4][kPieces];

  GeluTable() {
    for (int i = 0; i < kPieces; ++i) {
      cubic(i, [](double x) { return 0.5 * __builtin_erf(x * __builtin_sqrt(0.5)); }, value);
      cubic(
          i,
          [](double x) {
            return 0.5 * __builtin_erf(x * __builtin_sqrt(0.5)) + x * __builtin_exp(-0.5 * x * x) * 0.3989422804014327;
          },
          slope);
    }
  }

 private:
  // Interpolates by Newton's divided differences, in powers of u, the place in piece `i` from -1/2 to 1/2.
  template <class Of>
  void cubic(int i, Of of, float (*out)[kPieces]) {
    constexpr double kNodes[4] = {-0.46193976625564337, -0.1913417161825449, 0.1913417161825449, 0.46193976625564337};
    if (i == kPieces - 1) {
      for (int k = 0; k < 4; ++k) out[k][i] = k == 0 ? 0.5f : 0.0f;
      return;
    }
    double d[4], powers[4] = {};
    for (int k = 0; k < 4; ++k) d[k] = of((i + 0.5 + kNodes[k]) * 6.0 / kPieces);
    for (int order = 1; order < 4; ++order)
      for (int k = 3; k >= order; --k) d[k] = (d[k] - d[k - 1]) / (kNodes[k] - kNodes[k - order]);
    for (int k = 3; k >= 0; --k) {  // powers = powers * (u - node) + d
      for (int j = 3; j > 0; --j) powers[j] = powers[j - 1] - kNodes[k] * powers[j];
      powers[0] = d[k] - kNodes[k] * powers[0];
    }
    for (int k = 0; k < 4; ++k) out[k][i] = static_cast<float>(powers[k]);
  }
};

class Gelu {
 public:
  Gelu() : table_(table()) {}
  Activated operator()(Vec x) const {
    constexpr float kRound = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
    const Vec place = low(fma(magnitude(x), set(GeluTable::kPerUnit), set(-0.5f)), set(GeluTable::kPieces - 1.0f));
    const Vec shifted = place + kRound, u = place - (shifted - kRound);
    const Ints sign = bits_of(x) & INT32_MIN;
    const Vec phi = cubic(table_.value, bits_of(shifted), u, sign), slope = cubic(table_.slope, bits_of(shifted), u, sign);
    return {x * phi, slope};
  }

 private:
  static const GeluTable& table() {
    static const GeluTable filled;
    return filled;
  }
  static Vec low(Vec a, Vec b) { return _mm512_min_ps(b, a); }  // a where either is NaN
  static Vec looked_up(const float* row, Ints piece) {
    return _mm512_permutex2var_ps(load(row), reinterpret_cast<__m512i>(piece), load(row + kLanes));
  }
  static Vec cubic(const float (*rows)[GeluTable::kPieces], Ints piece, Vec u, Ints sign) {
    Vec p = fma(looked_up(rows[3], piece), u, looked_up(rows[2], piece));
    p = fma(p, u, looked_up(rows[1], piece));
    p = fma(p, u, looked_up(rows[0], piece));
    return floats_of(bits_of(p) ^ sign) + 0.5f;
  }

  const GeluTable& table_;
};

#else

using Gelu = GeluByFormula;

#endif

struct Relu {
  Activated operator()(Vec x) const { return {high(set(0.0f), x), choose(x > 0.0f, set(1.0f), Vec{})}; }  // NaN stays NaN
};

// x * s(x) and s + x * s * (1 - s) with the logistic function s (Elfwing et al. 2018).
struct Silu {
  Activated operator()(Vec x) const {
    const Vec e = exponential(-magnitude(x)), s = reciprocal(1.0f + e);  // of |x|: the exponential cannot overflow
    const Vec positive = choose(x < 0.0f, e * s, s);
    return {x * positive, fma(x * positive, 1.0f - positive, positive)};
  }
};

// `T` is what the results are stored as.
template <class T, class Use>
void with_activation(Activation activation, Use use) {
  if (activation == Activation::gelu) {
    use(std::conditional_t<std::is_same_v<T, float>, GeluByFormula, Gelu>());
  } else if (activation == Activation::relu) {
    use(Relu());
  } else {
    use(Silu());
  }
}

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
