// The inner loops, compiled once per instruction set. No containers and no library templates here: an inline function of
// theirs, compiled for AVX-512, could be the copy that the linker keeps for the whole program.
#include "loader/pixels.h"
#if defined(__AVX512F__)
#include "loader/rotate_rows.h"
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "loader/rotate_bytes.h"
#endif

namespace pairclip::PAIRCLIP_VARIANT {
namespace {

using loader::Border;
using loader::kPad;

// kSide: the side of a square tile, where the compiler should know it; 0: ask the job.
template <bool kBf16, bool kRecoloured, int kSide>
void rotate_zero(const TileJob& job, std::uint32_t* table) {
  const int height = kSide ? kSide : job.height, width = kSide ? kSide : job.width, pitch = width + 2 * kPad;
  std::memset(table, 0, sizeof(std::uint32_t) * kPad * pitch);
  for (int y = 0; y < height; ++y) {
    std::uint32_t* const row = table + (y + kPad) * pitch;
    for (int x = 0; x < kPad; ++x) row[x] = row[kPad + width + x] = 0;
    expand_row(job.source.pixels + y * job.source.row_bytes, row + kPad, width);
  }
  std::memset(table + (height + kPad) * pitch, 0, sizeof(std::uint32_t) * kPad * pitch);

  const auto writer = Writer<kBf16, kRecoloured>::make(job);
  const float centre_x = 0.5f * static_cast<float>(width - 1), centre_y = 0.5f * static_cast<float>(height - 1);
  const Floats most_x = spread(static_cast<float>(width + kPad) + 0.5f),
               most_y = spread(static_cast<float>(height + kPad) + 0.5f);
  const float direction = job.flip ? -1.0f : 1.0f;
  for (int x = 0; x < width; x += kLanes) {
    // Positions are counted from the corner of the padding: they are not negative, so truncation is floor.
    const Floats dx = (ramp() + (static_cast<float>(x) - centre_x)) * direction - job.moved_x;
    const Floats from_x = dx * job.cosine + (centre_x + kPad), from_y = dx * job.sine + (centre_y + kPad);
    const int count = width - x < kLanes ? width - x : kLanes;
    for (int y = 0; y < height; ++y) {
      const float dy = static_cast<float>(y) - centre_y - job.moved_y;
      const Floats at_x = smaller(larger(from_x - job.sine * dy, Floats{}), most_x);
      const Floats at_y = smaller(larger(from_y + job.cosine * dy, Floats{}), most_y);
      const Ints column = truncated(at_x), row = truncated(at_y);
      const Ints index = row * pitch + column;
      Taps taps;
      load_pairs(table, index, &taps.top_left, &taps.top_right);
      load_pairs(table + pitch, index, &taps.low_left, &taps.low_right);
      const Floats across = at_x - to_floats(column);
      const Pixels pixels = blended(taps, 1.0f - across, across, at_y - to_floats(row));
      writer.write(pixels, y, x, kSide % kLanes == 0 && kSide ? kLanes : count);
    }
  }
}

template <bool kBf16, bool kRecoloured>
void rotate_reflect(const TileJob& job, std::uint32_t* table) {
  const int height = job.height, width = job.width;
  for (int y = 0; y < height; ++y) expand_row(job.source.pixels + y * job.source.row_bytes, table + y * width, width);
  const auto writer = Writer<kBf16, kRecoloured>::make(job);
  const float centre_x = 0.5f * static_cast<float>(width - 1), centre_y = 0.5f * static_cast<float>(height - 1);
  // Beyond three sides a mirrored tap is a corner wherever it is.
  const float reach = 4.0f * static_cast<float>(height + width);
  const float direction = job.flip ? -1.0f : 1.0f;
  for (int y = 0; y < height; ++y) {
    const float dy = static_cast<float>(y) - centre_y - job.moved_y;
    for (int x = 0; x < width; x += kLanes) {
      const Floats dx = (ramp() + (static_cast<float>(x) - centre_x)) * direction - job.moved_x;
      // Counted from far outside, so that truncation is floor.
      const Floats at_x = smaller(larger(dx * job.cosine + (centre_x - job.sine * dy), spread(-reach)), spread(reach));
      const Floats at_y = smaller(larger(dx * job.sine + (centre_y + job.cosine * dy), spread(-reach)), spread(reach));
      Ints column = truncated(at_x), row = truncated(at_y);
      column += at_x < to_floats(column);  // true is -1: truncation went up
      row += at_y < to_floats(row);
      const Ints left = mirrored(column, width), right = mirrored(column + 1, width);
      const Ints top = mirrored(row, height) * width, low = mirrored(row + 1, height) * width;
      const Taps taps = {load_each(table, top + left), load_each(table, top + right), load_each(table, low + left),
                         load_each(table, low + right)};
      const Floats across = at_x - to_floats(column);
      const Pixels pixels = blended(taps, 1.0f - across, across, at_y - to_floats(row));
      writer.write(pixels, y, x, width - x < kLanes ? width - x : kLanes);
    }
  }
}

// Whole-pixel shift and flip: no sampling, each row once through registers.
template <bool kBf16, bool kRecoloured>
void shift(const TileJob& job, std::uint32_t* scratch) {
  const int height = job.height, width = job.width, reach = job.shift_x < 0 ? -job.shift_x : job.shift_x;
  std::uint32_t* const line = scratch + kLanes + reach;  // the row's own pixels; `reach` on either side are the border
  const auto writer = Writer<kBf16, kRecoloured>::make(job);
  for (int y = 0; y < height; ++y) {
    const int wanted = y - job.shift_y;
    const bool inside = wanted >= 0 && wanted < height;
    if (!inside && job.border == Border::zero) {
      std::memset(line - reach, 0, sizeof(std::uint32_t) * (width + 2 * reach));
    } else {
      expand_row(job.source.pixels + (inside ? wanted : mirrored(wanted, height)) * job.source.row_bytes, line, width);
      for (int x = 1; x <= reach; ++x) {
        line[-x] = job.border == Border::zero ? 0 : line[mirrored(-x, width)];
        line[width - 1 + x] = job.border == Border::zero ? 0 : line[mirrored(width - 1 + x, width)];
      }
    }
    for (int x = 0; x < width; x += kLanes) {
      const std::uint32_t* const first = line - job.shift_x + (job.flip ? width - x - kLanes : x);
      const Words words = load<Words>(first);
      writer.write(unpacked(job.flip ? reversed(words) : words), y, x, width - x < kLanes ? width - x : kLanes);
    }
  }
}

template <bool kBf16, bool kRecoloured>
void augment(const TileJob& job, std::uint32_t* scratch) {
  constexpr int kCommonSide = 32;
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
  const bool by_bytes = job.rotated && job.width <= loader::kRowWords && job.border == Border::zero;
  if (by_bytes && rotate_bytes<kBf16, kRecoloured>(job, scratch)) return;
#endif
  Fetcher::make(job, 1).part();
  if (!job.rotated) return shift<kBf16, kRecoloured>(job, scratch);
#if defined(__AVX512F__)
  if (job.width <= loader::kRowWords) return rotate_rows<kBf16, kRecoloured>(job, scratch);
#endif
  if (job.border == Border::reflect)
    rotate_reflect<kBf16, kRecoloured>(job, scratch);
  else if (job.height == kCommonSide && job.width == kCommonSide)
    rotate_zero<kBf16, kRecoloured, kCommonSide>(job, scratch);
  else
    rotate_zero<kBf16, kRecoloured, 0>(job, scratch);
}

}  // namespace

void augment_tile(const TileJob& job, std::uint32_t* scratch) {
  if (job.bf16)
    job.recoloured ? augment<true, true>(job, scratch) : augment<true, false>(job, scratch);
  else
    job.recoloured ? augment<false, true>(job, scratch) : augment<false, false>(job, scratch);
}

}  // namespace pairclip::PAIRCLIP_VARIANT
