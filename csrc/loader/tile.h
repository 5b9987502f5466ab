// One tile: sampled, recoloured, normalised and written in a single pass.
//
// Per tile, in float and without rounding in between: rotate about the centre and shift (one bilinear sampling) ->
// saturation (luma .299 .587 .114) -> contrast about 128 -> brightness -> clip to [0, 255] -> horizontal flip ->
// (x - mean) / std -> cutout. Each tile has its own parameters and its own border, so tiles never bleed into each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pairclip::loader {

// Columns of a parameter table (data/plan.py, `Column`).
enum Column { kAngle, kBrightness, kContrast, kSaturation, kFlip, kShiftX, kShiftY, kCutX, kCutY, kCutSize, kColumns };

// What a tap outside the tile is: 0, or the tile mirrored about the centre of its edge pixel.
enum class Border { zero, reflect };

// What is the same for all tiles of a loader.
struct TileSettings {
  int height, width;
  float mean[3], std[3];
  Border border;
  bool bf16;  // output rounded to bfloat16 (to nearest, ties to even) instead of float32
};

// RGB rows of a tile, somewhere in a shard or in a decoded picture.
struct TileSource {
  const std::uint8_t* pixels;
  std::ptrdiff_t row_bytes;
};

// Where a tile goes: three planes, strides in elements.
struct TileTarget {
  void* pixels;
  std::ptrdiff_t row, plane;
};

// Everything the inner loops need, resolved from a row of the table.
struct TileJob {
  TileSource source;
  TileTarget target;
  // What will be needed next, to be fetched on the way. Records lie anywhere in hundreds of megabytes: without this each costs a
  // wait for memory and for its page's address.
  const std::uint8_t* ahead;
  int ahead_bytes;
  int height, width;
  Border border;
  bool bf16, rotated, recoloured, flip;
  // Rotated: source = R (destination - centre - moved) + centre.
  float cosine, sine, moved_x, moved_y;
  // Not rotated: the same shift within two sides of the tile; beyond that nothing changes any more.
  int shift_x, shift_y;
  // out = clamp(gain x + grey luma(x) + offset, low, high): colour and normalisation as one affine map per channel.
  float gain[3], grey[3], offset[3], low[3], high[3];
};

// A kernel may write past the cache: a full fence has to follow before other threads read.
using TileKernel = void (*)(const TileJob& job, std::uint32_t* scratch);

// Words of scratch memory that a kernel needs, and the alignment it wants.
std::size_t scratch_words(int height, int width);
constexpr std::size_t kScratchAlignment = 64;

TileJob resolve(const TileSettings& settings, const TileSource& source, const TileTarget& target, const float* row);

// Zeroes the square of `row` in the finished tile.
void cut_out(const TileSettings& settings, const TileTarget& target, const float* row);

// The kernels that this machine can run, by the names of their instruction sets, slowest first.
struct NamedKernel {
  const char* name;
  TileKernel kernel;
};

std::vector<NamedKernel> tile_kernels();

// The kernel called `name`; the fastest if the name is empty or not among them.
TileKernel tile_kernel(const std::string& name);

}  // namespace pairclip::loader
