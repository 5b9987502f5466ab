// Pixels on their way through the registers: unpacked, blended, recoloured, written. Shared by the kernels of a variant.
#pragma once

#include "loader/simd.h"
#include "loader/simd_width.h"
#include "loader/tile.h"

namespace pairclip::PAIRCLIP_VARIANT {

using loader::TileJob;

constexpr float kLumaRed = 0.299f, kLumaGreen = 0.587f, kLumaBlue = 0.114f;  // ITU-R BT.601

static_assert(kLanes <= loader::kMaxLanes);

// In units of the kernel's own; the writer's factors make up for it.
struct Pixels {
  Floats red, green, blue;
};

// A value in 0..255 is scale times that in `Pixels`, plus bias.
struct Units {
  float scale[3], bias;
};

// Green is 256 times and blue 65536 times what it should be: a byte is masked out where it lies, not shifted down. Powers of
// two, so nothing is lost.
constexpr Units kMasked = {{1.0f, 0x1p-8f, 0x1p-16f}, 0.0f};

PAIRCLIP_INLINE Pixels unpacked(Words words) {
  return {to_floats(words & 0xFFu), to_floats(words & 0xFF00u), to_floats(words & 0xFF0000u)};
}

// A batch is larger than a core's cache, and another core will read it: whole lines are written past the cache, which
// otherwise would first have to read what is overwritten (a third of all traffic). The caller has to fence.
constexpr std::size_t kCacheLine = 64;

// Fetches a job's `ahead` in equal parts: asked for all at once, the lines would queue up, and the kernel behind them.
class Fetcher {
 public:
  PAIRCLIP_INLINE Fetcher make(const TileJob& job, int parts) {
    const std::ptrdiff_t bytes = static_cast<std::ptrdiff_t>(job.ahead_bytes), line = static_cast<std::ptrdiff_t>(kCacheLine);
    return {job.ahead, job.ahead + bytes, (bytes + parts * line - 1) / (parts * line) * line};
  }

  __attribute__((always_inline)) inline void part() {
    const std::uint8_t* const until = end_ - at_ < part_ ? end_ : at_ + part_;
    for (; at_ < until; at_ += kCacheLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  Fetcher(const std::uint8_t* at, const std::uint8_t* end, std::ptrdiff_t part) : at_(at), end_(end), part_(part) {}

  const std::uint8_t *at_, *end_;
  std::ptrdiff_t part_;
};

// One row of the tile's output; knows its colours and its format.
template <bool kBf16, bool kRecoloured>
class Writer {
 public:
  PAIRCLIP_INLINE Writer make(const TileJob& job, const Units& units = kMasked) {
    constexpr float luma[3] = {kLumaRed, kLumaGreen, kLumaBlue};
    Writer writer;
    writer.pixels_ = static_cast<std::uint8_t*>(job.target.pixels);
    writer.row_ = job.target.row * kElement;
    writer.plane_ = job.target.plane * kElement;
    const auto places =
        reinterpret_cast<std::uintptr_t>(writer.pixels_) | static_cast<std::uintptr_t>(writer.row_ | writer.plane_);
    writer.past_cache_ = places % kCacheLine == 0 && job.width % kLanes == 0;
    for (int c = 0; c < 3; ++c) {
      // high - low is the whole range of 255: without colour operations the gain is 1 / std and the offset -mean / std.
      const float gain = kRecoloured ? job.gain[c] : (job.high[c] - job.low[c]) * (1.0f / 255.0f);
      writer.gain_[c] = units.scale[c] * gain;
      writer.grey_[c] = kRecoloured ? job.grey[c] : 0.0f;
      writer.offset_[c] = (kRecoloured ? job.offset[c] : job.low[c]) + units.bias * (gain + writer.grey_[c]);
      writer.luma_[c] = units.scale[c] * luma[c];
      writer.low_[c] = job.low[c];
      writer.high_[c] = job.high[c];
    }
    return writer;
  }

  // The pixels x .. x + count - 1 of row y; count is at most kLanes.
  __attribute__((always_inline)) inline void write(const Pixels& pixels, int y, int x, int count) const {
    std::uint8_t* const to = pixels_ + y * row_ + static_cast<std::ptrdiff_t>(x) * kElement;
    Floats luma{};
    if constexpr (kRecoloured) luma = pixels.red * luma_[0] + (pixels.green * luma_[1] + pixels.blue * luma_[2]);
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

  __attribute__((always_inline)) inline void put(Floats value, std::uint8_t* to, int count) const {
    if constexpr (kBf16)
      put_whole(to_bfloat16(value), to, count);
    else
      put_whole(value, to, count);
  }

  template <class Vector>
  __attribute__((always_inline)) inline void put_whole(Vector value, std::uint8_t* to, int count) const {
#if defined(__AVX512F__)
    const auto wanted = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(Vector) == kCacheLine)
      past_cache_ ? _mm512_stream_ps(reinterpret_cast<float*>(to), value) : _mm512_mask_storeu_ps(to, wanted, value);
    else
      _mm256_mask_storeu_epi16(to, wanted, reinterpret_cast<__m256i>(value));
#else
    if (count == kLanes)
      store(to, value);
    else
      std::memcpy(to, &value, static_cast<std::size_t>(count) * kElement);
#endif
  }

  std::uint8_t* pixels_;
  std::ptrdiff_t row_, plane_;
  bool past_cache_;
  float gain_[3], grey_[3], offset_[3], luma_[3], low_[3], high_[3];
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

// The four taps around a position, one per lane, and their weights: `left` + `right` is 1 but where a tap counts nothing.
struct Taps {
  Words top_left, top_right, low_left, low_right;
};

PAIRCLIP_INLINE Pixels blended(const Taps& taps, Floats left, Floats right, Floats down) {
  const Pixels a = unpacked(taps.top_left), b = unpacked(taps.top_right), c = unpacked(taps.low_left),
               d = unpacked(taps.low_right);
  const Pixels top = {left * a.red + right * b.red, left * a.green + right * b.green, left * a.blue + right * b.blue};
  const Pixels low = {left * c.red + right * d.red, left * c.green + right * d.green, left * c.blue + right * d.blue};
  return {top.red + down * (low.red - top.red), top.green + down * (low.green - top.green),
          top.blue + down * (low.blue - top.blue)};
}

}  // namespace pairclip::PAIRCLIP_VARIANT
