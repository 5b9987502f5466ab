// Decoders of compressed records: only the plain kinds that `shard` writes. Whatever else comes is refused here, without a
// reason, and judged by the Python side, whose word on a damaged record is the same for every backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace pairclip::loader {

enum class Encoding { png, jpeg };

// The library that this build decodes an encoding with; null if it has none.
const char* decoder_library(Encoding encoding);

// For one thread, and any number of records of one size.
class Decoder {
 public:
  Decoder(Encoding encoding, int width, int height);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // RGB rows into `picture` (3 * width * height bytes). False if the record is damaged, of another size or kind, or if there
  // is no decoder; the picture is undefined then.
  bool decode(std::span<const std::uint8_t> record, std::uint8_t* picture);

  class Codec;

 private:
  std::unique_ptr<Codec> codec_;
};

class Decoder::Codec {
 public:
  virtual ~Codec() = default;
  virtual bool decode(std::span<const std::uint8_t> record, std::uint8_t* picture) = 0;
};

// Null where the library is not there.
std::unique_ptr<Decoder::Codec> make_png_codec(int width, int height);
std::unique_ptr<Decoder::Codec> make_jpeg_codec(int width, int height);

}  // namespace pairclip::loader
