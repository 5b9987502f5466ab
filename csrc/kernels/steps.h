// What is done with the scores of a step before they are overwritten by the next: the fused epilogues.
//
// The product leaves them in a buffer of one block by one tile (7 KB to 32 KB, first-level cache) rather than in registers.
// The store costs one instruction per depth multiply-adds, and a row's epilogue then runs over contiguous numbers.
#pragma once

#include "kernels/candidates.h"
#include "kernels/engine.h"
#include "kernels/online_softmax.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

inline void count_row(StatsRow& row, const float* scores, int captions) {
  const Vec best = set(row.best);
  Ints above{}, ties{};  // true is -1
  int j = 0;
  for (; j + kLanes <= captions; j += kLanes) {
    const Vec score = load(scores + j);
    above -= score > best;
    ties -= score == best;
  }
  if (j < captions) {
    const Vec score = load(scores + j);
    const Ints live = places() < captions - j;
    above -= (score > best) & live;
    ties -= (score == best) & live;
  }
  row.greater += sum(above);
  row.equal += sum(ties);
}

inline bool any_nan(const float* scores, int captions) {
  bool found = false;
  for (int j = 0; j < captions; ++j) found |= scores[j] != scores[j];
  return found;
}

template <class Products>
void softmax_step(const Step& step, float scale, SoftmaxRow* rows, float* mean) {
  Products::scores(step);
  const auto scores = [&](int r) { return step.scores + r * Products::kTile; };
  for (int r = 0; r < step.rows; ++r) raise(rows[r], scores(r), scale, step.captions);
  for (int r = 0; r < step.rows; ++r) add<Scores::weighted>(rows[r], scores(r), scale, step.captions);
  Products::mix(step, rows, mean);
}

template <class Products>
void stats_step(const Step& step, float scale, StatsRow* rows) {
  Products::scores(step);
  const auto scores = [&](int r) { return step.scores + r * Products::kTile; };
  for (int r = 0; r < step.rows; ++r) {
    count_row(rows[r], scores(r), step.captions);
    raise(rows[r].softmax, scores(r), scale, step.captions);
  }
  for (int r = 0; r < step.rows; ++r) {
    add<Scores::kept>(rows[r].softmax, scores(r), scale, step.captions);
    // NaN anywhere has made the sum NaN; so have infinite scores with a scale of 0, which do no damage.
    if (rows[r].softmax.total != rows[r].softmax.total) rows[r].damaged |= any_nan(scores(r), step.captions);
  }
}

template <class Products>
void topk_step(const Step& step, TopkSize size, TopkRow* rows) {
  Products::scores(step);
  for (int r = 0; r < step.rows; ++r)
    offer(rows[r], size, step.scores + r * Products::kTile, step.captions, static_cast<std::int32_t>(step.first));
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
