#include "loader/records.h"

#include <stdexcept>

#include "core/mapped.h"
#include "loader/crc32.h"

namespace pairclip::loader {

Records::Records(std::vector<std::span<const std::uint8_t>> shards, std::span<const std::int64_t> starts,
                 std::span<const std::int64_t> offsets, std::span<const std::int64_t> sizes,
                 std::span<const std::uint32_t> checksums)
    : checksums_(checksums.begin(), checksums.end()) {
  const auto count = static_cast<std::int64_t>(offsets.size());
  if (starts.size() != shards.size() + 1 || starts.front() != 0 || starts.back() != count || sizes.size() != offsets.size() ||
      checksums.size() != offsets.size())
    throw std::invalid_argument("the tables of the records have different lengths");
  records_.reserve(offsets.size());
  for (std::size_t shard = 0; shard < shards.size(); ++shard) {
    const auto bytes = static_cast<std::int64_t>(shards[shard].size());
    if (starts[shard] > starts[shard + 1] || starts[shard + 1] > count) throw std::invalid_argument("shards out of order");
    for (std::int64_t id = starts[shard]; id < starts[shard + 1]; ++id) {
      if (offsets[id] < 0 || sizes[id] < 0 || offsets[id] > bytes || sizes[id] > bytes - offsets[id])
        throw std::invalid_argument("a record lies outside its shard");
      records_.push_back(shards[shard].subspan(offsets[id], sizes[id]));
    }
  }
}

std::optional<std::uint32_t> Records::checksum(std::int64_t id) const {
  const std::span<const std::uint8_t> record = bytes(id);
  std::uint32_t found = 0;
  if (!touch_mapped([&found, record] { found = crc32(record.data(), record.size()); })) return std::nullopt;
  return found;
}

bool Records::intact(std::int64_t id) const { return checksum(id) == checksums_[id]; }

std::vector<std::int64_t> Records::damaged(std::span<const std::int64_t> ids) const {
  std::vector<std::int64_t> found;
  for (const std::int64_t id : ids) {
    if (id < 0 || id >= size()) throw std::invalid_argument("there is no such record");
    if (!intact(id)) found.push_back(id);
  }
  return found;
}

}  // namespace pairclip::loader
