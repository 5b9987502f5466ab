// What is done with the scores of a step as they come: the fused epilogues.
//
// A product hands over its scores panel by panel, `Products::kWidth` captions for all rows of the block, and asks for a few
// rows at a time: the tile unit then multiplies the next panel while the vector unit is busy with the last one. A panel is
// 4 KB; the scores of a whole tile would push the queries out of the first-level cache.
#pragma once

#include "kernels/candidates.h"
#include "kernels/engine.h"
#include "kernels/mixing.h"
#include "kernels/online_softmax.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// Calls use(row, scores) for every row of the part; all panels of a bank but its last are whole, which spares them the masks.
template <class Products, class Use>
[[gnu::always_inline]] inline void each_row(const Step& step, const Part& part, const Use& use) {
  constexpr int kWidth = Products::kWidth;
  const int live = step.captions - part.first;
  if (live >= kWidth) {
    for (int r = part.begin; r < part.end; ++r) use(r, Scores<kWidth, true>(part.scores + r * kWidth, kWidth));
  } else {
    for (int r = part.begin; r < part.end; ++r) use(r, Scores<kWidth, false>(part.scores + r * kWidth, live));
  }
}

// Adds how many scores are above `best` and, 2^16 each, how many equal it; lane by lane.
template <class Row>
[[gnu::always_inline]] inline void compare(const Row& scores, const float& best, Ints& counts) {
  const Vec bound = kept(set(best));
  Ints found = counts;
#pragma GCC unroll 8
  for (int v = 0; v < Row::kCount; ++v) {
    found = scores.vectors[v] > bound ? found + (scores.is_live(v) & 1) : found;
    found = scores.vectors[v] == bound ? found + (scores.is_live(v) & 0x10000) : found;
  }
  counts = found;
}

template <class Products>
void softmax_step(const Step& step, float scale, MixedRow* rows, float* numbers) {
  const Mean<Products::kRows, Products::kWidth> mean{numbers, step.rows, step.depth};
  typename Products::Weights weights(step);
  Vec totals[Products::kRows] = {}, mixed[Products::kRows] = {};
  for (int r = 0; r < step.rows; ++r) rows[r].softmax.shrink = 1.0f;
  Products::each_panel(step, [&](const Part& part) __attribute__((always_inline)) {
    const Vec slope = set(scale * kLog4E);
    each_row<Products>(step, part, [&](int r, const auto& scores) __attribute__((always_inline)) {
      const auto shrink = [&](const Exception& exception) {
        rows[r].softmax.shrink *= exception.shrink;
        mixed[r] *= exception.shrink;
        weights.shrink(r, part.first, exception.shrink);
      };
      weigh(rows[r].softmax, scores, slope, totals[r], shrink, [&](auto& found) {
        weights.set(r, part.first, found);
        for (const Vec& stored : found) mixed[r] += stored;
      });
    });
  });
  for (int r = 0; r < step.rows; ++r) {
    const float shrink = rows[r].softmax.shrink;
    rows[r].softmax.total = rows[r].softmax.total * shrink + sum(totals[r]);
    rows[r].mixed = rows[r].mixed * shrink + sum(mixed[r]);
    if (shrink != 1.0f) mean.shrink(r, shrink);
  }
  Products::mix(step, weights, mean);
}

template <class Products>
void unpack_mean(float* numbers, int rows, int depth, float* copy) {
  Mean<Products::kRows, Products::kWidth>{numbers, rows, depth}.unpack(copy);
}

template <class Products>
void stats_step(const Step& step, float scale, StatsRow* rows) {
  Vec totals[Products::kRows] = {};
  Ints counts[Products::kRows] = {};
  for (int r = 0; r < step.rows; ++r) rows[r].softmax.shrink = 1.0f;
  Products::each_panel(step, [&](const Part& part) __attribute__((always_inline)) {
    const Vec slope = set(scale * kLog4E);
    each_row<Products>(step, part, [&](int r, const auto& scores) __attribute__((always_inline)) {
      const auto note = [&](const Exception& exception) {
        rows[r].softmax.shrink *= exception.shrink;
        rows[r].damaged |= exception.nan;
      };
      compare(scores, rows[r].best, counts[r]);
      weigh(rows[r].softmax, scores, slope, totals[r], note, [](auto&) {});
    });
  });
  for (int r = 0; r < step.rows; ++r) {
    SoftmaxRow& row = rows[r].softmax;
    row.total = row.total * row.shrink + sum(totals[r]);
    rows[r].greater += sum(counts[r] & 0xffff);
    rows[r].equal += sum(counts[r] >> 16);
  }
}

template <class Products>
void topk_step(const Step& step, TopkSize size, TopkRow* rows) {
  static_assert(Products::kWidth <= kMostOffered);
  Products::each_panel(step, [&](const Part& part) __attribute__((always_inline)) {
    each_row<Products>(step, part, [&](int r, const auto& scores) __attribute__((always_inline)) {
      offer(rows[r], size, scores, static_cast<std::int32_t>(step.first) + part.first);
    });
  });
}

// All scores of the step, [rows, Engine::tile].
template <class Products>
void scores_step(const Step& step) {
  Products::each_panel(step, [&](const Part& part) __attribute__((always_inline)) {
    for (int r = part.begin; r < part.end; ++r)
      std::memcpy(step.scores + r * Products::kTile + part.first, part.scores + r * Products::kWidth,
                  sizeof(float) * Products::kWidth);
  });
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
