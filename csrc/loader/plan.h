// Order and augmentation parameters: the same numbers, bit for bit, as data/plan.py and data/parameters.py compute.
#pragma once

#include <cstdint>
#include <span>

namespace pairclip::loader {

// `Stream` of data/plan.py: last word of a Philox counter (epoch, id, tile, stream).
enum class Stream : std::uint32_t { order = 0, colour = 1, geometry = 2, cutout = 3, flip_phase = 4 };

// Fills `order` with 0..size-1 sorted by a 64-bit random key each, ties by number.
void keyed_permutation(std::uint64_t seed, std::uint32_t epoch, std::uint32_t tile, std::uint32_t stream,
                       std::span<std::int64_t> order);

// Ranges of the random parameters (`AugmentConfig`).
struct Ranges {
  double rotate_degrees, brightness, contrast, saturation, flip_probability;
  std::int64_t shift_pixels, cutout_size;
  bool alternating_flip;
};

// Whose parameters: the streams of a sample that is blended into another one are its own.
struct Draw {
  std::uint64_t seed;
  std::uint32_t epoch, stream_offset;
  int height, width;
};

// Fills table [ids * tiles * columns]; sources: [ids * tiles].
void parameter_table(std::span<const std::int64_t> ids, std::span<const std::int64_t> sources, const Ranges& ranges,
                     const Draw& draw, std::span<float> table);

}  // namespace pairclip::loader
