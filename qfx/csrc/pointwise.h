// Elementwise functions of integers that lie side by side: table lookup, add and mul.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "numerics.h"

namespace qfx {

#if defined(__AVX2__) && !(defined(__AVX512VBMI__) && defined(__AVX512BW__))
// The first elements of lookup() in whole vectors; returns how many.
//
// A shuffle picks by four bits out of a row of 16, and gives 0 where the index is negative. Row k holds what changes from
// row k - 1 of the table: with an index that falls by 16 from row to row, and stays negative once it is, the xor of all
// is the wanted row's entry. A signed index reaches 8 rows, so the table's two halves are looked up apart.
inline int64_t lookup_by_shuffles(const uint8_t* __restrict in, const uint8_t* __restrict table, uint8_t* __restrict out,
                           int64_t n, uint8_t flip) {
  __m256i changes[16];
  for (int k = 0; k < 16; ++k) {
    const auto row = [&](int at) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * at)));
    };
    changes[k] = k % 8 == 0 ? row(k) : _mm256_xor_si256(row(k), row(k - 1));
  }
  const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip)), top = _mm256_set1_epi8(static_cast<char>(0x80)),
                step = _mm256_set1_epi8(16);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i low = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)), flips);
    __m256i high = _mm256_xor_si256(low, top);
    __m256i a = _mm256_shuffle_epi8(changes[0], low), b = _mm256_shuffle_epi8(changes[8], high);
    for (int k = 1; k < 8; ++k) {
      low = _mm256_subs_epi8(low, step);
      high = _mm256_subs_epi8(high, step);
      a = _mm256_xor_si256(a, _mm256_shuffle_epi8(changes[k], low));
      b = _mm256_xor_si256(b, _mm256_shuffle_epi8(changes[8 + k], high));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_xor_si256(a, b));
  }
  return i;
}
#endif

// out[i] = table[in[i] ^ flip]: flip 0x80 makes a table in the order of int8 values one in the order of their bytes.
inline void lookup(const uint8_t* __restrict in, const uint8_t* __restrict table, uint8_t* __restrict out, int64_t n,
            uint8_t flip) {
  int64_t i = 0;
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
  // The table is four registers; a permute picks by seven bits out of two, the eighth bit chooses between the pairs.
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64),
                t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192),
                flips = _mm512_set1_epi8(static_cast<char>(flip));
  for (; i + 64 <= n; i += 64) {
    const __m512i index = _mm512_xor_si512(_mm512_loadu_si512(in + i), flips);
    const __m512i lower = _mm512_permutex2var_epi8(t0, index, t1), upper = _mm512_permutex2var_epi8(t2, index, t3);
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), lower, upper));
  }
#elif defined(__AVX2__)
  i = lookup_by_shuffles(in, table, out, n, flip);
#endif
  for (; i < n; ++i) out[i] = table[in[i] ^ flip];
}

struct Affine {
  float scale;
  int32_t zero_point;
};

struct Bounded {
  float inverse, zero_point, low, high, quant_min, quant_max;
};

// Real operands, low and high bound the real result (a fused relu or clamp).
template <bool kMultiply, class A, class B, class T>
void binary(const A* __restrict a, Affine in_a, const B* __restrict b, Affine in_b, T* __restrict out, Bounded to,
            int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float x = dequantized(a[i], in_a.scale, in_a.zero_point), y = dequantized(b[i], in_b.scale, in_b.zero_point);
    const float r = clamp(kMultiply ? x * y : x + y, to.low, to.high);
    out[i] = quantized<T>(r, to.inverse, to.zero_point, to.quant_min, to.quant_max);
  }
}

}  // namespace qfx
