// The exponential, and a softmax that sees its row a few captions at a time (Milakov and Gimelshein 2018).
//
// Logits are kept times log4(e), which the fused multiply-add that scales a score does for nothing: a weight is then
// 4^(logit - high) for the highest logit so far. (Base 4 because log4(e) < 1: no finite logit overflows.) A row keeps its
// highest while nothing exceeds it, which is nearly always: a random row of 10,000 captions has about ten new maxima. One
// comparison finds the exceptions, and NaN with them.
//
// Infinities follow torch: a logit of +inf gives lse = inf and a mean of NaN; only -inf gives -inf and NaN; NaN gives NaN.
#pragma once

#include <limits>

#include "kernels/engine.h"
#include "kernels/isa.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// 4^x for x < 64: 2^n * 2^r with n the integer nearest to 2x and |r| <= 1/2; 2^r is a polynomial, minimax in relative error
// (2.6e-9). Error at most 1.5 units in the last place. Far below, where results would be denormal: 0 or that; NaN stays NaN.
inline Vec power_of_four(Vec x) {
#if defined(__AVX512F__)
  const Vec doubled = x + x;
  const Vec r = _mm512_reduce_ps(doubled, _MM_FROUND_TO_NEAREST_INT);  // less the nearest integer; 0 for infinities
#else
  constexpr float kRound = 0x1.8p+23f;       // adding it leaves the nearest integer in the low bits
  const Vec clamped = high(set(-63.5f), x);  // in this order NaN stays NaN
  const Vec shifted = fma(clamped, set(2.0f), set(kRound));
  const Vec r = fms(clamped, set(2.0f), shifted - kRound);
#endif
  Vec p = set(0x1.470b48p-13f);
  p = fma(p, r, set(0x1.5f7276p-10f));
  p = fma(p, r, set(0x1.3b270ep-7f));
  p = fma(p, r, set(0x1.c6ae72p-5f));
  p = fma(p, r, set(0x1.ebfbe2p-3f));
  p = fma(p, r, set(0x1.62e432p-1f));
  p = fma(p, r, set(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, doubled - r);
#else
  return p * floats_of((bits_of(shifted) + 127) << 23);
#endif
}

// A row's scores of a panel, `Width` numbers; all of them are captions if Whole, else the first `live`.
template <int Width, bool Whole>
struct Scores {
  static constexpr int kCount = Width / kLanes;
  Vec vectors[kCount];
  int live;

  Scores(const float* from, int first_live) : live(first_live) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) vectors[v] = kept(load(from + v * kLanes));
  }
  Ints is_live(int v) const { return Whole ? set(-1) : places() < live - v * kLanes; }
  unsigned live_bits() const { return Whole ? ~0u : (1u << live) - 1; }

  // Logits below the highest one; what is no caption is out of reach.
  void logits(Vec slope, const float& highest, Vec (&out)[kCount]) const {
    const Vec top = kept(set(highest));
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) {
      out[v] = fms(vectors[v], slope, top);
      if (!Whole) out[v] = is_live(v) ? out[v] : set(-kInfinity);
    }
  }
};

// What a panel may do to a row besides adding weights to it.
struct Exception {
  float shrink;  // of everything summed before
  bool nan;      // a score was NaN
};

constexpr float kEnormous = 0x1p21f;  // here neighbouring floats lie 1/4 apart

// The rare case, a logit above the highest or NaN: raises `row.high` and leaves the logits below the new one in `out`. Where it
// is infinite those are NaN, and `total`, the lanes of the row's sum, is infinite unless it is NaN.
template <class Row>
__attribute__((noinline)) Exception raise(SoftmaxRow& row, const Row& scores, Vec slope, float* out, Vec& total) {
  Vec logits[Row::kCount], top = set(row.high);
  unsigned nan_scores = 0, nan_logits = 0;
  for (int v = 0; v < Row::kCount; ++v) {
    const Vec logit = scores.vectors[v] * slope;
    top = scores.is_live(v) ? high(logit, top) : top;
    nan_scores |= bits((scores.vectors[v] != scores.vectors[v]) & scores.is_live(v));
    nan_logits |= bits((logit != logit) & scores.is_live(v));
  }
  const float next = highest(top), shrink = next == row.high ? 1.0f : power_of_four(set(row.high - next))[0];
  row.high = next;
  scores.logits(slope, next, logits);
  total *= shrink;
  if (next == kInfinity) total = set(nan_logits != 0 || sum(total) != sum(total) ? kNaN : kInfinity);
  for (int v = 0; v < Row::kCount; ++v) {
    Vec logit = next == kInfinity ? set(kNaN) : logits[v];
    // Fused, even the highest is off by what rounding made of it: the same for all near it, so nothing, but beyond kEnormous.
    if (!(next < kEnormous && next > -kEnormous))
      logit = logit > 0.0f || (scores.vectors[v] * slope == next && scores.is_live(v)) ? Vec{} : logit;
    store(out + v * kLanes, logit);
  }
  return {shrink, nan_scores != 0};
}

// Adds a row's share of a panel to `total` and hands the weights to `use`; `exceptional` is told what became of the row before.
template <class Row, class Exceptional, class Use>
[[gnu::always_inline]] inline void weigh(SoftmaxRow& row, const Row& scores, Vec slope, Vec& total,
                                         const Exceptional& exceptional, const Use& use) {
  Vec weights[Row::kCount];
  scores.logits(slope, row.high, weights);
  const bool rare = any_not_less_equal(weights, Vec{});
  if (rare) [[unlikely]] {
    alignas(64) float logits[Row::kCount * kLanes];
    const Row copy = scores;  // in memory, for the call; `scores` stays in registers
    exceptional(raise(row, copy, slope, logits, total));
    for (int v = 0; v < Row::kCount; ++v) weights[v] = load(logits + v * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < Row::kCount; ++v) weights[v] = power_of_four(weights[v]);
  if (!rare || row.high != kInfinity) [[likely]] {  // else `raise` has done so
#pragma GCC unroll 8
    for (int v = 0; v < Row::kCount; ++v) total += weights[v];
  }
  use(weights);
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
