// Element-wise functions of integers in any layout: rows of contiguous elements, each by the loops of ../pointwise.h.

#pragma once

#include <cstdint>

#include "../pointwise.h"
#include "team.h"

namespace qfx {

// Where rows of contiguous elements begin: `first` elements into the sample, then `inner` rows `step` apart, and so on
// `outer` apart. What has no gaps is one row a sample; what is repeated has steps of 0.
struct Rows {
  int64_t sample, first, outer, inner, step;
  int64_t at(int64_t n, int64_t row) const {
    return n * sample + first + row / inner * outer + row % inner * step;
  }
};

// body(n, row) for this thread's share of `rows` rows in each of `count` samples.
template <class Body>
void each_row(const Team& team, int64_t count, int64_t rows, const Body& body) {
  const auto share = team.share(count * rows);
  for (int64_t i = share.begin; i < share.end; ++i) body(i / rows, i % rows);
}

}  // namespace qfx
