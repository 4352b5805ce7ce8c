// Where the results of a float operator go: to floats, to integers, or to both.

#pragma once

#include <algorithm>

#include "float_vector.h"

namespace qfx::f32 {

// clamp(round_half_even(x * inverse) + zero_point, low, high), as in qfx/affine.py: each step is one float32 operation.
struct QuantizeTo {
  float inverse, zero_point, low, high;
};

// NaN ends at the zero point.
QFX_F32 IntVec quantized(Vec x, QuantizeTo to) {
  Vec v = round_half_even(x * to.inverse);
  v = (v == v ? v : Vec{}) + to.zero_point;
  return __builtin_convertvector(min(all(to.high), max(all(to.low), v)), IntVec);
}

template <class T>
QFX_F32 void quantize_run(const float* x, T* q, QuantizeTo to, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    store_bytes(q + i, quantized(load(x + i), to), quantized(load(x + i + kLanes), to),
                quantized(load(x + i + 2 * kLanes), to), quantized(load(x + i + 3 * kLanes), to));
  }
  each_vector(n - i, [&, i](int64_t j, auto lanes) __attribute__((always_inline)) {
    store_bytes(q + i + j, quantized(load(x + i + j, lanes), to), lanes);
  });
}

constexpr int64_t kPart = 1024;  // floats that wait on the stack to be rounded

// T is uint8_t or int8_t; either pointer may be null.
template <class T>
struct Output {
  float* floats;
  T* integers;
  QuantizeTo to;

  template <class Lanes>
  QFX_F32 void put(int64_t at, Vec v, Lanes lanes) const {
    if (floats != nullptr) store(floats + at, v, lanes);
    if (integers != nullptr) store_bytes(integers + at, quantized(v, to), lanes);
  }

  // fn(i, lanes) for [begin, begin + n). Rounding has a loop of its own: behind a long function it would cost far more,
  // because the CPU could look less far ahead.
  template <class Fn>
  QFX_F32 void put_each(int64_t begin, int64_t n, const Fn& fn) const {
    float part[kPart];
    for (int64_t at = 0; at < n; at += kPart) {
      const int64_t count = std::min(kPart, n - at);
      float* y = floats != nullptr ? floats + begin + at : part;
      each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        store(y + i, fn(at + i, lanes), lanes);
      });
      if (integers != nullptr) quantize_run(y, integers + begin + at, to, count);
    }
  }
};

}  // namespace qfx::f32
