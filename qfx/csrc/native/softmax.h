// softmax over the last dimension of x * scale + mask.

#pragma once

#include "float_math.h"
#include "float_output.h"
#include "heads.h"
#include "team.h"

namespace qfx::f32 {

// x is [batch, heads, queries, keys], contiguous. A row without any key to see becomes NaN, as in torch.softmax. Floats
// may overwrite x.
template <class T>
void softmax(const Team& team, const float* x, Output<T> out, const Mask& mask, int64_t batch, int64_t heads,
             int64_t queries, int64_t keys, float scale) {
  const auto [begin, end] = team.share(batch * heads * queries);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t query = row % queries, head = row / queries % heads, at = row * keys;
    const float* in = x + at;
    const float* added = mask.row(row / queries / heads, head, query);
    const int64_t visible = mask.visible(query, keys);
    const auto score = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec s = load(in + i, lanes) * scale;
      return added == nullptr ? s : s + load(added + i, lanes);
    };
    const float most = largest_over(visible, score);
    const auto power = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return exp_nonpositive(score(i, lanes) - most);
    };
    float part[kPart];
    float* kept = out.floats != nullptr ? out.floats + at : keys <= kPart ? part : nullptr;
    const float total = sum_over(visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec e = power(i, lanes);
      if (kept != nullptr) store(kept + i, e, lanes);
      return e;
    });
    const float inverse = 1.0f / total;
    out.put_each(at, visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return (kept != nullptr ? load(kept + i, lanes) : power(i, lanes)) * inverse;
    });
    each_vector(keys - visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      out.put(at + visible + i, Vec{}, lanes);
    });
  }
}

}  // namespace qfx::f32
