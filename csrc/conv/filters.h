// The weight gradient of a 3x3 convolution in bfloat16: sizes, and the order of the tasks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pairclip::conv {

constexpr int kChunkPixels = 1024;  // packed at a time: with 256 channels both ways 1.5 MB, which a second-level cache holds
constexpr int kPieces = 8;          // of the pictures, each summed up by one task: the same for any number of threads

struct Filters {
  const std::uint16_t *pixels, *gradient;  // channels-last bfloat16; channels of the gradient are a multiple of 32
  int pictures, height, width, inputs, outputs;

  int output_blocks() const { return outputs / 32; }
  int input_blocks() const { return (inputs + 31) / 32; }
  int framed() const { return (height + 1) * (width + 1); }  // pixels of a picture with its zeros
  int chunk_pictures() const { return framed() < kChunkPixels ? kChunkPixels / framed() : 1; }
  int chunk_pixels() const { return (chunk_pictures() * framed() + 31) / 32 * 32; }
  int border() const { return (width + 3) / 2 * 2; }  // zeros before and after: at least a row and a pixel, and even
  std::size_t sums() const { return std::size_t{9} * 1024 * output_blocks() * input_blocks(); }
  std::size_t scratch_bytes() const {
    const std::size_t rows = chunk_pixels() + 2 * border();
    return 64 * (rows + std::size_t(chunk_pixels()) * output_blocks() + 2 * rows * input_blocks());
  }
};

// `weight` is [outputs, inputs, 3, 3].
void weight_gradient(const Filters& call, float* weight, int threads);

}  // namespace pairclip::conv
