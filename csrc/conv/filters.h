// The weight gradient of a 3x3 convolution that keeps the size: sizes, and the order of the tasks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pairclip::conv {

constexpr int kPieces = 8;  // of the pictures, each summed up by one task: the same for any number of threads

template <class T>
struct Convolution {
  const T *pixels, *gradient;  // channels-last
  int pictures, height, width, inputs, outputs;
};

// In bfloat16, by tile products. Channels of the gradient are a multiple of 32.
struct TileFilters : Convolution<std::uint16_t> {
  // Packed at a time: with 256 channels both ways 1.5 MB, which a second-level cache holds.
  static constexpr int kChunkPixels = 1024;

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

// In float32, by multiply-adds: blocks of some output channels by three neighbours in a row by a vector of input channels.
struct FloatFilters : Convolution<float> {
  // Packed at a time: a block of either side then fits the first-level cache, all of them about the second-level one.
  static constexpr int kChunkPixels = 400;

  int block_outputs, block_inputs;  // a block's channels; the instruction set's choice

  int output_blocks() const { return (outputs + block_outputs - 1) / block_outputs; }
  int input_blocks() const { return (inputs + block_inputs - 1) / block_inputs; }
  int chunk_pictures() const { return height * width < kChunkPixels ? kChunkPixels / (height * width) : 1; }
  int chunk_rows() const {  // of a picture: all, or in equal parts
    const int most = kChunkPixels / width > 0 ? kChunkPixels / width : 1, parts = (height + most - 1) / most;
    return (height + parts - 1) / parts;
  }
  std::size_t block_sums() const { return std::size_t{9} * block_outputs * block_inputs; }
  std::size_t sums() const { return block_sums() * output_blocks() * input_blocks(); }
  std::size_t scratch_bytes() const {
    const std::size_t rows = std::size_t(chunk_pictures()) * (chunk_rows() + 2);
    return sizeof(float) * rows * (width + 2) * (input_blocks() * block_inputs + output_blocks() * block_outputs);
  }
};

// `weight` is [outputs, inputs, 3, 3].
void weight_gradient(const Convolution<std::uint16_t>& call, float* weight, int threads);
void weight_gradient(const Convolution<float>& call, float* weight, int threads);

}  // namespace pairclip::conv
