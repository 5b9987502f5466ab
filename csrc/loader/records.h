// The records of a split: where each lies in its mapped shard, and what its checksum must be.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace pairclip::loader {

class Records {
 public:
  // shards: the mapped bytes, which the owner keeps alive; starts: id of the first record of each shard, and the total.
  // Throws std::invalid_argument if a record does not lie inside its shard, so that every later access does.
  Records(std::vector<std::span<const std::uint8_t>> shards, std::span<const std::int64_t> starts,
          std::span<const std::int64_t> offsets, std::span<const std::int64_t> sizes, std::span<const std::uint32_t> checksums);

  std::int64_t size() const { return static_cast<std::int64_t>(records_.size()); }

  std::span<const std::uint8_t> bytes(std::int64_t id) const { return records_[id]; }

  // Of the bytes as they are; none if they cannot be read.
  std::optional<std::uint32_t> checksum(std::int64_t id) const;

  // Whether the bytes are there, and those that the index was made from.
  bool intact(std::int64_t id) const;

  // Those of `ids` that are not intact, in their order. Throws std::invalid_argument if there is no such record.
  std::vector<std::int64_t> damaged(std::span<const std::int64_t> ids) const;

 private:
  std::vector<std::span<const std::uint8_t>> records_;
  std::vector<std::uint32_t> checksums_;
};

}  // namespace pairclip::loader
