// Both matrix products on tiles of bfloat16, summed in float32.
//
// bfloat16 inputs (Parts = 1) are multiplied as they are. A float32 input (Parts = 3) is split into three bfloat16, each the
// rounded rest of the ones before: 24 bits, all there are. Of the nine products of two such sums the six larger are taken;
// what is dropped is below 2^-24 of a product, as float32's own rounding is. Two parts and three products would be twice as
// fast, but their error of 2^-17 shows (a hundred times float32's for short vectors). Six products at 16 times the rate of
// float32 multiply-adds, by the manual, are still worth it.
//
// The softmax weights are split as the inputs are. One part is off by up to 2^-9, but the mean is divided by the sum of the
// rounded weights: what is left of the error is that of the differences between captions, which goes with the gradient to 0.
#pragma once

#include "kernels/mixing.h"
#include "kernels/tiles.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

constexpr int kVectors = 32 / kLanes;

// The nearest number with the mantissa of a bfloat16, ties away from zero.
inline Vec rounded(Vec x) { return floats_of((bits_of(x) + 0x8000) & ~0xffff); }

// 32 numbers as Parts rows of bfloat16, row `part` at place(part). False if one is not finite, or so large that its first part
// is not.
template <int Parts, class Place>
[[gnu::always_inline]] inline bool split(Vec (&numbers)[kVectors], const Place& place) {
  Ints special{};
  for (int part = 0; part < Parts - 1; ++part) {
    Vec heads[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      heads[v] = rounded(numbers[v]);
      numbers[v] -= heads[v];
      if (part == 0) special |= (bits_of(heads[v]) & 0x7f800000) == 0x7f800000;
    }
    narrow(heads, place(part));
  }
  narrow(numbers, place(Parts - 1));
  return Parts == 1 || bits(special) == 0;
}

// Numbers [first, first + 32) of a row in parts, as `split`; bfloat16 is taken as it is.
template <int Parts, class Place>
bool read_parts(const void* row, Element type, int first, int depth, const Place& place) {
  if (Parts == 1 && type == Element::bfloat16 && row != nullptr && depth - first >= 32) {
    std::memcpy(place(0), static_cast<const std::uint16_t*>(row) + first, 64);
    return true;
  }
  alignas(64) float numbers[32];
  read<32>(row, type, first, depth, numbers);
  Vec vectors[kVectors];
  for (int v = 0; v < kVectors; ++v) vectors[v] = load(numbers + v * kLanes);
  return split<Parts>(vectors, place);
}

// Factors in memory: [part][step of 32 in depth][half] tiles; `part_bytes` from one part to the next.
struct Factor {
  const char* tiles;
  std::size_t part_bytes;

  const char* at(int part, int step) const { return tiles + part * part_bytes + static_cast<std::size_t>(step) * 2 * kTileBytes; }
};

// The products of parts that are taken, each sharing a factor with the one before: that is loaded already, and loads are as
// scarce as products.
struct Pair {
  int left, right;
};
template <int Parts>
constexpr Pair kPairs[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}, {0, 0}};
template <>
constexpr Pair kPairs<1>[] = {{0, 0}};

// Adds these products to the 32 x 32 sums; `meanwhile()` is work for the vector unit.
template <int Parts, class Meanwhile>
[[gnu::always_inline]] inline void multiply(Tiles& tiles, Factor left, Factor right, int steps, const Meanwhile& meanwhile) {
  for (int step = 0; step < steps; ++step) {
    Pair loaded{-1, -1};
#pragma GCC unroll 6
    for (const Pair pair : kPairs<Parts>) {
      if (pair.right != loaded.right) tiles.right(right.at(pair.right, step));
      if (pair.left != loaded.left) tiles.left(left.at(pair.left, step));
      tiles.multiply();
      loaded = pair;
    }
    meanwhile();
  }
}

template <int Parts>
struct TileProducts {
  static constexpr int kRows = 32;
  static constexpr int kTile = 256;  // of depth 512: 256 KB a part
  static constexpr int kWidth = 32;
  static constexpr const char* kPrecision = Parts == 1 ? Tiles::kPrecision : "six products of bfloat16 tiles (24 bits)";

  static int steps(int depth) { return (depth + 31) / 32; }
  static std::size_t part_bytes(int depth) { return 2 * kTileBytes * static_cast<std::size_t>(steps(depth)); }
  static std::size_t query_bytes(int depth) { return Parts * part_bytes(depth); }
  static std::size_t key_bytes(int depth) { return kTile / kWidth * Parts * part_bytes(depth); }
  static std::size_t value_bytes(int depth) { return steps(depth) * Parts * part_bytes(kTile); }

