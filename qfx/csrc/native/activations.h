// Activations: functions of one float, and the loop that applies one. Those without exp, erf or tanh equal ATen's to
// the last bit. NaN passes through all.

#pragma once

#include "elementwise.h"
#include "float_math.h"

namespace qfx::f32 {

struct Square {
  QFX_F32 Vec operator()(Vec x) const { return x * x; }
};

struct Cube {
  QFX_F32 Vec operator()(Vec x) const { return x * x * x; }
};

struct Sqrt {
  QFX_F32 Vec operator()(Vec x) const { return square_root(x); }
};

struct Rsqrt {
  QFX_F32 Vec operator()(Vec x) const { return 1.0f / square_root(x); }
};

struct Negate {
  QFX_F32 Vec operator()(Vec x) const { return -x; }
};

struct Absolute {
  QFX_F32 Vec operator()(Vec x) const { return absolute(x); }
};

struct Relu {
  QFX_F32 Vec operator()(Vec x) const { return max(Vec{}, x); }
};

// hardtanh, relu6, clamp
struct Clamp {
  float low, high;
  QFX_F32 Vec operator()(Vec x) const { return min(all(high), max(all(low), x)); }
};

struct LeakyRelu {
  float slope;
  QFX_F32 Vec operator()(Vec x) const { return x > 0.0f ? x : x * slope; }
};

struct Elu {
  float alpha;
  QFX_F32 Vec operator()(Vec x) const { return x > 0.0f ? x : expm1_nonpositive(min(Vec{}, x)) * alpha; }
};

struct HardSigmoid {
  QFX_F32 Vec operator()(Vec x) const { return Clamp{0.0f, 6.0f}(x + 3.0f) / 6.0f; }
};

struct HardSwish {
  QFX_F32 Vec operator()(Vec x) const { return x * Clamp{0.0f, 6.0f}(x + 3.0f) / 6.0f; }
};

struct Sigmoid {
  QFX_F32 Vec operator()(Vec x) const { return gated(all(1.0f), x); }
};

struct Silu {
  QFX_F32 Vec operator()(Vec x) const { return gated(x, x); }
};

struct Tanh {
  QFX_F32 Vec operator()(Vec x) const { return tanh(x); }
};

// x P(X < x), the normal distribution's. The tail is small where it counts, so that nothing cancels.
struct Gelu {
  QFX_F32 Vec operator()(Vec x) const {
    const Vec size = min(all(14.0f), absolute(x));
    return fma(-size, normal_tail(size), max(Vec{}, x));
  }
};

// approximate="tanh": (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
struct GeluTanh {
  QFX_F32 Vec operator()(Vec x) const {
    const Vec cube = fma(x * x, all(0.044715f), all(1.0f));
    return gated(x, x * cube * 0x1.988454p0f);
  }
};

template <class Activation, class T>
void activate(const Team& team, const Activation& activation, const float* x, Output<T> out, int64_t count) {
  const auto [begin, end] = team.share(count, kShare);
  out.put_each(begin, end - begin, [&, from = x + begin](int64_t i, auto lanes) __attribute__((always_inline)) {
    return activation(load(from + i, lanes));
  });
}

}  // namespace qfx::f32
