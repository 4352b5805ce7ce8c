// Exact sums of products of bytes for AVX2 without VNNI: pairs of int16, since vpmaddubsw on bytes saturates.
// vpmaddwd takes half as many products as vpmaddubsw, but needs no second multiplication to widen its sums: on CPUs that
// start two vector multiplications a cycle both reach 32 products a cycle.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qfx {

struct DotAvx2 {
  using Vec = __m256i;
  using Data = int16_t;
  using Weight = int8_t;
  static constexpr int kLanes = 8, kUnit = 2, kRows = 6, kVecs = 2;

  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec splat(const Data* data) {
    int32_t pair;
    std::memcpy(&pair, data, sizeof pair);
    return _mm256_set1_epi32(pair);
  }
  static Vec weights(const Weight* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static Vec dot(Vec sum, Vec data, Vec w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(data, w)); }
  static void store(int32_t* to, Vec sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum); }

  // Reads up to 15 bytes behind `from + count`.
  static void widen(Data* to, const uint8_t* from, int count, uint8_t flip) {
    const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
    for (int i = 0; i < count; i += 16) {
      const __m128i bytes = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)), flips);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepu8_epi16(bytes));
    }
  }
};

// The same with weights of 16 bits, as a transformed kernel has.
struct DotAvx2Wide : DotAvx2 {
  using Weight = int16_t;
  static Vec weights(const Weight* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
};

}  // namespace qfx
