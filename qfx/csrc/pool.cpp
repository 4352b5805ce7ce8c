// Pooling of integers over H and W: the maximum, or the mean with requantization.
//
// Which inputs an output sees is a table of windows for each of H and W (built by qfx/kernels.py), so that strided,
// dilated, padded, adaptive and global pooling are one loop.

#include <limits>
#include <type_traits>
#include <vector>

#include "numerics.h"
#include "parallel.h"

namespace {

using namespace qfx;

struct Window {
  int32_t begin, end, divisor;  // inputs [begin, end) in steps of the dilation; its share of the divisor
};

struct Shape {
  int64_t n, c, h, w, out_h, out_w, step_h, step_w;
  const Window *rows, *cols;
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

// Channels innermost: a block of channels stays in registers over its whole window.
template <class Op>
void channels_last(const Op& op, const typename Op::In* x, const Shape& s, int threads) {
  constexpr int64_t kBlock = 64;
  const int64_t cost = s.out_w * s.c * std::max<int64_t>(1, s.h * s.w / (s.out_h * s.out_w));
  parallel_for(s.n * s.out_h, cost, threads, [&](int64_t first, int64_t last) {
    typename Op::Acc acc[kBlock];
    for (int64_t line = first; line < last; ++line) {
      const Window row = s.rows[line % s.out_h];
      const typename Op::In* image = x + line / s.out_h * s.h * s.w * s.c;
      for (int64_t j = 0; j < s.out_w; ++j) {
        const Window col = s.cols[j];
        const int64_t count = taps(row, s.step_h) * taps(col, s.step_w);
        const int64_t area = int64_t{row.divisor} * col.divisor;
        for (int64_t c = 0; c < s.c; c += kBlock) {
          // The width is a constant in whole blocks: only then does the compiler keep acc in registers.
          const auto block = [&](auto width) {
            for (int64_t i = 0; i < width; ++i) acc[i] = Op::first();
            for (int64_t h = row.begin; h < row.end; h += s.step_h)
              for (int64_t w = col.begin; w < col.end; w += s.step_w) {
                const typename Op::In* __restrict in = image + (h * s.w + w) * s.c + c;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) acc[i] = Op::join(acc[i], in[i]);
              }
            op.finish((line * s.out_w + j) * s.c + c, acc, width, count, area);
          };
          if (s.c - c >= kBlock)
            block(std::integral_constant<int64_t, kBlock>{});
          else
            block(s.c - c);
        }
      }
    }
  });
}

// Each channel a plane: down the columns first, which is a loop over neighbours, then along the row.
template <class Op>
void planes(const Op& op, const typename Op::In* x, const Shape& s, int threads) {
  parallel_for(s.n * s.c, s.h * s.w, threads, [&](int64_t first, int64_t last) {
    std::vector<typename Op::Acc> buffer(s.w);
    typename Op::Acc* __restrict acc = buffer.data();
    for (int64_t plane = first; plane < last; ++plane)
      for (int64_t i = 0; i < s.out_h; ++i) {
        const Window row = s.rows[i];
        for (int64_t w = 0; w < s.w; ++w) acc[w] = Op::first();
        for (int64_t h = row.begin; h < row.end; h += s.step_h) {
          const typename Op::In* __restrict in = x + (plane * s.h + h) * s.w;
#pragma omp simd
          for (int64_t w = 0; w < s.w; ++w) acc[w] = Op::join(acc[w], in[w]);
        }
        for (int64_t j = 0; j < s.out_w; ++j) {
          const Window col = s.cols[j];
          typename Op::Acc all = Op::first();
          for (int64_t w = col.begin; w < col.end; w += s.step_w) all = Op::join(all, acc[w]);
          op.finish((plane * s.out_h + i) * s.out_w + j, &all, 1, taps(row, s.step_h) * taps(col, s.step_w),
                    int64_t{row.divisor} * col.divisor);
        }
      }
  });
}

template <class Op>
void pool(const Op& op, const void* x, const Shape& s, int last, int threads) {
  const auto* in = static_cast<const typename Op::In*>(x);
  if (last) return channels_last(op, in, s, threads);
  return planes(op, in, s, threads);
}

}  // namespace

QFX_API void qfx_max_pool(const void* x, void* out, int64_t n, int64_t c, int64_t h, int64_t w, const Window* rows,
                          int64_t out_h, int64_t step_h, const Window* cols, int64_t out_w, int64_t step_w, int last,
                          int kind, int threads) {
  const Shape s{n, c, h, w, out_h, out_w, step_h, step_w, rows, cols};
  with_integer(kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool(Max<T>{static_cast<T*>(out)}, x, s, last, threads);
  });
}

QFX_API void qfx_mean_pool(const void* x, const float* scale, const int32_t* zero_point, void* out,
                           const float* out_scale, const int32_t* out_zero_point, int64_t n, int64_t c, int64_t h,
                           int64_t w, const Window* rows, int64_t out_h, const Window* cols, int64_t out_w,
                           int divisor_override, float quant_min, float quant_max, int last, int kind, int out_kind,
                           int threads) {
  const Shape s{n, c, h, w, out_h, out_w, 1, 1, rows, cols};
  with_integer(kind, [&](auto* type) {
    with_integer(out_kind, [&](auto* out_type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using Out = std::remove_pointer_t<decltype(out_type)>;
      pool(Mean<T, Out>{static_cast<Out*>(out), *scale, *zero_point, divisor_override, 1.0f / *out_scale,
                        static_cast<float>(*out_zero_point), quant_min, quant_max},
           x, s, last, threads);
    });
  });
}
