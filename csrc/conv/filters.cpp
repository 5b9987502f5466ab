#include "conv/filters.h"

#include <algorithm>

#include "conv/norm.h"
#include "core/huge_pages.h"
#include "core/parallel.h"

namespace pairclip::conv {

void weight_gradient(const Filters& call, float* weight, int threads) {
  const Engine& chosen = engine();
  const int pieces = std::min(kPieces, call.pictures), workers = std::min(threads, pieces);
  const std::size_t scratch_bytes = call.scratch_bytes();
  const Buffer memory(call.sums() * pieces * sizeof(float)), scratch(workers * scratch_bytes);
  float* const sums = reinterpret_cast<float*>(memory.at(0));
  ThreadPool::shared().run(workers, pieces, [&](std::int64_t piece, int worker) {
    const Range pictures{static_cast<int>(call.pictures * piece / pieces),
                         static_cast<int>(call.pictures * (piece + 1) / pieces)};
    chosen.weight_gradient(call, pictures, scratch.at(worker * scratch_bytes), sums + piece * call.sums());
  });
  ThreadPool::shared().run(threads, call.output_blocks(), [&](std::int64_t block, int) {
    for (int row = 0; row < 32; ++row)
      for (int input = 0; input < call.inputs; ++input)
        for (int place = 0; place < 9; ++place) {
          const std::size_t blocks = (std::size_t(place) * call.input_blocks() + input / 32) * call.output_blocks() + block;
          const float* from = sums + blocks * 1024 + row * 32 + input % 32;
          float total = 0;
          for (int piece = 0; piece < pieces; ++piece) total += from[piece * call.sums()];
          weight[((block * 32 + row) * call.inputs + input) * 9 + place] = total;
        }
  });
}

}  // namespace pairclip::conv
