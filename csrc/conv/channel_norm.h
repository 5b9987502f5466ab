// Pooling, normalisation over the channels of each pixel (Ba et al. 2016) and activation, pixel by pixel.
//
// All that a result needs is in its own pixel, so this is one pass over memory each way, and the backward pass finds the
// statistics again. Channels need not come in whole rows of 32: what is beyond them counts as zero, and is neither read nor
// written.
#pragma once

#include "conv/pictures.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

// The first `live` of 32 numbers; zeros after them.
inline Row read_some(const float* from, int live) {
  if (live >= kBlock) return read_on(from);
  fetch_ahead(from);
  return each([&](int v) { return load_first(from + v * kLanes, live - v * kLanes); });
}

inline void write_some(float* to, const Row& row, int live) {
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) store_first(to + v * kLanes, row.part[v], live - v * kLanes);
}

inline Row read_some(const bf16* from, int live) {
  if (live >= kBlock) return read_on(from);
  fetch_ahead(from);
#if defined(__AVX512BW__)
  const __m512i line = _mm512_maskz_loadu_epi16((1u << live) - 1, from);
  const auto widened = [](__m256i half) { return floats_of(reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(half)) << 16); };
  return {{widened(_mm512_castsi512_si256(line)), widened(_mm512_extracti64x4_epi64(line, 1))}};
#else
  alignas(64) bf16 numbers[kBlock] = {};
  std::memcpy(numbers, from, live * sizeof(bf16));
  return read_row(numbers);
#endif
}

inline void write_some(bf16* to, const Row& row, int live) {
  if (live >= kBlock) return write_row(to, row);
  alignas(64) bf16 numbers[kBlock];
  write_row(numbers, row);
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(to, (1u << live) - 1, _mm512_load_si512(numbers));
#else
  std::memcpy(to, numbers, live * sizeof(bf16));
#endif
}

template <class Activate>
class ChannelNorm {
 public:
  ChannelNorm(const Layer& layer, const Affine& affine, const Activate& activate)
      : layer_(layer),
        blocks_((layer.channels + kBlock - 1) / kBlock),
        inverse_(1.0f / static_cast<float>(layer.channels)),
        epsilon_(affine.epsilon),
        activate_(activate) {
    std::memcpy(weight_, affine.weight, layer.channels * sizeof(float));
    std::memcpy(bias_, affine.bias, layer.channels * sizeof(float));
  }

  template <class T>
  void forward(const Forward<T>& pass, Range pictures) const {
    each_pixel(pictures, [&](int picture, int pixel, std::int64_t number) {
      Row rows[kMostBlocks];
      for (int b = 0; b < blocks_; ++b) {
        const std::int64_t at = (number * blocks_ + b) * kBlock;
        const T* const first = pass.pixels + picture * layer_.picture() + place(pixel) + b * kBlock;
        if (layer_.pooled) {
          rows[b] = pooled(layer_, pass.places + at, [&](std::int64_t distance) { return read_some(first + distance, live(b)); });
          write_row(pass.kept + at, rows[b]);
        } else {
          rows[b] = read_some(first, live(b));
        }
      }
      const float scale = centre(rows);
      for (int b = 0; b < blocks_; ++b)
        write_some(pass.result + number * layer_.channels + b * kBlock,
                   each([&](int v) { return activated(rows[b].part[v] * scale, b, v).value; }), live(b));
    });
  }

