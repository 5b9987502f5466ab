// The inner loops, compiled once per instruction set. No containers and no library templates here: an inline function of
// theirs, compiled for AVX-512, could be the copy that the linker keeps for the whole program.
#include "loader/simd.h"
#include "loader/simd_width.h"
#include "loader/tile.h"

namespace pairclip::PAIRCLIP_VARIANT {
namespace {

using loader::Border;
using loader::kPad;
using loader::TileJob;

constexpr float kLumaRed = 0.299f, kLumaGreen = 0.587f, kLumaBlue = 0.114f;  // ITU-R BT.601

static_assert(kLanes <= loader::kMaxLanes);

struct Pixels {
  Floats red, green, blue;
};

PAIRCLIP_INLINE Pixels unpacked(Words words) {
  return {to_floats(words & 0xFFu), to_floats((words >> 8) & 0xFFu), to_floats(words >> 16)};
}

// One row of the tile's output; knows its colours and its format.
template <bool kBf16, bool kRecoloured>
class Writer {
 public:
  PAIRCLIP_INLINE Writer make(const TileJob& job) {
    Writer writer;
    writer.pixels_ = static_cast<std::uint8_t*>(job.target.pixels);
    writer.row_ = job.target.row * kElement;
    writer.plane_ = job.target.plane * kElement;
    for (int c = 0; c < 3; ++c) {
      // high - low is the whole range of 255: without colour operations the gain is 1 / std and the offset -mean / std.
      writer.gain_[c] = kRecoloured ? job.gain[c] : (job.high[c] - job.low[c]) * (1.0f / 255.0f);
      writer.offset_[c] = kRecoloured ? job.offset[c] : job.low[c];
      writer.grey_[c] = job.grey[c];
      writer.low_[c] = job.low[c];
      writer.high_[c] = job.high[c];
    }
    return writer;
  }

  // The pixels x .. x + count - 1 of row y; count is at most kLanes.
  __attribute__((always_inline)) inline void write(const Pixels& pixels, int y, int x, int count) const {
    std::uint8_t* const to = pixels_ + y * row_ + static_cast<std::ptrdiff_t>(x) * kElement;
    Floats luma{};
    if constexpr (kRecoloured) luma = pixels.red * kLumaRed + (pixels.green * kLumaGreen + pixels.blue * kLumaBlue);
    put(channel(pixels.red, luma, 0), to, count);
    put(channel(pixels.green, luma, 1), to + plane_, count);
    put(channel(pixels.blue, luma, 2), to + 2 * plane_, count);
  }

 private:
  static constexpr std::ptrdiff_t kElement = kBf16 ? 2 : 4;

  __attribute__((always_inline)) inline Floats channel(Floats value, Floats luma, int c) const {
    if constexpr (!kRecoloured) return value * gain_[c] + offset_[c];
    return smaller(larger(value * gain_[c] + (luma * grey_[c] + offset_[c]), spread(low_[c])), spread(high_[c]));
  }

  PAIRCLIP_INLINE void put(Floats value, std::uint8_t* to, int count) {
    if constexpr (kBf16)
      put_whole(to_bfloat16(value), to, count);
    else
      put_whole(value, to, count);
  }

  template <class Vector>
  PAIRCLIP_INLINE void put_whole(Vector value, std::uint8_t* to, int count) {
    if (count == kLanes)
      store(to, value);
    else
      std::memcpy(to, &value, static_cast<std::size_t>(count) * kElement);
  }

  std::uint8_t* pixels_;
  std::ptrdiff_t row_, plane_;
  float gain_[3], grey_[3], offset_[3], low_[3], high_[3];
};

// One row of RGB bytes as words.
PAIRCLIP_INLINE void expand_row(const std::uint8_t* from, std::uint32_t* to, int width) {
  int x = 0;
  for (; x + kLanes <= width; x += kLanes) store(to + x, expand_rgb(from + 3 * x));
  if (x == width) return;
  std::uint8_t rest[3 * kLanes] = {};
  std::memcpy(rest, from + 3 * x, static_cast<std::size_t>(3 * (width - x)));
  const Words words = expand_rgb(rest);
  std::memcpy(to + x, &words, static_cast<std::size_t>(4 * (width - x)));
}

// Mirrored about the centre of the edge pixel, once, then clamped: -1 -> 1, side -> side - 2.
PAIRCLIP_INLINE int mirrored(int at, int side) {
  const int once = at < 0 ? -at : at < side ? at : 2 * (side - 1) - at;
  return once < 0 ? 0 : once < side ? once : side - 1;
}

PAIRCLIP_INLINE Ints mirrored(Ints at, int side) {
  const Ints once = smaller(at < 0 ? -at : at, 2 * (side - 1) - at);
  return larger(smaller(once, spread(side - 1)), Ints{});
}

// Bilinear weights of two rows of two taps each.
PAIRCLIP_INLINE Pixels blended(Words top_left, Words top_right, Words low_left, Words low_right, Floats across, Floats down) {
  const Pixels a = unpacked(top_left), b = unpacked(top_right), c = unpacked(low_left), d = unpacked(low_right);
  const Pixels top = {a.red + across * (b.red - a.red), a.green + across * (b.green - a.green),
                      a.blue + across * (b.blue - a.blue)};
  const Pixels low = {c.red + across * (d.red - c.red), c.green + across * (d.green - c.green),
                      c.blue + across * (d.blue - c.blue)};
  return {top.red + down * (low.red - top.red), top.green + down * (low.green - top.green),
          top.blue + down * (low.blue - top.blue)};
}

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
      const Ints index = pair_order(row * pitch + column);
      Words top_left, top_right, low_left, low_right;
      gather_pairs(table, index, &top_left, &top_right);
      gather_pairs(table + pitch, index, &low_left, &low_right);
      const Pixels pixels = blended(top_left, top_right, low_left, low_right, at_x - to_floats(column), at_y - to_floats(row));
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
      const Pixels pixels = blended(gather(table, top + left), gather(table, top + right), gather(table, low + left),
                                    gather(table, low + right), at_x - to_floats(column), at_y - to_floats(row));
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
  if (!job.rotated)
    shift<kBf16, kRecoloured>(job, scratch);
  else if (job.border == Border::reflect)
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
