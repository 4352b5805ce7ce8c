// Vectors of floats in the width of the CPU: AVX-512F 16, AVX2 with FMA 8, SSE2 4, else 4 in the compiler's own vectors
// (`-DQFX_PLAIN_VECTORS` asks for those anywhere). Arithmetic, comparisons and `mask ? a : b` are operators of g++'s
// vector extension; this file adds what is missing there.
//
// What comes in a last, shorter piece is written once: functions take `lanes`, which is Whole{} or First{count}.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(QFX_PLAIN_VECTORS)
#include <immintrin.h>
#define QFX_F32_X86 1
#if defined(__AVX512F__)
#define QFX_F32_LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define QFX_F32_LANES 8
#endif
#endif
#ifndef QFX_F32_LANES
#define QFX_F32_LANES 4
#endif

#define QFX_F32 [[gnu::always_inline]] inline

namespace qfx::f32 {

constexpr int kLanes = QFX_F32_LANES;
constexpr int kRegisters = QFX_F32_LANES == 16 ? 32 : 16;  // of vectors; more than there are costs time, fewer do not

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

struct Whole {};

struct First {
  int64_t count;  // 1 .. kLanes - 1
};

QFX_F32 Vec all(float value) { return value - Vec{}; }  // folded, where adding 0 is not: it changes -0

QFX_F32 IntVec bits(Vec v) { return reinterpret_cast<IntVec>(v); }
QFX_F32 Vec from_bits(IntVec i) { return reinterpret_cast<Vec>(i); }

QFX_F32 IntVec lane_numbers() {
#if QFX_F32_LANES == 16
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif QFX_F32_LANES == 8
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return IntVec{0, 1, 2, 3};
#endif
}

// True (-1) in the lanes that are there.
QFX_F32 IntVec mask(First lanes) { return lane_numbers() < static_cast<int32_t>(lanes.count); }

// `v` with `filler` in the lanes that are not there.
QFX_F32 Vec fill(Vec v, float, Whole) { return v; }
QFX_F32 Vec fill(Vec v, float filler, First lanes) { return mask(lanes) ? v : all(filler); }

QFX_F32 Vec load(const float* p, Whole = {}) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

QFX_F32 void store(float* p, Vec v, Whole = {}) { std::memcpy(p, &v, sizeof v); }

#if QFX_F32_LANES == 16

// Lanes that are not there are 0.
QFX_F32 Vec load(const float* p, First lanes) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.count) - 1), p);
}
QFX_F32 void store(float* p, Vec v, First lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes.count) - 1), v);
}
QFX_F32 Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Of min and max the second operand is the result where either is NaN.
QFX_F32 Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
QFX_F32 Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
QFX_F32 Vec round_half_even(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QFX_F32 Vec square_root(Vec v) { return _mm512_sqrt_ps(v); }
QFX_F32 float sum(Vec v) { return _mm512_reduce_add_ps(v); }
QFX_F32 float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// Integers that fit T, which is uint8_t or int8_t.
template <class T>
QFX_F32 void store_bytes(T* p, IntVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}
QFX_F32 IntVec load_bytes(const uint8_t* p) {
  return reinterpret_cast<IntVec>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
QFX_F32 IntVec load_bytes(const int8_t* p) {
  return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif QFX_F32_LANES == 8

QFX_F32 Vec load(const float* p, First lanes) {
  return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask(lanes)));
}
QFX_F32 void store(float* p, Vec v, First lanes) {
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(mask(lanes)), v);
}
QFX_F32 Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
QFX_F32 Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
QFX_F32 Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
QFX_F32 Vec round_half_even(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QFX_F32 Vec square_root(Vec v) { return _mm256_sqrt_ps(v); }
QFX_F32 float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
QFX_F32 float largest(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
QFX_F32 __m256i saturated(__m256i a, __m256i b, const uint8_t*) { return _mm256_packus_epi16(a, b); }
QFX_F32 __m256i saturated(__m256i a, __m256i b, const int8_t*) { return _mm256_packs_epi16(a, b); }
// Packing keeps to the halves of registers: fours of bytes come out as 0 1 2 3 of one half, then of the other.
template <class T>
QFX_F32 void store_bytes(T* p, IntVec a, IntVec b, IntVec c, IntVec d) {
  const __m256i ab = _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  const __m256i cd = _mm256_packs_epi32(reinterpret_cast<__m256i>(c), reinterpret_cast<__m256i>(d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(saturated(ab, cd, p), order));
}
template <class T>
QFX_F32 void store_bytes(T* p, IntVec a, IntVec b) {
  const __m256i words = _mm256_packs_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(saturated(words, words, p), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
}
template <class T>
QFX_F32 void store_bytes(T* p, IntVec v) {
  const __m256i wide = reinterpret_cast<__m256i>(v);
  const __m256i words = _mm256_packs_epi32(wide, _mm256_castsi128_si256(_mm256_extracti128_si256(wide, 1)));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(saturated(words, words, p)));
}
QFX_F32 IntVec load_bytes(const uint8_t* p) {
  return reinterpret_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
QFX_F32 IntVec load_bytes(const int8_t* p) {
  return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#else

QFX_F32 Vec load(const float* p, First lanes) {
  Vec v{};
  for (int i = 0; i < lanes.count; ++i) v[i] = p[i];
  return v;
}
QFX_F32 void store(float* p, Vec v, First lanes) {
  for (int i = 0; i < lanes.count; ++i) p[i] = v[i];
}
QFX_F32 Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF) && !defined(QFX_F32_X86)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
// Adding and taking away 2^23 leaves no fraction; larger numbers have none.
QFX_F32 Vec round_half_even(Vec v) {
  const IntVec sign = bits(v) & INT32_MIN;
  const Vec size = from_bits(bits(v) & INT32_MAX);
  const Vec rounded = (size + 0x1p23f) - 0x1p23f;
  return from_bits(bits(size < 0x1p23f ? rounded : size) | sign);
}
QFX_F32 Vec square_root(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
}
QFX_F32 float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#if defined(QFX_F32_X86)
QFX_F32 Vec min(Vec a, Vec b) { return _mm_min_ps(a, b); }
QFX_F32 Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
#else
QFX_F32 Vec min(Vec a, Vec b) { return a < b ? a : b; }
QFX_F32 Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
QFX_F32 float largest(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
template <class T>
QFX_F32 void store_bytes(T* p, IntVec v) {
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}
QFX_F32 IntVec load_bytes(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
}
QFX_F32 IntVec load_bytes(const int8_t* p) {
  SignedBytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
}

#endif

#if QFX_F32_LANES != 8
template <class T>
QFX_F32 void store_bytes(T* p, IntVec a, IntVec b) {
  store_bytes(p, a);
  store_bytes(p + kLanes, b);
}
template <class T>
QFX_F32 void store_bytes(T* p, IntVec a, IntVec b, IntVec c, IntVec d) {
  store_bytes(p, a, b);
  store_bytes(p + 2 * kLanes, c, d);
}
#endif

template <class T>
QFX_F32 IntVec load_bytes(const T* p, Whole) {
  return load_bytes(p);
}
template <class T>
QFX_F32 IntVec load_bytes(const T* p, First lanes) {
  T all[kLanes] = {};
  for (int i = 0; i < lanes.count; ++i) all[i] = p[i];
  return load_bytes(all);
}
template <class T>
QFX_F32 void store_bytes(T* p, IntVec v, Whole) {
  store_bytes(p, v);
}
template <class T>
QFX_F32 void store_bytes(T* p, IntVec v, First lanes) {
  T all[kLanes];
  store_bytes(all, v);
  for (int i = 0; i < lanes.count; ++i) p[i] = all[i];
}

// Magnitude of the first, sign of the second.
QFX_F32 Vec with_sign(Vec magnitude, Vec sign) {
  return from_bits((bits(magnitude) & INT32_MAX) | (bits(sign) & INT32_MIN));
}
QFX_F32 Vec absolute(Vec v) { return from_bits(bits(v) & INT32_MAX); }

// fn(i, lanes) for the vectors that begin at i = 0, kLanes, ... below n.
template <class Fn>
QFX_F32 void each_vector(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, Whole{});
  if (i < n) fn(i, First{n - i});
}

// Two sums at once.
struct Two {
  Vec a, b;
};
QFX_F32 Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
QFX_F32 Two fill(Two v, float filler, First lanes) { return {fill(v.a, filler, lanes), fill(v.b, filler, lanes)}; }
struct TwoSums {
  float a, b;
};
QFX_F32 TwoSums sum(Two v) { return {sum(v.a), sum(v.b)}; }

// The sum of term(i, lanes), a Vec or Two, over [0, n), in four chains, whose results are added in a fixed order.
template <class Fn>
QFX_F32 auto sum_over(int64_t n, const Fn& term) {
  decltype(term(n, Whole{})) a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = a + term(i, Whole{});
    b = b + term(i + kLanes, Whole{});
    c = c + term(i + 2 * kLanes, Whole{});
    d = d + term(i + 3 * kLanes, Whole{});
  }
  for (; i + kLanes <= n; i += kLanes) a = a + term(i, Whole{});
  if (i < n) b = b + fill(term(i, First{n - i}), 0.0f, First{n - i});
  return sum((a + b) + (c + d));
}

// The largest value(i, lanes) over [0, n), NaN passed over or not; -inf if there is none.
template <class Fn>
QFX_F32 float largest_over(int64_t n, const Fn& value) {
  const float least = -__builtin_inff();
  Vec a = all(least), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a = max(value(i, Whole{}), a);
    b = max(value(i + kLanes, Whole{}), b);
    c = max(value(i + 2 * kLanes, Whole{}), c);
    d = max(value(i + 3 * kLanes, Whole{}), d);
  }
  for (; i + kLanes <= n; i += kLanes) a = max(value(i, Whole{}), a);
  if (i < n) b = max(fill(value(i, First{n - i}), least, First{n - i}), b);
  return largest(max(max(a, b), max(c, d)));
}

}  // namespace qfx::f32
