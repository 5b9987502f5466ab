// Philox4x32-10: random numbers as a pure function of key and counter; word for word data/philox.py.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cstdint>

namespace pairclip::loader {

using PhiloxBlock = std::array<std::uint32_t, 4>;

inline PhiloxBlock philox(PhiloxBlock counter, std::uint64_t key) {
  std::uint32_t low_key = static_cast<std::uint32_t>(key), high_key = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p = std::uint64_t{0xD2511F53} * counter[0], q = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(q >> 32) ^ counter[1] ^ low_key, static_cast<std::uint32_t>(q),
               static_cast<std::uint32_t>(p >> 32) ^ counter[3] ^ high_key, static_cast<std::uint32_t>(p)};
    low_key += 0x9E3779B9;
    high_key += 0xBB67AE85;
  }
  return counter;
}

// The upper 24 bits of a word as a number in [0, 1).
inline double unit_interval(std::uint32_t word) { return static_cast<double>(word >> 8) * 0x1p-24; }

// A word as an integer in 0..count-1.
inline std::int64_t bounded(std::uint32_t word, std::uint64_t count) { return static_cast<std::int64_t>(word * count >> 32); }

}  // namespace pairclip::loader
