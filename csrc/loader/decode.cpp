#include "loader/decode.h"

namespace pairclip::loader {

const char* decoder_library(Encoding encoding) {
  if (encoding == Encoding::png) {
#if defined(PAIRCLIP_LIBDEFLATE)
    return "libdeflate";
#elif defined(PAIRCLIP_ZLIB)
    return "zlib";
#else
    return nullptr;
#endif
  }
#if defined(PAIRCLIP_LIBJPEG)
  return "libjpeg";
#else
  return nullptr;
#endif
}

Decoder::Decoder(Encoding encoding, int width, int height)
    : codec_(encoding == Encoding::png ? make_png_codec(width, height) : make_jpeg_codec(width, height)) {}

Decoder::~Decoder() = default;

bool Decoder::decode(std::span<const std::uint8_t> record, std::uint8_t* picture) {
  return codec_ != nullptr && codec_->decode(record, picture);
}

}  // namespace pairclip::loader
