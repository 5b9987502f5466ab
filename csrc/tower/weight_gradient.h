// The gradient of a weight: gradients of the outputs, transposed, times inputs, summed over all tokens; and the bias's with it.
//
// A task owns up to 512 x 512 of the weight (256 x 256 in float32) and goes through the tokens once, some strips at a time: packs
// them both ways, then adds up products in sums that stay in the second-level cache. No two tasks add to the same number, so the
// result does not depend on who computes what. It leaves as float32 in torch's layout [outputs, inputs].
#pragma once

#include "tower/rows.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

template <class T>
struct WeightGradient {
  const T *gradients, *inputs;  // matrices in blocks
  int gradient_panels, input_panels;
  Range outputs, depth;  // panels of either that this task is for
  int strips;
  float *weight, *bias;  // of the whole weight; bias null if another task has it
};

template <class T>
class WeightGradientTask {
 public:
  WeightGradientTask(const WeightGradient<T>& call, const Scratch<T>& scratch)
      : call_(call),
        outputs_(call.outputs.end - call.outputs.begin),
        inputs_(call.depth.end - call.depth.begin),
        sums_(scratch.sums),
        left_(reinterpret_cast<T*>(scratch.packed)),
        right_(left_ + static_cast<std::size_t>(most_gradient_blocks(sizeof(T))) * kGradientStrips * kBlockNumbers) {}

  void run() {
    if (call_.bias != nullptr) std::memset(call_.bias + call_.outputs.begin * kBlock, 0, sizeof(float) * outputs_ * kBlock);
    const int rounds = (call_.strips + kGradientStrips - 1) / kGradientStrips;
    for (int round = 0; round < rounds; ++round) {
      const Range strips{call_.strips * round / rounds, call_.strips * (round + 1) / rounds};
      pack(strips);
      const Range next{strips.end, static_cast<int>(call_.strips * (round + 2) / rounds)};
      add(strips.end - strips.begin, round == rounds - 1 ? Range{0, 0} : next, round == 0);
    }
  }

 private:
  void pack(Range strips) {
    const int count = strips.end - strips.begin;
    for (int strip = strips.begin; strip < strips.end; ++strip) {
      for (int i = 0; i < outputs_; ++i) {
        const int panel = call_.outputs.begin + i;
        pack_transposed(block_at(call_.gradients, call_.gradient_panels, strip, panel),
                        left_ + static_cast<std::size_t>(i * count + strip - strips.begin) * kBlockNumbers,
                        call_.bias == nullptr ? nullptr : call_.bias + panel * kBlock);
      }
      for (int j = 0; j < inputs_; ++j)
        pack_rows_as_depth(block_at(call_.inputs, call_.input_panels, strip, call_.depth.begin + j),
                           right_ + static_cast<std::size_t>(j * count + strip - strips.begin) * kBlockNumbers);
    }
  }

  // One round's products. Meanwhile the sums that come next go to the first-level cache, and what is packed next to the second.
  void add(int strips, Range next, bool first) const {
    const int stride = call_.input_panels * kBlock, pairs = outputs_ * inputs_;
    const int wanted = (next.end - next.begin) * (outputs_ + inputs_), lines = (2 * kBlock + strips - 1) / strips;
    int fetched = 0;
    for (int pair = 0; pair < pairs; ++pair) {
      const int i = pair % outputs_, j = pair / outputs_;
      float* sums = sums_ + static_cast<std::size_t>(pair) * kBlockNumbers;
      const T *left = left_ + static_cast<std::size_t>(i * strips) * kBlockNumbers,
              *right = right_ + static_cast<std::size_t>(j * strips) * kBlockNumbers;
      const int until = wanted * (pair + 1) / pairs;
      TilesOf<T> tiles;
      if (first) {
        tiles.clear();
      } else {
        tiles.load(sums, kBlock);
      }
      for (int k = 0; k < strips; ++k) {
        for (int line = k * lines; line < (k + 1) * lines; ++line)
          __builtin_prefetch(sums + kBlockNumbers + line * (kBlock / 2), 1, 3);
        if (fetched < until) fetch(next.begin, fetched++);
        tiles.multiply(left + k * kBlockNumbers, right + k * kBlockNumbers, true);
      }
      if (next.begin < next.end) {
        tiles.store(sums, kBlock);
      } else {
        tiles.store(call_.weight + (call_.outputs.begin + i) * static_cast<std::size_t>(kBlock) * stride +
                        (call_.depth.begin + j) * kBlock,
                    stride);
      }
    }
  }

  // The block that is packed as number `number` after strip `first` begins.
  void fetch(int first, int number) const {
    const int strip = first + number / (outputs_ + inputs_), block = number % (outputs_ + inputs_);
    const T* from = block < outputs_ ? block_at(call_.gradients, call_.gradient_panels, strip, call_.outputs.begin + block)
                                     : block_at(call_.inputs, call_.input_panels, strip, call_.depth.begin + block - outputs_);
    for (int line = 0; line < kBlock; ++line) prefetch(from + line * kBlock);
  }

  const WeightGradient<T>& call_;
  int outputs_, inputs_;
  float* sums_;
  T *left_, *right_;
};

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
