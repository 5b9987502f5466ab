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
  unsigned damaged = 0;
  int above = 0, ties = 0;
  for (int j = 0; j < captions; j += kLanes) {
    const unsigned live = lanes_before(j, captions);
    const Vec score = load(scores + j);
    const unsigned higher = greater(score, best) & live, same = equal(score, best) & live;
    above += __builtin_popcount(higher);
    ties += __builtin_popcount(same);
    damaged |= ~equal(score, score) & live;
  }
  row.greater += above;
  row.equal += ties;
  row.damaged |= damaged != 0;
}

template <class Products>
void softmax_step(const Step& step, float scale, SoftmaxRow* rows, float* mean) {
  Products::scores(step);
  for (int r = 0; r < step.rows; ++r) update(rows[r], step.scores + r * Products::kTile, scale, step.captions);
  Products::mix(step, rows, mean);
}

template <class Products>
void stats_step(const Step& step, float scale, StatsRow* rows) {
  Products::scores(step);
  for (int r = 0; r < step.rows; ++r) {
    float* row = step.scores + r * Products::kTile;
    count_row(rows[r], row, step.captions);
    update(rows[r].softmax, row, scale, step.captions);
  }
}

template <class Products>
void topk_step(const Step& step, TopkSize size, TopkRow* rows) {
  Products::scores(step);
  for (int r = 0; r < step.rows; ++r)
    offer(rows[r], size, step.scores + r * Products::kTile, step.captions, static_cast<std::int32_t>(step.first));
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
