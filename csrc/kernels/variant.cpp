// Compiled once per instruction set: fills in that set's tables.
#include "core/variant.h"

#include "kernels/engines.h"
#include "kernels/fma_products.h"
#include "kernels/steps.h"
#include "kernels/tile_products.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {
namespace {

void powers_of_four(float* numbers, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(numbers + i, power_of_four(load(numbers + i)));
}

double multiply_adds(std::int64_t rounds) {
  constexpr int kChains = 12;  // two a cycle, four cycles each, and some to spare
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = set(static_cast<float>(i));  // all different: none can be left out
  const Vec factor = set(0.5f);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (Vec& sum : sums) sum = fma(sum, factor, factor);
  }
  Vec total{};
  for (const Vec& sum : sums) total += sum;
  return sum(total) >= 0 ? 2.0 * kLanes * kChains * static_cast<double>(rounds) : 0.0;
}

template <class Products>
constexpr Engine engine(const Engine* fallback) {
  return {.precision = Products::kPrecision,
          .rows = Products::kRows,
          .tile = Products::kTile,
          .fallback = fallback,
          .query_bytes = Products::query_bytes,
          .key_bytes = Products::key_bytes,
          .value_bytes = Products::value_bytes,
          .pack_queries = Products::pack_queries,
          .pack_keys = Products::pack_keys,
          .pack_values = Products::pack_values,
          .begin = Products::begin,
          .end = Products::end,
          .scores = scores_step<Products>,
          .softmax = softmax_step<Products>,
          .unpack_mean = unpack_mean<Products>,
          .stats = stats_step<Products>,
          .topk = topk_step<Products>,
          .sort = [](TopkSize size, TopkRow* row) { sort_best(*row, size.k); },
          .powers_of_four = powers_of_four,
          .multiply_adds = multiply_adds};
}

constexpr Engine kFma = engine<FmaProducts>(nullptr);
constexpr Engine kBfloat16 = engine<TileProducts<1>>(nullptr);

// Six products are worth it if they take less than a multiply-add; what they cannot represent is left to multiply-adds.
template <class Kind>
constexpr Engine float32_engine() {
  if constexpr (Kind::kRate > 6) {
    return engine<TileProducts<3>>(&kFma);
  } else {
    return kFma;
  }
}
constexpr Engine kFloat32 = float32_engine<Tiles>();

}  // namespace

const Engine& fma_engine() { return kFma; }
const Engine& tile_engine(Element type) { return type == Element::bfloat16 ? kBfloat16 : kFloat32; }

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
