// The weight gradient of a 3x3 convolution in bfloat16, by tile products.
//
// Pictures are laid out one after the other with a zero after each row and a row of zeros after each picture, which serve as the
// border of what follows too. Then each of the nine neighbours of a pixel lies at a fixed distance, and the gradient of a
// filter's place is one product over all pixels: gradients transposed times inputs from that distance on. Inputs are packed as
// pairs of pixels, 64 bytes a pair, so that a tile may begin at any pair; once from even and once from odd pixels on, for the
// distances of either kind. No neighbourhood is ever written down.
#pragma once

#include "tower/rows.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

using namespace tower::PAIRCLIP_VARIANT;
using tower::kBlockNumbers;

class TileWeightGradientTask {
 public:
  TileWeightGradientTask(const TileFilters& call, char* scratch)
      : call_(call), pixels_(call.chunk_pixels()), border_(call.border()) {
    rows_ = reinterpret_cast<bf16*>(scratch);
    gradients_ = rows_ + std::int64_t{pixels_ + 2 * border_} * kBlock;
    inputs_ = gradients_ + std::int64_t{call.output_blocks()} * pixels_ * kBlock;
  }

  void run(Range pictures, float* sums) {
    Tiles::begin();
    const int most = call_.chunk_pictures();
    for (int first = pictures.begin; first < pictures.end; first += most) {
      const Range chunk{first, first + most < pictures.end ? first + most : pictures.end};
      pack(chunk);
      add(sums, first == pictures.begin);
    }
    Tiles::end();
  }

 private:
  // The number of packed pairs of a phase, and where those of a block's first 16 channels begin.
  std::int64_t pairs() const { return pixels_ / 2 + border_; }
  bf16* paired(int phase, int block) const {
    return inputs_ + (std::int64_t{phase} * call_.input_blocks() + block) * 2 * pairs() * kBlock;
  }

  // 32 channels of some pictures, with their borders, from `lead` zero pixels on; what is left of the rows is zero.
  void lay_out(const bf16* from, int channels, int block, Range pictures, int lead, std::int64_t count) const {
    std::memset(rows_, 0, count * kBlock * sizeof(bf16));
    const int first = block * kBlock, width = channels - first < kBlock ? channels - first : kBlock;
    bf16* to = rows_ + std::int64_t{lead} * kBlock;
    for (int picture = pictures.begin; picture < pictures.end; ++picture, to += std::int64_t{call_.width + 1} * kBlock)
      for (int y = 0; y < call_.height; ++y, to += kBlock) {
        const bf16* pixel = from + (std::int64_t{picture} * call_.height + y) * call_.width * channels + first;
        for (int x = 0; x < call_.width; ++x, pixel += channels, to += kBlock) {
          if (width == kBlock) {
            std::memcpy(to, pixel, kBlock * sizeof(bf16));  // a constant size: one vector move
          } else {
            std::memcpy(to, pixel, width * sizeof(bf16));
          }
        }
      }
  }

  void pack(Range pictures) const {
    for (int block = 0; block < call_.output_blocks(); ++block) {
      lay_out(call_.gradient, call_.outputs, block, pictures, 0, pixels_);
      for (int strip = 0; strip < pixels_ / kBlock; ++strip)
        pack_transposed(rows_ + strip * kBlockNumbers,
                        gradients_ + (std::int64_t{block} * pixels_ / kBlock + strip) * kBlockNumbers, nullptr);
    }
    for (int block = 0; block < call_.input_blocks(); ++block) {
      lay_out(call_.pixels, call_.inputs, block, pictures, border_, pixels_ + 2 * border_);
      for (int phase = 0; phase < 2; ++phase) {
        bf16 *low = paired(phase, block), *high = low + pairs() * kBlock;
        for (int i = 0; i < pairs() - phase; ++i) pair_rows(rows_ + phase * kBlock, low, high, i);
      }
    }
  }

  void add(float* sums, bool first) const {
    const int strips = pixels_ / kBlock;
    for (int place = 0; place < 9; ++place) {
      const int distance = border_ + (place / 3 - 1) * (call_.width + 1) + place % 3 - 1;
      for (int j = 0; j < call_.input_blocks(); ++j) {
        const bf16* right = paired(distance % 2, j) + std::int64_t{distance / 2} * kBlock;
        for (int i = 0; i < call_.output_blocks(); ++i, sums += kBlockNumbers) {
          const bf16* left = gradients_ + std::int64_t{i} * pixels_ * kBlock;
          Tiles tiles;
          if (first) {
            tiles.clear();
          } else {
            tiles.load(sums, kBlock);
          }
          for (int k = 0; k < strips; ++k)
            tiles.multiply(left + k * kBlockNumbers, right + k * kBlockNumbers / 2, false, pairs() * kBlock * sizeof(bf16));
          tiles.store(sums, kBlock);
        }
      }
    }
  }

  const TileFilters& call_;
  int pixels_, border_;
  bf16 *rows_, *gradients_, *inputs_;
};

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
