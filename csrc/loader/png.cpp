// PNG, 8 bits per channel, RGB, not interlaced. The chunks and the row filters are read here; only the inflation is a
// library's. Every length is checked against what is left before it is used.
//
// Source: W3C Recommendation "Portable Network Graphics (PNG) Specification", second edition.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "loader/crc32.h"
#include "loader/decode.h"

#if defined(PAIRCLIP_LIBDEFLATE)
#include <libdeflate.h>
#elif defined(PAIRCLIP_ZLIB)
#include <zlib.h>
#endif

namespace pairclip::loader {

#if defined(PAIRCLIP_LIBDEFLATE) || defined(PAIRCLIP_ZLIB)
namespace {

using Bytes = std::span<const std::uint8_t>;

constexpr std::size_t kChannels = 3, kSlack = 8;  // rows are read four bytes at a time
constexpr std::uint8_t kSignature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};

std::uint32_t big_endian(const std::uint8_t* from) {
  return std::uint32_t{from[0]} << 24 | std::uint32_t{from[1]} << 16 | std::uint32_t{from[2]} << 8 | from[3];
}

// Inflates a whole zlib stream that must come out at exactly the expected size.
class Inflater {
 public:
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;
#if defined(PAIRCLIP_LIBDEFLATE)
  Inflater() : state_(libdeflate_alloc_decompressor()) {}
  ~Inflater() { libdeflate_free_decompressor(state_); }
  bool inflate_whole(Bytes from, std::uint8_t* to, std::size_t size) {
    return state_ != nullptr &&
           libdeflate_zlib_decompress(state_, from.data(), from.size(), to, size, nullptr) == LIBDEFLATE_SUCCESS;
  }

 private:
  libdeflate_decompressor* state_;
#else
  Inflater() { ready_ = inflateInit(&state_) == Z_OK; }
  ~Inflater() { inflateEnd(&state_); }
  bool inflate_whole(Bytes from, std::uint8_t* to, std::size_t size) {
    if (!ready_ || inflateReset(&state_) != Z_OK) return false;
    state_.next_in = const_cast<std::uint8_t*>(from.data());
    state_.avail_in = static_cast<uInt>(from.size());
    state_.next_out = to;
    state_.avail_out = static_cast<uInt>(size);
    return inflate(&state_, Z_FINISH) == Z_STREAM_END && state_.avail_out == 0;
  }

 private:
  z_stream state_{};
  bool ready_ = false;
#endif
};

// Eight 16-bit numbers of which the first four are a pixel and one byte that nobody reads: a filter that depends on the
// pixel to the left can at least do the channels of a pixel at once.
using Shorts = std::int16_t __attribute__((vector_size(16)));
using Octets = std::uint8_t __attribute__((vector_size(8)));

inline Shorts load_pixel(const std::uint8_t* from) {
  std::uint32_t word;
  std::memcpy(&word, from, sizeof word);
  const std::uint64_t wide = word;
  Octets octets;
  std::memcpy(&octets, &wide, sizeof octets);
  return __builtin_convertvector(octets, Shorts);
}

inline void store_pixel(std::uint8_t* to, Shorts value) {
  const Octets octets = __builtin_convertvector(value, Octets);
  std::memcpy(to, &octets, kChannels);
}

inline Shorts magnitude(Shorts x) { return x < 0 ? -x : x; }

// What `filter` predicts from the pixels to the left, above, and above the left one.
template <int kFilter>
inline Shorts predicted(Shorts left, Shorts above, Shorts corner) {
  if constexpr (kFilter == 1) return left;
  if constexpr (kFilter == 3) return (left + above) >> 1;
  const Shorts to_left = magnitude(above - corner), to_above = magnitude(left - corner),
               to_corner = magnitude(left + above - corner - corner);
  const Shorts of_above_or_corner = to_above <= to_corner ? above : corner;
  return (to_left <= to_above) & (to_left <= to_corner) ? left : of_above_or_corner;
}

template <int kFilter>
void undo_by_pixel(const std::uint8_t* from, const std::uint8_t* above, std::uint8_t* to, std::size_t row_bytes) {
  Shorts left{}, corner{};
  for (std::size_t i = 0; i < row_bytes; i += kChannels) {
    const Shorts up = load_pixel(above + i);
    left = (load_pixel(from + i) + predicted<kFilter>(left, up, corner)) & 255;
    corner = up;
    store_pixel(to + i, left);
  }
}

bool undo_filter(int filter, const std::uint8_t* from, const std::uint8_t* above, std::uint8_t* to, std::size_t row_bytes) {
  switch (filter) {
    case 0:
      std::memcpy(to, from, row_bytes);
      return true;
    case 1:
      undo_by_pixel<1>(from, above, to, row_bytes);
      return true;
    case 2:
      for (std::size_t i = 0; i < row_bytes; ++i) to[i] = static_cast<std::uint8_t>(from[i] + above[i]);
      return true;
    case 3:
      undo_by_pixel<3>(from, above, to, row_bytes);
      return true;
    case 4:
      undo_by_pixel<4>(from, above, to, row_bytes);
      return true;
    default:
      return false;
  }
}

class PngCodec : public Decoder::Codec {
 public:
  PngCodec(int width, int height)
      : width_(width),
        height_(height),
        row_bytes_(kChannels * static_cast<std::size_t>(width)),
        filtered_((row_bytes_ + 1) * static_cast<std::size_t>(height) + kSlack),
        first_above_(row_bytes_ + kSlack),
        finished_(row_bytes_ + kSlack) {}

