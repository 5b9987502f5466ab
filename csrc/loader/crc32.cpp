#include "loader/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pairclip::loader {
namespace {

constexpr std::uint32_t kPolynomial = 0xEDB88320;
constexpr int kSlices = 8;  // bytes per step

using Tables = std::array<std::array<std::uint32_t, 256>, kSlices>;

// tables[k][b]: what byte b contributes when k bytes follow it in the step.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? kPolynomial : 0);
    tables[0][byte] = value;
  }
  for (int k = 1; k < kSlices; ++k)
    for (int byte = 0; byte < 256; ++byte) tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 255];
  return tables;
}

constexpr Tables kTables = make_tables();

// Continues `state` (the inverted checksum so far).
std::uint32_t update(std::uint32_t state, const std::uint8_t* data, std::size_t size) {
  for (; size >= kSlices; data += kSlices, size -= kSlices) {
    std::uint64_t bytes;
    std::memcpy(&bytes, data, sizeof bytes);
    bytes ^= state;
    state = 0;
    for (int k = 0; k < kSlices; ++k) state ^= kTables[kSlices - 1 - k][bytes >> (8 * k) & 255];
  }
  for (; size > 0; ++data, --size) state = state >> 8 ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#if defined(__x86_64__)
// Folding (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel, 2009): 64 bytes at a time are
// replaced by a congruent block 64 bytes further on, in the end by 16 bytes, which the tables finish. The constants are
// x^(512 +- 32) and x^(128 +- 32) (below: x^(2048 +- 32)) modulo the polynomial, bit-reflected.
constexpr std::size_t kFoldFrom = 64;

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i block, __m128i by, __m128i onto) {
  const __m128i low = _mm_clmulepi64_si128(block, by, 0x00), high = _mm_clmulepi64_si128(block, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

__attribute__((target("pclmul,sse4.1"))) std::uint32_t update_folding(std::uint32_t state, const std::uint8_t* data,
                                                                      std::size_t size) {
  const auto at = [&](std::size_t offset) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + offset)); };
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  __m128i a = _mm_xor_si128(at(0), _mm_cvtsi32_si128(static_cast<int>(state))), b = at(16), c = at(32), d = at(48);
  data += 64;
  for (size -= 64; size >= 64; data += 64, size -= 64) {
    a = fold(a, by_64, at(0));
    b = fold(b, by_64, at(16));
    c = fold(c, by_64, at(32));
    d = fold(d, by_64, at(48));
  }
  a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
  for (; size >= 16; data += 16, size -= 16) a = fold(a, by_16, at(0));
  std::uint8_t rest[16];
  std::memcpy(rest, &a, sizeof rest);
  return update(update(0, rest, sizeof rest), data, size);
}

// The same with registers four times as wide: 256 bytes at a time. What is left is a block that stands for all of them.
constexpr std::size_t kFoldWideFrom = 1024;

__attribute__((target("avx512f,vpclmulqdq"))) inline __m512i fold_wide(__m512i block, __m512i by, const std::uint8_t* onto) {
  constexpr int kExclusiveOrOfThree = 0x96;
  const __m512i low = _mm512_clmulepi64_epi128(block, by, 0x00), high = _mm512_clmulepi64_epi128(block, by, 0x11);
  return _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(onto), kExclusiveOrOfThree);
}

__attribute__((target("avx512f,vpclmulqdq"))) std::uint32_t update_folding_wide(std::uint32_t state, const std::uint8_t* data,
                                                                                std::size_t size) {
  constexpr int kRegisters = 4;
  constexpr std::size_t kWidth = 64, kStep = kRegisters * kWidth;
  const __m512i by_256 = _mm512_set4_epi64(0x01322d1430, 0x011542778a, 0x01322d1430, 0x011542778a);
  __m512i blocks[kRegisters];
  for (int k = 0; k < kRegisters; ++k) blocks[k] = _mm512_loadu_si512(data + k * kWidth);
  blocks[0] = _mm512_xor_si512(blocks[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  data += kStep;
  for (size -= kStep; size >= kStep; data += kStep, size -= kStep)
    for (int k = 0; k < kRegisters; ++k) blocks[k] = fold_wide(blocks[k], by_256, data + k * kWidth);
  std::uint8_t folded[kStep];
  std::memcpy(folded, blocks, sizeof folded);
  _mm256_zeroupper();  // GCC 12 leaves it out here, and the code below would drag the wide registers along
  const std::uint32_t so_far = update_folding(0, folded, sizeof folded);
  return size >= kFoldFrom ? update_folding(so_far, data, size) : update(so_far, data, size);
}

enum class Folding { none, narrow, wide };

Folding folding_here() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("pclmul") || !__builtin_cpu_supports("sse4.1")) return Folding::none;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq") ? Folding::wide : Folding::narrow;
}
#endif

}  // namespace

std::uint32_t crc32_portable(const std::uint8_t* data, std::size_t size) { return ~update(~0u, data, size); }

std::uint32_t crc32(const std::uint8_t* data, std::size_t size) {
#if defined(__x86_64__)
  static const Folding folding = folding_here();
  if (folding == Folding::wide && size >= kFoldWideFrom) return ~update_folding_wide(~0u, data, size);
  if (folding != Folding::none && size >= kFoldFrom) return ~update_folding(~0u, data, size);
#endif
  return crc32_portable(data, size);
}

}  // namespace pairclip::loader
