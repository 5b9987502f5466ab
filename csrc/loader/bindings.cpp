// What Python sees of the loader's core. Everything long runs without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

#include "loader/batch_memory.h"
#include "loader/crc32.h"
#include "loader/filler.h"
#include "loader/plan.h"

namespace nb = nanobind;

namespace pairclip::loader {
namespace {

using namespace nb::literals;

template <class Scalar, class... Shape>
using Array = nb::ndarray<Scalar, nb::c_contig, nb::device::cpu, Shape...>;
using Numbers = Array<const std::int64_t, nb::ndim<1>>;
using Bytes = Array<const std::uint8_t, nb::ndim<1>>;
using Sources = Array<const std::int64_t, nb::ndim<2>>;
using Table = Array<const float, nb::ndim<3>>;
using Result = std::pair<double, std::vector<std::int64_t>>;

template <class Anything>
auto view(const Anything& array) {
  return std::span(array.data(), array.size());
}

Result plain(Outcome outcome) { return {outcome.cpu_seconds, std::move(outcome.damaged)}; }

Encoding encoding_named(const std::string& name) {
  if (name == "png") return Encoding::png;
  if (name == "jpeg") return Encoding::jpeg;
  throw std::invalid_argument("no such encoding: " + name);
}

// Records over arrays that it keeps alive (the mapped shards).
struct MappedRecords {
  std::vector<Bytes> shards;
  Records records;
};

void map_records(MappedRecords* self, std::vector<Bytes> shards, const Numbers& starts, const Numbers& offsets,
                 const Numbers& sizes, const Array<const std::uint32_t, nb::ndim<1>>& checksums) {
  std::vector<std::span<const std::uint8_t>> views;
  for (const Bytes& shard : shards) views.push_back(view(shard));
  Records records(std::move(views), view(starts), view(offsets), view(sizes), view(checksums));
  new (self) MappedRecords{std::move(shards), std::move(records)};
}

class PyFiller {
 public:
  PyFiller(const TileSettings& settings, int tiles, int threads, const std::string& isa)
      : settings_(settings), tiles_(tiles), filler_(settings, tiles, threads, tile_kernel(isa)) {}

  // A batch of `rows` pictures, uninitialised. Its memory is taken again once nothing refers to it.
  nb::ndarray<nb::pytorch> batch(std::size_t rows) {
    const std::size_t width = static_cast<std::size_t>(tiles_) * static_cast<std::size_t>(settings_.width);
    const std::size_t shape[] = {rows, 3, static_cast<std::size_t>(settings_.height), width};
    auto memory = std::make_unique<std::shared_ptr<void>>(memory_.take(rows * 3 * shape[2] * width * (settings_.bf16 ? 2 : 4)));
    void* const data = memory->get();
    const nb::capsule owner(memory.release(), [](void* held) noexcept { delete static_cast<std::shared_ptr<void>*>(held); });
    return {data, std::size(shape), shape, owner, nullptr, dtype()};
  }

  Result fill_records(const MappedRecords& mapped, const Sources& sources, const Table& table,
                      const nb::ndarray<nb::c_contig>& out) {
    void* const pixels = checked(out, sources, table);
    const nb::gil_scoped_release release;
    return plain(filler_.fill(mapped.records, view(sources), view(table), pixels));
  }

  Result fill_pictures(const Array<const std::uint8_t, nb::ndim<4>>& pictures, const Sources& sources, const Table& table,
                       const nb::ndarray<nb::c_contig>& out) {
    void* const pixels = checked(out, sources, table);
    const nb::gil_scoped_release release;
    return plain(filler_.fill(view(pictures), view(sources), view(table), pixels));
  }

  Result decode(const MappedRecords& mapped, const std::string& encoding, const Numbers& ids, const Numbers& rows,
                const Array<std::uint8_t, nb::ndim<4>>& pictures) {
    const Encoding kind = encoding_named(encoding);
    const nb::gil_scoped_release release;
    return plain(filler_.decode(mapped.records, kind, view(ids), view(rows), view(pictures)));
  }

 private:
  // The memory of a batch [rows, 3, height, tiles * width] of the right type.
  void* checked(const nb::ndarray<nb::c_contig>& out, const Sources& sources, const Table& table) const {
    const std::size_t rows = sources.shape(0), tiles = static_cast<std::size_t>(tiles_);
    const bool fits = out.device_type() == nb::device::cpu::value && out.dtype() == dtype() && out.ndim() == 4 &&
                      out.shape(0) == rows && out.shape(1) == 3 && out.shape(2) == static_cast<std::size_t>(settings_.height) &&
                      out.shape(3) == tiles * static_cast<std::size_t>(settings_.width) && sources.shape(1) == tiles &&
                      table.shape(0) == rows && table.shape(1) == tiles && table.shape(2) == kColumns;
    if (!fits) throw std::invalid_argument("sources, table and output do not fit together");
    return out.data();
  }

