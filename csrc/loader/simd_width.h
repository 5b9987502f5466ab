// Sizes that the callers of the kernels must know without knowing which kernel will run.
#pragma once

namespace pairclip::loader {

constexpr int kMaxLanes = 16;  // pixels of the widest vector
constexpr int kPad = 2;        // pixels around a tile of zeros, so that no tap needs a test
constexpr int kRowWords = 32;  // pixels of a row that two AVX-512 registers hold

}  // namespace pairclip::loader
