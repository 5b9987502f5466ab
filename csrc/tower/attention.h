// Attention of one head of one sample on tiles, forward and backward, keeping the softmax weights (Vaswani et al. 2017, eq. 1).
//
// A sample's rows do not begin where a strip does, so queries, keys and values are gathered into blocks first, padded with
// zeros to 32 tokens. Products leave out tiles of sixteen rows or columns that are padding altogether.
#pragma once

#include "tower/exponential.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

// Blocks in memory, [rows][columns] of them; as a factor of a product: [what is not summed over][depth].
template <class T>
struct BlockGrid {
  T* blocks;
  int rows, columns;

  T* at(int row, int column) const { return blocks + (row * columns + column) * kBlockNumbers; }
};

template <int Rows, int Columns, class T>
void product_block(const T* left, const T* right, int depth, float* out, int stride) {
  TilesOf<T> tiles;
  tiles.template clear<Rows, Columns>();
  for (int k = 0; k < depth; ++k) tiles.template multiply<Rows, Columns>(left + k * kBlockNumbers, right + k * kBlockNumbers);
  tiles.template store<Rows, Columns>(out, stride);
}

// out[rows][columns] with rows of `right.rows` blocks; `rows` and `columns` count in tiles of sixteen.
template <class T>
void multiply(const BlockGrid<T>& left, int rows, const BlockGrid<T>& right, int columns, float* out) {
  const int stride = right.rows * kBlock, depth = left.columns;
  for (int i = 0; i < rows; i += 2)
    for (int j = 0; j < columns; j += 2) {
      const T *a = left.at(i / 2, 0), *b = right.at(j / 2, 0);
      float* to = out + i * 16 * stride + j * 16;
      if (i + 1 < rows && j + 1 < columns) {
        product_block<2, 2>(a, b, depth, to, stride);
      } else if (i + 1 < rows) {
        product_block<2, 1>(a, b, depth, to, stride);
      } else if (j + 1 < columns) {
        product_block<1, 2>(a, b, depth, to, stride);
      } else {
        product_block<1, 1>(a, b, depth, to, stride);
      }
    }
}

// exp(scale * (score - highest)) / sum of them; 0 for the padding after `count` scores. Replaces the scores.
inline void softmax_row(float* scores, int count, int blocks, float scale) {
  Vec top = set(-kInfinity);
  for (int j = 0; j < count; j += kLanes) top = high(places() < count - j ? load(scores + j) : set(-kInfinity), top);
  const Vec zero = set(-scale * highest(top));
  Vec sums{};
  for (int j = 0; j < blocks * kBlock; j += kLanes) {
    const Vec found = exponential(fma(load(scores + j), set(scale), zero));
    const Vec term = places() < count - j ? found : Vec{};
    store(scores + j, term);
    sums += term;
  }
  const float inverse = 1.0f / sum(sums);
  for (int j = 0; j < blocks * kBlock; j += kLanes) store(scores + j, load(scores + j) * inverse);
}

template <class T>
class Head {
 public:
  // `memory` is scratch, of `attention_bytes`.
  Head(const Shape& shape, int sample, int head, char* memory)
      : shape_(shape),
        first_row_(std::int64_t{sample} * shape.tokens),
        kept_(static_cast<std::int64_t>(sample) * shape.heads + head),
        head_(head),
        tokens_(shape.token_blocks()),
        columns_(shape.head_panels()),
        tiles_((shape.tokens + 15) / 16),
        scale_(1.0f / __builtin_sqrtf(static_cast<float>(columns_ * kBlock))),
        memory_(memory) {}

  void forward(const BlockBuffers<T>& block) {
    const BlockGrid<T> queries = gather(block.qkv, 3, 0), keys = gather(block.qkv, 3, 1), values = gather(block.qkv, 3, 2);
    const int stride = tokens_ * kBlock;
    float* scores = take<float>(tokens_ * tokens_ * kBlockNumbers);
    multiply(queries, tiles_, packed(keys, pack_rows_as_columns), tiles_, scores);
    const BlockGrid<T> weights = grid(tokens_, tokens_);
    std::memset(weights.blocks, 0, sizeof(T) * tokens_ * tokens_ * kBlockNumbers);
    for (int i = 0; i < shape_.tokens; ++i) {
      softmax_row(scores + i * stride, shape_.tokens, tokens_, scale_);
      write_weights(weights, i, scores + i * stride);
    }
    for (int i = 0; i < shape_.tokens; ++i)
      for (int j = 0; j < tokens_; ++j) std::memcpy(kept(block, i, j), weight_row(weights, i, j), kBlock * sizeof(T));
    float* mixed = take<float>(tokens_ * columns_ * kBlockNumbers);
    multiply(weights, tiles_, turned(values, pack_rows_as_depth), 2 * columns_, mixed);
    scatter(mixed, block.attended, 1, 0);
  }

