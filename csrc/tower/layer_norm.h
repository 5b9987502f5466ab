// LayerNorm of some strips and its gradient, statistics and sums in float32 (Ba et al. 2016).
#pragma once

#include "tower/rows.h"

namespace pairclip::tower::PAIRCLIP_VARIANT {

constexpr float kNormEpsilon = 1e-5f;  // torch.nn.LayerNorm's default

// `in` and `out` begin at strip 0 of the matrix, as everything that `norm` holds.
template <class T>
void normalise(const T* in, T* out, int panels, Range strips, const Norm& norm) {
  const float count = static_cast<float>(panels * kBlock);
  for (std::int64_t row = std::int64_t{strips.begin} * kBlock; row < std::int64_t{strips.end} * kBlock; ++row) {
    const T* from = row_at(in, panels, row, 0);
    T* to = row_at(out, panels, row, 0);
    Row sums{};
    for (int panel = 0; panel < panels; ++panel) sums = sums + read_row(from + panel * kBlockNumbers);
    const float mean = total(sums) / count;
    Row squares{};
    for (int panel = 0; panel < panels; ++panel) {
      const Row x = read_row(from + panel * kBlockNumbers);
      squares = each([&](int i) {
        const Vec centred = x.part[i] - mean;
        return fma(centred, centred, squares.part[i]);
      });
    }
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / count + kNormEpsilon);
    norm.mean[row] = mean;
    norm.scale[row] = scale;
    for (int panel = 0; panel < panels; ++panel) {
      const Row x = read_row(from + panel * kBlockNumbers), weight = read_row(norm.weight + panel * kBlock),
                bias = read_row(norm.bias + panel * kBlock);
      write_row(to + panel * kBlockNumbers,
                each([&](int i) { return fma((x.part[i] - mean) * scale, weight.part[i], bias.part[i]); }));
    }
  }
}

template <class T>
struct NormGradient {
  const T* in;        // what was normalised
  const T* gradient;  // of the result, from the first of the strips on
  const T* residual;  // added to the gradient of `in`; null for none
  T* out;             // gradient of `in`; may be `in` or `residual` itself
};

// Also leaves the strips' sums for the gradients of weight and bias.
template <class T>
void normalise_backward(const NormGradient<T>& call, int panels, Range strips, const Norm& norm) {
  const float count = static_cast<float>(panels * kBlock);
  const std::size_t width = static_cast<std::size_t>(panels) * kBlock;
  for (int strip = strips.begin; strip < strips.end; ++strip) {
    const T* in = block_at(call.in, panels, strip, 0);
    const T* gradient = block_at(call.gradient, panels, strip - strips.begin, 0);
    const float *mean = norm.mean + strip * kBlock, *scale = norm.scale + strip * kBlock;
    float means[kBlock], slopes[kBlock];
    for (int r = 0; r < kBlock; ++r) {
      Row plain{}, weighted{};
      for (int panel = 0; panel < panels; ++panel) {
        const Row x = read_row(in + panel * kBlockNumbers + r * kBlock),
                  g = read_row(gradient + panel * kBlockNumbers + r * kBlock) * read_row(norm.weight + panel * kBlock);
        plain = plain + g;
        weighted = each([&](int i) { return fma(g.part[i], (x.part[i] - mean[r]) * scale[r], weighted.part[i]); });
      }
      means[r] = total(plain) / count;
      slopes[r] = total(weighted) / count;
    }
    for (int panel = 0; panel < panels; ++panel) {
      const Row weight = read_row(norm.weight + panel * kBlock);
      Row weight_sums{}, bias_sums{};
      for (int r = 0; r < kBlock; ++r) {
        const std::size_t place = static_cast<std::size_t>(panel) * kBlockNumbers + r * kBlock;
        const Row x = read_row(in + place), g = read_row(gradient + place);
        const Row normal = each([&](int i) { return (x.part[i] - mean[r]) * scale[r]; });
        weight_sums = each([&](int i) { return fma(g.part[i], normal.part[i], weight_sums.part[i]); });
        bias_sums = bias_sums + g;
        Row found =
            each([&](int i) { return scale[r] * (fma(g.part[i], weight.part[i], set(-means[r])) - normal.part[i] * slopes[r]); });
        if (call.residual != nullptr) found = found + read_row(block_at(call.residual, panels, strip, 0) + place);
        write_row(block_at(call.out, panels, strip, 0) + place, found);
      }
      float* sums = norm.sums + strip * 2 * width + panel * kBlock;
      write_row(sums, weight_sums);
      write_row(sums + width, bias_sums);
    }
  }
}

}  // namespace pairclip::tower::PAIRCLIP_VARIANT
