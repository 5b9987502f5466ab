// A 3x3 convolution that keeps the size, and its gradients: sizes, and the order of the tasks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pairclip::conv {

constexpr int kPieces = 8;  // of the pictures or their tiles, each summed up by one task: the same for any number of threads

// Of pictures and channels. Pictures are channels-last, as all are.
struct Sizes {
  int pictures, height, width, inputs, outputs;
};

template <class T>
struct WeightGradient : Sizes {
  const T *pixels, *gradient;
};

// In bfloat16, by tile products. Channels of the gradient are a multiple of 32.
struct TileFilters : WeightGradient<std::uint16_t> {
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

// In float32, by minimal filtering (winograd.h), in tiles of 4x4 pixels.
struct Winograd : Sizes {
  static constexpr int kPlanes = 36;

  int rows, columns;  // of a product that stays in registers; the instruction set's choice

  int tile_columns() const { return (width + 3) / 4; }
  int tiles_of_picture() const { return (height + 3) / 4 * tile_columns(); }
  int tiles() const { return pictures * tiles_of_picture(); }
  // Transformed at a time: as many numbers as the transformed filters are that they are multiplied with, within limits.
  int block_tiles() const {
    const int balanced = inputs * outputs / (inputs + outputs) / rows;
    return rows * (balanced < 4 ? 4 : balanced > 16 ? 16 : balanced);
  }
  int panels() const { return (outputs + columns - 1) / columns; }
  int input_row() const { return odd_lines((inputs + rows - 1) / rows * rows); }
  int output_row() const { return odd_lines(panels() * columns); }
  std::size_t filters() const { return std::size_t{kPlanes} * panels() * inputs * columns; }
  std::size_t sums() const { return std::size_t{9} * panels() * columns * inputs; }
  std::size_t convolve_bytes() const {
    return sizeof(float) * kPlanes * block_tiles() * (std::size_t(input_row()) + output_row());
  }
  std::size_t gradient_bytes() const {
    const std::size_t products = std::size_t(panels()) * columns * ((inputs + rows - 1) / rows * rows);
    return sizeof(float) * kPlanes * (block_tiles() * (std::size_t(input_row()) + panels() * columns) + products);
  }

 private:
  // The least odd number of cache lines that holds so many numbers, in numbers.
  static int odd_lines(int numbers) { return (numbers + 15) / 32 * 32 + 16; }
};

// In float32. With `turned` filters, [inputs, 3, 3, outputs] instead of [outputs, 3, 3, inputs], it is the input gradient of the
// convolution with these, and `pixels` its output's gradient.
struct Convolution : Sizes {
  const float *pixels, *weight;
  bool turned;
};

// `weight` becomes [outputs, 3, 3, inputs], `result` [pictures, height, width, outputs].
void weight_gradient(const WeightGradient<std::uint16_t>& call, float* weight, int threads);
void weight_gradient(const WeightGradient<float>& call, float* weight, int threads);
void convolve(const Convolution& call, float* result, int threads);

}  // namespace pairclip::conv
