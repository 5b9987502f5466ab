#include "conv/convolution.h"

#include <algorithm>

#include "conv/norm.h"
#include "core/huge_pages.h"
#include "core/parallel.h"

namespace pairclip::conv {
namespace {

constexpr std::size_t on_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Equal parts of `count` things, each summed up by one task: as many for any number of threads. add(range, scratch, sums) fills
// `numbers` sums of a part, and fold(first, total) goes through blocks of them; total(i) adds up the parts' sums number i.
template <class Add, class Fold>
void in_pieces(int count, std::size_t scratch_bytes, std::size_t numbers, int blocks, const Add& add, const Fold& fold,
               int threads) {
  const int pieces = std::min(kPieces, count), workers = std::min(threads, pieces);
  const std::size_t of_worker = on_lines(scratch_bytes);
  const Buffer memory(numbers * pieces * sizeof(float)), scratch(workers * of_worker);
  float* const sums = reinterpret_cast<float*>(memory.at(0));
  ThreadPool::shared().run(workers, pieces, [&](std::int64_t piece, int worker) {
    const Range range{static_cast<int>(count * piece / pieces), static_cast<int>(count * (piece + 1) / pieces)};
    add(range, scratch.at(worker * of_worker), sums + piece * numbers);
  });
  const auto total = [&](std::size_t i) {
    float found = 0;
    for (int piece = 0; piece < pieces; ++piece) found += sums[piece * numbers + i];
    return found;
  };
  ThreadPool::shared().run(threads, blocks, [&](std::int64_t block, int) { fold(static_cast<int>(block), total); });
}

}  // namespace

void weight_gradient(const WeightGradient<std::uint16_t>& convolution, float* weight, int threads) {
  const Engine& chosen = engine();
  const TileFilters call{convolution};
  in_pieces(
      call.pictures, call.scratch_bytes(), call.sums(), call.output_blocks(),
      [&](Range pictures, char* scratch, float* sums) { chosen.weight_gradient(call, pictures, scratch, sums); },
      [&](int block, const auto& total) {
        for (int row = 0; row < 32; ++row)
          for (int input = 0; input < call.inputs; ++input)
            for (int place = 0; place < 9; ++place) {
              const std::size_t blocks = (std::size_t(place) * call.input_blocks() + input / 32) * call.output_blocks() + block;
              weight[(std::int64_t{block * 32 + row} * 9 + place) * call.inputs + input] =
                  total(blocks * 1024 + row * 32 + input % 32);
            }
      },
      threads);
}

void weight_gradient(const WeightGradient<float>& convolution, float* weight, int threads) {
  const WinogradEngine& chosen = engine().winograd;
  const Winograd call{convolution, chosen.rows, chosen.columns};
  in_pieces(
      call.tiles(), call.gradient_bytes(), call.sums(), call.panels(),
      [&](Range tiles, char* scratch, float* sums) {
        chosen.add_gradients(call, convolution.pixels, convolution.gradient, tiles, scratch, sums);
      },
      [&](int panel, const auto& total) {
        const int first = panel * call.columns, count = std::min(call.columns, call.outputs - first);
        for (int input = 0; input < call.inputs; ++input)
          for (int place = 0; place < 9; ++place)
            for (int output = 0; output < count; ++output)
              weight[(std::int64_t{first + output} * 9 + place) * call.inputs + input] =
                  total(((std::size_t(panel) * call.inputs + input) * 9 + place) * call.columns + output);
      },
      threads);
}

void convolve(const Convolution& convolution, float* result, int threads) {
  const WinogradEngine& chosen = engine().winograd;
  const Winograd call{convolution, chosen.rows, chosen.columns};
  const std::size_t of_worker = on_lines(call.convolve_bytes());
  const Buffer filters(call.filters() * sizeof(float)), scratch(threads * of_worker);
  float* const transformed = reinterpret_cast<float*>(filters.at(0));
  ThreadPool::shared().run(threads, call.panels(), [&](std::int64_t panel, int) {
    chosen.transform_filters(call, convolution.weight, convolution.turned, static_cast<int>(panel), transformed);
  });
  const int blocks = (call.tiles() + call.block_tiles() - 1) / call.block_tiles();
  ThreadPool::shared().run(threads, blocks, [&](std::int64_t block, int worker) {
    const int first = static_cast<int>(block) * call.block_tiles();
    const Range tiles{first, std::min(first + call.block_tiles(), call.tiles())};
    chosen.convolve(call, convolution.pixels, transformed, tiles, scratch.at(worker * of_worker), result);
  });
}

}  // namespace pairclip::conv
