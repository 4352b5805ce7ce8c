// layer_norm and rms_norm over the last dimension. A row is read from memory once, then swept again in the cache: the
// variance is the mean square of the differences from the mean, which loses nothing where the mean is large. So is what
// rounding took from the mean made good.

#pragma once

#include <algorithm>
#include <cmath>

#include "float_output.h"
#include "team.h"

namespace qfx::f32 {

// A row of x, with the residual added if there is one.
struct NormRow {
  const float* x;
  const float* residual;

  template <class Lanes>
  QFX_F32 Vec get(int64_t i, Lanes lanes) const {
    const Vec v = load(x + i, lanes);
    return residual == nullptr ? v : v + load(residual + i, lanes);
  }
};

// Sum of term(v) over a row; a sum_out that is not null gets the row, and is the row from then on.
template <class Term>
QFX_F32 float first_sweep(NormRow& row, float* sum_out, int64_t cols, const Term& term) {
  const float total = sum_over(cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec v = row.get(i, lanes);
    if (sum_out != nullptr) store(sum_out + i, v, lanes);
    return term(v);
  });
  if (sum_out != nullptr) row = {sum_out, nullptr};
  return total;
}

// x and residual are [rows, cols], weight and bias [cols]; sum_out gets x + residual. All of them but x may be null.
// Outputs may overwrite x and residual, but not each other.
template <class T>
void layer_norm(const Team& team, const float* x, const float* residual, const float* weight, const float* bias,
                Output<T> out, float* sum_out, int64_t rows, int64_t cols, float eps) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    NormRow in{x + at, residual == nullptr ? nullptr : residual + at};
    float* sums = sum_out == nullptr ? nullptr : sum_out + at;
    const float count = static_cast<float>(cols);
    const float mean = first_sweep(in, sums, cols, [](Vec v) { return v; }) / count;
    const TwoSums moments = sum_over(cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec d = in.get(i, lanes) - mean;
      return Two{d, d * d};
    });
    const float rest = moments.a / count;  // by which the mean was rounded
    const float square = std::max(0.0f, moments.b / count - rest * rest);
    const float scale = 1.0f / std::sqrt(square + eps);
    out.put_each(at, cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec y = (in.get(i, lanes) - mean - rest) * scale;
      if (weight != nullptr) y *= load(weight + i, lanes);
      if (bias != nullptr) y += load(bias + i, lanes);
      return y;
    });
  }
}

// x / sqrt(mean(x^2) + eps) * weight, the rest as in layer_norm.
template <class T>
void rms_norm(const Team& team, const float* x, const float* residual, const float* weight, Output<T> out,
              float* sum_out, int64_t rows, int64_t cols, float eps) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * cols;
    NormRow in{x + at, residual == nullptr ? nullptr : residual + at};
    float* sums = sum_out == nullptr ? nullptr : sum_out + at;
    const float square = first_sweep(in, sums, cols, [](Vec v) { return v * v; }) / static_cast<float>(cols);
    const float scale = 1.0f / std::sqrt(square + eps);
    out.put_each(at, cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec y = in.get(i, lanes) * scale;
      if (weight != nullptr) y *= load(weight + i, lanes);
      return y;
    });
  }
}

}  // namespace qfx::f32
