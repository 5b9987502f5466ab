// Compiled once per instruction set: pooling, batch normalisation and activation, picture by picture, a row of 32 channels at a
// time.
#include "core/variant.h"

#include "conv/engine.h"
#include "conv/weight_gradient.h"
#include "tower/activation.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {
namespace {

using namespace tower::PAIRCLIP_VARIANT;

typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));

// Two float32 sums per channel of a picture's numbers, which go to float64 when the picture ends.
constexpr int kMostChannels = 256;  // at a time: 2 KB of sums

template <class Add>
void sum_pictures(const Layer& layer, Range pictures, double* sums, Add add) {
  for (int picture = pictures.begin; picture < pictures.end; ++picture)
    for (int first = 0; first < layer.channels; first += kMostChannels) {
      const int end = first + kMostChannels < layer.channels ? first + kMostChannels : layer.channels;
      alignas(64) float found[2][kMostChannels] = {};
      add(picture, Range{first, end}, found);
      for (int which = 0; which < 2; ++which)
        for (int c = first; c < end; ++c) sums[which * layer.channels + c] += found[which][c - first];
    }
}

inline void add_to(float* sums, Vec numbers) { store(sums, load(sums) + numbers); }

// Kept numbers of a picture from a place on, in pieces of 32 channels: body(pixel, channel).
template <class Body>
void each_block(const Layer& layer, Range channels, Body body) {
  const int pixels = layer.rows() * layer.columns();
  for (int pixel = 0; pixel < pixels; ++pixel)
    for (int c = channels.begin; c < channels.end; c += kBlock) body(pixel, c);
}

// The first of the four pixels of a pooled one, in numbers from the picture's begin.
inline std::int64_t corner(const Layer& layer, int pixel) {
  const int row = pixel / layer.columns(), column = pixel % layer.columns();
  return (std::int64_t{2} * row * layer.width + 2 * column) * layer.channels;
}

// The largest of 2x2 pixels and which of the four it was: the first of equals, and NaN if there is one.
inline Row pooled(const bf16* from, std::int64_t right, std::int64_t below, std::uint8_t* places) {
  Row best = read_row(from);
  Ints which[kVecs] = {};
  const bf16* others[] = {from + right, from + below, from + below + right};
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Row other = read_row(others[i]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Ints larger = (other.part[v] > best.part[v]) | (other.part[v] != other.part[v]);
      best.part[v] = choose(larger, other.part[v], best.part[v]);
      which[v] = larger ? set(i + 1) : which[v];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    const Bytes bytes = __builtin_convertvector(which[v], Bytes);
    std::memcpy(places + v * kLanes, &bytes, sizeof bytes);
  }
  return best;
}

void gather(const Layer& layer, const Forward& pass, const float* shift, Range pictures, double* sums) {
  const std::int64_t right = layer.channels, below = right * layer.width;
  sum_pictures(layer, pictures, sums, [&](int picture, Range channels, auto& found) {
    const bf16* from = pass.pixels + picture * layer.picture();
    const std::int64_t begin = picture * layer.kept_picture();
    each_block(layer, channels, [&](int pixel, int c) {
      const std::int64_t at = begin + std::int64_t{pixel} * layer.channels + c;
      Row row;
      if (layer.pooled) {
        row = pooled(from + corner(layer, pixel) + c, right, below, pass.places + at);
        write_row(pass.kept + at, row);
      } else {
        row = read_row(from + std::int64_t{pixel} * layer.channels + c);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int lane = c + v * kLanes;
        const Vec off = row.part[v] - load(shift + lane);
        add_to(found[0] + lane - channels.begin, off);
        float* squares = found[1] + lane - channels.begin;
        store(squares, fma(off, off, load(squares)));
      }
    });
  });
}

// (x - mean) and what the activation makes of it when normalised.
struct Normed {
  Vec off;
  Activated activated;
};

template <class Activate>
inline Normed normed(Vec kept, const Channels& channels, int lane, const Activate& activate) {
  const Vec off = kept - load(channels.mean + lane);
  return {off, activate(fma(off, load(channels.scale + lane), load(channels.bias + lane)))};
}

