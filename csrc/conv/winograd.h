// A 3x3 convolution that keeps the size, in float32, by minimal filtering: a quarter of the multiplications.
//
// Results come in tiles of 4x4 pixels. Such a tile depends on 6x6 pixels; both the pixels and the filter are transformed so that
// the convolution becomes 36 products, where the definition has 144, and the transformations are additions. Over channels and
// tiles the products are 36 matrix products, which `FmaProducts` computes.
//
//   result   = A' [(G filter G') * (B' pixels B)] A                 input gradient: the same, with the filters turned about
//   gradient = G' [sum of (B' pixels B) * (A gradient A')] G        of the filter
//
// Blocks of tiles keep what is transformed within the caches. A tile's row of channels is an odd number of cache lines long, so
// that neither tiles nor the 36 planes fall into the same few places of a cache. Rounding errors are larger than by the
// definition, some 1e-6 of the result, for the transformations' largest factors are 4, 5 and 8.
//
// Source: A. Lavin and S. Gray, "Fast algorithms for convolutional neural networks" (2016), F(4x4, 3x3).
#pragma once

#include "conv/pictures.h"
#include "kernels/fma_products.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

constexpr int kRows = FmaProducts::kRows, kWidth = FmaProducts::kWidth;
constexpr int kPlanes = Winograd::kPlanes;

// Six numbers by B', four by A, and back: six by A' and by G'; three by G. `in` and `out` go in steps of their own.
inline void by_b(const Vec* in, int step, Vec* out, int out_step) {
  const Vec even = in[4 * step] - 4.0f * in[2 * step], odd = in[3 * step] - 4.0f * in[step];
  const Vec outer = in[4 * step] - in[2 * step], inner = 2.0f * (in[3 * step] - in[step]);
  out[0] = 4.0f * in[0] - 5.0f * in[2 * step] + in[4 * step];
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  out[3 * out_step] = outer + inner;
  out[4 * out_step] = outer - inner;
  out[5 * out_step] = 4.0f * in[step] - 5.0f * in[3 * step] + in[5 * step];
}

inline void by_a(const Vec* in, int step, Vec* out, int out_step) {
  const Vec even = in[0] + in[2 * step], odd = in[step] + in[3 * step];
  const Vec outer = in[0] + 4.0f * in[2 * step], inner = 2.0f * in[step] + 8.0f * in[3 * step];
  out[0] = in[0];
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  out[3 * out_step] = outer + inner;
  out[4 * out_step] = outer - inner;
  out[5 * out_step] = in[3 * step];
}

inline void back_by_a(const Vec* in, int step, Vec* out, int out_step) {
  const Vec sum = in[step] + in[2 * step], difference = in[step] - in[2 * step];
  const Vec outer = in[3 * step] + in[4 * step], inner = in[3 * step] - in[4 * step];
  out[0] = in[0] + sum + outer;
  out[out_step] = difference + 2.0f * inner;
  out[2 * out_step] = sum + 4.0f * outer;
  out[3 * out_step] = difference + 8.0f * inner + in[5 * step];
}

inline void by_g(const Vec* in, int step, Vec* out, int out_step) {
  const Vec sum = (in[0] + in[2 * step]) * (-1.0f / 6), middle = in[step] * (1.0f / 6);
  const Vec outer = in[0] * (1.0f / 24) + in[2 * step] * (1.0f / 6), inner = in[step] * (1.0f / 12);
  out[0] = in[0] * 0.25f;
  out[out_step] = sum - middle;
  out[2 * out_step] = sum + middle;
  out[3 * out_step] = outer + inner;
  out[4 * out_step] = outer - inner;
  out[5 * out_step] = in[2 * step];
}

inline void back_by_g(const Vec* in, int step, Vec* out, int out_step) {
  const Vec sum = (in[step] + in[2 * step]) * (-1.0f / 6), outer = in[3 * step] + in[4 * step];
  out[0] = in[0] * 0.25f + sum + outer * (1.0f / 24);
  out[out_step] = (in[2 * step] - in[step]) * (1.0f / 6) + (in[3 * step] - in[4 * step]) * (1.0f / 12);
  out[2 * out_step] = sum + outer * (1.0f / 6) + in[5 * step];
}

// Columns, then rows, of a square of `From` to one of `To` numbers.
template <int From, int To, class Along>
[[gnu::always_inline]] inline void both_ways(const Vec* in, Vec* out, Along along) {
  Vec half[From * To];
#pragma GCC unroll 6
  for (int i = 0; i < From; ++i) along(in + i, From, half + i, From);
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) along(half + i * From, 1, out + i * To, 1);
}

class WinogradTask {
 public:
  WinogradTask(const Winograd& call, char* scratch) : call_(call), scratch_(reinterpret_cast<float*>(scratch)) {}

