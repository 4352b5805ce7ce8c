// Elementwise operators on contiguous memory: arithmetic of two floats, quantize, dequantize, boolean masks.
// Results may overwrite inputs of the same element type.

#pragma once

#include "float_output.h"
#include "team.h"

namespace qfx::f32 {

constexpr int64_t kShare = 64;  // elements: shares end at cache lines, also those of bytes

struct Add {
  QFX_F32 Vec operator()(Vec a, Vec b) const { return a + b; }
};
struct Subtract {
  QFX_F32 Vec operator()(Vec a, Vec b) const { return a - b; }
};
struct Multiply {
  QFX_F32 Vec operator()(Vec a, Vec b) const { return a * b; }
};
struct Divide {
  QFX_F32 Vec operator()(Vec a, Vec b) const { return a / b; }
};

// op(a, b) of [rows, cols]. An operand's row is `cols` behind the one before, or the same one if its `rows` is 1.
struct Operand {
  const float* data;
  int64_t rows;
};

template <class Op, class T>
void binary(const Team& team, const Op& op, Operand a, Operand b, Output<T> out, int64_t rows, int64_t cols) {
  if (a.rows == rows && b.rows == rows) {  // as one row, for rows may be few or short
    cols *= rows;
    rows = 1;
  }
  const bool one = rows == 1;
  const Team::Range r = one ? Team::Range{0, 1} : team.share(rows);
  const Team::Range c = one ? team.share(cols, kShare) : Team::Range{0, cols};
  for (int64_t row = r.begin; row < r.end; ++row) {
    const float* left = a.data + (a.rows == 1 ? 0 : row * cols) + c.begin;
    const float* right = b.data + (b.rows == 1 ? 0 : row * cols) + c.begin;
    const int64_t to = row * cols + c.begin;
    out.put_each(to, c.end - c.begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return op(load(left + i, lanes), load(right + i, lanes));
    });
  }
}

// x * scale + shift, of which each row of x has one.
template <class T>
void scale_and_shift(const Team& team, const float* x, const float* scale, const float* shift, Output<T> out,
                     int64_t rows, int64_t cols) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x + row * cols;
    out.put_each(row * cols, cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return fma(load(from + i, lanes), load(scale + i, lanes), load(shift + i, lanes));
    });
  }
}

// The mean of each row.
template <class T>
void mean(const Team& team, const float* x, Output<T> out, int64_t rows, int64_t cols) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const float total = sum_over(cols, [from = x + row * cols](int64_t i, auto lanes) __attribute__((always_inline)) {
      return load(from + i, lanes);
    });
    out.put(row, all(total / static_cast<float>(cols)), First{1});
  }
}

template <class T>
void quantize(const Team& team, const float* x, T* q, QuantizeTo to, int64_t count) {
  const auto [begin, end] = team.share(count, kShare);
  quantize_run(x + begin, q + begin, to, end - begin);
}

// (q - zero_point) * scale
template <class T>
void dequantize(const Team& team, const T* q, float* x, float scale, int32_t zero_point, int64_t count) {
  const auto [begin, end] = team.share(count, kShare);
  each_vector(end - begin, [&, at = begin](int64_t i, auto lanes) __attribute__((always_inline)) {
    store(x + at + i, __builtin_convertvector(load_bytes(q + at + i, lanes) - zero_point, Vec) * scale, lanes);
  });
}

// What scaled_dot_product_attention makes of a boolean mask: 0 where `keep` is 1, -inf where it is 0.
inline void additive_mask(const Team& team, const uint8_t* keep, float* added, int64_t count) {
  const auto [begin, end] = team.share(count, kShare);
  each_vector(end - begin, [&, at = begin](int64_t i, auto lanes) __attribute__((always_inline)) {
    store(added + at + i, load_bytes(keep + at + i, lanes) != 0 ? Vec{} : all(-__builtin_inff()), lanes);
  });
}

}  // namespace qfx::f32
