// Compiled once per instruction set: fills in that set's table.
#include "core/variant.h"

#include "conv/batch_norm.h"
#include "conv/channel_norm.h"
#include "conv/weight_gradient.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {
namespace {

void weight_gradient(const Filters& call, Range pictures, char* scratch, float* sums) {
  WeightGradientTask(call, scratch).run(pictures, sums);
}

constexpr Engine kEngine{.isa = PAIRCLIP_VARIANT_NAME,
                         .gather = gather,
                         .apply = apply,
                         .gather_slopes = gather_slopes,
                         .spread = spread,
                         .channel_forward = channel_forward,
                         .channel_backward = channel_backward,
                         .weight_gradient = weight_gradient};

}  // namespace

const Engine& engine() { return kEngine; }

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