  // Results of some tiles: [tiles] = [tiles x inputs] @ [inputs x outputs] in each plane, transformed back.
  void convolve(const float* pixels, const float* filters, Range tiles, float* result) const {
    float *const inputs = scratch_, *const products = inputs + kPlanes * plane(call_.input_row());
    const int count = tiles.end - tiles.begin, row = call_.output_row();
    for (int t = 0; t < count; ++t) transform_pixels(pixels, tiles.begin + t, inputs + std::int64_t{t} * call_.input_row());
    for (int f = 0; f < kPlanes; ++f)
      for (int panel = 0; panel < call_.panels(); ++panel) {
        const float* const right = filters + (std::int64_t{f} * call_.panels() + panel) * call_.inputs * kWidth;
        for (int t = 0; t < count; t += kRows) {
          Vec sums[kRows][2] = {};
          FmaProducts::multiply(inputs + f * plane(call_.input_row()) + std::int64_t{t} * call_.input_row(), 1, call_.input_row(),
                                right, call_.inputs, sums);
          float* const to = products + f * plane(row) + std::int64_t{t} * row + panel * kWidth;
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            store(to + std::int64_t{r} * row, sums[r][0]);
            store(to + std::int64_t{r} * row + kLanes, sums[r][1]);
          }
        }
      }
    for (int t = 0; t < count; ++t) write_tile(products + std::int64_t{t} * row, tiles.begin + t, result);
  }

  // The filters' gradient, summed over some tiles: sums [panels][inputs][9][kWidth].
  void add_gradients(const float* pixels, const float* gradient, Range tiles, float* sums) const {
    float* const inputs = scratch_;
    float* const gradients = inputs + kPlanes * plane(call_.input_row());
    float* const products = gradients + kPlanes * plane(call_.panels() * kWidth);
    std::memset(inputs, 0, kPlanes * plane(call_.input_row()) * sizeof(float));  // channels beyond the last count as zero
    for (int first = tiles.begin; first < tiles.end; first += call_.block_tiles()) {
      const int count = tiles.end - first < call_.block_tiles() ? tiles.end - first : call_.block_tiles();
      for (int t = 0; t < count; ++t) {
        transform_pixels(pixels, first + t, inputs + std::int64_t{t} * call_.input_row());
        transform_gradient(gradient, first + t, gradients + std::int64_t{t} * kWidth);
      }
      float* to = products;
      for (int f = 0; f < kPlanes; ++f)
        for (int panel = 0; panel < call_.panels(); ++panel)
          for (int i = 0; i < call_.inputs; i += kRows, to += kRows * kWidth) {
            Vec found[kRows][2] = {};
            if (first != tiles.begin)
#pragma GCC unroll 16
              for (int r = 0; r < kRows; ++r) {
                found[r][0] = load(to + r * kWidth);
                found[r][1] = load(to + r * kWidth + kLanes);
              }
            FmaProducts::multiply(inputs + f * plane(call_.input_row()) + i, call_.input_row(), 1,
                                  gradients + f * plane(call_.panels() * kWidth) + panel * plane(kWidth), count, found);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
              store(to + r * kWidth, found[r][0]);
              store(to + r * kWidth + kLanes, found[r][1]);
            }
          }
    }
    gradients_back(products, sums);
  }

  // Of the outputs of a panel: [36][panels][inputs][kWidth]. Turned about, for the input gradient, `weight` is
  // [inputs, 3, 3, outputs] instead of [outputs, 3, 3, inputs].
  static void transform_filters(const Winograd& call, const float* weight, bool turned, int panel, float* out) {
    alignas(64) float taps[9][kWidth] = {};
    const int there = call.outputs - panel * kWidth < kWidth ? call.outputs - panel * kWidth : kWidth;
    for (int i = 0; i < call.inputs; ++i) {
      for (int o = 0; o < there; ++o) {
        const int output = panel * kWidth + o;
        for (int k = 0; k < 9; ++k)
          taps[k][o] = turned ? weight[(std::int64_t{i} * 9 + 8 - k) * call.outputs + output]
                              : weight[(std::int64_t{output} * 9 + k) * call.inputs + i];
      }
      for (int half = 0; half < kWidth; half += kLanes) {
        Vec filter[9], found[kPlanes];
        for (int k = 0; k < 9; ++k) filter[k] = load(taps[k] + half);
        both_ways<3, 6>(filter, found, by_g);
        for (int f = 0; f < kPlanes; ++f)
          store(out + ((std::int64_t{f} * call.panels() + panel) * call.inputs + i) * kWidth + half, found[f]);
      }
    }
  }

 private:
  // Numbers of a plane of the tiles of a block.
  std::int64_t plane(int row) const { return std::int64_t{call_.block_tiles()} * row; }

  struct Place {
    int picture, y, x;  // of the first pixel
  };
  Place place(int tile) const {
    const int inside = tile % call_.tiles_of_picture();
    return {tile / call_.tiles_of_picture(), inside / call_.tile_columns() * 4, inside % call_.tile_columns() * 4};
  }

  // Pointers to the first channels of `Side` x `Side` pixels around a tile; null where the picture has none.
  template <int Side>
  void find(const float* pictures, int channels, int tile, const float* (&found)[Side * Side]) const {
    const Place first = place(tile);
    constexpr int kBefore = (Side - 4) / 2;
    for (int k = 0; k < Side * Side; ++k) {
      const int y = first.y + k / Side - kBefore, x = first.x + k % Side - kBefore;
      const bool inside = y >= 0 && y < call_.height && x >= 0 && x < call_.width;
      found[k] = inside ? pictures + ((std::int64_t{first.picture} * call_.height + y) * call_.width + x) * channels : nullptr;
    }
  }

  // Channels from `c` on of pixels that `find` found. The processor does not see squares coming: those of the next tile but one
  // are asked for.
  template <int Count>
  [[gnu::always_inline]] void read(const float* const (&at)[Count], int c, int channels, Vec (&in)[Count]) const {
    if (channels - c >= kLanes) {
#pragma GCC unroll 6
      for (int k = 0; k < Count; ++k) {
        in[k] = Vec{};
        if (at[k] == nullptr) continue;
        in[k] = load(at[k] + c);
        __builtin_prefetch(at[k] + c + 8 * channels);
      }
    } else {
      for (int k = 0; k < Count; ++k) in[k] = at[k] == nullptr ? Vec{} : load_first(at[k] + c, channels - c);
    }
  }

  // Transformed, to the same place of each plane.
  [[gnu::always_inline]] static void write(const Vec (&pixels)[36], float* to, std::int64_t step) {
    Vec out[kPlanes];
    both_ways<6, 6>(pixels, out, by_b);
#pragma GCC unroll 6
    for (int f = 0; f < kPlanes; ++f, to += step) store(to, out[f]);
  }
  [[gnu::always_inline]] static void write(const Vec (&gradient)[16], float* to, std::int64_t step) {
    Vec out[kPlanes];
    both_ways<4, 6>(gradient, out, by_a);
#pragma GCC unroll 6
    for (int f = 0; f < kPlanes; ++f, to += step) store(to, out[f]);
  }

  void transform_pixels(const float* pixels, int tile, float* to) const {
    const float* at[36];
    find<6>(pixels, call_.inputs, tile, at);
    const std::int64_t step = plane(call_.input_row());
    for (int c = 0; c < call_.inputs; c += kLanes, to += kLanes) {
      Vec in[36];
      read(at, c, call_.inputs, in);
      write(in, to, step);
    }
  }

  void transform_gradient(const float* gradient, int tile, float* to) const {
    const float* at[16];
    find<4>(gradient, call_.outputs, tile, at);
    const std::int64_t step = plane(call_.panels() * kWidth);
    for (int c = 0; c < call_.panels() * kWidth; c += kLanes) {
      Vec in[16];
      read(at, c, call_.outputs, in);
      write(in, to + c / kWidth * plane(kWidth) + c % kWidth, step);
    }
  }

  void write_tile(const float* products, int tile, float* result) const {
    const Place first = place(tile);
    float* const to =
        result + ((std::int64_t{first.picture} * call_.height + first.y) * call_.width + first.x) * std::int64_t{call_.outputs};
    const int rows = call_.height - first.y < 4 ? call_.height - first.y : 4;
    const int columns = call_.width - first.x < 4 ? call_.width - first.x : 4;
    const std::int64_t step = plane(call_.output_row());
    for (int c = 0; c < call_.outputs; c += kLanes) {
      Vec in[kPlanes], out[16];
      const float* from = products + c;
#pragma GCC unroll 6
      for (int f = 0; f < kPlanes; ++f, from += step) in[f] = load(from);
      both_ways<6, 4>(in, out, back_by_a);
      for (int y = 0; y < rows; ++y)
        for (int x = 0; x < columns; ++x)
          store_first(to + (std::int64_t{y} * call_.width + x) * call_.outputs + c, out[y * 4 + x], call_.outputs - c);
    }
  }

  // From products [36][panels][blocks of kRows inputs][kRows][kWidth].
  void gradients_back(const float* products, float* sums) const {
    const std::int64_t of_panel = std::int64_t{(call_.inputs + kRows - 1) / kRows * kRows} * kWidth;
    for (int panel = 0; panel < call_.panels(); ++panel)
      for (int i = 0; i < call_.inputs; ++i, sums += 9 * kWidth)
        for (int half = 0; half < kWidth; half += kLanes) {
          Vec in[kPlanes], out[9];
          for (int f = 0; f < kPlanes; ++f)
            in[f] = load(products + (std::int64_t{f} * call_.panels() + panel) * of_panel + std::int64_t{i} * kWidth + half);
          both_ways<6, 3>(in, out, back_by_g);
          for (int k = 0; k < 9; ++k) store(sums + k * kWidth + half, out[k]);
        }
  }

  const Winograd& call_;
  float* scratch_;
};

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
