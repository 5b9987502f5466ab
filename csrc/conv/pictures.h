// What the normalisations share: sums over pictures, and the maximum of 2x2 pixels with its way back.
#pragma once

#include "conv/engine.h"
#include "tower/activation.h"
#include "tower/rows.h"

namespace pairclip::conv::PAIRCLIP_VARIANT {

using namespace tower::PAIRCLIP_VARIANT;

typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));

// Pictures are read from begin to end, two rows at a time. Asking for what comes 4 KB later made a pass over more than the caches
// hold three times as fast on a Zen 5 (throw-away program).
template <class T>
void fetch_ahead(const T* from) {
  __builtin_prefetch(from + 4096 / sizeof(T));
}
template <class T>
Row read_on(const T* from) {
  fetch_ahead(from);
  return read_row(from);
}

// The first `live` numbers of a vector, and zeros; any number.
inline Vec load_first(const float* from, int live) {
  if (live >= kLanes) return load(from);
  Vec found{};
  if (live > 0) std::memcpy(&found, from, live * sizeof(float));
  return found;
}

inline void store_first(float* to, Vec numbers, int live) {
  if (live >= kLanes) return store(to, numbers);
  if (live > 0) std::memcpy(to, &numbers, live * sizeof(float));
}

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

// The first of the four pixels of a pooled one, in numbers from the picture's begin.
inline std::int64_t corner(const Layer& layer, int pixel) {
  const int row = pixel / layer.columns(), column = pixel % layer.columns();
  return (std::int64_t{2} * row * layer.width + 2 * column) * layer.channels;
}

// The largest of 2x2 pixels and which of the four it was: the first of equals, and NaN if there is one.
// read(distance) gives the row of the pixel that lies so many numbers after the first.
template <class Read>
inline Row pooled(const Layer& layer, std::uint8_t* places, const Read& read) {
  Row best = read(0);
  Ints which[kVecs] = {};
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) {
    const Row other = read(layer.distance(i));
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Ints larger = (other.part[v] > best.part[v]) | (other.part[v] != other.part[v]);
      best.part[v] = choose(larger, other.part[v], best.part[v]);
      which[v] = larger ? set(i) : which[v];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    const Bytes bytes = __builtin_convertvector(which[v], Bytes);
    std::memcpy(places + v * kLanes, &bytes, sizeof bytes);
  }
  return best;
}

// Writes a pooled pixel's gradient to the largest of the four, and zeros to the others.
// write(distance, row) as above.
template <class Write>
inline void unpool(const Layer& layer, const Row& gradient, const std::uint8_t* places, const Write& write) {
  Ints which[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    Bytes bytes;
    std::memcpy(&bytes, places + v * kLanes, sizeof bytes);
    which[v] = __builtin_convertvector(bytes, Ints);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    write(layer.distance(i), each([&](int v) { return choose(which[v] == i, gradient.part[v], Vec{}); }));
}

// Zeros where pooling left an odd last row or column out.
template <class T>
void clear_rest(const Layer& layer, T* picture) {
  const std::int64_t row = std::int64_t{layer.width} * layer.channels;
  if (layer.width % 2 != 0)
    for (int y = 0; y < layer.height; ++y) std::memset(picture + (y + 1) * row - layer.channels, 0, layer.channels * sizeof(T));
  if (layer.height % 2 != 0) std::memset(picture + (layer.height - 1) * row, 0, row * sizeof(T));
}

}  // namespace pairclip::conv::PAIRCLIP_VARIANT
