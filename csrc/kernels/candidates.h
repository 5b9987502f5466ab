// The k best of a stream of scores, exact and stable, without a heap.
//
// A row keeps a buffer of several times k candidates in order of index. A score below the k-th best seen so far is dropped by
// one comparison; the others are appended, a vector at a time. A full buffer is cut back to its k best: bisection finds the
// k-th largest (at most 32 counting passes over a few KB), then one pass keeps what is above it and the first of those equal
// to it. Scores are kept as integers of the same order, NaN above all as torch sorts it, and both zeros alike.
#pragma once

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

// A key from which on there are k or more candidates, of more than k: exactly k as soon as bisection meets such a key, which is
// long before it has found the k-th largest; else the k-th largest.
inline std::int32_t bound_of_best(const TopkRow& row, int k) {
  std::int32_t least = kNanKey, most = std::numeric_limits<std::int32_t>::min();
  for (int i = 0; i < row.count; ++i) {
    least = row.keys[i] < least ? row.keys[i] : least;
    most = row.keys[i] > most ? row.keys[i] : most;
  }
  std::int64_t low = least, end = static_cast<std::int64_t>(most) + 1;  // count_from(low) >= k > count_from(end)
  while (end - low > 1) {
    const std::int64_t middle = low + (end - low) / 2;
    const int count = count_from(row, static_cast<std::int32_t>(middle));
    (count >= k ? low : end) = middle;
    if (count == k) break;
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
  const std::int32_t bound = bound_of_best(row, k);
  int equals = k - (bound == kNanKey ? 0 : count_from(row, bound + 1));
  int kept = 0;
  Ints least = set(kNanKey);
  for (int i = 0; i < row.count; i += kLanes) {
    const Ints keys = load(row.keys + i), indices = load(row.indices + i);
    const unsigned live = lanes_before(i, row.count);
    const unsigned same = first_bits(bits(keys == bound) & live, equals);
    const Ints better = (keys >= bound) & (places() < row.count - i);
    least = better && keys < least ? keys : least;
    const unsigned chosen = (bits(keys > bound) & live) | same;
    compress(row.keys + kept, keys, chosen);  // writes no further than it has read
    kept += compress(row.indices + kept, indices, chosen);
    equals -= __builtin_popcount(same);
  }
  row.count = kept;
  std::int32_t last = kNanKey;
  for (int lane = 0; lane < kLanes; ++lane) last = least[lane] < last ? least[lane] : last;
  // Later scores must exceed the k-th best. Nothing exceeds NaN; +inf as the bound lets only NaN through, which is cut off
  // again by its index.
  row.threshold = last == kNanKey ? std::numeric_limits<float>::infinity() : score_of(last);
}

// How many candidates come before number i: the better ones, and the equal ones of a lower index.
inline int place_of(const TopkRow& row, int i) {
  const Ints key = set(row.keys[i]);
  Ints before{};
  for (int j = 0; j < row.count; j += kLanes) {
    const Ints keys = load(row.keys + j);
    before -= (keys > key) | ((keys == key) & (places() < i - j));
  }
  return sum(before);
}

// Best first. For so few, counting what comes before each is faster than a sort, whose branches nobody can predict.
inline void sort_best(TopkRow& row, int k) {
  std::int32_t keys[kMostTop], indices[kMostTop];
  keep_best(row, k);
  for (int i = 0; i < kLanes; ++i) row.keys[row.count + i] = std::numeric_limits<std::int32_t>::min();  // below every key
  for (int i = 0; i < row.count; ++i) {
    const int place = place_of(row, i);
    keys[place] = row.keys[i];
    indices[place] = row.indices[i];
  }
  std::memcpy(row.keys, keys, sizeof(std::int32_t) * row.count);
  std::memcpy(row.indices, indices, sizeof(std::int32_t) * row.count);
}

// Appends what may be among the k best. A threshold of NaN, the first, lets everything through.
template <class Row>
[[gnu::always_inline]] inline void offer(TopkRow& row, TopkSize size, const Row& scores, std::int32_t first) {
  const Vec threshold = kept(set(row.threshold));
  unsigned chosen = 0;
#pragma GCC unroll 8
  for (int v = 0; v < Row::kCount; ++v) chosen |= not_less_equal(scores.vectors[v], threshold) << v * kLanes;
  chosen &= scores.live_bits();
  if (chosen == 0) return;
  for (int v = 0; v < Row::kCount; ++v) {
    const unsigned these = chosen >> v * kLanes & kAllLanes;
    compress(row.keys + row.count, keys_of(scores.vectors[v]), these);
    row.count += compress(row.indices + row.count, places() + (first + v * kLanes), these);
  }
  if (row.count > size.capacity - kMostOffered - kSlack) [[unlikely]]
    keep_best(row, size.k);
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
