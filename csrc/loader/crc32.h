// CRC-32 as in PNG, gzip and zlib (polynomial 0xEDB88320, reflected).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pairclip::loader {

// The checksum of `size` bytes. About 20 bytes per nanosecond where the processor multiplies without carries (PCLMULQDQ),
// more where it does so in wide registers, a tenth elsewhere.
std::uint32_t crc32(const std::uint8_t* data, std::size_t size);

// The same without special instructions, on any machine.
std::uint32_t crc32_portable(const std::uint8_t* data, std::size_t size);

}  // namespace pairclip::loader
