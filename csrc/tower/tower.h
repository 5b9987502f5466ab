// A stack of transformer blocks, forward and backward: which tasks there are and in which order they run.
#pragma once

#include <string>
#include <vector>

#include "tower/engine.h"

namespace pairclip::tower {

// The names that `engine` takes here: in bfloat16 "emulated", with tiles in software, and the levels that multiply it fast; in
// float32 "portable" and "avx2".
std::vector<std::string> engine_names();

// Throws std::invalid_argument for a name that is not among them.
const Engine& engine(const std::string& name);

// Throws std::invalid_argument for a name other than gelu, relu and silu.
Activation activation(const std::string& name);

// `pass` as the direction needs it. The memory is a workspace for `threads` threads; results do not depend on their number.
void forward(const Engine& engine, const Pass& pass, int threads);

// Once per forward pass, since gradients replace activations. Overwrites `gradients`.
void backward(const Engine& engine, const Pass& pass, int threads);

}  // namespace pairclip::tower