  template <class T>
  void backward(const Backward<T>& pass, Range pictures, double* sums) const {
    sum_pictures(layer_, pictures, sums, [&](int picture, Range, auto& found) {
      T* const to = pass.result + picture * layer_.picture();
      if (layer_.pooled) clear_rest(layer_, to);
      each_pixel({picture, picture + 1}, [&](int, int pixel, std::int64_t number) {
        Row rows[kMostBlocks], slopes[kMostBlocks];  // normed, and the gradient of that
        for (int b = 0; b < blocks_; ++b)
          rows[b] = layer_.pooled ? read_on(pass.kept + (number * blocks_ + b) * kBlock)
                                  : read_some(pass.kept + number * layer_.channels + b * kBlock, live(b));
        const float scale = centre(rows);
        Vec total{}, product{};
        for (int b = 0; b < blocks_; ++b) {
          const Row gradient = read_some(pass.gradient + number * layer_.channels + b * kBlock, live(b));
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) {
            const int lane = b * kBlock + v * kLanes;
            const Vec normed = rows[b].part[v] * scale, slope = gradient.part[v] * activated(normed, b, v).slope;
            add_to(found[0] + lane, slope * normed);
            add_to(found[1] + lane, slope);
            const Vec weighted = slope * load(weight_ + lane);
            total += weighted;
            product = fma(weighted, normed, product);
            rows[b].part[v] = normed;
            slopes[b].part[v] = weighted;
          }
        }
        const Vec mean = set(sum(total) * inverse_), covariance = set(sum(product) * inverse_);
        for (int b = 0; b < blocks_; ++b) {
          const Row out = each([&](int v) { return scale * fma(-rows[b].part[v], covariance, slopes[b].part[v] - mean); });
          T* const first = to + place(pixel) + b * kBlock;
          const auto write = [&](std::int64_t distance, const Row& row) { write_some(first + distance, row, live(b)); };
          if (layer_.pooled) {
            unpool(layer_, out, pass.places + (number * blocks_ + b) * kBlock, write);
          } else {
            write(0, out);
          }
        }
      });
    });
  }

 private:
  static constexpr int kMostBlocks = kMostNormChannels / kBlock;

  int live(int block) const { return layer_.channels - block * kBlock; }
  // Where a kept pixel comes from, in numbers from its picture's begin.
  std::int64_t place(int pixel) const { return layer_.pooled ? corner(layer_, pixel) : std::int64_t{pixel} * layer_.channels; }

  // body(picture, pixel, number): `number` counts the pixels of all pictures.
  template <class Body>
  void each_pixel(Range pictures, const Body& body) const {
    const int pixels = layer_.rows() * layer_.columns();
    for (int picture = pictures.begin; picture < pictures.end; ++picture)
      for (int pixel = 0; pixel < pixels; ++pixel) body(picture, pixel, std::int64_t{picture} * pixels + pixel);
  }

  // Takes the mean away and returns one over the standard deviation.
  float centre(Row* rows) const {
    Row sums{};
    for (int b = 0; b < blocks_; ++b) sums = sums + rows[b];
    const float mean = total(sums) * inverse_;
    Vec squares{};
    for (int b = 0; b < blocks_; ++b)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const Vec off = places() < live(b) - v * kLanes ? rows[b].part[v] - mean : Vec{};
        squares = fma(off, off, squares);
        rows[b].part[v] = off;
      }
    return 1.0f / __builtin_sqrtf(sum(squares) * inverse_ + epsilon_);
  }

  Activated activated(Vec normed, int block, int v) const {
    const int lane = block * kBlock + v * kLanes;
    return activate_(fma(normed, load(weight_ + lane), load(bias_ + lane)));
  }

  const Layer& layer_;
  int blocks_;
  float inverse_, epsilon_;
  const Activate& activate_;
  float weight_[kMostNormChannels] = {}, bias_[kMostNormChannels] = {};
};

template <class T>
void channel_forward(const Layer& layer, const Forward<T>& pass, const Affine& affine, Range pictures) {
  with_activation<T>(layer.activation, [&](auto activate) { ChannelNorm(layer, affine, activate).forward(pass, pictures); });
}

template <class T>
void channel_backward(const Layer& layer, const Backward<T>& pass, const Affine& affine, Range pictures, double* sums) {
  with_activation<T>(layer.activation,
                     [&](auto activate) { ChannelNorm(layer, affine, activate).backward(pass, pictures, sums); });
}

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
