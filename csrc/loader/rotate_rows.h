// Rotation of tiles up to 32 pixels wide, by AVX-512's table look-up in registers.
//
// A source row is two registers, and VPERMI2D picks 16 of its 32 pixels at once. The 16 pixels of an output vector come from
// few source rows (15 |sin angle| + 2 of them, plus the one below): each is loaded once, looked up for the left and the right
// taps, and kept by the lanes whose taps it holds. A tap beyond the tile to the left or right weighs nothing, or is looked up
// where it is mirrored to; a row above or below is a row of zeros, or the mirrored one. No load depends on a lane.
#pragma once

#include "loader/pixels.h"

namespace pairclip::PAIRCLIP_VARIANT {

// Positions along one axis, counted from `low`, where they are not negative and truncation is floor. What is further out
// than `low` or `low` + `reach` looks like what is there.
struct Axis {
  int side, low;
  float centre, reach;

  PAIRCLIP_INLINE Axis make(int side, bool reflect) {
    const int low = reflect ? -(side + 1) : -2, high = reflect ? 2 * side : side + 1;
    return {side, low, 0.5f * static_cast<float>(side - 1) - static_cast<float>(low), static_cast<float>(high - low)};
  }
};

PAIRCLIP_INLINE Floats weighed(__mmask16 counts, Floats weight) { return _mm512_maskz_mov_ps(counts, weight); }

PAIRCLIP_INLINE __mmask16 inside(Ints at, int side) {
  return _mm512_cmplt_epu32_mask(reinterpret_cast<__m512i>(at), _mm512_set1_epi32(side));
}

// Where the 16 pixels of an output vector come from.
struct Place {
  Ints row, column, next;  // `row` counts from the axis' low end; `column` and `next` are the pixels of the left and right taps
  Floats left, right, below;  // weights of the left and right taps, and of the lower row
  int first;                  // the topmost row
};

// Places and pixels are computed in turns of a few vectors: within one vector everything waits for what was before it, but
// the vectors of a turn do not wait for each other.
constexpr int kTurn = 8;

// Looks taps up; `places` says where in the table each row is.
PAIRCLIP_INLINE Taps look_up(const std::uint32_t* table, const std::uint32_t* places, const Place& place, int count) {
  const __m512i left = reinterpret_cast<__m512i>(place.column), right = reinterpret_cast<__m512i>(place.next);
  __m512i taps[4] = {};
  __mmask16 above = 0;
  for (int k = 0; k < count; ++k) {
    const std::uint32_t* const words = table + places[place.first + k];
    const __m512i low = _mm512_load_si512(words), high = _mm512_load_si512(words + kLanes);
    const __m512i lefts = _mm512_permutex2var_epi32(low, left, high), rights = _mm512_permutex2var_epi32(low, right, high);
    const __mmask16 here = _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(place.row), _mm512_set1_epi32(place.first + k));
    taps[0] = _mm512_mask_mov_epi32(taps[0], here, lefts);
    taps[1] = _mm512_mask_mov_epi32(taps[1], here, rights);
    taps[2] = _mm512_mask_mov_epi32(taps[2], above, lefts);
    taps[3] = _mm512_mask_mov_epi32(taps[3], above, rights);
    above = here;
  }
  return {reinterpret_cast<Words>(taps[0]), reinterpret_cast<Words>(taps[1]), reinterpret_cast<Words>(taps[2]),
          reinterpret_cast<Words>(taps[3])};
}

template <bool kReflect>
PAIRCLIP_INLINE void find_place(Floats x, Floats y, const Axis& across, const Axis& down, Place* place) {
  const Floats at_x = smaller(larger(x, Floats{}), spread(across.reach)), at_y = smaller(larger(y, Floats{}), spread(down.reach));
  const Ints steps = truncated(at_x);
  const Floats fraction = at_x - to_floats(steps);
  place->row = truncated(at_y);
  place->below = at_y - to_floats(place->row);
  const Ints column = steps + across.low, next = column + 1;
  if constexpr (kReflect) {
    place->column = mirrored(column, across.side);
    place->next = mirrored(next, across.side);
    place->left = 1.0f - fraction;
    place->right = fraction;
  } else {
    place->column = column;
    place->next = next;
    place->left = weighed(inside(column, across.side), 1.0f - fraction);
    place->right = weighed(inside(next, across.side), fraction);
  }
  const int first = place->row[0], last = place->row[kLanes - 1];  // rows rise or fall from lane to lane
  place->first = first < last ? first : last;
}

template <bool kBf16, bool kRecoloured, bool kReflect>
static void rotate_rows_with(const TileJob& job, std::uint32_t* table) {
  const int height = job.height, width = job.width;
  std::memset(table, 0, sizeof(std::uint32_t) * loader::kRowWords);
  for (int y = 0; y < height; ++y) {
    std::uint32_t* const row = table + (y + 1) * loader::kRowWords;
    for (int x = width; x < loader::kRowWords; ++x) row[x] = 0;
    expand_row(job.source.pixels + y * job.source.row_bytes, row, width);
  }
  std::memset(table + (height + 1) * loader::kRowWords, 0, sizeof(std::uint32_t) * loader::kRowWords);

  const auto writer = Writer<kBf16, kRecoloured>::make(job);
  const Axis across = Axis::make(width, kReflect), down = Axis::make(height, kReflect);
  const float middle_x = 0.5f * static_cast<float>(width - 1), middle_y = 0.5f * static_cast<float>(height - 1);
  const float steepness = job.sine < 0.0f ? -job.sine : job.sine;
  const int rows_met = static_cast<int>(steepness * (kLanes - 1)) + 3;
  std::uint32_t* const places = table + (height + 2) * loader::kRowWords;
  for (int k = 0; k < static_cast<int>(down.reach) + rows_met + 1; ++k) {
    const int row = k + down.low, clamped = row < -1 ? -1 : row > height ? height : row;
    places[k] = static_cast<std::uint32_t>((kReflect ? mirrored(row, height) : clamped) + 1) * loader::kRowWords;
  }
  for (int x = 0; x < width; x += kLanes) {
    const int count = width - x < kLanes ? width - x : kLanes;
    const Floats dx = (ramp() + (static_cast<float>(x) - middle_x)) * (job.flip ? -1.0f : 1.0f) - job.moved_x;
    const Floats from_x = dx * job.cosine + across.centre, from_y = dx * job.sine + down.centre;
    for (int y = 0; y < height; y += kTurn) {
      const int turn = height - y < kTurn ? height - y : kTurn;
      Place found[kTurn];
      for (int k = 0; k < turn; ++k) {
        const float dy = static_cast<float>(y + k) - middle_y - job.moved_y;
        find_place<kReflect>(from_x - job.sine * dy, from_y + job.cosine * dy, across, down, found + k);
      }
      for (int k = 0; k < turn; ++k) {
        const Taps taps = look_up(table, places, found[k], rows_met);
        writer.write(blended(taps, found[k].left, found[k].right, found[k].below), y + k, x, count);
      }
    }
  }
}

template <bool kBf16, bool kRecoloured>
static void rotate_rows(const TileJob& job, std::uint32_t* table) {
  if (job.border == loader::Border::reflect)
    rotate_rows_with<kBf16, kRecoloured, true>(job, table);
  else
    rotate_rows_with<kBf16, kRecoloured, false>(job, table);
}

}  // namespace pairclip::PAIRCLIP_VARIANT
