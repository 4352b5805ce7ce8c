// One tile of a product: rows of a panel times the packed weights of `kVecs` vectors of channels, summed exactly.

#pragma once

#include <cstdint>

namespace qfx {

template <class Dot>
constexpr int kChannels = Dot::kLanes * Dot::kVecs;  // output channels of one tile

// Packed weights of one tile: [depth / kUnit][kChannels][kUnit].
template <class Dot, int kRows>
[[gnu::noinline, gnu::noclone]] void tile(const typename Dot::Data* data, int64_t row, const typename Dot::Weight* weight, int depth, int32_t* sums) {
  constexpr int kVecs = Dot::kVecs;
  typename Dot::Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Dot::zero();
  }
  for (int k = 0; k < depth; k += Dot::kUnit) {
    typename Dot::Vec w[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) w[v] = Dot::weights(weight + v * Dot::kLanes * Dot::kUnit);
    weight += kChannels<Dot> * Dot::kUnit;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Dot::Vec x = Dot::splat(data + r * row + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        sum[r][v] = Dot::dot(sum[r][v], x, w[v]);
#if defined(__x86_64__) && !defined(QFX_EMULATED)
        asm("" : "+v"(sum[r][v]));  // keeps the compiler from starting all products first, which spills the sums
#endif
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Dot::store(sums + r * kChannels<Dot> + v * Dot::kLanes, sum[r][v]);
  }
}

// The same for `rows` of 1 to Dot::kRows; it may compute some rows too many, whose data must be readable.
template <class Dot>
void tile(int rows, const typename Dot::Data* data, int64_t row, const typename Dot::Weight* weight, int depth, int32_t* sums) {
  if (rows == 1) return tile<Dot, 1>(data, row, weight, depth, sums);
  if (rows == 2) return tile<Dot, 2>(data, row, weight, depth, sums);
  if (rows <= 4) return tile<Dot, 4>(data, row, weight, depth, sums);
  if constexpr (Dot::kRows > 8) {
    if (rows <= 8) return tile<Dot, 8>(data, row, weight, depth, sums);
  }
  return tile<Dot, Dot::kRows>(data, row, weight, depth, sums);
}

}  // namespace qfx
