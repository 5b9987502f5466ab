// The weight gradient of a 3x3 convolution in float32, by multiply-adds.
//
// A block of sums stays in registers while all pixels of a chunk go by: some output channels, the three neighbours in one row of
// the filter, a vector of input channels (4 x 3 x 8 with AVX2). A pixel costs three loads of inputs, of which its successor
// needs two again, and one broadcast per output channel, shared by three neighbours each: the multipliers are what it waits for.
//
// Both sides are packed so that the loop reads on: inputs as [vector of channels][pixel with a border of zeros][channel], the
// gradient as [block of channels][pixel][channel], without a border, since only inputs are looked for beyond the edge.
//
// Measured on a Zen 3, the loop alone: 97 of some 110 GFLOP/s, for rows of 3 pixels and of 31.
#pragma once

#include "conv/engine.h"
#include "kernels/isa.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

using namespace kernels::PAIRCLIP_VARIANT;

class FloatWeightGradientTask {
 public:
#if defined(__AVX512F__)
  static constexpr int kOutputs = 8;  // 24 sums, three vectors of inputs and a broadcast: 28 of 32 registers
#elif defined(__AVX2__)
  static constexpr int kOutputs = 4;  // 12 + 3 + 1 of 16
#else
  static constexpr int kOutputs = 2;
#endif
  static constexpr int kInputs = kLanes;

  FloatWeightGradientTask(const FloatFilters& call, char* scratch) : call_(call), inputs_(reinterpret_cast<float*>(scratch)) {}

  void run(Range pictures, float* sums) {
    bool first = true;
    for (int picture = pictures.begin; picture < pictures.end; picture += call_.chunk_pictures())
      for (int row = 0; row < call_.height; row += call_.chunk_rows()) {
        pictures_ = smaller(call_.chunk_pictures(), pictures.end - picture);
        rows_ = smaller(call_.chunk_rows(), call_.height - row);
        gradients_ = inputs_ + framed() * call_.input_blocks() * kInputs;
        pack_inputs(picture, row);
        pack_gradients(picture, row);
        add(sums, first);
        first = false;
      }
  }

 private:
  static int smaller(int a, int b) { return a < b ? a : b; }
  // Pixels of a chunk, with the border and without it.
  std::int64_t framed() const { return std::int64_t{pictures_} * (rows_ + 2) * (call_.width + 2); }
  std::int64_t pixels() const { return std::int64_t{pictures_} * rows_ * call_.width; }

  // `channels` numbers of each pixel of a row, `live` of them, side by side; zeros beyond those.
  template <int channels>
  void copy_row(float* to, const float* from, int stride, int live) const {
    for (int x = 0; x < call_.width; ++x, to += channels, from += stride) {
      if (live >= channels) {
        std::memcpy(to, from, channels * sizeof(float));  // a constant size: one vector move
      } else {
        std::memset(to, 0, channels * sizeof(float));
        std::memcpy(to, from, live * sizeof(float));
      }
    }
  }

  void pack_inputs(int picture, int row) const {
    const std::int64_t line = std::int64_t{call_.width + 2} * kInputs;
    float* to = inputs_;
    for (int p = picture; p < picture + pictures_; ++p)
      for (int y = row - 1; y <= row + rows_; ++y, to += line) {
        const float* from = call_.pixels + (std::int64_t{p} * call_.height + y) * call_.width * call_.inputs;
        for (int block = 0; block < call_.input_blocks(); ++block) {
          float* out = to + block * framed() * kInputs;
          if (y < 0 || y >= call_.height) {
            std::memset(out, 0, line * sizeof(float));
            continue;
          }
          std::memset(out, 0, kInputs * sizeof(float));
          copy_row<kInputs>(out + kInputs, from + block * kInputs, call_.inputs, call_.inputs - block * kInputs);
          std::memset(out + line - kInputs, 0, kInputs * sizeof(float));
        }
      }
  }

  void pack_gradients(int picture, int row) const {
    const std::int64_t line = std::int64_t{call_.width} * kOutputs;
    float* to = gradients_;
    for (int p = picture; p < picture + pictures_; ++p)
      for (int y = row; y < row + rows_; ++y, to += line) {
        const float* from = call_.gradient + (std::int64_t{p} * call_.height + y) * call_.width * call_.outputs;
        for (int block = 0; block < call_.output_blocks(); ++block)
          copy_row<kOutputs>(to + block * pixels() * kOutputs, from + block * kOutputs, call_.outputs,
                             call_.outputs - block * kOutputs);
      }
  }

  // Inputs of a block stay in the first-level cache while the gradient's blocks go by.
  void add(float* sums, bool first) const {
    for (int i = 0; i < call_.input_blocks(); ++i)
      for (int o = 0; o < call_.output_blocks(); ++o)
        for (int line = 0; line < 3; ++line, sums += kOutputs * 3 * kLanes)
          add_block(inputs_ + i * framed() * kInputs + std::int64_t{line} * (call_.width + 2) * kInputs,
                    gradients_ + o * pixels() * kOutputs, sums, first);
  }

  void add_block(const float* inputs, const float* gradient, float* sums, bool first) const {
    Vec found[kOutputs][3];
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) found[o][k] = Vec{};
    for (int at = 0; at < kOutputs * 3 * kLanes; at += 16) __builtin_prefetch(sums + at, 1);
    const std::int64_t next = pixels() * kOutputs;
    for (int p = 0; p < pictures_; ++p, inputs += std::int64_t{2} * (call_.width + 2) * kInputs)
      for (int y = 0; y < rows_; ++y, inputs += 2 * kInputs)
        for (int x = 0; x < call_.width; ++x, inputs += kInputs, gradient += kOutputs) {
          const Vec left = load(inputs), middle = load(inputs + kInputs), right = load(inputs + 2 * kInputs);
          __builtin_prefetch(gradient + next);  // the block that comes after this one
#pragma GCC unroll 8
          for (int o = 0; o < kOutputs; ++o) {
            const Vec number = set(gradient[o]);
            found[o][0] = fma(number, left, found[o][0]);
            found[o][1] = fma(number, middle, found[o][1]);
            found[o][2] = fma(number, right, found[o][2]);
          }
        }
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        float* const to = sums + (o * 3 + k) * kLanes;
        store(to, first ? found[o][k] : load(to) + found[o][k]);
      }
  }

  const FloatFilters& call_;
  float *inputs_, *gradients_ = nullptr;
  int pictures_ = 0, rows_ = 0;  // of the chunk
};

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
