#include "tower/workspace.h"

#include <algorithm>

namespace pairclip::tower {
namespace {

constexpr std::size_t kLine = 64;

// Hands out pieces of a memory one after the other; with no memory it counts.
class Cursor {
 public:
  explicit Cursor(char* memory, std::size_t start = 0) : memory_(memory), used_(start) {}
  template <class T>
  T* take(std::size_t count) {
    char* found = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * sizeof(T) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<T*>(found);
  }
  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_;
};

std::size_t matrix_numbers(const Shape& shape, int panels) {
  return static_cast<std::size_t>(shape.strips()) * panels * kBlockNumbers;
}

Norm take_norm(const Shape& shape, Cursor& cursor) {
  const std::size_t rows = static_cast<std::size_t>(shape.strips()) * kBlock, width = shape.width;
  Norm norm;
  norm.weight = cursor.take<float>(width);
  norm.bias = cursor.take<float>(width);
  norm.mean = cursor.take<float>(rows);
  norm.scale = cursor.take<float>(rows);
  norm.sums = cursor.take<float>(shape.strips() * 2 * width);
  return norm;
}

// `in` and `out` are the blocks' common boundaries, which have places of their own.
BlockBuffers take_block(const Shape& shape, Cursor& cursor) {
  const auto matrix = [&](int panels) { return cursor.take<bf16>(matrix_numbers(shape, panels)); };
  BlockBuffers block{};
  block.normed = shape.pre_norm ? matrix(shape.panels()) : nullptr;
  block.qkv = matrix(3 * shape.panels());
  block.weights = cursor.take<bf16>(static_cast<std::size_t>(shape.rows()) * shape.heads * shape.token_blocks() * kBlock);
  block.attended = matrix(shape.panels());
  block.sum1 = matrix(shape.panels());
  block.mlp_in = matrix(shape.panels());
  block.hidden = matrix(shape.mlp_panels());
  block.slope = matrix(shape.mlp_panels());
  block.sum2 = shape.pre_norm ? nullptr : matrix(shape.panels());
  block.norm1 = take_norm(shape, cursor);
  block.norm2 = take_norm(shape, cursor);
  for (int m = 0; m < kMatrices; ++m) {
    const std::size_t numbers = static_cast<std::size_t>(outputs(shape, m)) * inputs(shape, m);
    block.forward[m] = cursor.take<bf16>(numbers);
    block.backward[m] = cursor.take<bf16>(numbers);
    block.bias[m] = cursor.take<float>(outputs(shape, m));
  }
  return block;
}

// Attention works on one head: queries, keys, values and gradients as factors, scores and their gradients.
std::size_t attention_bytes(const Shape& shape) {
  const std::size_t tokens = shape.token_blocks(), head = shape.head_panels();
  return 2 * kBlockNumbers * (9 * tokens * head + 4 * tokens * tokens) + 4 * kBlockNumbers * (tokens * tokens + tokens * head);
}

Scratch take_scratch(const Shape& shape, Cursor& cursor) {
  const std::size_t blocks = std::max(kMostStrips * std::max(shape.panels(), kPiece), kMostGradientBlocks * kMostGradientBlocks);
  const std::size_t factors = std::size_t{2} * 2 * kMostGradientBlocks * kGradientStrips * kBlockNumbers;
  Scratch scratch;
  scratch.sums = cursor.take<float>(blocks * kBlockNumbers);
  const bool in_pieces = shape.panels() > kPiece;
  scratch.hidden_sums = cursor.take<float>(in_pieces ? std::size_t{kPiece} * kMostStrips * kBlockNumbers : 0);
  scratch.packed = cursor.take<char>(std::max(factors, attention_bytes(shape)));
  scratch.rows = cursor.take<bf16>(static_cast<std::size_t>(kMostStrips) * shape.panels() * kBlockNumbers);
  return scratch;
}

struct Sizes {
  std::size_t boundary, block, shared, scratch;

  explicit Sizes(const Shape& shape) {
    Cursor one(nullptr), two(nullptr), three(nullptr);
    boundary = matrix_numbers(shape, shape.panels()) * sizeof(bf16);
    take_block(shape, one);
    take_scratch(shape, two);
    block = one.used();
    scratch = two.used();
    shared = (shape.pre_norm ? 1 : 2) * boundary;
  }
  std::size_t blocks_at(const Shape& shape) const { return (shape.depth + 1) * boundary + shared; }
  std::size_t scratch_at(const Shape& shape) const { return blocks_at(shape) + shape.depth * block; }
};

}  // namespace

BlockBuffers Pass::block(int number) const {
  const Sizes sizes(shape);
  Cursor cursor(memory, sizes.blocks_at(shape) + number * sizes.block);
  BlockBuffers block = take_block(shape, cursor);
  block.in = reinterpret_cast<bf16*>(memory + number * sizes.boundary);
  block.out = reinterpret_cast<bf16*>(memory + (number + 1) * sizes.boundary);
  if (block.normed == nullptr) block.normed = block.in;
  if (block.sum2 == nullptr) block.sum2 = block.out;
  return block;
}

Scratch Pass::scratch(int worker) const {
  const Sizes sizes(shape);
  Cursor cursor(memory, sizes.scratch_at(shape) + worker * sizes.scratch);
  return take_scratch(shape, cursor);
}

bf16* Pass::attended() const {
  const Sizes sizes(shape);
  return reinterpret_cast<bf16*>(memory + (shape.depth + 1) * sizes.boundary);
}

bf16* Pass::rolling() const { return attended() + matrix_numbers(shape, shape.panels()); }

std::size_t workspace_bytes(const Shape& shape, int threads) {
  const Sizes sizes(shape);
  return sizes.scratch_at(shape) + threads * sizes.scratch;
}

}  // namespace pairclip::tower
