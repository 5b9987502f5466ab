// Sizes that the callers of the kernels must know without knowing which kernel will run.
#pragma once

namespace pairclip::loader {

constexpr int kMaxLanes = 16;  // pixels of the widest vector
constexpr int kPad = 2;        // pixels around a tile of zeros, so that no tap needs a test
constexpr int kRowWords = 32;  // pixels of a row that two AVX-512 registers hold

constexpr int whole_vectors(int count) { return (count + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// Of a plane of up to kRowWords bytes per line: three lines and two columns more, and what registers reach beyond.
constexpr int plane_bytes(int height) { return (height + 3) * (kRowWords + 2) / 64 * 64 + 6 * 64; }

}  // namespace pairclip::loader