void apply(const Layer& layer, const Forward& pass, const Channels& channels, Range pictures) {
  with_activation(layer.activation, [&](auto activate) {
    for (int picture = pictures.begin; picture < pictures.end; ++picture)
      each_block(layer, {0, layer.channels}, [&](int pixel, int c) {
        const std::int64_t at = picture * layer.kept_picture() + std::int64_t{pixel} * layer.channels + c;
        const Row kept = read_row(pass.kept + at);
        write_row(pass.result + at,
                  each([&](int v) { return normed(kept.part[v], channels, c + v * kLanes, activate).activated.value; }));
      });
  });
}

void gather_slopes(const Layer& layer, const Backward& pass, const Channels& channels, Range pictures, double* sums) {
  with_activation(layer.activation, [&](auto activate) {
    sum_pictures(layer, pictures, sums, [&](int picture, Range some, auto& found) {
      each_block(layer, some, [&](int pixel, int c) {
        const std::int64_t at = picture * layer.kept_picture() + std::int64_t{pixel} * layer.channels + c;
        const Row kept = read_row(pass.kept + at), gradient = read_row(pass.gradient + at);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
          const int lane = c + v * kLanes;
          const Normed here = normed(kept.part[v], channels, lane, activate);
          const Vec slope = gradient.part[v] * here.activated.slope;
          add_to(found[0] + lane - some.begin, slope);
          float* products = found[1] + lane - some.begin;
          store(products, fma(slope, here.off, load(products)));
        }
      });
    });
  });
}

// Writes a pooled pixel's gradient to the largest of the four, and zeros to the others.
inline void unpool(const Row& gradient, const std::uint8_t* places, bf16* to, std::int64_t right, std::int64_t below) {
  Ints which[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    Bytes bytes;
    std::memcpy(&bytes, places + v * kLanes, sizeof bytes);
    which[v] = __builtin_convertvector(bytes, Ints);
  }
  bf16* const four[] = {to, to + right, to + below, to + below + right};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) write_row(four[i], each([&](int v) { return choose(which[v] == i, gradient.part[v], Vec{}); }));
}

// Zeros where pooling left an odd last row or column out.
void clear_rest(const Layer& layer, bf16* picture) {
  const std::int64_t row = std::int64_t{layer.width} * layer.channels;
  if (layer.width % 2 != 0)
    for (int y = 0; y < layer.height; ++y)
      std::memset(picture + (y + 1) * row - layer.channels, 0, layer.channels * sizeof(bf16));
  if (layer.height % 2 != 0) std::memset(picture + (layer.height - 1) * row, 0, row * sizeof(bf16));
}

void spread(const Layer& layer, const Backward& pass, const Channels& channels, Range pictures) {
  const std::int64_t right = layer.channels, below = right * layer.width;
  with_activation(layer.activation, [&](auto activate) {
    for (int picture = pictures.begin; picture < pictures.end; ++picture) {
      bf16* const to = pass.result + picture * layer.picture();
      if (layer.pooled) clear_rest(layer, to);
      each_block(layer, {0, layer.channels}, [&](int pixel, int c) {
        const std::int64_t inside = std::int64_t{pixel} * layer.channels + c, at = picture * layer.kept_picture() + inside;
        const Row kept = read_row(pass.kept + at), gradient = read_row(pass.gradient + at);
        const Row found = each([&](int v) {
          const int lane = c + v * kLanes;
          const Normed here = normed(kept.part[v], channels, lane, activate);
          const Vec slope = fma(gradient.part[v], here.activated.slope, -load(pass.mean_slope + lane));
          return load(channels.scale + lane) * fma(-here.off, load(pass.covariance + lane), slope);
        });
        if (layer.pooled) {
          unpool(found, pass.places + at, to + corner(layer, pixel) + c, right, below);
        } else {
          write_row(to + inside, found);
        }
      });
    }
  });
}

void weight_gradient(const Filters& call, Range pictures, char* scratch, float* sums) {
  WeightGradientTask(call, scratch).run(pictures, sums);
}

constexpr Engine kEngine{.isa = PAIRCLIP_VARIANT_NAME,
                         .gather = gather,
                         .apply = apply,
                         .gather_slopes = gather_slopes,
                         .spread = spread,
                         .weight_gradient = weight_gradient};

}  // namespace

const Engine& engine() { return kEngine; }

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
