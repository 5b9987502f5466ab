#include "loader/tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/cpu.h"
#include "loader/simd_width.h"

namespace pairclip {

namespace portable {
void augment_tile(const loader::TileJob& job, std::uint32_t* scratch);
}
namespace avx2 {
void augment_tile(const loader::TileJob& job, std::uint32_t* scratch);
}
namespace avx512 {
void augment_tile(const loader::TileJob& job, std::uint32_t* scratch);
}
namespace vbmi {
void augment_tile(const loader::TileJob& job, std::uint32_t* scratch);
}

namespace loader {
namespace {

constexpr float kLuma[3] = {0.299f, 0.587f, 0.114f};  // ITU-R BT.601; the kernels have the same
constexpr double kContrastCentre = 128.0, kWhite = 255.0;
constexpr double kDegree = 3.14159265358979323846 / 180.0;

constexpr int kFarthest = 1 << 24;  // sums of two fit into an int, and a float holds every whole number up to here

// A table is only data: NaN and infinities must not become indices.
int whole(float value, int limit) {
  if (!(value > static_cast<float>(-limit))) return -limit;
  return value < static_cast<float>(limit) ? static_cast<int>(value) : limit;
}

}  // namespace

std::size_t scratch_words(int height, int width) {
  const std::size_t padded = static_cast<std::size_t>(height + 2 * kPad) * (width + 2 * kPad) + kMaxLanes;
  const std::size_t row = 5 * static_cast<std::size_t>(width) + 2 * kMaxLanes;
  const std::size_t rows =
      (static_cast<std::size_t>(height) + 2) * kRowWords + 3 * static_cast<std::size_t>(height) + 3 * kMaxLanes;
  const std::size_t planes = 3 * static_cast<std::size_t>(plane_bytes(height)) / sizeof(std::uint32_t) +
                             (2 + 2 * kRowWords / kMaxLanes) * static_cast<std::size_t>(whole_vectors(height));
  return std::max({padded, row, rows, planes});
}

TileJob resolve(const TileSettings& settings, const TileSource& source, const TileTarget& target, const float* row) {
  TileJob job{};
  job.source = source;
  job.target = target;
  job.height = settings.height;
  job.width = settings.width;
  job.border = settings.border;
  job.bf16 = settings.bf16;
  job.flip = row[kFlip] != 0.0f;
  job.rotated = row[kAngle] != 0.0f;
  const double radians = static_cast<double>(row[kAngle]) * kDegree;
  job.cosine = static_cast<float>(std::cos(radians));
  job.sine = static_cast<float>(std::sin(radians));
  job.moved_x = static_cast<float>(whole(row[kShiftX], kFarthest));
  job.moved_y = static_cast<float>(whole(row[kShiftY], kFarthest));
  job.shift_x = whole(row[kShiftX], 2 * settings.width);
  job.shift_y = whole(row[kShiftY], 2 * settings.height);
  const double brightness = row[kBrightness], contrast = row[kContrast], saturation = row[kSaturation];
  job.recoloured = !(brightness == 1.0 && contrast == 1.0 && saturation == 1.0);
  // b (128 + c (luma + s (x - luma) - 128)) = b c s x + b c (1 - s) luma + 128 b (1 - c)
  for (int c = 0; c < 3; ++c) {
    const double mean = settings.mean[c], scale = 1.0 / settings.std[c];
    job.gain[c] = static_cast<float>(brightness * contrast * saturation * scale);
    job.grey[c] = static_cast<float>(brightness * contrast * (1.0 - saturation) * scale);
    job.offset[c] = static_cast<float>((kContrastCentre * brightness * (1.0 - contrast) - mean) * scale);
    job.low[c] = static_cast<float>(-mean * scale);
    job.high[c] = static_cast<float>((kWhite - mean) * scale);
  }
  return job;
}

void cut_out(const TileSettings& settings, const TileTarget& target, const float* row) {
  const int size = whole(row[kCutSize], kFarthest), x = whole(row[kCutX], kFarthest), y = whole(row[kCutY], kFarthest);
  const int left = std::max(x, 0), right = std::min(x + size, settings.width);
  const int top = std::max(y, 0), bottom = std::min(y + size, settings.height);
  if (left >= right) return;
  const std::size_t element = settings.bf16 ? 2 : 4;
  auto* bytes = static_cast<std::uint8_t*>(target.pixels);
  for (int c = 0; c < 3; ++c)
    for (int line = top; line < bottom; ++line)
      std::memset(bytes + (c * target.plane + line * target.row + left) * element, 0, (right - left) * element);
}

std::vector<NamedKernel> tile_kernels() {
  std::vector<NamedKernel> kernels{{name(Level::portable), portable::augment_tile}};
  const Level level = best_level();
  static_cast<void>(level);
#if defined(PAIRCLIP_BUILT_avx2)
  if (level >= Level::avx2) kernels.push_back({name(Level::avx2), avx2::augment_tile});
#endif
#if defined(PAIRCLIP_BUILT_avx512)
  if (level >= Level::avx512) kernels.push_back({name(Level::avx512), avx512::augment_tile});
#endif
#if defined(PAIRCLIP_BUILT_vbmi)
  if (has_byte_lookup()) kernels.push_back({"avx512_vbmi", vbmi::augment_tile});
#endif
  return kernels;
}

TileKernel tile_kernel(const std::string& name_wanted) {
  const std::vector<NamedKernel> kernels = tile_kernels();
  for (const NamedKernel& each : kernels)
    if (name_wanted == each.name) return each.kernel;
  return kernels.back().kernel;
}

}  // namespace loader
}  // namespace pairclip