  nb::dlpack::dtype dtype() const {
    return settings_.bf16 ? nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}
                          : nb::dtype<float>();
  }

  TileSettings settings_;
  int tiles_;
  Filler filler_;
  BatchMemory memory_;
};

void new_filler(PyFiller* self, int height, int width, int tiles, std::tuple<float, float, float> mean,
                std::tuple<float, float, float> std, const std::string& border, bool bf16, int threads, const std::string& isa) {
  const auto [mean_r, mean_g, mean_b] = mean;
  const auto [std_r, std_g, std_b] = std;
  if (border != "zero" && border != "reflect") throw std::invalid_argument("no such border: " + border);
  const TileSettings settings{
      height, width, {mean_r, mean_g, mean_b}, {std_r, std_g, std_b}, border == "zero" ? Border::zero : Border::reflect, bf16};
  new (self) PyFiller(settings, tiles, threads, isa);
}

}  // namespace

void bind(nb::module_& module) {
  module.def("crc32", [](const Bytes& data) { return crc32(data.data(), data.size()); }, "data"_a);
  module.def("crc32_portable", [](const Bytes& data) { return crc32_portable(data.data(), data.size()); }, "data"_a);
  module.def(
      "decoder_library", [](const std::string& encoding) { return decoder_library(encoding_named(encoding)); }, "encoding"_a,
      nb::sig("def decoder_library(encoding: str) -> str | None"));
  module.def(
      "keyed_permutation",
      [](const Array<std::int64_t, nb::ndim<1>>& order, std::uint64_t seed, std::uint32_t epoch, std::uint32_t tile,
         std::uint32_t stream) { keyed_permutation(seed, epoch, tile, stream, view(order)); },
      "order"_a, nb::kw_only(), "seed"_a, "epoch"_a, "tile"_a, "stream"_a);
  module.def(
      "parameter_table",
      [](const Numbers& ids, const Sources& sources, const Array<float, nb::ndim<3>>& table, std::uint64_t seed,
         std::uint32_t epoch, std::uint32_t stream_offset, int height, int width, double rotate_degrees, double brightness,
         double contrast, double saturation, double flip_probability, std::int64_t shift_pixels, std::int64_t cutout_size,
         bool alternating_flip) {
        const Ranges ranges{rotate_degrees,   brightness,   contrast,    saturation,
                            flip_probability, shift_pixels, cutout_size, alternating_flip};
        parameter_table(view(ids), view(sources), ranges, {seed, epoch, stream_offset, height, width}, view(table));
      },
      "ids"_a, "sources"_a, "table"_a, nb::kw_only(), "seed"_a, "epoch"_a, "stream_offset"_a, "height"_a, "width"_a,
      "rotate_degrees"_a, "brightness"_a, "contrast"_a, "saturation"_a, "flip_probability"_a, "shift_pixels"_a, "cutout_size"_a,
      "alternating_flip"_a);
  module.def(
      "loader_isas",
      [] {
        std::vector<std::string> names;
        for (const NamedKernel& each : tile_kernels()) names.emplace_back(each.name);
        return names;
      },
      "Instruction sets that a Filler can have on this machine, slowest first.");
  nb::class_<MappedRecords>(module, "Records")
      .def("__init__", &map_records, "shards"_a, "starts"_a, "offsets"_a, "sizes"_a, "checksums"_a)
      .def(
          "damaged",
          [](const MappedRecords& mapped, const Numbers& ids) {
            const nb::gil_scoped_release release;
            return mapped.records.damaged(view(ids));
          },
          "ids"_a)
      .def(
          "checksum",
          [](const MappedRecords& mapped, std::int64_t id) {
            if (id < 0 || id >= mapped.records.size()) throw std::invalid_argument("there is no such record");
            const nb::gil_scoped_release release;
            return mapped.records.checksum(id);
          },
          "id"_a, "CRC-32 of a record's bytes; None if they cannot be read.");
  nb::class_<PyFiller>(module, "Filler")
      .def("__init__", &new_filler, nb::kw_only(), "height"_a, "width"_a, "tiles"_a, "mean"_a, "std"_a, "border"_a, "bf16"_a,
           "threads"_a, "isa"_a = "")
      .def("batch", &PyFiller::batch, "rows"_a)
      .def("fill_records", &PyFiller::fill_records, "records"_a, "sources"_a, "table"_a, "out"_a)
      .def("fill_pictures", &PyFiller::fill_pictures, "pictures"_a, "sources"_a, "table"_a, "out"_a)
      .def("decode", &PyFiller::decode, "records"_a, "encoding"_a, "ids"_a, "rows"_a, "pictures"_a);
}

}  // namespace pairclip::loader
