#include "conv/norm.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

#include "core/cpu.h"
#include "core/parallel.h"

namespace pairclip::conv {
namespace {

constexpr int kPictures = 8;  // of a task

int tasks_of(const Layer& layer) { return (layer.pictures + kPictures - 1) / kPictures; }

void each_piece(const Layer& layer, int threads, const std::function<void(int task, Range pictures)>& body) {
  ThreadPool::shared().run(threads, tasks_of(layer), [&](std::int64_t task, int) {
    const int first = static_cast<int>(task) * kPictures;
    body(static_cast<int>(task), {first, std::min(first + kPictures, layer.pictures)});
  });
}

float number(bf16 x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }
float number(float x) { return x; }

template <class T>
const NormEngine<T>& norms() {
  if constexpr (std::is_same_v<T, float>) {
    return engine().float32;
  } else {
    return engine().bfloat16;
  }
}

// Two sums per channel, over all pictures.
using Sums = std::vector<double>;
Sums summed(const Layer& layer, int threads, const std::function<void(Range pictures, double* sums)>& add) {
  const std::size_t numbers = 2 * static_cast<std::size_t>(layer.channels);
  Sums pieces(numbers * tasks_of(layer)), total(numbers);
  each_piece(layer, threads, [&](int task, Range pictures) { add(pictures, pieces.data() + task * numbers); });
  for (std::size_t i = 0; i < pieces.size(); ++i) total[i % numbers] += pieces[i];
  return total;
}

std::vector<float> scales(const Layer& layer, const float* weight, const float* variance, double epsilon) {
  std::vector<float> found(layer.channels);
  for (int c = 0; c < layer.channels; ++c) found[c] = static_cast<float>(weight[c] / std::sqrt(variance[c] + epsilon));
  return found;
}

}  // namespace

const Engine& engine() {
#if defined(PAIRCLIP_BUILT_amx)
  if (best_level() >= Level::amx) return amx::engine();
#endif
#if defined(PAIRCLIP_BUILT_avx512_bf16)
  if (best_level() >= Level::avx512_bf16) return avx512_bf16::engine();
#endif
#if defined(PAIRCLIP_BUILT_avx512)
  if (best_level() >= Level::avx512) return avx512::engine();
#endif
#if defined(PAIRCLIP_BUILT_avx2)
  if (best_level() >= Level::avx2) return avx2::engine();
#endif
  return portable::engine();
}

template <class T>
void forward(const Layer& layer, const Forward<T>& pass, const float* weight, const float* bias, double epsilon,
             Statistics statistics, int threads) {
  const NormEngine<T>& chosen = norms<T>();
  std::vector<float> shift(layer.channels);
  for (int c = 0; c < layer.channels; ++c) shift[c] = number(pass.pixels[c]);
  const Sums sums =
      summed(layer, threads, [&](Range pictures, double* out) { chosen.gather(layer, pass, shift.data(), pictures, out); });
  const double count = static_cast<double>(layer.count());
  for (int c = 0; c < layer.channels; ++c) {
    const double off = sums[c] / count, variance = sums[layer.channels + c] / count - off * off;
    statistics.mean[c] = static_cast<float>(shift[c] + off);
    statistics.variance[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays NaN
  }
  const std::vector<float> scale = scales(layer, weight, statistics.variance, epsilon);
  const Channels channels{statistics.mean, scale.data(), bias};
  each_piece(layer, threads, [&](int, Range pictures) { chosen.apply(layer, pass, channels, pictures); });
}

template <class T>
void backward(const Layer& layer, Backward<T> pass, const float* weight, const float* bias, double epsilon, Statistics statistics,
              float* weight_gradient, float* bias_gradient, int threads) {
  const NormEngine<T>& chosen = norms<T>();
  const std::vector<float> scale = scales(layer, weight, statistics.variance, epsilon);
  const Channels channels{statistics.mean, scale.data(), bias};
  const Sums sums =
      summed(layer, threads, [&](Range pictures, double* out) { chosen.gather_slopes(layer, pass, channels, pictures, out); });
  const double count = static_cast<double>(layer.count());
  std::vector<float> mean_slope(layer.channels), covariance(layer.channels);
  for (int c = 0; c < layer.channels; ++c) {
    const double variance = statistics.variance[c] + epsilon;
    bias_gradient[c] = static_cast<float>(sums[c]);
    weight_gradient[c] = static_cast<float>(sums[layer.channels + c] / std::sqrt(variance));
    mean_slope[c] = static_cast<float>(sums[c] / count);
    covariance[c] = static_cast<float>(sums[layer.channels + c] / (count * variance));
  }
  pass.mean_slope = mean_slope.data();
  pass.covariance = covariance.data();
  each_piece(layer, threads, [&](int, Range pictures) { chosen.spread(layer, pass, channels, pictures); });
}

template <class T>
void channel_forward(const Layer& layer, const Forward<T>& pass, const Affine& affine, int threads) {
  const NormEngine<T>& chosen = norms<T>();
  each_piece(layer, threads, [&](int, Range pictures) { chosen.channel_forward(layer, pass, affine, pictures); });
}

template <class T>
void channel_backward(const Layer& layer, const Backward<T>& pass, const Affine& affine, float* weight_gradient,
                      float* bias_gradient, int threads) {
  const NormEngine<T>& chosen = norms<T>();
  const Sums sums =
      summed(layer, threads, [&](Range pictures, double* out) { chosen.channel_backward(layer, pass, affine, pictures, out); });
  for (int c = 0; c < layer.channels; ++c) {
    weight_gradient[c] = static_cast<float>(sums[c]);
    bias_gradient[c] = static_cast<float>(sums[layer.channels + c]);
  }
}

#define PAIRCLIP_NORMS_OF(T)                                                                                              \
  template void forward(const Layer&, const Forward<T>&, const float*, const float*, double, Statistics, int);            \
  template void backward(const Layer&, Backward<T>, const float*, const float*, double, Statistics, float*, float*, int); \
  template void channel_forward(const Layer&, const Forward<T>&, const Affine&, int);                                     \
  template void channel_backward(const Layer&, const Backward<T>&, const Affine&, float*, float*, int);
PAIRCLIP_NORMS_OF(bf16)
PAIRCLIP_NORMS_OF(float)
#undef PAIRCLIP_NORMS_OF

}  // namespace pairclip::conv
