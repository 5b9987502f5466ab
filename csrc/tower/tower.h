// A stack of transformer blocks, forward and backward: which tasks there are and in which order they run.
#pragma once

#include <string>
#include <vector>

#include "tower/engine.h"

namespace pairclip::tower {

// The names that `engine` takes here, best last: "emulated", with tiles in software, and the levels that multiply bfloat16.
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