  // `gradient` is that of `attended`. Queries, keys and values are replaced by their gradients.
  void backward(const BlockBuffers<T>& block, const T* gradient) {
    const BlockGrid<T> queries = gather(block.qkv, 3, 0), keys = gather(block.qkv, 3, 1), values = gather(block.qkv, 3, 2),
                       mixed = gather(gradient, 1, 0), weights = grid(tokens_, tokens_);
    std::memset(weights.blocks, 0, sizeof(T) * tokens_ * tokens_ * kBlockNumbers);
    for (int i = 0; i < shape_.tokens; ++i)
      for (int j = 0; j < tokens_; ++j) std::memcpy(weight_row(weights, i, j), kept(block, i, j), kBlock * sizeof(T));
    float* found = take<float>(tokens_ * columns_ * kBlockNumbers);
    multiply(turned(weights, pack_left), tiles_, turned(mixed, pack_rows_as_depth), 2 * columns_, found);
    scatter(found, block.qkv, 3, 2);
    const BlockGrid<T> scores = score_gradients(weights, mixed, values);
    multiply(scores, tiles_, turned(keys, pack_rows_as_depth), 2 * columns_, found);
    scatter(found, block.qkv, 3, 0);
    multiply(turned(scores, pack_left), tiles_, turned(queries, pack_rows_as_depth), 2 * columns_, found);
    scatter(found, block.qkv, 3, 1);
  }

 private:
  template <class Number>
  Number* take(int count) {
    char* found = memory_;
    memory_ += sizeof(Number) * count;
    return reinterpret_cast<Number*>(found);
  }
  BlockGrid<T> grid(int rows, int columns) { return {take<T>(rows * columns * kBlockNumbers), rows, columns}; }

  static void pack_left(const T* block, T* out) { pack_transposed(block, out, nullptr); }

  // Part `part` of `parts` side by side in a matrix, this head's columns and this sample's rows of it.
  BlockGrid<T> gather(const T* matrix, int parts, int part) {
    const BlockGrid<T> found = grid(tokens_, columns_);
    const int panels = parts * shape_.panels(), first = part * shape_.panels() + head_ * columns_;
    for (int i = 0; i < tokens_ * kBlock; ++i)
      for (int c = 0; c < columns_; ++c) {
        T* to = found.at(i / kBlock, c) + i % kBlock * kBlock;
        if (i < shape_.tokens) {
          std::memcpy(to, row_at(matrix, panels, first_row_ + i, first + c), kBlock * sizeof(T));
        } else {
          std::memset(to, 0, kBlock * sizeof(T));
        }
      }
    return found;
  }

  void scatter(const float* rows, T* matrix, int parts, int part) const {
    const int panels = parts * shape_.panels(), first = part * shape_.panels() + head_ * columns_;
    for (int i = 0; i < shape_.tokens; ++i)
      for (int c = 0; c < columns_; ++c)
        write_row(row_at(matrix, panels, first_row_ + i, first + c), read_row(rows + (i * columns_ + c) * kBlock));
  }

  using Pack = void(const T* block, T* out);
  BlockGrid<T> packed(const BlockGrid<T>& from, Pack pack) {
    const BlockGrid<T> to = grid(from.rows, from.columns);
    for (int i = 0; i < from.rows * from.columns; ++i) pack(from.blocks + i * kBlockNumbers, to.blocks + i * kBlockNumbers);
    return to;
  }
  BlockGrid<T> turned(const BlockGrid<T>& from, Pack pack) {
    const BlockGrid<T> to = grid(from.columns, from.rows);
    for (int i = 0; i < from.rows; ++i)
      for (int j = 0; j < from.columns; ++j) pack(from.at(i, j), to.at(j, i));
    return to;
  }

  static T* weight_row(const BlockGrid<T>& weights, int i, int j) { return weights.at(i / kBlock, j) + i % kBlock * kBlock; }
  static void write_weights(const BlockGrid<T>& weights, int i, const float* row) {
    for (int j = 0; j < weights.columns; ++j) write_row(weight_row(weights, i, j), read_row(row + j * kBlock));
  }
  T* kept(const BlockBuffers<T>& block, int i, int j) const {
    return block.weights + ((kept_ * tokens_ + j) * shape_.tokens + i) * kBlock;
  }

  // weights * (gradient of weights - their weighted mean) * scale, the gradient of the scores.
  BlockGrid<T> score_gradients(const BlockGrid<T>& weights, const BlockGrid<T>& mixed, const BlockGrid<T>& values) {
    const int stride = tokens_ * kBlock;
    float* gradients = take<float>(tokens_ * tokens_ * kBlockNumbers);
    multiply(mixed, tiles_, packed(values, pack_rows_as_columns), tiles_, gradients);
    const BlockGrid<T> found = grid(tokens_, tokens_);
    std::memset(found.blocks, 0, sizeof(T) * tokens_ * tokens_ * kBlockNumbers);
    for (int i = 0; i < shape_.tokens; ++i) {
      float* row = gradients + i * stride;
      for (int j = 2 * 16 * (shape_.tokens / kBlock); j < stride; j += kLanes)  // tiles left out were never written
        store(row + j, places() < shape_.tokens - j ? load(row + j) : Vec{});
      Row products{};
      for (int j = 0; j < tokens_; ++j) products = products + read_row(weight_row(weights, i, j)) * read_row(row + j * kBlock);
      const float mean = total(products);
      for (int j = 0; j < tokens_; ++j) {
        const Row weight = read_row(weight_row(weights, i, j)), gradient = read_row(row + j * kBlock);
        write_row(weight_row(found, i, j), each([&](int v) { return weight.part[v] * (gradient.part[v] - mean) * scale_; }));
      }
    }
    return found;
  }

  const Shape& shape_;
  std::int64_t first_row_, kept_;
  int head_, tokens_, columns_, tiles_;
  float scale_;
  char* memory_;
};

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
