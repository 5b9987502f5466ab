// Pooling, batch normalisation and activation, picture by picture, a row of 32 channels at a time (Ioffe and Szegedy 2015).
#pragma once

#include "conv/pictures.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

// Kept numbers of a picture from a place on, in pieces of 32 channels: body(pixel, channel).
template <class Body>
void each_block(const Layer& layer, Range channels, Body body) {
  const int pixels = layer.rows() * layer.columns();
  for (int pixel = 0; pixel < pixels; ++pixel)
    for (int c = channels.begin; c < channels.end; c += kBlock) body(pixel, c);
}

template <class T>
void gather(const Layer& layer, const Forward<T>& pass, const float* shift, Range pictures, double* sums) {
  sum_pictures(layer, pictures, sums, [&](int picture, Range channels, auto& found) {
    const T* from = pass.pixels + picture * layer.picture();
    const std::int64_t begin = picture * layer.kept_picture();
    each_block(layer, channels, [&](int pixel, int c) {
      const std::int64_t at = begin + std::int64_t{pixel} * layer.channels + c;
      Row row;
      if (layer.pooled) {
        const T* const first = from + corner(layer, pixel) + c;
        row = pooled(layer, pass.places + at, [&](std::int64_t distance) { return read_on(first + distance); });
        write_row(pass.kept + at, row);
      } else {
        row = read_on(from + std::int64_t{pixel} * layer.channels + c);
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

template <class T>
void apply(const Layer& layer, const Forward<T>& pass, const Channels& channels, Range pictures) {
  with_activation<T>(layer.activation, [&](auto activate) {
    for (int picture = pictures.begin; picture < pictures.end; ++picture)
      each_block(layer, {0, layer.channels}, [&](int pixel, int c) {
        const std::int64_t at = picture * layer.kept_picture() + std::int64_t{pixel} * layer.channels + c;
        const Row kept = read_on(pass.kept + at);
        write_row(pass.result + at,
                  each([&](int v) { return normed(kept.part[v], channels, c + v * kLanes, activate).activated.value; }));
      });
  });
}

template <class T>
void gather_slopes(const Layer& layer, const Backward<T>& pass, const Channels& channels, Range pictures, double* sums) {
  with_activation<T>(layer.activation, [&](auto activate) {
    sum_pictures(layer, pictures, sums, [&](int picture, Range some, auto& found) {
      each_block(layer, some, [&](int pixel, int c) {
        const std::int64_t at = picture * layer.kept_picture() + std::int64_t{pixel} * layer.channels + c;
        const Row kept = read_on(pass.kept + at), gradient = read_on(pass.gradient + at);
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

template <class T>
void spread(const Layer& layer, const Backward<T>& pass, const Channels& channels, Range pictures) {
  with_activation<T>(layer.activation, [&](auto activate) {
    for (int picture = pictures.begin; picture < pictures.end; ++picture) {
      T* const to = pass.result + picture * layer.picture();
      if (layer.pooled) clear_rest(layer, to);
      each_block(layer, {0, layer.channels}, [&](int pixel, int c) {
        const std::int64_t inside = std::int64_t{pixel} * layer.channels + c, at = picture * layer.kept_picture() + inside;
        const Row kept = read_on(pass.kept + at), gradient = read_on(pass.gradient + at);
        const Row found = each([&](int v) {
          const int lane = c + v * kLanes;
          const Normed here = normed(kept.part[v], channels, lane, activate);
          const Vec slope = fma(gradient.part[v], here.activated.slope, -load(pass.mean_slope + lane));
          return load(channels.scale + lane) * fma(-here.off, load(pass.covariance + lane), slope);
        });
        if (layer.pooled) {
          T* const first = to + corner(layer, pixel) + c;
          unpool(layer, found, pass.places + at,
                 [&](std::int64_t distance, const Row& row) { write_row(first + distance, row); });
        } else {
          write_row(to + inside, found);
        }
      });
    }
  });
}

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
