#include "loader/filler.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>

namespace pairclip::loader {
namespace {

constexpr std::int64_t kRowsPerTask = 8;  // about 40 us of work: little beside a wake-up, and the threads end together

// What the tasks of a run find, from any thread.
class Report {
 public:
  void damaged(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    outcome_.damaged.push_back(id);
  }

  Outcome result(double cpu_seconds) {
    outcome_.cpu_seconds = cpu_seconds;
    std::sort(outcome_.damaged.begin(), outcome_.damaged.end());
    outcome_.damaged.erase(std::unique(outcome_.damaged.begin(), outcome_.damaged.end()), outcome_.damaged.end());
    return std::move(outcome_);
  }

 private:
  std::mutex mutex_;
  Outcome outcome_;
};

}  // namespace

Filler::Filler(const TileSettings& settings, int tiles, int threads, TileKernel kernel)
    : settings_(settings), tiles_(tiles), threads_(threads), kernel_(kernel) {
  if (tiles < 1 || threads < 1 || settings.height < 1 || settings.width < 1)
    throw std::invalid_argument("sizes must be positive");
  for (int worker = 0; worker < threads; ++worker)
    scratch_.emplace_back(sizeof(std::uint32_t) * scratch_words(settings.height, settings.width));
}

template <class Tile>
Outcome Filler::fill_from(const Tile& tile, std::int64_t limit, std::span<const std::int64_t> sources,
                          std::span<const float> table, void* out) {
  if (sources.size() % tiles_ != 0 || table.size() != sources.size() * kColumns)
    throw std::invalid_argument("sources and table differ");
  for (const std::int64_t source : sources)
    if (source < 0 || source >= limit) throw std::invalid_argument("a source is not a tile of the split");
  const auto rows = static_cast<std::int64_t>(sources.size()) / tiles_;
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(tiles_) * settings_.width, plane = row * settings_.height;
  const std::size_t element = settings_.bf16 ? 2 : 4;
  Report report;
  const double cpu_seconds = pool_.run(threads_, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int worker) {
    auto* const scratch = reinterpret_cast<std::uint32_t*>(scratch_[worker].at(0));
    for (std::int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
      std::int64_t checked = -1;
      for (int t = 0; t < tiles_; ++t) {
        const std::int64_t source = sources[i * tiles_ + t], sample = source / tiles_;
        if (sample != checked && !tile.usable(sample)) {
          report.damaged(sample);
          continue;
        }
        checked = sample;
        auto* const picture =
            static_cast<std::uint8_t*>(out) + static_cast<std::size_t>(3 * i * plane + t * settings_.width) * element;
        const TileTarget target{picture, row, plane};
        const float* const parameters = &table[(i * tiles_ + t) * kColumns];
        TileJob job = resolve(settings_, tile.at(sample, static_cast<int>(source % tiles_)), target, parameters);
        if (i + 1 < rows) {
          const std::int64_t next = sources[(i + 1) * tiles_ + t];
          const std::span<const std::uint8_t> ahead = tile.bytes(next / tiles_, static_cast<int>(next % tiles_));
          job.ahead = ahead.data();
          job.ahead_bytes = static_cast<int>(ahead.size());
        }
        kernel_(job, scratch);
        if (parameters[kCutSize] > 0.0f) cut_out(settings_, target, parameters);
      }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // see TileKernel
  });
  return report.result(cpu_seconds);
}

Outcome Filler::fill(const Records& records, std::span<const std::int64_t> sources, std::span<const float> table, void* out) {
  struct RawTiles {
    const Records& records;
    std::ptrdiff_t row_bytes, tile_bytes, sample_bytes;
    bool usable(std::int64_t sample) const {
      return static_cast<std::ptrdiff_t>(records.bytes(sample).size()) == sample_bytes && records.intact(sample);
    }
    std::span<const std::uint8_t> bytes(std::int64_t sample, int tile) const {
      const std::span<const std::uint8_t> all = records.bytes(sample);
      if (static_cast<std::ptrdiff_t>(all.size()) != sample_bytes) return {};
      return all.subspan(tile * tile_bytes, tile_bytes);
    }
    TileSource at(std::int64_t sample, int tile) const { return {records.bytes(sample).data() + tile * tile_bytes, row_bytes}; }
  };
  const std::ptrdiff_t row_bytes = 3L * settings_.width;
  return fill_from(RawTiles{records, row_bytes, row_bytes * settings_.height, picture_bytes()}, records.size() * tiles_, sources,
                   table, out);
}

Outcome Filler::fill(std::span<const std::uint8_t> pictures, std::span<const std::int64_t> sources, std::span<const float> table,
                     void* out) {
  struct PictureTiles {
    const std::uint8_t* pictures;
    std::ptrdiff_t row_bytes, tile_row_bytes, share_bytes, picture_bytes;
    bool usable(std::int64_t) const { return true; }
    // Tiles lie side by side: a share of the picture instead.
    std::span<const std::uint8_t> bytes(std::int64_t sample, int tile) const {
      return {pictures + sample * picture_bytes + tile * share_bytes, static_cast<std::size_t>(share_bytes)};
    }
    TileSource at(std::int64_t sample, int tile) const {
      return {pictures + sample * picture_bytes + tile * tile_row_bytes, row_bytes};
    }
  };
  const std::ptrdiff_t tile_row_bytes = 3L * settings_.width;
  const PictureTiles tiles{pictures.data(), tile_row_bytes * tiles_, tile_row_bytes, picture_bytes() / tiles_, picture_bytes()};
  return fill_from(tiles, static_cast<std::int64_t>(pictures.size()) / picture_bytes() * tiles_, sources, table, out);
}

Outcome Filler::decode(const Records& records, Encoding encoding, std::span<const std::int64_t> ids,
                       std::span<const std::int64_t> rows, std::span<std::uint8_t> pictures) {
  if (ids.size() != rows.size()) throw std::invalid_argument("as many rows as ids");
  const std::int64_t room = static_cast<std::int64_t>(pictures.size()) / picture_bytes();
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= records.size() || rows[i] < 0 || rows[i] >= room)
      throw std::invalid_argument("an id or row is out of range");
  const auto count = static_cast<std::int64_t>(ids.size());
  Report report;
  const double cpu_seconds = pool_.run(threads_, (count + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
    Decoder decoder(encoding, settings_.width * tiles_, settings_.height);
    for (std::int64_t i = task * kRowsPerTask; i < std::min(count, (task + 1) * kRowsPerTask); ++i) {
      const bool good = records.intact(ids[i]) && decoder.decode(records.bytes(ids[i]), &pictures[rows[i] * picture_bytes()]);
      if (!good) report.damaged(ids[i]);
    }
  });
  return report.result(cpu_seconds);
}

}  // namespace pairclip::loader
