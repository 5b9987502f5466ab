// Compiled once per instruction set: fills in that set's table.
#include "core/variant.h"

#include "conv/batch_norm.h"
#include "conv/channel_norm.h"
#include "conv/float_filters.h"
#include "conv/tile_filters.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {
namespace {

void weight_gradient(const TileFilters& call, Range pictures, char* scratch, float* sums) {
  TileWeightGradientTask(call, scratch).run(pictures, sums);
}

void float_weight_gradient(const FloatFilters& call, Range pictures, char* scratch, float* sums) {
  FloatWeightGradientTask(call, scratch).run(pictures, sums);
}

template <class T>
constexpr NormEngine<T> kNorms{.gather = gather<T>,
                               .apply = apply<T>,
                               .gather_slopes = gather_slopes<T>,
                               .spread = spread<T>,
                               .channel_forward = channel_forward<T>,
                               .channel_backward = channel_backward<T>};

constexpr Engine kEngine{.isa = PAIRCLIP_VARIANT_NAME,
                         .bfloat16 = kNorms<bf16>,
                         .float32 = kNorms<float>,
                         .weight_gradient = weight_gradient,
                         .block_outputs = FloatWeightGradientTask::kOutputs,
                         .block_inputs = FloatWeightGradientTask::kInputs,
                         .float_weight_gradient = float_weight_gradient};

}  // namespace

const Engine& engine() { return kEngine; }

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
