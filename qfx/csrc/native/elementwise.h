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

// Of [rows, cols]: a row is `cols` behind the one before, or the same one if `rows` is 1. With a `period`, all of a row
// is one number, and row i has the number i % period.
struct Operand {
  const float* data;
  int64_t rows;
  int64_t period = 0;

  const float* row(int64_t i, int64_t cols) const {
    return data + (period > 0 ? i % period : rows == 1 ? 0 : i * cols);
  }
};

// A row of an operand: numbers one behind the other, or one number for all.
struct Run {
  const float* data;
  bool one;
  template <class Lanes>
  QFX_F32 Vec get(int64_t i, Lanes lanes) const {
    return one ? all(*data) : load(data + i, lanes);
  }
};

// op(a, b)

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
    const Run left{a.row(row, cols) + (a.period > 0 ? 0 : c.begin), a.period > 0};
    const Run right{b.row(row, cols) + (b.period > 0 ? 0 : c.begin), b.period > 0};
    const int64_t to = row * cols + c.begin;
    out.put_each(to, c.end - c.begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return op(left.get(i, lanes), right.get(i, lanes));
    });
  }
}

// x * scale + shift
template <class T>
void scale_and_shift(const Team& team, const float* x, Operand scale, Operand shift, Output<T> out, int64_t rows,
                     int64_t cols) {
  const auto [begin, end] = team.share(rows);
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x + row * cols;
    const Run factor{scale.row(row, cols), scale.period > 0}, term{shift.row(row, cols), shift.period > 0};
    out.put_each(row * cols, cols, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      return fma(load(from + i, lanes), factor.get(i, lanes), term.get(i, lanes));
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