  bool decode(Bytes record, std::uint8_t* picture) override {
    if (!read_chunks(record) || !inflater_.inflate_whole(stream_, filtered_.data(), filtered_.size() - kSlack)) return false;
    const std::uint8_t* above = first_above_.data();
    const std::uint8_t* from = filtered_.data();
    for (int y = 0; y < height_; ++y, from += row_bytes_ + 1) {
      // The pixels above are read four bytes at a time: from a copy with slack, not from the picture's end.
      if (!undo_filter(from[0], from + 1, above, picture + y * row_bytes_, row_bytes_)) return false;
      std::memcpy(finished_.data(), picture + y * row_bytes_, row_bytes_);
      above = finished_.data();
    }
    return true;
  }

 private:
  // Checks header and chunks; leaves the compressed bytes in stream_.
  bool read_chunks(Bytes record) {
    if (record.size() < sizeof kSignature || std::memcmp(record.data(), kSignature, sizeof kSignature) != 0) return false;
    Bytes rest = record.subspan(sizeof kSignature);
    stream_ = {};
    joined_.clear();
    for (bool first = true;; first = false) {
      if (rest.size() < 12) return false;
      const std::size_t size = big_endian(rest.data());
      if (size > rest.size() - 12) return false;
      const std::uint8_t* const name = rest.data() + 4;
      const Bytes content = rest.subspan(8, size);
      if (crc32(name, size + 4) != big_endian(rest.data() + 8 + size)) return false;
      rest = rest.subspan(size + 12);
      if (std::memcmp(name, "IHDR", 4) == 0) {
        if (!first || !is_ours(content)) return false;
      } else if (first) {
        return false;
      } else if (std::memcmp(name, "IDAT", 4) == 0) {
        append(content);
      } else if (std::memcmp(name, "IEND", 4) == 0) {
        return !stream_.empty();
      } else if ((name[0] & 0x20) == 0) {
        return false;  // a critical chunk that we do not know, such as a palette
      }
    }
  }

  bool is_ours(Bytes header) const {
    static constexpr std::uint8_t kPlain[5] = {8, 2, 0, 0, 0};  // bits, RGB, deflate, adaptive filters, not interlaced
    return header.size() == 13 && big_endian(header.data()) == static_cast<std::uint32_t>(width_) &&
           big_endian(header.data() + 4) == static_cast<std::uint32_t>(height_) && std::memcmp(header.data() + 8, kPlain, 5) == 0;
  }

  void append(Bytes content) {
    if (stream_.empty() && joined_.empty()) {
      stream_ = content;  // nearly always the only one
      return;
    }
    if (joined_.empty()) joined_.assign(stream_.begin(), stream_.end());
    joined_.insert(joined_.end(), content.begin(), content.end());
    stream_ = joined_;
  }

  int width_, height_;
  std::size_t row_bytes_;
  std::vector<std::uint8_t> filtered_, first_above_, finished_, joined_;
  Bytes stream_;
  Inflater inflater_;
};

}  // namespace

std::unique_ptr<Decoder::Codec> make_png_codec(int width, int height) { return std::make_unique<PngCodec>(width, height); }
#else
std::unique_ptr<Decoder::Codec> make_png_codec(int, int) { return nullptr; }
#endif

}  // namespace pairclip::loader
