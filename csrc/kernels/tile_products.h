// Both matrix products on tiles of bfloat16, summed in float32.
//
// bfloat16 inputs (Parts = 1) are multiplied as they are. A float32 input (Parts = 3) is split into three bfloat16, each the
// rounded rest of the ones before: 24 bits, all there are. Of the nine products of two such sums the six larger are taken;
// what is dropped is below 2^-24 of a product, as float32's own rounding is. Two parts and three products would be twice as
// fast, but their error of 2^-17 shows (a hundred times float32's for short vectors). Six products at 16 times the rate of
// float32 multiply-adds, by the manual, are still worth it. The softmax weights of bfloat16 inputs have two parts: rounding
// them to one would be the largest error of the gradient.
#pragma once

#include "kernels/mixing.h"
#include "kernels/tiles.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

// 32 numbers as Parts rows of bfloat16. False if one is not finite, or so large that its first part is not.
template <int Parts>
bool split(const float* numbers, std::uint16_t (*parts)[32]) {
  unsigned special = 0;
  for (int i = 0; i < 32; ++i) {
    float rest = numbers[i];
    for (int part = 0; part < Parts; ++part) {
      parts[part][i] = narrowed(rest);
      rest -= widened(parts[part][i]);
    }
    special |= (parts[0][i] & 0x7f80) == 0x7f80;
  }
  return Parts == 1 || special == 0;
}

// Factors in memory: [part][step of 32 in depth][half] tiles; `part_bytes` from one part to the next.
struct Factor {
  const char* tiles;
  std::size_t part_bytes;

  const char* at(int part, int step) const { return tiles + part * part_bytes + static_cast<std::size_t>(step) * 2 * kTileBytes; }
};

// The 32 x 32 sums of the products of all parts but the smallest.
template <int LeftParts, int RightParts>
void multiply(Factor left, Factor right, int steps) {
  constexpr int kOrders = LeftParts > RightParts ? LeftParts : RightParts;
  Tiles::clear();
  for (int step = 0; step < steps; ++step)
    for (int i = 0; i < LeftParts; ++i) {
      Tiles::left(left.at(i, step));
      for (int j = 0; j < RightParts && i + j < kOrders; ++j) {
        Tiles::right(right.at(j, step));
        Tiles::multiply();
      }
    }
}

template <int Parts>
struct TileProducts {
  static constexpr int kRows = 32;
  static constexpr int kTile = 256;  // steps over the captions cost a store of the sums; 256 rows of depth 512 are 256 KB a part
  static constexpr int kWidth = 32;
  static constexpr int kWeightParts = Parts == 1 ? 2 : Parts;
  static constexpr const char* kPrecision =
      Parts == 1 ? "bfloat16 tiles, float32 sums" : "six products of bfloat16 tiles (24 bits)";

  static int steps(int depth) { return (depth + 31) / 32; }
  static std::size_t part_bytes(int depth) { return 2 * kTileBytes * static_cast<std::size_t>(steps(depth)); }
  static std::size_t query_bytes(int depth) { return Parts * part_bytes(depth); }
  static std::size_t key_bytes(int depth) { return kTile / kWidth * Parts * part_bytes(depth); }
  static std::size_t value_bytes(int depth) { return steps(depth) * Parts * part_bytes(kTile); }

  // Layout [part][step][half][16 rows][32].
  static bool pack_queries(const void* const* rows, int count, Element type, int depth, void* out) {
    alignas(64) float numbers[32];
    std::uint16_t parts[Parts][32];
    bool representable = true;
    for (int step = 0; step < steps(depth); ++step)
      for (int r = 0; r < kRows; ++r) {
        read<32>(r < count ? rows[r] : nullptr, type, step * 32, depth, numbers);
        representable &= split<Parts>(numbers, parts);
        for (int part = 0; part < Parts; ++part)
          std::memcpy(static_cast<char*>(out) + part * part_bytes(depth) + step * 2 * kTileBytes + r * sizeof parts[0],
                      parts[part], sizeof parts[0]);
      }
    return representable;
  }

