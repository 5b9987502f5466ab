// The submodule `conv`; `pairclip_fast.models.fused_norm` and `.convolution` call it.
#include "conv/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <type_traits>

#include "conv/norm.h"
#include "tower/tower.h"

namespace nb = nanobind;

namespace pairclip::conv {
namespace {

// Bfloat16 comes as the 16-bit integers of its bits.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, bf16>, std::int16_t, T>;
template <class T>
using Pictures = nb::ndarray<Stored<T>, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Places = nb::ndarray<std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using PerChannel = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Filter = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("conv: ") + what);
}

template <class T>
T* numbers(const nb::ndarray<T, nb::ndim<4>, nb::c_contig, nb::device::cpu>& pictures) {
  return pictures.data();
}
bf16* numbers(const Pictures<bf16>& pictures) { return reinterpret_cast<bf16*>(pictures.data()); }

// Of a convolution between these pictures, which keeps the size.
template <class T>
Sizes sizes(const T& pixels, const T& outputs) {
  expect(pixels.size() > 0 && outputs.size() > 0, "there are pixels");
  for (int axis = 0; axis < 3; ++axis) expect(outputs.shape(axis) == pixels.shape(axis), "sizes differ");
  const auto length = [&](int axis) { return static_cast<int>(pixels.shape(axis)); };
  return {length(0), length(1), length(2), length(3), static_cast<int>(outputs.shape(3))};
}

template <class T>
Layer layer_of(const T& pixels, bool pooled, const std::string& name) {
  const Layer found{static_cast<int>(pixels.shape(0)),
                    static_cast<int>(pixels.shape(1)),
                    static_cast<int>(pixels.shape(2)),
                    static_cast<int>(pixels.shape(3)),
                    pooled,
                    tower::activation(name)};
  expect(found.channels > 0 && found.count() > 0, "there are channels and pixels");
  return found;
}

// `pixels` has the shape that the convolution gave, `kept` that of the result.
template <class T>
Layer layer(const T& pixels, const T& kept, const std::optional<Places>& places, const std::string& name) {
  const Layer found = layer_of(pixels, places.has_value(), name);
  expect(found.channels % kBlock == 0, "channels are a multiple of 32");
  const std::size_t size = static_cast<std::size_t>(found.pictures) * found.kept_picture();
  expect(kept.size() == size && (!places || places->size() == size), "wrong number of pixels");
  return found;
}

// The same for normalisation over channels: what is kept of pooled pixels is padded to whole rows.
template <class T>
Layer channel_layer(const T& pixels, const T& kept, const std::optional<Places>& places, const T& result,
                    const std::string& name) {
  const Layer found = layer_of(pixels, places.has_value(), name);
  expect(found.channels <= kMostNormChannels, "there are too many channels");
  const std::size_t count = static_cast<std::size_t>(found.count()), blocks = (found.channels + kBlock - 1) / kBlock;
  expect(result.size() == count * found.channels, "wrong number of pixels");
  const bool fits =
      places ? kept.size() == count * blocks * kBlock && places->size() == kept.size() : kept.size() == pixels.size();
  expect(fits, "wrong number of kept pixels");
  return found;
}

float* of(const Layer& layer, const PerChannel& numbers) {
  expect(numbers.size() == static_cast<std::size_t>(layer.channels), "one number per channel");
  return numbers.data();
}

