// Loops over torch tensors for the pooling of integers; pooling.h says what they compute.

#include <vector>

#include "parallel.h"
#include "pooling.h"

namespace {

using namespace qfx;

struct Shape {
  int64_t n, c, h, w, out_h, out_w, step_h, step_w;
  const Window *rows, *cols;
};

template <class Op>
void channels_last(const Op& op, const typename Op::In* x, const Shape& s, int threads) {
  const Pooling pooling{s.c, s.out_h, s.out_w, s.step_h, s.step_w, s.rows, s.cols, {s.h * s.w * s.c, s.w * s.c, s.c},
                        {s.out_h * s.out_w * s.c, s.out_w * s.c, s.c}};
  const int64_t cost = s.out_w * s.c * std::max<int64_t>(1, s.h * s.w / (s.out_h * s.out_w));
  parallel_for(s.n * s.out_h, cost, threads, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) pool_line(op, x, pooling, line);
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
