// The table between the order of the tasks (tower.cpp, compiled once) and their arithmetic (variant.cpp, per instruction set).
#pragma once

#include "tower/workspace.h"

namespace pairclip::tower {

struct Range {
  int begin, end;
};

struct Engine {
  const char* isa;

  // Around the tasks of a thread.
  void (*begin)();
  void (*end)();

  // Panel `panel` of a weight, both ways, with its bias; and the parameters of the norms.
  void (*pack)(const Pass& pass, int block, int matrix, int panel);
  void (*copy_norms)(const Pass& pass, int block);

  // Row by row, strips of `kMostStrips` at most. Forward: what comes after the attention of block `block - 1` and before that
  // of `block`; `block` goes from 0 (reads the tokens) to `depth` (writes the result). Backward: the same, from `depth` to 0.
  void (*forward_rows)(const Pass& pass, int block, Range strips, const Scratch& scratch);
  void (*backward_rows)(const Pass& pass, int block, Range strips, const Scratch& scratch);

  // Attention of some samples.
  void (*forward_attention)(const Pass& pass, int block, Range samples, const Scratch& scratch);
  void (*backward_attention)(const Pass& pass, int block, Range samples, const Scratch& scratch);

  // Gradients of parameters, task by task; norms are 0 and 1.
  void (*weight_gradient)(const Pass& pass, int block, int matrix, Range output_blocks, Range input_blocks,
                          const Scratch& scratch);
  void (*norm_gradient)(const Pass& pass, int block, int norm);

  // For tests: the activation and its derivative, of a multiple of 32 numbers.
  void (*activate)(Activation activation, const float* numbers, int count, float* values, float* slopes);
};

#define PAIRCLIP_DECLARE_TOWER(variant) \
  namespace variant {                   \
  const Engine& engine();               \
  }
PAIRCLIP_DECLARE_TOWER(portable)
PAIRCLIP_DECLARE_TOWER(avx512_bf16)
PAIRCLIP_DECLARE_TOWER(amx)
#undef PAIRCLIP_DECLARE_TOWER

}  // namespace pairclip::tower
