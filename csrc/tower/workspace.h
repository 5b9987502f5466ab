// Everything that a forward pass leaves for its backward pass, in one piece of memory that the caller owns.
//
// Matrices lie in blocks of 32 x 32 numbers, bfloat16 or float32: `T` below, [strip of 32 rows][panel of 32 columns][32][32].
// Such a block is two tiles as the left factor of a product, and in one piece for whoever packs it as another factor. Rows beyond
// the last token are padding: finite in activations, zero in gradients.
//
// The backward pass writes each gradient over the activation that it no longer needs, named in the comments below.
#pragma once

#include <cstddef>

#include "tower/shape.h"

namespace pairclip::tower {

using bf16 = std::uint16_t;

enum Matrix { kQkv, kOut, kUp, kDown, kMatrices };

// Of each block, in torch's order of parameters.
enum Parameter {
  kNorm1Weight,
  kNorm1Bias,
  kQkvWeight,
  kQkvBias,
  kOutWeight,
  kOutBias,
  kNorm2Weight,
  kNorm2Bias,
  kUpWeight,
  kUpBias,
  kDownWeight,
  kDownBias
};
constexpr Parameter kWeightOf[] = {kQkvWeight, kOutWeight, kUpWeight, kDownWeight};
constexpr Parameter kBiasOf[] = {kQkvBias, kOutBias, kUpBias, kDownBias};

struct Norm {
  float *weight, *bias;  // copies of the parameters
  float *mean, *scale;   // of each row: mean and 1 / standard deviation
  float* sums;           // gradients of weight and bias, [strips][2][width]: added up in this order, whoever computed them
};

template <class T>
struct BlockBuffers {
  T* in;        // tokens; then, with norms before, their gradient
  T* normed;    // with norms before: norm1 of `in`; else `in` itself
  T* qkv;       // queries, keys, values; then their gradients
  T* weights;   // softmax weights, [batch][heads][blocks of keys][tokens][32]
  T* attended;  // before the output projection
  T* sum1;      // `in` + attention; then its gradient
  T* mlp_in;    // norm of `sum1`
  T* hidden;    // after the activation
  T* slope;     // the activation's derivative; then the gradient of what goes into it
  T* sum2;      // with norms after: `mlp_in` + MLP; then its gradient; else `out` itself
  T* out;       // `in` of the next block
  Norm norm1, norm2;
  T* forward[kMatrices];   // packed as right factors of x W^T: [panel of outputs][block of inputs]
  T* backward[kMatrices];  // and of y W: [panel of inputs][block of outputs]
  float* bias[kMatrices];
};

template <class T>
struct Scratch {
  float* sums;         // [panels][most_strips] blocks, or the blocks of a weight's gradient
  float* hidden_sums;  // [kPiece][most_strips] blocks; used where the width comes in pieces
  char* packed;        // factors of a weight's gradient, or what attention works with
  T* rows;             // [most_strips][panels] blocks
};

// A forward or backward pass: sizes, memory, and what the caller hands in.
struct Pass {
  Shape shape;
  char* memory;
  const float* tokens;             // forward: [batch, tokens, width]; backward: the gradient of the result
  float* result;                   // forward: the same; backward: the gradient of the tokens
  const float* const* parameters;  // forward: kParametersPerBlock per block
  float* const* gradients;         // backward: likewise

  template <class T>
  BlockBuffers<T> block(int number) const;
  template <class T>
  Scratch<T> scratch(int worker) const;
  template <class T>
  T* rolling() const;  // with norms after: the gradient between blocks
  template <class T>
  T* attended() const;  // gradient of `attended`, from one run of tasks to the next
};

// Bytes of a workspace for so many threads.
template <class T>
std::size_t workspace_bytes(const Shape& shape, int threads);

inline int outputs(const Shape& shape, int matrix) {
  return matrix == kQkv ? 3 * shape.width : matrix == kUp ? shape.mlp_width : shape.width;
}
inline int inputs(const Shape& shape, int matrix) { return matrix == kDown ? shape.mlp_width : shape.width; }

}  // namespace pairclip::tower
