// Copies between two layouts.

#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"

namespace qfx {

constexpr int kMostDims = 6;

// Every thread writes `value` into its share of `count` bytes.
inline void fill(const Team& team, void* to, int64_t count, int value) {
  const auto share = team.share(count, 64);
  std::memset(static_cast<char*>(to) + share.begin, value, share.end - share.begin);
}

// `dims` sizes, the outermost first, and the steps of source and destination in elements.
struct Copy {
  int dims;
  int64_t size[kMostDims], from[kMostDims], to[kMostDims];
};

template <class T>
void copy(const Team& team, const Copy& c, int64_t count, const T* from, T* to) {
  int64_t rows = count;  // the outermost dimension is the batch
  for (int d = 1; d + 1 < c.dims; ++d) rows *= c.size[d];
  const int last = c.dims - 1;
  const auto share = team.share(rows);
  for (int64_t row = share.begin; row < share.end; ++row) {
    int64_t rest = row, source = 0, target = 0;
    for (int d = last - 1; d > 0; --d) {
      const int64_t at = rest % c.size[d];
      rest /= c.size[d];
      source += at * c.from[d];
      target += at * c.to[d];
    }
    source += rest * c.from[0];
    target += rest * c.to[0];
    if (c.from[last] == 1 && c.to[last] == 1) {
      std::memcpy(to + target, from + source, c.size[last] * sizeof(T));
      continue;
    }
    for (int64_t i = 0; i < c.size[last]; ++i) to[target + i * c.to[last]] = from[source + i * c.from[last]];
  }
}

}  // namespace qfx
