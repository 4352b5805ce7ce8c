// Exact sums of products of bytes by VNNI: four at once into an int32, in 256 bits (AVX-VNNI) or 512 (AVX-512 VNNI).

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qfx {

inline int32_t four_bytes(const uint8_t* data) {
  int32_t four;
  std::memcpy(&four, data, sizeof four);
  return four;
}

#if defined(__AVXVNNI__)
struct DotAvxVnni {
  using Vec = __m256i;
  using Data = uint8_t;
  using Weight = int8_t;
  static constexpr int kLanes = 8, kUnit = 4, kRows = 6, kVecs = 2;

  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec splat(const Data* data) { return _mm256_set1_epi32(four_bytes(data)); }
  static Vec weights(const Weight* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
  static Vec dot(Vec sum, Vec data, Vec w) { return _mm256_dpbusd_avx_epi32(sum, data, w); }
  static void store(int32_t* to, Vec sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum); }

  // Reads and writes up to 31 bytes further.
  static void widen(Data* to, const uint8_t* from, int count, uint8_t flip) {
    const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip));
    for (int i = 0; i < count; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_xor_si256(bytes, flips));
    }
  }
};
#endif

#if defined(__AVX512VNNI__)
struct DotAvx512Vnni {
  using Vec = __m512i;
  using Data = uint8_t;
  using Weight = int8_t;
  static constexpr int kLanes = 16, kUnit = 4, kRows = 12, kVecs = 2;

  static Vec zero() { return _mm512_setzero_si512(); }
  static Vec splat(const Data* data) { return _mm512_set1_epi32(four_bytes(data)); }
  static Vec weights(const Weight* w) { return _mm512_loadu_si512(w); }
  static Vec dot(Vec sum, Vec data, Vec w) { return _mm512_dpbusd_epi32(sum, data, w); }
  static void store(int32_t* to, Vec sum) { _mm512_storeu_si512(to, sum); }

  // Reads and writes up to 63 bytes further.
  static void widen(Data* to, const uint8_t* from, int count, uint8_t flip) {
    const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
    for (int i = 0; i < count; i += 64) {
      _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), flips));
    }
  }
};
#endif

}  // namespace qfx
