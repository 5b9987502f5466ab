// The outer loops: the bank streams past the queries, chunk by chunk, and nothing of size N is ever kept.
//
// All queries of a batch (at most `kMostRows` at a time) are packed once. Then, for each chunk of the bank: the threads pack
// the chunk's tiles together, and when all are packed they take groups of query blocks, each group going through all tiles
// of the chunk. A tile stays in the second-level cache while a group passes over it, a block in the first-level cache while
// it passes over the tile. Packing is shared, so its cost per thread falls with the number of threads as the rest does.
//
// Each row belongs to one task per chunk and meets the bank in ascending order: results do not depend on the number of
// threads, on the size of the batch or of the chunk. (One exception: where float32 is split into bfloat16, a number that cannot
// be split sends the whole call to multiply-adds, which round the other rows differently too.)
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/huge_pages.h"
#include "kernels/engine.h"

namespace pairclip::kernels {

constexpr std::int64_t kMostRows = 8192;

struct Matrix {
  const void* data;
  Element type;
  std::int64_t rows, stride;  // in elements
  int depth;

  const void* row(std::int64_t i) const {
    return static_cast<const char*>(data) + i * stride * (type == Element::float32 ? sizeof(float) : sizeof(std::uint16_t));
  }
};

// Packing met a number that the engine cannot represent.
struct Unrepresentable {};

// Bank rows chosen for each query: row i's are captions[first[i]] to captions[last[i] - 1].
struct Chosen {
  std::span<const std::int64_t> captions, first, last;
};

class Stream {
 public:
  // Queries [begin, end) of `emb` against `bank`. Throws Unrepresentable, as `run` does.
  Stream(const Engine& engine, const Matrix& emb, std::int64_t begin, std::int64_t end, const Matrix& bank, int threads);

  // Calls visit(step, row) for every block and tile, on several threads; `row` counts from `begin`.
  using Visit = std::function<void(const Step& step, std::int64_t row)>;
  void run(bool with_values, const Visit& visit) const;

  // Calls visit(row, count) for every block of rows, on several threads.
  void for_blocks(const std::function<void(std::int64_t row, int count)>& visit) const;

  // The scores of chosen pairs, by the same arithmetic as in a step: visit(row, scores), in the order of the choice.
  using VisitChosen = std::function<void(std::int64_t row, std::span<const float> scores)>;
  void run_chosen(const Chosen& chosen, const VisitChosen& visit) const;

 private:
  int rows_of(std::int64_t block) const;
  void pack_tile(std::int64_t tile, void* keys, void* values) const;

  const Engine& engine_;
  const Matrix &emb_, &bank_;
  std::int64_t begin_, rows_, blocks_;
  int threads_;
  Buffer queries_;
};

}  // namespace pairclip::kernels
