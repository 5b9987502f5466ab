#include "conv/filters.h"

#include <algorithm>

#include "conv/norm.h"
#include "core/huge_pages.h"
#include "core/parallel.h"

namespace pairclip::conv {
namespace {

// Sums of pieces of the pictures by `add`; `fold` then adds up those of an output block.
template <class Filters, class Fold>
void in_pieces(const Filters& call, void (*add)(const Filters& call, Range pictures, char* scratch, float* sums),
               const Fold& fold, int threads) {
  const int pieces = std::min(kPieces, call.pictures), workers = std::min(threads, pieces);
  const std::size_t scratch_bytes = (call.scratch_bytes() + 63) / 64 * 64;
  const Buffer memory(call.sums() * pieces * sizeof(float)), scratch(workers * scratch_bytes);
  float* const sums = reinterpret_cast<float*>(memory.at(0));
  ThreadPool::shared().run(workers, pieces, [&](std::int64_t piece, int worker) {
    const Range pictures{static_cast<int>(call.pictures * piece / pieces),
                         static_cast<int>(call.pictures * (piece + 1) / pieces)};
    add(call, pictures, scratch.at(worker * scratch_bytes), sums + piece * call.sums());
  });
  const auto total = [&](const float* from) {
    float found = 0;
    for (int piece = 0; piece < pieces; ++piece) found += from[piece * call.sums()];
    return found;
  };
  ThreadPool::shared().run(threads, call.output_blocks(), [&](std::int64_t block, int) { fold(sums, block, total); });
}

}  // namespace

void weight_gradient(const Convolution<std::uint16_t>& convolution, float* weight, int threads) {
  const TileFilters call{convolution};
  const auto fold = [&](const float* sums, std::int64_t block, const auto& total) {
    for (int row = 0; row < 32; ++row)
      for (int input = 0; input < call.inputs; ++input)
        for (int place = 0; place < 9; ++place) {
          const std::size_t blocks = (std::size_t(place) * call.input_blocks() + input / 32) * call.output_blocks() + block;
          weight[((block * 32 + row) * call.inputs + input) * 9 + place] = total(sums + blocks * 1024 + row * 32 + input % 32);
        }
  };
  in_pieces(call, engine().weight_gradient, fold, threads);
}

void weight_gradient(const Convolution<float>& convolution, float* weight, int threads) {
  const Engine& chosen = engine();
  const FloatFilters call{convolution, chosen.block_outputs, chosen.block_inputs};
  const auto fold = [&](const float* sums, std::int64_t block, const auto& total) {
    const int first = static_cast<int>(block) * call.block_outputs, rows = std::min(call.block_outputs, call.outputs - first);
    for (int input = 0; input < call.inputs; ++input) {
      const float* from =
          sums + (input / call.block_inputs * call.output_blocks() + block) * call.block_sums() + input % call.block_inputs;
      for (int line = 0; line < 3; ++line)
        for (int row = 0; row < call.block_outputs; ++row)
          for (int column = 0; column < 3; ++column, from += call.block_inputs)
            if (row < rows) weight[(std::int64_t{first + row} * call.inputs + input) * 9 + line * 3 + column] = total(from);
    }
  };
  in_pieces(call, chosen.float_weight_gradient, fold, threads);
}

}  // namespace pairclip::conv
