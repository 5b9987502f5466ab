// The submodule `tower`; `pairclip_fast.models.tower` calls it.
#include "tower/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "core/huge_pages.h"
#include "tower/tower.h"

namespace nb = nanobind;

namespace pairclip::tower {
namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ReadFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("tower: ") + what);
}

Shape shape(int batch, int tokens, int width, int mlp_width, int heads, int depth, bool pre_norm, const std::string& name) {
  expect(batch > 0 && tokens > 0 && depth > 0 && heads > 0, "sizes are positive");
  expect(width > 0 && mlp_width > 0 && mlp_width % kBlock == 0 && width % (kBlock * heads) == 0,
         "the widths of a head and of the MLP are multiples of 32");
  return {batch, tokens, width, mlp_width, heads, depth, pre_norm, activation(name)};
}

std::size_t size_of(const Shape& shape, int parameter) {
  for (int m = 0; m < kMatrices; ++m) {
    if (parameter == kWeightOf[m]) return static_cast<std::size_t>(outputs(shape, m)) * inputs(shape, m);
    if (parameter == kBiasOf[m]) return outputs(shape, m);
  }
  return shape.width;
}

template <class Pointer, class Array>
std::vector<Pointer> pointers(const Shape& shape, const std::vector<Array>& arrays) {
  expect(arrays.size() == static_cast<std::size_t>(shape.depth) * kParametersPerBlock, "twelve parameters a block");
  std::vector<Pointer> found;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    expect(arrays[i].size() == size_of(shape, static_cast<int>(i % kParametersPerBlock)), "wrong size of a parameter");
    found.push_back(arrays[i].data());
  }
  return found;
}

Pass pass(const Engine& engine, const Shape& shape, int threads, const Bytes& memory, const ReadFloats& tokens,
          const Floats& result) {
  expect(threads > 0 && memory.size() >= engine.workspace_bytes(shape, threads), "the workspace is too small");
  const std::size_t numbers = static_cast<std::size_t>(shape.rows()) * shape.width;
  expect(tokens.size() == numbers && result.size() == numbers, "wrong number of tokens");
  return {shape, reinterpret_cast<char*>(memory.data()), tokens.data(), result.data(), nullptr, nullptr};
}

}  // namespace

void bind(nb::module_& module) {
  module.doc() = "Stacks of transformer blocks; `pairclip_fast.models.tower` calls it.";
  nb::class_<Shape>(module, "Shape", "Sizes of a stack of blocks.")
      .def(
          "__init__",
          [](Shape* self, int batch, int tokens, int width, int mlp_width, int heads, int depth, bool pre_norm,
             const std::string& name) { new (self) Shape(shape(batch, tokens, width, mlp_width, heads, depth, pre_norm, name)); },
          nb::kw_only(), nb::arg("batch"), nb::arg("tokens"), nb::arg("width"), nb::arg("mlp_width"), nb::arg("heads"),
          nb::arg("depth"), nb::arg("pre_norm"), nb::arg("activation"));
  module.def("engines", engine_names,
             "Names that the passes take as their engine: emulated, avx512_bf16 and amx in bfloat16, the others in float32.");
  module.def(
      "workspace_bytes",
      [](const std::string& name, const Shape& shape, int threads) { return engine(name).workspace_bytes(shape, threads); },
      "Bytes that a pass works in.");
  module.def("prefer_huge_pages", [](Bytes memory) { prefer_huge_pages(memory.data(), memory.size()); });
  module.def("forward", [](const std::string& name, int threads, const Shape& shape, Bytes memory, ReadFloats tokens,
                           const std::vector<ReadFloats>& parameters, Floats result) {
    const auto given = pointers<const float*>(shape, parameters);
    const Engine& chosen = engine(name);
    Pass asked = pass(chosen, shape, threads, memory, tokens, result);
    asked.parameters = given.data();
    const nb::gil_scoped_release released;
    forward(chosen, asked, threads);
  });
  module.def("backward", [](const std::string& name, int threads, const Shape& shape, Bytes memory, ReadFloats gradient,
                            Floats result, const std::vector<Floats>& gradients) {
    const auto wanted = pointers<float*>(shape, gradients);
    const Engine& chosen = engine(name);
    Pass asked = pass(chosen, shape, threads, memory, gradient, result);
    asked.gradients = wanted.data();
    const nb::gil_scoped_release released;
    backward(chosen, asked, threads);
  });
  module.def(
      "activate",
      [](const std::string& name, const std::string& which, ReadFloats numbers, Floats values, Floats slopes) {
        expect(numbers.size() % kBlock == 0 && values.size() == numbers.size() && slopes.size() == numbers.size(), "wrong sizes");
        engine(name).activate(activation(which), numbers.data(), static_cast<int>(numbers.size()), values.data(), slopes.data());
      },
      "An activation and its derivative; for tests.");
}

}  // namespace pairclip::tower
