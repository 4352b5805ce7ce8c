// Pooling of integers over H and W, channels innermost: the maximum, or the mean with requantization.
//
// Which inputs an output sees is a table of windows for each of H and W (built by qfx/kernels.py), so that strided,
// dilated, padded, adaptive and global pooling are one loop.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "numerics.h"

namespace qfx {

struct Window {
  int32_t begin, end, divisor;  // inputs [begin, end) in steps of the dilation; its share of the divisor
};

inline int64_t taps(const Window& window, int64_t step) {
  return window.end > window.begin ? (window.end - window.begin + step - 1) / step : 0;
}

template <class T>
struct Max {
  using In = T;
  using Acc = T;
  T* out;

  static Acc first() { return std::numeric_limits<T>::lowest(); }
  static Acc join(Acc a, Acc b) { return a > b ? a : b; }
  void finish(int64_t at, const Acc* __restrict acc, int64_t n, int64_t, int64_t) const {
    std::copy(acc, acc + n, out + at);
  }
};

template <class T, class Out>
struct Mean {
  using In = T;
  using Acc = int32_t;
  Out* out;
  float scale;
  int32_t zero_point, divisor_override;
  float inverse, out_zero_point, quant_min, quant_max;

  static Acc first() { return 0; }
  static Acc join(Acc a, Acc b) { return a + b; }
  void finish(int64_t at, const Acc* __restrict acc, int64_t n, int64_t count, int64_t area) const {
    Out* __restrict to = out + at;
    const int32_t zero = zero_point * static_cast<int32_t>(count);
    const float divisor = static_cast<float>(divisor_override ? divisor_override : area), s = scale, inv = inverse,
                offset = out_zero_point, lo = quant_min, hi = quant_max;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      to[i] = quantized<Out>(static_cast<float>(acc[i] - zero) * s / divisor, inv, offset, lo, hi);
  }
};

// Elements from one image, row and pixel to the next.
struct Steps {
  int64_t image, row, pixel;
};

// `rows` and `cols`: a window for each output, whose inputs are `step_h` and `step_w` apart.
struct Pooling {
  int64_t channels, out_h, out_w, step_h, step_w;
  const Window *rows, *cols;
  Steps in, out;
};

// One row of outputs, the `line`-th of all images. A block of channels stays in registers over its whole window.
template <class Op>
void pool_line(const Op& op, const typename Op::In* x, const Pooling& s, int64_t line) {
  constexpr int64_t kBlock = 64;
  typename Op::Acc acc[kBlock];
  const int64_t n = line / s.out_h, i = line % s.out_h;
  const Window row = s.rows[i];
  for (int64_t j = 0; j < s.out_w; ++j) {
    const Window col = s.cols[j];
    const int64_t count = taps(row, s.step_h) * taps(col, s.step_w);
    const int64_t area = int64_t{row.divisor} * col.divisor;
    const int64_t to = n * s.out.image + i * s.out.row + j * s.out.pixel;
    for (int64_t c = 0; c < s.channels; c += kBlock) {
      // The width is a constant in whole blocks: only then does the compiler keep acc in registers.
      const auto block = [&](auto width) {
        for (int64_t k = 0; k < width; ++k) acc[k] = Op::first();
        for (int64_t h = row.begin; h < row.end; h += s.step_h)
          for (int64_t w = col.begin; w < col.end; w += s.step_w) {
            const typename Op::In* __restrict in = x + n * s.in.image + h * s.in.row + w * s.in.pixel + c;
#pragma omp simd
            for (int64_t k = 0; k < width; ++k) acc[k] = Op::join(acc[k], in[k]);
          }
        op.finish(to + c, acc, width, count, area);
      };
      if (s.channels - c >= kBlock)
        block(std::integral_constant<int64_t, kBlock>{});
      else
        block(s.channels - c);
    }
  }
}

}  // namespace qfx
