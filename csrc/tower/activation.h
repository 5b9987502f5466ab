// The activations of the MLP, each with its derivative, which the forward pass computes at once and keeps.
#pragma once

#include "kernels/online_softmax.h"
#include "tower/rows.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

struct Activated {
  Vec value, slope;
};

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

// x * Phi(x) and Phi(x) + x * phi(x) (Hendrycks and Gimpel 2016). The error function is formula 7.1.26 of Abramowitz and Stegun
// (1964), off by at most 1.5e-7; its exponential is the density's too. `exponential` ends before denormal numbers begin, each
// of which would cost a hundred ordinary ones.
struct Gelu {
  static Activated of(Vec x) {
    constexpr float kRootHalf = 0x1.6a09e6p-1f, kDensity = 0x1.988454p-2f;  // sqrt(1 / 2), 1 / sqrt(2 pi)
    const Vec z = floats_of(bits_of(x) & 0x7fffffff) * kRootHalf;
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

struct Relu {
  static Activated of(Vec x) { return {choose(x > 0.0f, x, x * 0.0f), choose(x > 0.0f, set(1.0f), x * 0.0f)}; }  // keeps NaN
};

// x * s(x) and s + x * s * (1 - s) with the logistic function s (Elfwing et al. 2018).
struct Silu {
  static Activated of(Vec x) {
    const Vec magnitude = floats_of(bits_of(x) & 0x7fffffff);
    const Vec e = exponential(-magnitude), s = reciprocal(1.0f + e);  // of |x|: the exponential cannot overflow
    const Vec positive = choose(x < 0.0f, e * s, s);
    return {x * positive, fma(x * positive, 1.0f - positive, positive)};
  }
};

template <class Use>
void with_activation(Activation activation, Use use) {
  if (activation == Activation::gelu) {
    use(Gelu());
  } else if (activation == Activation::relu) {
    use(Relu());
  } else {
    use(Silu());
  }
}

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
