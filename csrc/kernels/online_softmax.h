// The exponential, and a softmax that sees its row tile by tile (Milakov and Gimelshein 2018).
#pragma once

#include <limits>

#include "kernels/engine.h"
#include "kernels/isa.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// exp(x) for x <= 88: 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2. ln 2 is subtracted in two parts, the first
// short enough that n times it is exact (Cody and Waite 1980); exp(r) is a polynomial, minimax in relative error (3.1e-9).
// Error at most 1.5 units in the last place (tested on every 97th float). Below -87.3, where results would be denormal: 0.
inline Vec exponential(Vec x) {
  constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRound = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  constexpr float kLowest = -87.3f;
  const Vec clamped = high(set(kLowest), x);  // in this order NaN stays NaN
  const Vec shifted = fma(clamped, set(kLog2E), set(kRound));
  const Vec n = shifted - kRound;
  const Vec r = fma(n, set(-kLn2Low), fma(n, set(-kLn2High), clamped));
  Vec p = set(0x1.6a23cep-10f);
  p = fma(p, r, set(0x1.123a2p-7f));
  p = fma(p, r, set(0x1.5558f2p-5f));
  p = fma(p, r, set(0x1.555492p-3f));
  p = fma(p, r, set(0x1.fffffcp-2f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  const Vec power = floats_of((bits_of(shifted) + 127) << 23);
  return x < kLowest ? Vec{} : p * power;
}

// A row takes in `captions` more scores in two steps, so that a caller can do the first for all rows of a block: both are
// chains of dependent instructions, and rows side by side fill each other's gaps.
//
// Infinities follow torch: a logit of +inf gives lse = inf and a mean of NaN; only -inf gives -inf and NaN; NaN gives NaN.

// First step: the highest logit, and by how much that shrinks what was summed before.
inline void raise(SoftmaxRow& row, const float* scores, float scale, int captions) {
  const int whole = captions / kLanes * kLanes;
  Vec top = set(row.high);
  for (int j = 0; j < whole; j += kLanes) top = high(load(scores + j) * scale, top);
  if (whole < captions) top = high(places() < captions - whole ? load(scores + whole) * scale : set(-kInfinity), top);
  const float next = highest(top);
  row.shrink = row.high == next ? 1.0f : exponential(set(row.high - next))[0];
  row.high = next;
}

enum class Scores { kept, weighted };

// Second step: the sum of exp(scale * score - high), in which the fused multiply spares the logits their own rounding.
// Weighted: these terms replace the scores, padded with zeros to whole vectors.
template <Scores After>
void add(SoftmaxRow& row, float* scores, float scale, int captions) {
  if (row.high == kInfinity) {
    bool nan = row.total != row.total;
    for (int j = 0; j < captions; ++j) {
      nan |= scores[j] * scale != scores[j] * scale;
      if constexpr (After == Scores::weighted) scores[j] = kNaN;
    }
    row.total = nan ? kNaN : kInfinity;
    return;
  }
  const float zero = row.high == -kInfinity ? 0.0f : row.high;
  Vec total{};
  const auto weigh = [&](int j, Ints counted) {
    const Vec all = exponential(fma(load(scores + j), set(scale), set(-zero)));
    const Vec weights = counted ? all : Vec{};
    if constexpr (After == Scores::weighted) store(scores + j, weights);
    total += weights;
  };
  const int whole = captions / kLanes * kLanes;
  for (int j = 0; j < whole; j += kLanes) weigh(j, set(-1));
  if (whole < captions) weigh(whole, places() < captions - whole);
  row.total = row.total * row.shrink + sum(total);
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
