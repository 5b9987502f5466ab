#include "kernels/bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "kernels/bank_ops.h"
#include "kernels/engines.h"

namespace nb = nanobind;

namespace pairclip::kernels {
namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<std::int32_t, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<std::int64_t, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;  // float32 or bfloat16, unit stride within a row

Matrix matrix(const Rows& rows) {
  const nb::dlpack::dtype type = rows.dtype();
  const bool wide = type == nb::dtype<float>();
  const bool narrow = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
  if (!wide && !narrow) throw std::invalid_argument("kernels: expected float32 or bfloat16");
  if (rows.shape(1) > 1 && rows.stride(1) != 1) throw std::invalid_argument("kernels: expected rows of unit stride");
  return {rows.data(), wide ? Element::float32 : Element::bfloat16, static_cast<std::int64_t>(rows.shape(0)), rows.stride(0),
          static_cast<int>(rows.shape(1))};
}

Call call(const std::string& name, const Rows& emb, const Rows& bank, int threads) {
  const Matrix queries = matrix(emb), captions = matrix(bank);
  if (queries.depth != captions.depth || queries.type != captions.type)
    throw std::invalid_argument("kernels: embeddings and bank do not fit together");
  if (threads < 1) throw std::invalid_argument("kernels: expected threads");
  return {engine(name, queries.type), queries, captions, threads};
}

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("kernels: wrong size of ") + what);
}

std::span<const std::int64_t> span_of(const Longs& numbers) { return {numbers.data(), numbers.size()}; }

// Callers check what they can read; a compiled program's indices are seen here first.
void expect_captions(const Longs& indices, std::int64_t lowest, const Rows& bank) {
  for (const std::int64_t index : span_of(indices))
    if (index < lowest || index >= static_cast<std::int64_t>(bank.shape(0)))
      throw std::invalid_argument("kernels: there is no caption " + std::to_string(index));
}

void bind_softmax(nb::module_& module) {
  module.def("bank_softmax", [](const std::string& name, int threads, Rows emb, Rows bank, float scale, Floats lse, Floats mean) {
    const Call asked = call(name, emb, bank, threads);
    expect(lse.size() == emb.shape(0) && mean.size() == emb.shape(0) * emb.shape(1), "the outputs");
    const nb::gil_scoped_release released;
    bank_softmax(asked, scale, lse.data(), mean.data());
  });
}

void bind_stats(nb::module_& module) {
  module.def("bank_stats", [](const std::string& name, int threads, Rows emb, Rows bank, float scale, Longs captions, Longs first,
                              Longs last, Floats lse, Floats best, Ints greater, Ints equal) {
    const Call asked = call(name, emb, bank, threads);
    const std::size_t rows = emb.shape(0);
    expect(first.size() == rows && last.size() == rows, "the choice");
    expect_captions(captions, 0, bank);
    expect(lse.size() == rows && best.size() == rows && greater.size() == rows && equal.size() == rows, "the outputs");
    const nb::gil_scoped_release released;
    bank_stats(asked, scale, {span_of(captions), span_of(first), span_of(last)}, lse.data(), best.data(), greater.data(),
               equal.data());
  });
}

void bind_chosen(nb::module_& module) {
  module.def("pair_scores", [](const std::string& name, int threads, Rows emb, Rows bank, Longs indices, Floats scores) {
    const Call asked = call(name, emb, bank, threads);
    expect(indices.ndim() == 2 && indices.shape(0) == emb.shape(0) && scores.size() == indices.size(), "the indices");
    expect_captions(indices, -1, bank);
    const nb::gil_scoped_release released;
    pair_scores(asked, indices.data(), static_cast<std::int64_t>(indices.shape(1)), scores.data());
  });
  module.def("bank_topk", [](const std::string& name, int threads, Rows emb, Rows bank, int k, Floats scores, Longs indices) {
    const Call asked = call(name, emb, bank, threads);
    expect(k >= 1 && k <= kMostTop, "k");
    expect(scores.size() == emb.shape(0) * k && indices.size() == scores.size(), "the outputs");
    const nb::gil_scoped_release released;
    bank_topk(asked, k, scores.data(), indices.data());
  });
}

}  // namespace

void bind(nb::module_& module) {
  module.doc() = "The bank operations; `pairclip_fast.kernels.cpp` calls them.";
  module.def("engines", engine_names, "Names that the operations take as their engine, best last.");
  module.def(
      "precision",
      [](const std::string& name, bool narrow) { return engine(name, narrow ? Element::bfloat16 : Element::float32).precision; },
      "How an engine multiplies bfloat16 (narrow) or float32 inputs.");
  module.def(
      "powers_of_four",
      [](const std::string& name, Floats numbers) {
        expect(numbers.size() % kSlack == 0, "the numbers");
        engine(name, Element::float32).powers_of_four(numbers.data(), static_cast<std::int64_t>(numbers.size()));
      },
      "The softmax's 4^x, in place; for tests.");
  module.def(
      "multiply_adds",
      [](const std::string& name, std::int64_t rounds) {
        const Engine& chosen = engine(name, Element::float32);
        const nb::gil_scoped_release released;
        return chosen.multiply_adds(rounds);
      },
      "Multiply-adds that wait for nothing, on this thread, and their flop; for benchmarks.");
  bind_softmax(module);
  bind_stats(module);
  bind_chosen(module);
}

}  // namespace pairclip::kernels
