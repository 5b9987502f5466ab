// The bank operations on plain memory. What they compute is defined in pairclip_fast/kernels/reference.py; arguments have been
// checked. Results do not depend on the number of threads.
#pragma once

#include "kernels/stream.h"

namespace pairclip::kernels {

struct Call {
  const Engine& engine;
  Matrix emb, bank;
  int threads;
};

// lse [B], mean [B, D].
void bank_softmax(const Call& call, float scale, float* lse, float* mean);

// lse, best, greater, equal: [B] each. `positives`: the captions that count as right for each row, each once.
void bank_stats(const Call& call, float scale, const Chosen& positives, float* lse, float* best, std::int32_t* greater,
                std::int32_t* equal);

// indices, scores: [B, chosen]; an index of -1 gives -inf.
void pair_scores(const Call& call, const std::int64_t* indices, std::int64_t chosen, float* scores);

// scores, indices: [B, k]; k <= kMostTop.
void bank_topk(const Call& call, int k, float* scores, std::int64_t* indices);

}  // namespace pairclip::kernels