  // Layout [part][step][half][16 rows][32].
  static bool pack_queries(const void* const* rows, int count, Element type, int depth, void* out) {
    bool representable = true;
    for (int r = 0; r < kRows; ++r)
      for (int step = 0; step < steps(depth); ++step)
        representable &= read_parts<Parts>(r < count ? rows[r] : nullptr, type, step * 32, depth, [&](int part) {
          return reinterpret_cast<std::uint16_t*>(static_cast<char*>(out) + part * part_bytes(depth) + step * 2 * kTileBytes) +
                 r * 32;
        });
    return representable;
  }

  // Layout [kTile / 32] of [part][step][half][16 pairs of depth][16 captions][2]: pairs are words, and words are transposed.
  static bool pack_keys(const void* const* rows, int count, Element type, int depth, void* out) {
    alignas(64) std::uint16_t parts[kWidth][Parts][32];
    bool representable = true;
    for (int first = 0; first < count; first += kWidth) {
      char* panel = static_cast<char*>(out) + first / kWidth * Parts * part_bytes(depth);
      for (int step = 0; step < steps(depth); ++step) {
        for (int j = 0; j < kWidth; ++j) {
          representable &= read_parts<Parts>(first + j < count ? rows[first + j] : nullptr, type, step * 32, depth,
                                             [&](int part) { return parts[j][part]; });
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
    alignas(64) std::uint16_t parts[2][Parts][32];
    bool representable = true;
    for (int j = 0; j < (count + 31) / 32 * 32; j += 2)
      for (int column = 0; column < steps(depth); ++column) {
        for (int member = 0; member < 2; ++member) {
          representable &= read_parts<Parts>(j + member < count ? rows[j + member] : nullptr, type, column * 32, depth,
                                             [&](int part) { return parts[member][part]; });
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

  // The weights of a step, packed as queries are.
  class Weights {
   public:
    explicit Weights(const Step& step) {
      if (step.rows < kRows) std::memset(tiles_, 0, sizeof tiles_);
    }
    // Leaves in `found` what is stored.
    void set(int row, int first, Vec (&found)[kVectors]) {
      if constexpr (Parts == 1) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) found[v] = rounded(found[v]);
        return narrow(found, numbers(0, row, first));
      }
      Vec rest[kVectors];
      for (int v = 0; v < kVectors; ++v) rest[v] = found[v];
      split<Parts>(rest, [&](int part) { return numbers(part, row, first); });
    }
    // Those of the row before caption `end`.
    void shrink(int row, int end, float factor) {
      for (int first = 0; first < end; first += kWidth) {
        Vec sums[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) {
          for (int part = Parts - 1; part >= 0; --part) sums[v] += widened(numbers(part, row, first) + v * kLanes);
          sums[v] *= factor;
        }
        set(row, first, sums);
      }
    }
    Factor factor() const { return {tiles_, part_bytes(kTile)}; }

   private:
    std::uint16_t* numbers(int part, int row, int first) {
      return reinterpret_cast<std::uint16_t*>(tiles_ + part * part_bytes(kTile) + first / kWidth * 2 * kTileBytes) + row * 32;
    }

    alignas(64) char tiles_[Parts * 2 * kTileBytes * (kTile / 32)];
  };

  // Calls use(part) for a few rows of a panel at a time, while the next panel is multiplied.
  template <class Use>
  [[gnu::always_inline]] static void each_panel(const Step& step, const Use& use) {
    alignas(64) float scores[2][kRows * kWidth];
    const Factor queries{static_cast<const char*>(step.queries), part_bytes(step.depth)};
    const int depth_steps = steps(step.depth), rows_at_once = (step.rows + depth_steps - 1) / depth_steps;
    for (int first = 0; first < step.captions; first += kWidth) {
      const Factor keys{static_cast<const char*>(step.keys) + first / kWidth * Parts * part_bytes(step.depth),
                        part_bytes(step.depth)};
      const float* last = scores[first / kWidth % 2 ^ 1];
      int row = first == 0 ? step.rows : 0;
      Tiles tiles;
      tiles.clear();
      multiply<Parts>(tiles, queries, keys, depth_steps, [&]() __attribute__((always_inline)) {
        const int end = row + rows_at_once < step.rows ? row + rows_at_once : step.rows;
        if (row < end) use(Part{last, first - kWidth, row, end});
        row = end;
      });
      tiles.store(scores[first / kWidth % 2], kWidth);
    }
    const int first = (step.captions - 1) / kWidth * kWidth;
    use(Part{scores[first / kWidth % 2], first, 0, step.rows});
  }

  static void mix(const Step& step, const Weights& weights, Mean<kRows, kWidth> mean) {
    for (int column = 0; column < steps(step.depth); ++column) {
      const Factor values{static_cast<const char*>(step.values) + column * Parts * part_bytes(kTile), part_bytes(kTile)};
      mean.panel(column * kWidth, [&](float* to, std::ptrdiff_t stride) {
        Tiles tiles;
        tiles.load(to, stride);
        multiply<Parts>(tiles, weights.factor(), values, steps(step.captions), [] {});
        tiles.store(to, stride);
      });
    }
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
