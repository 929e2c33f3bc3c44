// Sums over the lanes of several vectors at once.
//
// Every sum adds lane i to lane i + width / 2, then halves the width: the same tree whichever
// function computes it.
#pragma once

#include <utility>

#include "vec.h"

namespace lorax::LORAX_ISA {
namespace {

// Lane i of the halves of blocks: a vector holds kLanes / width blocks of `width` lanes; the lower
// (upper) halves of a's blocks, then of b's.
template <int width, bool upper>
constexpr int half_lane(int i) {
  const int half = width / 2, block = i / half, blocks = kLanes / width;
  const int source = block < blocks ? block * width : kLanes + (block - blocks) * width;
  return source + i % half + (upper ? half : 0);
}

template <int width, int... i>
LORAX_INLINE Vec halve(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, half_lane<width, false>(i)...) +
         __builtin_shufflevector(a, b, half_lane<width, true>(i)...);
}

// Adds the upper half of each block to its lower half: blocks of width / 2, a's before b's.
template <int width>
LORAX_INLINE Vec halve(Vec a, Vec b) {
  return halve<width>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Lane i of the result is the sum of sums[i]; the array is used up.
LORAX_INLINE Vec sum_lanes(Vec (&sums)[kLanes]) {
  if constexpr (kLanes == 16) {
    for (int i = 0; i < 8; ++i) sums[i] = halve<16>(sums[2 * i], sums[2 * i + 1]);
  }
  if constexpr (kLanes >= 8) {
    for (int i = 0; i < 4; ++i) sums[i] = halve<8>(sums[2 * i], sums[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) sums[i] = halve<4>(sums[2 * i], sums[2 * i + 1]);
  return halve<2>(sums[0], sums[1]);
}

// The sums of four vectors, to out[0 .. 4).
LORAX_INLINE void store_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
  constexpr int stride =
      kLanes / 4;  // the four sums end up in lanes 0, stride, 2 * stride, 3 * stride
  Vec all = halve<kLanes / 2>(halve<kLanes>(a, b), halve<kLanes>(c, d));
  if constexpr (kLanes >= 8) all = halve<stride>(all, all);
  if constexpr (kLanes == 16) all = halve<stride / 2>(all, all);
  typedef float Four __attribute__((vector_size(16)));
  const Four four = __builtin_shufflevector(all, all, 0, 1, 2, 3);
  std::memcpy(out, &four, sizeof four);
}

}  // namespace
}  // namespace lorax::LORAX_ISA
