// Loops over torch tensors for elementwise functions of integers; pointwise.h says what they compute.

#include "parallel.h"
#include "pointwise.h"

namespace {

using namespace qfx;

template <class T>
using element = std::remove_pointer_t<T>;

}  // namespace

QFX_API void qfx_lookup(const uint8_t* q, const uint8_t* table, uint8_t* out, int64_t n, int kind, int threads) {
  const uint8_t flip = kind == kInt8 ? 0x80 : 0;
  parallel_for(n, 1, threads,
               [&](int64_t begin, int64_t end) { lookup(q + begin, table, out + begin, end - begin, flip); });
}

QFX_API void qfx_binary(const void* a, const float* a_scale, const int32_t* a_zero_point, const void* b,
                        const float* b_scale, const int32_t* b_zero_point, void* out, const float* out_scale,
                        const int32_t* out_zero_point, int64_t n, float low, float high, float quant_min,
                        float quant_max, int a_kind, int b_kind, int out_kind, int multiply, int threads) {
  const Affine in_a = a_kind == kFloat32 ? Affine{1.0f, 0} : Affine{*a_scale, *a_zero_point};
  const Affine in_b{*b_scale, *b_zero_point};
  const Bounded to{1.0f / *out_scale, static_cast<float>(*out_zero_point), low, high, quant_min, quant_max};
  with_number(a_kind, [&](auto* ta) {
    with_integer(b_kind, [&](auto* tb) {
      with_integer(out_kind, [&](auto* to_type) {
        const auto* pa = static_cast<const element<decltype(ta)>*>(a);
        const auto* pb = static_cast<const element<decltype(tb)>*>(b);
        auto* po = static_cast<element<decltype(to_type)>*>(out);
        parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
          const int64_t m = end - begin;
          if (multiply) return binary<true>(pa + begin, in_a, pb + begin, in_b, po + begin, to, m);
          return binary<false>(pa + begin, in_a, pb + begin, in_b, po + begin, to, m);
        });
      });
    });
  });
}