// For pictures of `T`: each function has two forms, and arrays that are not converted say which.
template <class T>
void bind_for(nb::module_& module) {
  module.def(
      "weight_gradient",
      [](int threads, Pictures<T> pixels, Pictures<T> gradient, Filter result) {
        const WeightGradient<T> call{sizes(pixels, gradient), numbers(pixels), numbers(gradient)};
        expect(threads > 0, "there are threads");
        expect(std::is_same_v<T, float> || call.outputs % kBlock == 0, "output channels are a multiple of 32");
        expect(result.size() == std::size_t{9} * call.inputs * call.outputs, "wrong size of the weight");
        float* const weight = result.data();
        const nb::gil_scoped_release released;
        weight_gradient(call, weight, threads);
      },
      nb::arg("threads"), nb::arg("pixels").noconvert(), nb::arg("gradient").noconvert(), nb::arg("result"),
      "Of a 3x3 convolution that keeps the size.");
  module.def(
      "forward",
      [](const std::string& name, int threads, double epsilon, Pictures<T> pixels, PerChannel weight, PerChannel bias,
         Pictures<T> kept, std::optional<Places> places, Pictures<T> result, PerChannel mean, PerChannel variance) {
        const Layer found = layer(pixels, kept, places, name);
        expect(threads > 0 && result.size() == kept.size(), "wrong size of the result");
        const Forward<T> pass{numbers(pixels), numbers(kept), places ? places->data() : nullptr, numbers(result)};
        const Statistics statistics{of(found, mean), of(found, variance)};
        const float *factors = of(found, weight), *offsets = of(found, bias);
        const nb::gil_scoped_release released;
        forward(found, pass, factors, offsets, epsilon, statistics, threads);
      },
      nb::arg("activation"), nb::arg("threads"), nb::arg("epsilon"), nb::arg("pixels").noconvert(), nb::arg("weight"),
      nb::arg("bias"), nb::arg("kept"), nb::arg("places").none(), nb::arg("result"), nb::arg("mean"), nb::arg("variance"));
  module.def(
      "backward",
      [](const std::string& name, int threads, double epsilon, Pictures<T> gradient, PerChannel weight, PerChannel bias,
         Pictures<T> kept, std::optional<Places> places, PerChannel mean, PerChannel variance, Pictures<T> result,
         PerChannel weight_gradient, PerChannel bias_gradient) {
        const Layer found = layer(result, kept, places, name);
        expect(threads > 0 && gradient.size() == kept.size(), "wrong size of the gradient");
        const Backward<T> pass{.gradient = numbers(gradient),
                               .kept = numbers(kept),
                               .places = places ? places->data() : nullptr,
                               .mean_slope = nullptr,
                               .covariance = nullptr,
                               .result = numbers(result)};
        const Statistics statistics{of(found, mean), of(found, variance)};
        const float *factors = of(found, weight), *offsets = of(found, bias);
        float *of_factors = of(found, weight_gradient), *of_offsets = of(found, bias_gradient);
        const nb::gil_scoped_release released;
        backward(found, pass, factors, offsets, epsilon, statistics, of_factors, of_offsets, threads);
      },
      nb::arg("activation"), nb::arg("threads"), nb::arg("epsilon"), nb::arg("gradient").noconvert(), nb::arg("weight"),
      nb::arg("bias"), nb::arg("kept"), nb::arg("places").none(), nb::arg("mean"), nb::arg("variance"), nb::arg("result"),
      nb::arg("weight_gradient"), nb::arg("bias_gradient"));
  module.def(
      "channel_forward",
      [](const std::string& name, int threads, double epsilon, Pictures<T> pixels, PerChannel weight, PerChannel bias,
         Pictures<T> kept, std::optional<Places> places, Pictures<T> result) {
        const Layer found = channel_layer(pixels, kept, places, result, name);
        expect(threads > 0, "there are threads");
        const Forward<T> pass{numbers(pixels), numbers(kept), places ? places->data() : nullptr, numbers(result)};
        const Affine affine{of(found, weight), of(found, bias), static_cast<float>(epsilon)};
        const nb::gil_scoped_release released;
        channel_forward(found, pass, affine, threads);
      },
      nb::arg("activation"), nb::arg("threads"), nb::arg("epsilon"), nb::arg("pixels").noconvert(), nb::arg("weight"),
      nb::arg("bias"), nb::arg("kept"), nb::arg("places").none(), nb::arg("result"));
  module.def(
      "channel_backward",
      [](const std::string& name, int threads, double epsilon, Pictures<T> gradient, PerChannel weight, PerChannel bias,
         Pictures<T> kept, std::optional<Places> places, Pictures<T> result, PerChannel weight_gradient,
         PerChannel bias_gradient) {
        const Layer found = channel_layer(result, kept, places, gradient, name);
        expect(threads > 0, "there are threads");
        const Backward<T> pass{.gradient = numbers(gradient),
                               .kept = numbers(kept),
                               .places = places ? places->data() : nullptr,
                               .mean_slope = nullptr,
                               .covariance = nullptr,
                               .result = numbers(result)};
        const Affine affine{of(found, weight), of(found, bias), static_cast<float>(epsilon)};
        float *of_factors = of(found, weight_gradient), *of_offsets = of(found, bias_gradient);
        const nb::gil_scoped_release released;
        channel_backward(found, pass, affine, of_factors, of_offsets, threads);
      },
      nb::arg("activation"), nb::arg("threads"), nb::arg("epsilon"), nb::arg("gradient").noconvert(), nb::arg("weight"),
      nb::arg("bias"), nb::arg("kept"), nb::arg("places").none(), nb::arg("result"), nb::arg("weight_gradient"),
      nb::arg("bias_gradient"));
}

}  // namespace

void bind(nb::module_& module) {
  module.doc() = "Convolutional stages in training; `pairclip_fast.models.fused_norm` and `.convolution` call it.";
  module.def("isa", [] { return engine().isa; }, "Instruction set of the functions below.");
  module.def(
      "convolve",
      [](int threads, Pictures<float> pixels, Filter weight, bool turned, Pictures<float> result) {
        const Convolution call{sizes(pixels, result), pixels.data(), weight.data(), turned};
        expect(threads > 0, "there are threads");
        expect(weight.size() == std::size_t{9} * call.inputs * call.outputs, "wrong size of the weight");
        float* const out = result.data();
        const nb::gil_scoped_release released;
        convolve(call, out, threads);
      },
      nb::arg("threads"), nb::arg("pixels").noconvert(), nb::arg("weight").noconvert(), nb::arg("turned"),
      nb::arg("result").noconvert(), "A 3x3 convolution that keeps the size; with the filters turned about its input gradient.");
  bind_for<bf16>(module);
  bind_for<float>(module);
}

}  // namespace pairclip::conv
