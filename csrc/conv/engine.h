// The table between the order of the tasks (norm.cpp and convolution.cpp, compiled once) and their arithmetic (variant.cpp, per
// instruction set).
//
// Pictures are channels-last: [pictures, height, width, channels]; their numbers are bfloat16 or float, `T` below. A pooled layer
// takes the maximum of 2x2 pixels first; an odd last row or column is left out, as torch does it. Its pictures are then kept at a
// quarter of the size, with the place of each maximum in one byte.
#pragma once

#include <cstdint>

#include "conv/convolution.h"
#include "tower/engine.h"

namespace pairclip::conv {

using tower::Activation;
using tower::bf16;
using tower::kBlock;  // channels of a row: a cache line of bfloat16
using tower::Range;

struct Layer {
  int pictures, height, width, channels;  // of what the convolution gave
  bool pooled;
  Activation activation;

  int rows() const { return pooled ? height / 2 : height; }
  int columns() const { return pooled ? width / 2 : width; }
  std::int64_t picture() const { return std::int64_t{height} * width * channels; }  // numbers
  std::int64_t kept_picture() const { return std::int64_t{rows()} * columns() * channels; }
  // From the first of four pooled pixels to the others: right of it, below it, and both.
  std::int64_t distance(int i) const { return (std::int64_t{i / 2} * width + i % 2) * channels; }
  std::int64_t count() const { return std::int64_t{pictures} * rows() * columns(); }  // that a channel's statistics are of
};

constexpr int kMostNormChannels = 256;  // of a pixel that is normalised by itself

// One number per channel each. normed = (kept - mean) * scale + bias, where scale is the weight over the standard deviation.
struct Channels {
  const float *mean, *scale, *bias;
};

// Of a normalisation over channels.
struct Affine {
  const float *weight, *bias;
  float epsilon;
};

template <class T>
struct Forward {
  const T* pixels;
  T* kept;               // the pixels themselves where nothing is pooled
  std::uint8_t* places;  // of the maxima; null where nothing is pooled
  T* result;
};

template <class T>
struct Backward {
  const T* gradient;  // of the result
  const T* kept;
  const std::uint8_t* places;
  // Per channel: means of the gradient behind the activation, plain and times (kept - mean) / variance.
  const float *mean_slope, *covariance;
  T* result;  // gradient of the pixels
};

template <class T>
struct NormEngine {
  // Forward: pools, and adds up kept - shift and its square, per channel: sums[0][channels], sums[1][channels]. The shift is any
  // number near the mean: squares about it lose no digits (Chan, Golub and LeVeque 1983). Then the result.
  void (*gather)(const Layer& layer, const Forward<T>& pass, const float* shift, Range pictures, double* sums);
  void (*apply)(const Layer& layer, const Forward<T>& pass, const Channels& channels, Range pictures);

  // Backward: adds up the gradient behind the activation, plain and times kept - mean. Then the gradient of the pixels.
  void (*gather_slopes)(const Layer& layer, const Backward<T>& pass, const Channels& channels, Range pictures, double* sums);
  void (*spread)(const Layer& layer, const Backward<T>& pass, const Channels& channels, Range pictures);

  // The same with each pixel normalised over its channels (LayerNorm); at most `kMostNormChannels`. What is kept of pooled
  // pixels, and their places, is padded to whole rows. Backward adds up the gradients of weight and bias.
  void (*channel_forward)(const Layer& layer, const Forward<T>& pass, const Affine& affine, Range pictures);
  void (*channel_backward)(const Layer& layer, const Backward<T>& pass, const Affine& affine, Range pictures, double* sums);
};

// The 3x3 convolution in float32.
struct WinogradEngine {
  int rows, columns;

  // Filters of a panel of outputs: [36][panels][inputs][columns]. Then the results of a block of tiles.
  void (*transform_filters)(const Winograd& call, const float* weight, bool turned, int panel, float* out);
  void (*convolve)(const Winograd& call, const float* pixels, const float* filters, Range tiles, char* scratch, float* result);

  // The filters' gradient over any number of tiles: sums [panels][inputs][9][columns].
  void (*add_gradients)(const Winograd& call, const float* pixels, const float* gradient, Range tiles, char* scratch,
                        float* sums);
};

struct Engine {
  const char* isa;
  NormEngine<bf16> bfloat16;
  NormEngine<float> float32;

  // Of a piece of the pictures: sums [9][input blocks][output blocks][32][32].
  void (*weight_gradient)(const TileFilters& call, Range pictures, char* scratch, float* sums);

  WinogradEngine winograd;
};

#define PAIRCLIP_DECLARE_CONV(variant) \
  namespace variant {                  \
  const Engine& engine();              \
  }
PAIRCLIP_DECLARE_CONV(portable)
PAIRCLIP_DECLARE_CONV(avx2)
PAIRCLIP_DECLARE_CONV(avx512)
PAIRCLIP_DECLARE_CONV(avx512_bf16)
PAIRCLIP_DECLARE_CONV(amx)
#undef PAIRCLIP_DECLARE_CONV

}  // namespace pairclip::conv
