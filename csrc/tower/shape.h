// Sizes of a stack of transformer blocks, and what follows from them.
#pragma once

#include <cstdint>

namespace pairclip::tower {

enum class Activation { gelu, relu, silu };

constexpr int kBlock = 32;  // rows and columns of a block of a matrix: two tiles
constexpr int kBlockNumbers = kBlock * kBlock;
constexpr int kPiece = 16;           // blocks of depth that are summed up before the sums leave the registers
constexpr int kGradientStrips = 12;  // rows of tokens that a task of weight gradients packs at a time, in blocks

// Of numbers of 2 or 4 bytes. Strips of a task: their inputs, sums and hidden pieces fill a second-level cache. Blocks of a task
// of weight gradients, each way: what is packed for it does.
constexpr int most_strips(int bytes) { return 32 / bytes; }
constexpr int most_gradient_blocks(int bytes) { return 32 / bytes; }

constexpr int kParametersPerBlock = 12;

struct Shape {
  int batch, tokens, width, mlp_width, heads, depth;
  bool pre_norm;
  Activation activation;

  std::int64_t rows() const { return std::int64_t{batch} * tokens; }
  int strips() const { return static_cast<int>((rows() + kBlock - 1) / kBlock); }
  int panels() const { return width / kBlock; }
  int mlp_panels() const { return mlp_width / kBlock; }
  int head_panels() const { return width / heads / kBlock; }
  int token_blocks() const { return (tokens + kBlock - 1) / kBlock; }
};

}  // namespace pairclip::tower
