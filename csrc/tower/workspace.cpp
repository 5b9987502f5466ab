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
template <class T>
BlockBuffers<T> take_block(const Shape& shape, Cursor& cursor) {
  const auto matrix = [&](int panels) { return cursor.take<T>(matrix_numbers(shape, panels)); };
  BlockBuffers<T> block{};
  block.normed = shape.pre_norm ? matrix(shape.panels()) : nullptr;
  block.qkv = matrix(3 * shape.panels());
  block.weights = cursor.take<T>(static_cast<std::size_t>(shape.rows()) * shape.heads * shape.token_blocks() * kBlock);
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
    block.forward[m] = cursor.take<T>(numbers);
    block.backward[m] = cursor.take<T>(numbers);
    block.bias[m] = cursor.take<float>(outputs(shape, m));
  }
  return block;
}

// Attention works on one head: queries, keys, values and gradients as factors, scores and their gradients.
template <class T>
std::size_t attention_bytes(const Shape& shape) {
  const std::size_t tokens = shape.token_blocks(), head = shape.head_panels();
  return sizeof(T) * kBlockNumbers * (9 * tokens * head + 4 * tokens * tokens) +
         sizeof(float) * kBlockNumbers * (tokens * tokens + tokens * head);
}

template <class T>
Scratch<T> take_scratch(const Shape& shape, Cursor& cursor) {
  constexpr std::size_t kStrips = most_strips(sizeof(T)), kBlocks = most_gradient_blocks(sizeof(T));
  const std::size_t panels = shape.panels(), factors = sizeof(T) * 2 * kBlocks * kGradientStrips * kBlockNumbers;
  Scratch<T> scratch;
  scratch.sums = cursor.take<float>(std::max(kStrips * std::max<std::size_t>(panels, kPiece), kBlocks * kBlocks) * kBlockNumbers);
  scratch.hidden_sums = cursor.take<float>(panels > kPiece ? kPiece * kStrips * kBlockNumbers : 0);
  scratch.packed = cursor.take<char>(std::max(factors, attention_bytes<T>(shape)));
  scratch.rows = cursor.take<T>(kStrips * panels * kBlockNumbers);
  return scratch;
}

template <class T>
struct Sizes {
  std::size_t boundary, block, shared, scratch;

  explicit Sizes(const Shape& shape) {
    Cursor one(nullptr), two(nullptr);
    boundary = matrix_numbers(shape, shape.panels()) * sizeof(T);
    take_block<T>(shape, one);
    take_scratch<T>(shape, two);
    block = one.used();
    scratch = two.used();
    shared = (shape.pre_norm ? 1 : 2) * boundary;
  }
  std::size_t blocks_at(const Shape& shape) const { return (shape.depth + 1) * boundary + shared; }
  std::size_t scratch_at(const Shape& shape) const { return blocks_at(shape) + shape.depth * block; }
};

}  // namespace

template <class T>
BlockBuffers<T> Pass::block(int number) const {
  const Sizes<T> sizes(shape);
  Cursor cursor(memory, sizes.blocks_at(shape) + number * sizes.block);
  BlockBuffers<T> block = take_block<T>(shape, cursor);
  block.in = reinterpret_cast<T*>(memory + number * sizes.boundary);
  block.out = reinterpret_cast<T*>(memory + (number + 1) * sizes.boundary);
  if (block.normed == nullptr) block.normed = block.in;
  if (block.sum2 == nullptr) block.sum2 = block.out;
  return block;
}

template <class T>
Scratch<T> Pass::scratch(int worker) const {
  const Sizes<T> sizes(shape);
  Cursor cursor(memory, sizes.scratch_at(shape) + worker * sizes.scratch);
  return take_scratch<T>(shape, cursor);
}

template <class T>
T* Pass::attended() const {
  const Sizes<T> sizes(shape);
  return reinterpret_cast<T*>(memory + (shape.depth + 1) * sizes.boundary);
}

template <class T>
T* Pass::rolling() const {
  return attended<T>() + matrix_numbers(shape, shape.panels());
}

template <class T>
std::size_t workspace_bytes(const Shape& shape, int threads) {
  const Sizes<T> sizes(shape);
  return sizes.scratch_at(shape) + threads * sizes.scratch;
}

#define PAIRCLIP_WORKSPACE_OF(T)                      \
  template BlockBuffers<T> Pass::block<T>(int) const; \
  template Scratch<T> Pass::scratch<T>(int) const;    \
  template T* Pass::attended<T>() const;              \
  template T* Pass::rolling<T>() const;               \
  template std::size_t workspace_bytes<T>(const Shape&, int);
PAIRCLIP_WORKSPACE_OF(bf16)
PAIRCLIP_WORKSPACE_OF(float)
#undef PAIRCLIP_WORKSPACE_OF

}  // namespace pairclip::tower
