// The k best of a stream of scores, exact and stable, without a heap.
//
// A row keeps a buffer of several times k candidates in order of index. A score below the k-th best seen so far is dropped by
// one comparison; the others are appended, a vector at a time. A full buffer is cut back to its k best: bisection finds the
// k-th largest (at most 32 counting passes over a few KB), then one pass keeps what is above it and the first of those equal
// to it. Scores are kept as integers of the same order, NaN above all as torch sorts it, and both zeros alike.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/engine.h"
#include "kernels/isa.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

constexpr std::int32_t kNanKey = std::numeric_limits<std::int32_t>::max();

// Flipping the lower bits of negative floats makes them sort as integers; x + 0 turns -0 into +0.
inline Ints keys_of(Vec scores) {
  const Ints bits = bits_of(scores + 0.0f);
  const Ints keys = bits ^ ((bits >> 31) & 0x7fffffff);
  return scores == scores ? keys : set(kNanKey);
}

inline float score_of(std::int32_t key) {
  const std::int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

inline int count_from(const TopkRow& row, std::int32_t bound) {
  int count = 0;
  for (int i = 0; i < row.count; ++i) count += row.keys[i] >= bound;
  return count;
}

// The k-th largest key of more than k.
inline std::int32_t kth_key(const TopkRow& row, int k) {
  std::int32_t least = kNanKey, most = std::numeric_limits<std::int32_t>::min();
  for (int i = 0; i < row.count; ++i) {
    least = row.keys[i] < least ? row.keys[i] : least;
    most = row.keys[i] > most ? row.keys[i] : most;
  }
  std::int64_t low = least, end = static_cast<std::int64_t>(most) + 1;  // count_from(low) >= k > count_from(end)
  while (end - low > 1) {
    const std::int64_t middle = low + (end - low) / 2;
    (count_from(row, static_cast<std::int32_t>(middle)) >= k ? low : end) = middle;
  }
  return static_cast<std::int32_t>(low);
}

// The lowest `count` of the bits that are set.
inline unsigned first_bits(unsigned set, int count) {
  unsigned kept = 0;
  for (; count > 0 && set != 0; --count, set &= set - 1) kept |= set & -set;
  return kept;
}

// Cuts the candidates back to the k best. The first among equals stay.
inline void keep_best(TopkRow& row, int k) {
  if (row.count <= k) return;
  const std::int32_t bound = kth_key(row, k);
  int equals = k - (bound == kNanKey ? 0 : count_from(row, bound + 1));
  int kept = 0;
  for (int i = 0; i < row.count; i += kLanes) {
    const Ints keys = load(row.keys + i), indices = load(row.indices + i);
    const unsigned live = lanes_before(i, row.count);
    const unsigned same = first_bits(bits(keys == bound) & live, equals);
    const unsigned chosen = (bits(keys > bound) & live) | same;
    compress(row.keys + kept, keys, chosen);  // writes no further than it has read
    kept += compress(row.indices + kept, indices, chosen);
    equals -= __builtin_popcount(same);
  }
  row.count = kept;
  // Later scores must exceed the k-th best. Nothing exceeds NaN; +inf as the bound lets only NaN through, which is cut off
  // again by its index.
  row.threshold = bound == kNanKey ? std::numeric_limits<float>::infinity() : score_of(bound);
}

struct Candidate {
  std::int32_t key, index;
  bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : index < other.index; }
};

inline void sort_best(TopkRow& row, int k) {
  constexpr int kMost = 1024;
  Candidate best[kMost];
  keep_best(row, k);
  for (int i = 0; i < row.count; ++i) best[i] = {row.keys[i], row.indices[i]};
  std::sort(best, best + row.count);
  for (int i = 0; i < row.count; ++i) {
    row.keys[i] = best[i].key;
    row.indices[i] = best[i].index;
  }
}

// Appends what may be among the k best. A threshold of NaN, the first, lets everything through.
inline void offer(TopkRow& row, TopkSize size, const float* scores, int captions, std::int32_t first) {
  Vec threshold = set(row.threshold);
  for (int j = 0; j < captions; j += kLanes) {
    const Vec found = load(scores + j);
    const unsigned chosen = not_less_equal(found, threshold) & lanes_before(j, captions);
    if (chosen == 0) continue;
    compress(row.keys + row.count, keys_of(found), chosen);
    row.count += compress(row.indices + row.count, places() + (first + j), chosen);
    if (row.count > size.capacity - kSlack) {
      keep_best(row, size.k);
      threshold = set(row.threshold);
    }
  }
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
