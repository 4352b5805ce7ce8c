// Rows of a table by index.

#pragma once

#include "float_vector.h"
#include "team.h"

namespace qfx::f32 {

// y[i] = table[index[i]]; table is [rows, cols], y [count, cols]. False if an index of this thread's share is out of
// range: its row is then zeros.
template <class Index>
bool embedding(const Team& team, const Index* index, const float* table, float* y, int64_t count, int64_t rows,
               int64_t cols) {
  const auto [begin, end] = team.share(count);
  bool good = true;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = static_cast<int64_t>(index[i]);
    if (row >= 0 && row < rows) {
      std::memcpy(y + i * cols, table + row * cols, cols * sizeof(float));
    } else {
      std::memset(y + i * cols, 0, cols * sizeof(float));
      good = false;
    }
  }
  return good;
}

}  // namespace qfx::f32
