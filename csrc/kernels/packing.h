// Rows of the caller's matrices, as the inner loops want to read them.
#pragma once

#include "kernels/engine.h"
#include "kernels/isa.h"

namespace pairclip::kernels::PAIRCLIP_VARIANT {

inline float widened(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The nearest bfloat16, ties to even.
inline std::uint16_t narrowed(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7fc0 : rounded);
}

// As many bfloat16 as a vector has lanes, widened.
inline Vec widened(const std::uint16_t* from) {
  typedef std::uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return floats_of(__builtin_convertvector(narrow, Ints) << 16);
}

// 32 numbers to their nearest bfloat16; NaN stays NaN.
inline void narrow(const Vec (&numbers)[32 / kLanes], std::uint16_t* out) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh(numbers[1], numbers[0]);
  std::memcpy(out, &both, sizeof both);
#else
  for (int v = 0; v < 32 / kLanes; ++v)
    for (int i = 0; i < kLanes; ++i) out[v * kLanes + i] = narrowed(numbers[v][i]);
#endif
}

// Numbers [first, first + Count) of a row as floats, zeros from `depth` on and where there is no row.
template <int Count>
inline void read(const void* row, Element type, int first, int depth, float* out) {
  const int there = row == nullptr ? 0 : depth - first;
  if (type == Element::float32) {
    const float* from = static_cast<const float*>(row) + first;
    if (there >= Count) return void(std::memcpy(out, from, sizeof(float) * Count));  // a constant size: plain vector moves
    for (int i = 0; i < Count; ++i) out[i] = i < there ? from[i] : 0.0f;
  } else {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(row) + first;
    if (there >= Count) {
      for (int i = 0; i < Count; ++i) out[i] = widened(from[i]);
    } else {
      for (int i = 0; i < Count; ++i) out[i] = i < there ? widened(from[i]) : 0.0f;
    }
  }
}

// out[k * out_stride + j] = in[j * in_stride + k] for j < rows, k < columns, both multiples of kLanes; 32-bit words of any kind.
inline void transpose(const void* in, int in_stride, int rows, int columns, void* out, int out_stride) {
  const std::int32_t* from = static_cast<const std::int32_t*>(in);
  std::int32_t* to = static_cast<std::int32_t*>(out);
  for (int j = 0; j < rows; j += kLanes)
    for (int k = 0; k < columns; k += kLanes) {
      Ints square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (j + i) * in_stride + k);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (k + i) * out_stride + j, square[i]);
    }
}

}  // namespace pairclip::kernels::PAIRCLIP_VARIANT
