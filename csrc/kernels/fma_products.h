// Both matrix products in float32, with fused multiply-add; bfloat16 inputs are widened, which is exact.
//
// A micro-kernel keeps a block of results in registers: kRows x 2 vectors, 14 x 32 with AVX-512. Each step along the depth
// loads two vectors of the bank and broadcasts one number of each query, so 28 multiply-adds share 16 loads and the
// multipliers are the bottleneck, as they should be. Packing makes every load of the inner loop contiguous and pads the
// edges, so there are no edge kernels: which rows happen to lie side by side never changes a row's arithmetic.
//
// A score is one chain of multiply-adds from the first number to the last. The same pair has the same score bit for bit
// wherever it is computed, and equal captions tie exactly.
#pragma once

#include "kernels/mixing.h"
#include "kernels/packing.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

struct FmaProducts {
#if defined(__AVX512F__)
  static constexpr int kRows = 14;  // 28 sums, two vectors of the bank and a broadcast: 31 of 32 registers
#elif defined(__AVX2__)
  static constexpr int kRows = 6;  // 12 + 2 + 1 of 16
#else
  static constexpr int kRows = 4;  // without a fused instruction the product needs a register too
#endif
  static constexpr int kWidth = 2 * kLanes;
  static constexpr int kTile = 128;  // keys and values of a tile of depth 512: 512 KB, within a server's second-level cache
  static constexpr const char* kPrecision = "float32 multiply-add";

  static constexpr int panels(int depth) { return (depth + kWidth - 1) / kWidth; }
  static std::size_t query_bytes(int depth) { return sizeof(float) * kRows * depth; }
  static std::size_t key_bytes(int depth) { return sizeof(float) * kTile * depth; }
  static std::size_t value_bytes(int depth) { return sizeof(float) * kTile * kWidth * panels(depth); }

  // Layout [depth][kRows].
  static bool pack_queries(const void* const* rows, int count, Element type, int depth, void* out) {
    float* to = static_cast<float*>(out);
    float part[64];
    for (int r = 0; r < kRows; ++r)
      for (int first = 0; first < depth; first += 64) {
        read<64>(r < count ? rows[r] : nullptr, type, first, depth, part);
        const int end = depth - first < 64 ? depth - first : 64;
        for (int k = 0; k < end; ++k) to[(first + k) * kRows + r] = part[k];
      }
    return true;
  }

  // Layout [kTile / kWidth][depth][kWidth].
  static bool pack_keys(const void* const* rows, int count, Element type, int depth, void* out) {
    alignas(64) float part[kWidth][kLanes], turned[kLanes][kWidth];
    for (int panel = 0; panel * kWidth < count; ++panel) {
      float* to = static_cast<float*>(out) + static_cast<std::size_t>(panel) * depth * kWidth;
      for (int first = 0; first < depth; first += kLanes) {
        const int captions = count - panel * kWidth;
        for (int j = 0; j < kWidth; ++j)
          read<kLanes>(j < captions ? rows[panel * kWidth + j] : nullptr, type, first, depth, part[j]);
        const bool whole = first + kLanes <= depth;
        transpose(part, kLanes, kWidth, kLanes, whole ? to + first * kWidth : turned[0], kWidth);
        if (!whole) std::memcpy(to + first * kWidth, turned, sizeof(float) * kWidth * (depth - first));
      }
    }
    return true;
  }

  // Layout [panels(depth)][kTile][kWidth].
  static bool pack_values(const void* const* rows, int count, Element type, int depth, void* out) {
    for (int j = 0; j < count; ++j)
      for (int panel = 0; panel < panels(depth); ++panel)
        read<kWidth>(rows[j], type, panel * kWidth, depth,
                     static_cast<float*>(out) + (static_cast<std::size_t>(panel) * kTile + j) * kWidth);
    return true;
  }

  static void begin() {}
  static void end() {}

  // The streams come from the second-level cache, and the processor's own prefetching falls behind them at every page and
  // tile: asking for the line of 16 steps ahead was worth 10 % to 20 %. (Past the end it asks for nothing that hurts.)
  static void fetch_ahead(const float* stream) {
    for (int line = 0; line < kWidth; line += 16) __builtin_prefetch(stream + 16 * kWidth + line);
  }

  static void scores(const Step& step) {
    for (int first = 0; first < step.captions; first += kWidth) {
      const float* keys = static_cast<const float*>(step.keys) + static_cast<std::size_t>(first) * step.depth;
      const float* queries = static_cast<const float*>(step.queries);
      Vec sums[kRows][2] = {};
      for (int k = 0; k < step.depth; ++k) {
        const Vec left = load(keys), right = load(keys + kLanes);
        fetch_ahead(keys);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec query = set(queries[r]);
          sums[r][0] = fma(query, left, sums[r][0]);
          sums[r][1] = fma(query, right, sums[r][1]);
        }
        queries += kRows;
        keys += kWidth;
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        store(step.scores + r * kTile + first, sums[r][0]);
        store(step.scores + r * kTile + first + kLanes, sums[r][1]);
      }
    }
  }

  static void mix(const Step& step, const SoftmaxRow* rows, float* mean) {
    for (int panel = 0; panel < panels(step.depth); ++panel) {
      const float* values = static_cast<const float*>(step.values) + static_cast<std::size_t>(panel) * kTile * kWidth;
      const float* weights = step.scores;
      Vec sums[kRows][2] = {};
      for (int j = 0; j < step.captions; ++j) {
        const Vec left = load(values), right = load(values + kLanes);
        fetch_ahead(values);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec weight = set(weights[r * kTile]);
          sums[r][0] = fma(weight, left, sums[r][0]);
          sums[r][1] = fma(weight, right, sums[r][1]);
        }
        ++weights;
        values += kWidth;
      }
      alignas(64) float found[kRows][kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        store(found[r], sums[r][0]);
        store(found[r] + kLanes, sums[r][1]);
      }
      add_mixed(step, rows, found, panel * kWidth, mean);
    }
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
