// Compiled once per instruction set: fills in that set's table.
#include "core/variant.h"

#include "conv/batch_norm.h"
#include "conv/channel_norm.h"
#include "conv/tile_filters.h"
#include "conv/winograd.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {
namespace {

void weight_gradient(const TileFilters& call, Range pictures, char* scratch, float* sums) {
  TileWeightGradientTask(call, scratch).run(pictures, sums);
}

void convolve(const Winograd& call, const float* pixels, const float* filters, Range tiles, char* scratch, float* result) {
  WinogradTask(call, scratch).convolve(pixels, filters, tiles, result);
}

void add_gradients(const Winograd& call, const float* pixels, const float* gradient, Range tiles, char* scratch, float* sums) {
  WinogradTask(call, scratch).add_gradients(pixels, gradient, tiles, sums);
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
                         .winograd = {.rows = kRows,
                                      .columns = kWidth,
                                      .transform_filters = WinogradTask::transform_filters,
                                      .convolve = convolve,
                                      .add_gradients = add_gradients}};

}  // namespace

const Engine& engine() { return kEngine; }

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
