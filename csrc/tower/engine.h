// The table between the order of the tasks (tower.cpp, compiled once) and their arithmetic (variant.cpp, per instruction set).
#pragma once

#include "tower/workspace.h"

namespace pairclip::tower {

struct Range {
  int begin, end;
};

struct Engine {
  int number_bytes;
  std::size_t (*workspace_bytes)(const Shape& shape, int threads);

  // Around the tasks of a thread.
  void (*begin)();
  void (*end)();

  // Panel `panel` of a weight, both ways, with its bias; and the parameters of the norms.
  void (*pack)(const Pass& pass, int block, int matrix, int panel);
  void (*copy_norms)(const Pass& pass, int block);

  // `worker` says whose scratch memory a task works in.
  //
  // Row by row, `most_strips` strips at most. Forward: what comes after the attention of block `block - 1` and before that
  // of `block`; `block` goes from 0 (reads the tokens) to `depth` (writes the result). Backward: the same, from `depth` to 0.
  void (*forward_rows)(const Pass& pass, int block, Range strips, int worker);
  void (*backward_rows)(const Pass& pass, int block, Range strips, int worker);

  // Attention of some samples.
  void (*forward_attention)(const Pass& pass, int block, Range samples, int worker);
  void (*backward_attention)(const Pass& pass, int block, Range samples, int worker);

  // Gradients of parameters, task by task; norms are 0 and 1.
  void (*weight_gradient)(const Pass& pass, int block, int matrix, Range output_blocks, Range input_blocks, int worker);
  void (*norm_gradient)(const Pass& pass, int block, int norm);

  // For tests: the activation and its derivative, of a multiple of 32 numbers.
  void (*activate)(Activation activation, const float* numbers, int count, float* values, float* slopes);
};

// In bfloat16 the portable one is slow, with tiles in software: for tests.
#define PAIRCLIP_DECLARE_TOWER(variant, T)   \
  namespace variant {                        \
  template <class Number>                    \
  const Engine& engine();                    \
  extern template const Engine& engine<T>(); \
  }
PAIRCLIP_DECLARE_TOWER(portable, bf16)
PAIRCLIP_DECLARE_TOWER(portable, float)
PAIRCLIP_DECLARE_TOWER(avx2, float)
PAIRCLIP_DECLARE_TOWER(avx512, float)
PAIRCLIP_DECLARE_TOWER(avx512_bf16, bf16)
PAIRCLIP_DECLARE_TOWER(amx, bf16)
#undef PAIRCLIP_DECLARE_TOWER

}  // namespace pairclip::tower
