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

  // The weights of a step, as the second product reads them.
  class Weights {
   public:
    explicit Weights(const Step& step) {
      if (step.rows < kRows) std::memset(numbers_, 0, sizeof numbers_);
    }
    void set(int row, int first, Vec (&found)[2]) {
      store(numbers_[row] + first, found[0]);
      store(numbers_[row] + first + kLanes, found[1]);
    }
    // Those of the row before caption `end`.
    void shrink(int row, int end, float factor) {
      for (int j = 0; j < end; ++j) numbers_[row][j] *= factor;
    }
    const float* at(int caption) const { return numbers_[0] + caption; }

   private:
    alignas(64) float numbers_[kRows][kTile];
  };

  // Calls use(part) for all rows of each panel.
  template <class Use>
  [[gnu::always_inline]] static void each_panel(const Step& step, const Use& use) {
    alignas(64) float scores[kRows * kWidth];
    for (int first = 0; first < step.captions; first += kWidth) {
      const float* keys = static_cast<const float*>(step.keys) + static_cast<std::size_t>(first) * step.depth;
      Vec sums[kRows][2] = {};
      multiply(static_cast<const float*>(step.queries), kRows, 1, keys, step.depth, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        store(scores + r * kWidth, sums[r][0]);
        store(scores + r * kWidth + kLanes, sums[r][1]);
      }
      use(Part{scores, first, 0, step.rows});
    }
  }

  static void mix(const Step& step, const Weights& weights, Mean<kRows, kWidth> mean) {
    for (int panel = 0; panel < panels(step.depth); ++panel) {
      const float* values = static_cast<const float*>(step.values) + static_cast<std::size_t>(panel) * kTile * kWidth;
      mean.panel(panel * kWidth, [&](float* to, std::ptrdiff_t stride) {
        Vec sums[kRows][2];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          sums[r][0] = load(to + r * stride);
          sums[r][1] = load(to + r * stride + kLanes);
        }
        multiply(weights.at(0), 1, kTile, values, step.captions, sums);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          store(to + r * stride, sums[r][0]);
          store(to + r * stride + kLanes, sums[r][1]);
        }
      });
    }
  }

  // sums += left @ right: number k of row r lies at left[k * along + r * across], the right factor's two vectors at k * kWidth.
  [[gnu::always_inline]] static void multiply(const float* left, int along, int across, const float* right, int depth,
                                              Vec (&sums)[kRows][2]) {
    for (int k = 0; k < depth; ++k) {
      const Vec first = load(right), second = load(right + kLanes);
      fetch_ahead(right);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec number = set(left[r * across]);
        sums[r][0] = fma(number, first, sums[r][0]);
        sums[r][1] = fma(number, second, sums[r][1]);
      }
      left += along;
      right += kWidth;
    }
  }
};

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
