// exp, 2^x, erf, tanh and sigmoid of vectors. The bound at each, in units of the last place, was found by trying one
// float in seven, with and without FMA.
//
// Arguments are reduced to n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite, Software Manual for the
// Elementary Functions, 1980). Polynomials are minimax: Remez's exchange in 50 digits, with the weight that makes the
// error named beside each relative, the coefficients then rounded to float32.

#pragma once

#include "float_vector.h"

namespace qfx::f32 {

// c0 + c1 x + c2 x^2 + ..., by Estrin's scheme: chains of dependent operations are what bounds the speed here.
QFX_F32 Vec polynomial(Vec x, float c0, float c1, float c2, float c3, float c4) {
  const Vec x2 = x * x, low = fma(all(c1), x, all(c0)), middle = fma(all(c3), x, all(c2));
  return fma(fma(all(c4), x2, middle), x2, low);
}
QFX_F32 Vec polynomial(Vec x, float c0, float c1, float c2, float c3, float c4, float c5, float c6) {
  const Vec x2 = x * x;
  return fma(polynomial(x, c2, c3, c4, c5, c6), x2, fma(all(c1), x, all(c0)));
}

QFX_F32 Vec polynomial(Vec x, float c0, float c1, float c2, float c3, float c4, float c5, float c6, float c7,
                       float c8) {
  const Vec x2 = x * x, low = fma(fma(all(c3), x, all(c2)), x2, fma(all(c1), x, all(c0)));
  return fma(polynomial(x, c4, c5, c6, c7, c8), x2 * x2, low);
}

// 1.5 * 2^23: a float to which a small number is added holds it, rounded, in its low bits.
constexpr float kRounder = 0x1.8p23f;

// e^x = 2^n (1 + p). Of |x| < 2^20.
struct Reduced {
  Vec n_bits;  // kRounder + n
  Vec p;       // e^r - 1
};

QFX_F32 Reduced reduce(Vec x) {
  const Vec z = fma(x, all(0x1.715476p0f), all(kRounder));
  const Vec n = z - kRounder;
  Vec r = fma(n, all(-0x1.62ep-1f), x);  // exact: 12 bits times 8 of n
  r = fma(n, all(-0x1.0bfbe8p-15f), r);
  // (e^r - 1 - r) / r^2, relative error of e^r 3.1e-9
  const Vec q = polynomial(r, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f);
  return {z, fma(r * r, q, r)};
}

// 2^n for n in [-127, 127], the first of them as 0.
QFX_F32 Vec power_of_two(Vec n_bits) { return from_bits(bits(n_bits + 127.0f) << 23); }

// 1.1 ulp; overflows to inf, underflows gradually.
QFX_F32 Vec exp(Vec x) {
  const Reduced e = reduce(min(all(89.0f), max(all(-104.0f), x)));
  const IntVec n = bits(e.n_bits) - bits(all(kRounder)), half = n >> 1;
  // In two steps, since neither 2^128 nor 2^-150 is a float.
  return (e.p + 1.0f) * from_bits((half + 127) << 23) * from_bits((n - half + 127) << 23);
}

// e^x for x <= 0, 1.1 ulp; 0 where the result would be below 1e-38. NaN passes.
QFX_F32 Vec exp_nonpositive(Vec x) {
  const Reduced e = reduce(max(all(-88.0f), x));
  const Vec scale = power_of_two(e.n_bits);
  return fma(e.p, scale, scale);
}

// e^x - 1 for x <= 0, 1 ulp.
QFX_F32 Vec expm1_nonpositive(Vec x) {
  const Reduced e = reduce(max(all(-88.0f), x));
  const Vec scale = power_of_two(e.n_bits);
  return fma(e.p, scale, scale - 1.0f);
}

// 2^x for x <= 0, 2.3 ulp; 0 where the result would be below 1e-38. NaN passes.
QFX_F32 Vec exp2_nonpositive(Vec x) {
  const Vec t = max(all(-127.0f), x);
  const Vec z = t + kRounder, r = t - (z - kRounder);
  // (2^r - 1) / r, relative error of 2^r 9.2e-8
  const Vec p = polynomial(r, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b754p-5f, 0x1.3ceab4p-7f, 0x1.5bb9e4p-10f);
  return fma(r, p, all(1.0f)) * power_of_two(z);
}

// 2.5 ulp.
QFX_F32 Vec tanh(Vec x) {
  const Vec t = expm1_nonpositive(-2.0f * absolute(x));
  return with_sign(t / (t + 2.0f), x);
}

// 1.4 ulp. Below 1 a polynomial in x^2, above 1 - 2^p(|x|).
QFX_F32 Vec erf(Vec x) {
  const Vec size = min(all(4.0f), absolute(x)), z = size * size;
  // erf(x) / x - 1, error relative to erf 1.2e-9
  const Vec inner = polynomial(z, 0x1.06eba8p-3f, -0x1.81273ep-2f, 0x1.ce2cf8p-4f, -0x1.b7f90ep-6f, 0x1.5405b2p-8f,
                               -0x1.a3f7p-11f, 0x1.496a32p-14f);
  // log2(1 - erf(x)) on [1, 4], absolute error of erf 1.5e-9
  const Vec outer = polynomial(size, -0x1.09ee5cp-11f, -0x1.a040b2p0f, -0x1.d76bfcp-1f, -0x1.3078a4p-3f,
                               0x1.01c4a2p-5f, -0x1.160d48p-8f, 0x1.18ea0ap-12f);
  return size < 1.0f ? fma(x, inner, x) : with_sign(1.0f - exp2_nonpositive(outer), x);
}

// What lies above `a` of the normal distribution, (1 - erf(a / sqrt 2)) / 2, for a in [0, 14]: absolute error 6e-8, and
// relative error 0.5 % up to 6, where 1e-9 is left.
QFX_F32 Vec normal_tail(Vec a) {
  // log2 of it on [0, 6], absolute error of the tail 3.5e-8; falls steeply from there on
  return exp2_nonpositive(polynomial(a, -0x1.fffffep-1f, -0x1.26af12p0f, -0x1.d631cep-2f, -0x1.af0234p-5f,
                                     0x1.db7604p-8f, -0x1.3a694p-12f, -0x1.d87192p-14f, 0x1.7eab46p-16f,
                                     -0x1.72b388p-20f));
}

// x / (1 + e^-y): with x = y silu, with x = 1 the logistic function. 3.3 ulp, but 0 where e^y would be below 1e-38.
QFX_F32 Vec gated(Vec x, Vec y) {
  const Vec e = exp_nonpositive(-absolute(y));
  return (y < 0.0f ? x * e : x) / (e + 1.0f);
}

}  // namespace qfx::f32
