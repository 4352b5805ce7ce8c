// How fast this CPU multiplies bytes: the tile of a Dot on data that stay in the first-level cache.

#pragma once

#include <cstdint>
#include <cstring>

#include "tile.h"

namespace qfx {

// Multiply-accumulates of one call.
template <class Dot>
constexpr int64_t kPeakProducts = int64_t{Dot::kRows} * kChannels<Dot> * 256;

template <class Dot>
void peak(int64_t calls) {
  constexpr int kDepth = 256, kRow = kDepth + 64;
  alignas(64) static thread_local typename Dot::Data data[Dot::kRows * kRow];
  alignas(64) static thread_local typename Dot::Weight weight[kChannels<Dot> * kDepth + 64];
  alignas(64) int32_t sums[Dot::kRows * kChannels<Dot>];
  std::memset(data, 1, sizeof data);
  std::memset(weight, 1, sizeof weight);
  for (int64_t i = 0; i < calls; ++i) {
    tile<Dot, Dot::kRows>(data, kRow, weight, kDepth, sums);
    asm volatile("" : : "r"(sums) : "memory");
  }
}

}  // namespace qfx