  // Layout [kTile / 32] of [part][step][half][16 pairs of depth][16 captions][2]: pairs are words, and words are transposed.
  static bool pack_keys(const void* const* rows, int count, Element type, int depth, void* out) {
    alignas(64) float numbers[32];
    alignas(64) std::uint16_t parts[kWidth][Parts][32];
    bool representable = true;
    for (int first = 0; first < count; first += kWidth) {
      char* panel = static_cast<char*>(out) + first / kWidth * Parts * part_bytes(depth);
      for (int step = 0; step < steps(depth); ++step) {
        for (int j = 0; j < kWidth; ++j) {
          read<32>(first + j < count ? rows[first + j] : nullptr, type, step * 32, depth, numbers);
          representable &= split<Parts>(numbers, parts[j]);
        }
        for (int part = 0; part < Parts; ++part)
          for (int half = 0; half < 2; ++half)
            transpose(parts[16 * half][part], 16 * Parts, 16, 16,
                      panel + part * part_bytes(depth) + (step * 2 + half) * kTileBytes, 16);
      }
    }
    return representable;
  }

  // Layout [steps(depth)] of [part][kTile / 32][half][16 pairs of captions][16 of depth][2].
  static bool pack_values(const void* const* rows, int count, Element type, int depth, void* out) {
    alignas(64) float numbers[32];
    std::uint16_t parts[2][Parts][32];
    bool representable = true;
    for (int j = 0; j < (count + 31) / 32 * 32; j += 2)
      for (int column = 0; column < steps(depth); ++column) {
        for (int member = 0; member < 2; ++member) {
          read<32>(j + member < count ? rows[j + member] : nullptr, type, column * 32, depth, numbers);
          representable &= split<Parts>(numbers, parts[member]);
        }
        for (int part = 0; part < Parts; ++part) {
          char* pairs =
              static_cast<char*>(out) + (column * Parts + part) * part_bytes(kTile) + j / 32 * 2 * kTileBytes + j % 32 / 2 * 64;
          std::uint32_t words[32];
          for (int i = 0; i < 32; ++i) words[i] = parts[0][part][i] | static_cast<std::uint32_t>(parts[1][part][i]) << 16;
          std::memcpy(pairs, words, 64);
          std::memcpy(pairs + kTileBytes, words + 16, 64);
        }
      }
    return representable;
  }

  static void begin() { Tiles::begin(); }
  static void end() { Tiles::end(); }

  static void scores(const Step& step) {
    const Factor queries{static_cast<const char*>(step.queries), part_bytes(step.depth)};
    for (int first = 0; first < step.captions; first += kWidth) {
      const Factor keys{static_cast<const char*>(step.keys) + first / kWidth * Parts * part_bytes(step.depth),
                        part_bytes(step.depth)};
      multiply<Parts, Parts>(queries, keys, steps(step.depth));
      Tiles::store(step.scores + first, kTile);
    }
  }

  static void mix(const Step& step, const SoftmaxRow* rows, float* mean) {
    alignas(64) char weights[kWeightParts * 2 * kTileBytes * (kTile / 32)];
    pack_weights(step, weights);
    for (int column = 0; column < steps(step.depth); ++column) {
      const Factor values{static_cast<const char*>(step.values) + column * Parts * part_bytes(kTile), part_bytes(kTile)};
      multiply<kWeightParts, Parts>({weights, part_bytes(kTile)}, values, steps(step.captions));
      alignas(64) float found[kRows][kWidth];
      Tiles::store(found[0], kWidth);
      add_mixed(step, rows, found, column * kWidth, mean);
    }
  }

 private:
  // As queries are packed, from scores that have become weights.
  static void pack_weights(const Step& step, char* out) {
    alignas(64) float numbers[32];
    std::uint16_t parts[kWeightParts][32];
    for (int first = 0; first < step.captions; first += 32)
      for (int r = 0; r < kRows; ++r) {
        read<32>(r < step.rows ? step.scores + r * kTile : nullptr, Element::float32, first, step.captions, numbers);
        split<kWeightParts>(numbers, parts);
        for (int part = 0; part < kWeightParts; ++part)
          std::memcpy(out + part * part_bytes(kTile) + first * 2 * kTileBytes / 32 + r * sizeof parts[0], parts[part],
                      sizeof parts[0]);
      }
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
