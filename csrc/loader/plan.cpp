// Compiled without contraction to fused multiply-add: the NumPy twin rounds after each operation.
#include "loader/plan.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <vector>

#include "loader/philox.h"
#include "loader/tile.h"

namespace pairclip::loader {
namespace {

constexpr int kMostBucketBits = 20;

struct Keyed {
  std::uint64_t key;
  std::int64_t number;
  bool operator<(const Keyed& other) const { return key != other.key ? key < other.key : number < other.number; }
};

std::uint32_t word(std::int64_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace

void keyed_permutation(std::uint64_t seed, std::uint32_t epoch, std::uint32_t tile, std::uint32_t stream,
                       std::span<std::int64_t> order) {
  const auto count = static_cast<std::int64_t>(order.size());
  // The keys are uniform: their upper bits put each into a bucket of about one, and what is left to sort is next to nothing.
  const int bits = std::clamp(static_cast<int>(std::bit_width(static_cast<std::uint64_t>(count))), 1, kMostBucketBits);
  std::vector<Keyed> drawn(count), sorted(count);
  std::vector<std::int64_t> ends((std::size_t{1} << bits) + 1);
  for (std::int64_t i = 0; i < count; ++i) {
    const PhiloxBlock block = philox({epoch, word(i), tile, stream}, seed);
    drawn[i] = {std::uint64_t{block[0]} << 32 | block[1], i};
    ++ends[(drawn[i].key >> (64 - bits)) + 1];
  }
  for (std::size_t bucket = 1; bucket < ends.size(); ++bucket) ends[bucket] += ends[bucket - 1];
  for (const Keyed& item : drawn) sorted[ends[item.key >> (64 - bits)]++] = item;
  std::int64_t begin = 0;
  for (std::size_t bucket = 0; bucket + 1 < ends.size(); begin = ends[bucket++])
    if (ends[bucket] - begin > 1) std::sort(sorted.begin() + begin, sorted.begin() + ends[bucket]);
  for (std::int64_t i = 0; i < count; ++i) order[i] = sorted[i].number;
}

void parameter_table(std::span<const std::int64_t> ids, std::span<const std::int64_t> sources, const Ranges& ranges,
                     const Draw& draw, std::span<float> table) {
  if (ids.empty()) return;
  if (sources.size() % ids.size() != 0 || table.size() != sources.size() * kColumns)
    throw std::invalid_argument("ids, sources and table differ");
  const auto tiles = static_cast<std::int64_t>(sources.size() / ids.size());
  const bool colours =
      ranges.brightness != 0.0 || ranges.contrast != 0.0 || ranges.saturation != 0.0 || ranges.rotate_degrees != 0.0;
  const bool moves = ranges.flip_probability != 0.0 || ranges.shift_pixels != 0;
  const auto block = [&](std::int64_t id, std::int64_t tile, Stream stream) {
    return philox({draw.epoch, word(id), word(tile), static_cast<std::uint32_t>(stream) + draw.stream_offset}, draw.seed);
  };
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const std::int64_t id = ids[i / tiles], tile = static_cast<std::int64_t>(i) % tiles;
    float* const row = &table[i * kColumns];
    std::fill(row, row + kColumns, 0.0f);
    row[kBrightness] = row[kContrast] = row[kSaturation] = 1.0f;
    if (colours) {
      const PhiloxBlock words = block(id, tile, Stream::colour);
      const auto drawn = [&](double range, int k) { return range * (2.0 * unit_interval(words[k]) - 1.0); };
      row[kAngle] = static_cast<float>(drawn(ranges.rotate_degrees, 0));
      row[kBrightness] = static_cast<float>(1.0 + drawn(ranges.brightness, 1));
      row[kContrast] = static_cast<float>(1.0 + drawn(ranges.contrast, 2));
      row[kSaturation] = static_cast<float>(1.0 + drawn(ranges.saturation, 3));
    }
    if (moves) {
      const PhiloxBlock words = block(id, tile, Stream::geometry);
      const auto positions = static_cast<std::uint64_t>(2 * ranges.shift_pixels + 1);
      row[kFlip] = unit_interval(words[0]) < ranges.flip_probability ? 1.0f : 0.0f;
      row[kShiftX] = static_cast<float>(bounded(words[1], positions) - ranges.shift_pixels);
      row[kShiftY] = static_cast<float>(bounded(words[2], positions) - ranges.shift_pixels);
    }
    if (ranges.alternating_flip) {
      const std::int64_t sample = sources[i] / tiles, side = sources[i] % tiles;
      const PhiloxBlock words = philox({0, word(sample), word(side), static_cast<std::uint32_t>(Stream::flip_phase)}, draw.seed);
      row[kFlip] = static_cast<float>((words[0] >> 31) ^ (draw.epoch & 1));
    }
    if (ranges.cutout_size != 0) {
      const PhiloxBlock words = block(id, tile, Stream::cutout);
      row[kCutX] = static_cast<float>(bounded(words[0], static_cast<std::uint64_t>(draw.width)) - ranges.cutout_size / 2);
      row[kCutY] = static_cast<float>(bounded(words[1], static_cast<std::uint64_t>(draw.height)) - ranges.cutout_size / 2);
      row[kCutSize] = static_cast<float>(ranges.cutout_size);
    }
  }
}

}  // namespace pairclip::loader
