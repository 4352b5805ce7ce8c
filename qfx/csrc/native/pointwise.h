// Element-wise functions of integers.

#pragma once

#include <cstdint>

#include "../numerics.h"
#include "float_output.h"
#include "team.h"

namespace qfx {

template <class T>
T rounded(float x, const f32::QuantizeTo& to) {
  return quantized<T>(x, to.inverse, to.zero_point, to.low, to.high);
}

struct Affine {
  float scale;
  int32_t zero_point;
};

// Where rows of contiguous elements begin: `first` elements into the sample, then `inner` rows `step` apart, and so on
// `outer` apart. What has no gaps is one row a sample; what is repeated has steps of 0.
struct Rows {
  int64_t sample, first, outer, inner, step;
  int64_t at(int64_t n, int64_t row) const {
    return n * sample + first + row / inner * outer + row % inner * step;
  }
};

template <class Body>
void each_row(const Team& team, int64_t count, int64_t rows, const Body& body) {
  const auto share = team.share(count * rows);
  for (int64_t i = share.begin; i < share.end; ++i) body(i / rows, i % rows);
}

template <class T>
void lookup(const Team& team, int64_t count, int64_t rows, int64_t length, const T* x, const Rows& in, uint8_t* y,
            const Rows& out, const uint8_t* table) {
  each_row(team, count, rows, [&](int64_t n, int64_t row) {
    const auto* from = reinterpret_cast<const uint8_t*>(x + in.at(n, row));
    uint8_t* to = y + out.at(n, row);
    for (int64_t i = 0; i < length; ++i) to[i] = table[from[i]];
  });
}

struct Add {
  float operator()(float a, float b) const { return a + b; }
};
struct Mul {
  float operator()(float a, float b) const { return a * b; }
};

template <class Function, class A, class B, class T>
void binary(const Team& team, int64_t count, int64_t rows, int64_t length, const A* a, const Rows& in_a, const Affine& of_a,
            const B* b, const Rows& in_b, const Affine& of_b, T* y, const Rows& out, const f32::QuantizeTo& to) {
  each_row(team, count, rows, [&](int64_t n, int64_t row) {
    const A* p = a + in_a.at(n, row);
    const B* q = b + in_b.at(n, row);
    T* r = y + out.at(n, row);
    for (int64_t i = 0; i < length; ++i) {
      const float u = dequantized(p[i], of_a.scale, of_a.zero_point), v = dequantized(q[i], of_b.scale, of_b.zero_point);
      r[i] = rounded<T>(Function{}(u, v), to);
    }
  });
}

}  // namespace qfx
