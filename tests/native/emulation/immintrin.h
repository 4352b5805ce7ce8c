// A stand-in for g++'s <immintrin.h>: what qfx/csrc/native uses of AVX2, FMA, AVX-VNNI, AVX-512 and AMX, in plain C++,
// so that code for those instructions runs on any x86-64 CPU. Put its folder first with -I, compile for -march=x86-64,
// and define the features that are to be there (-D__AVX512F__ ...) and QFX_EMULATED: vectors are wider than registers,
// so that asm cannot have them as operands.
//
// Every function does what Intel's Intrinsics Guide says its instruction does. Where a CPU would raise a fault (tiles
// without a configuration, shapes that do not fit), the process ends.

#pragma once

#include <emmintrin.h>  // SSE2, which every x86-64 CPU has
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

typedef float __m256 __attribute__((vector_size(32), may_alias));
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef uint16_t __mmask16;

#define _MM_FROUND_TO_NEAREST_INT 0x00
#define _MM_FROUND_NO_EXC 0x08

namespace emulated {

#define EMULATED [[gnu::noinline]] inline

// The elements of a vector, T by T.
template <class T, class Vector>
struct Lanes {
  static constexpr int count = sizeof(Vector) / sizeof(T);
  T at[count];
  Lanes() : at{} {}
  explicit Lanes(const Vector& v) { std::memcpy(at, &v, sizeof v); }
  T& operator[](int i) { return at[i]; }
  const T& operator[](int i) const { return at[i]; }
  operator Vector() const {
    Vector v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
};

template <class T, class Vector>
EMULATED Lanes<T, Vector> lanes(const Vector& v) {
  return Lanes<T, Vector>(v);
}

template <class Vector>
EMULATED Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class T>
EMULATED Vector all(T value) {
  Lanes<T, Vector> v;
  for (T& lane : v.at) lane = value;
  return v;
}

template <class T, class Vector, class Fn>
EMULATED Vector each(const Vector& a, const Vector& b, const Fn& fn) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  Lanes<T, Vector> v;
  for (int i = 0; i < v.count; ++i) v[i] = fn(x[i], y[i]);
  return v;
}

// From in a narrow vector to To in a wide one, or the other way; what is left over is zero.
template <class From, class To, class Wide, class Narrow>
EMULATED Wide converted(const Narrow& a) {
  const auto x = lanes<From>(a);
  Lanes<To, Wide> v;
  for (int i = 0; i < v.count && i < x.count; ++i) v[i] = static_cast<To>(x[i]);
  return v;
}

template <class To, class From>
EMULATED To saturated(From x) {
  constexpr From low = static_cast<To>(-1) < 0 ? -(From{1} << (8 * sizeof(To) - 1)) : 0;
  constexpr From high = low + static_cast<From>((int64_t{1} << (8 * sizeof(To))) - 1);
  return static_cast<To>(x < low ? low : x > high ? high : x);
}

// Within every 128 bits those of a, then those of b.
template <class From, class To, class Vector>
EMULATED Vector packed(const Vector& a, const Vector& b) {
  const auto x = lanes<From>(a), y = lanes<From>(b);
  Lanes<To, Vector> v;
  constexpr int half = 16 / sizeof(From);
  for (int i = 0; i < v.count; ++i) {
    const int part = i / (2 * half), at = i % (2 * half);
    v[i] = saturated<To>(at < half ? x[part * half + at] : y[part * half + at - half]);
  }
  return v;
}

template <class T, int kUpper, class Vector>
EMULATED Vector interleaved(const Vector& a, const Vector& b) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  Lanes<T, Vector> v;
  constexpr int part = 16 / sizeof(T);
  for (int i = 0; i < v.count; ++i) {
    const int from = i / part * part + kUpper * part / 2 + i % part / 2;
    v[i] = i % 2 == 0 ? x[from] : y[from];
  }
  return v;
}

template <class Vector>
EMULATED Vector shuffled_bytes(const Vector& a, const Vector& by) {
  const auto x = lanes<uint8_t>(a), at = lanes<uint8_t>(by);
  Lanes<uint8_t, Vector> v;
  for (int i = 0; i < v.count; ++i) v[i] = at[i] & 128 ? 0 : x[i / 16 * 16 + at[i] % 16];
  return v;
}

template <class Vector>
EMULATED Vector pair_sums(const Vector& a, const Vector& b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  Lanes<uint32_t, Vector> v;
  for (int i = 0; i < v.count; ++i) {
    v[i] = static_cast<uint32_t>(x[2 * i] * y[2 * i]) + static_cast<uint32_t>(x[2 * i + 1] * y[2 * i + 1]);
  }
  return v;
}

template <class Vector>
EMULATED Vector saturating_pair_sums(const Vector& a, const Vector& b) {
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  Lanes<int16_t, Vector> v;
  for (int i = 0; i < v.count; ++i) v[i] = saturated<int16_t>(x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]);
  return v;
}

inline int32_t four_products(const uint8_t* a, const int8_t* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

inline int32_t wrapped_sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

template <class Vector>
EMULATED Vector dpbusd(const Vector& sums, const Vector& a, const Vector& b) {
  auto v = lanes<int32_t>(sums);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  for (int i = 0; i < v.count; ++i) v[i] = wrapped_sum(v[i], four_products(&x.at[4 * i], &y.at[4 * i]));
  return v;
}

template <class Vector>
EMULATED Vector fmadd(const Vector& a, const Vector& b, const Vector& c) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  auto v = lanes<float>(c);
  for (int i = 0; i < v.count; ++i) v[i] = std::fma(x[i], y[i], v[i]);
  return v;
}

template <class Vector>
EMULATED Vector round_even(const Vector& a) {
  auto v = lanes<float>(a);
  for (float& lane : v.at) lane = std::nearbyint(lane);
  return v;
}

template <class Vector>
EMULATED Vector sqrt_ps(Vector a) {
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(float); ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
template <class Vector>
EMULATED Vector min_ps(const Vector& a, const Vector& b) {
  return each<float>(a, b, [](float x, float y) { return x < y ? x : y; });
}

template <class Vector>
EMULATED Vector max_ps(const Vector& a, const Vector& b) {
  return each<float>(a, b, [](float x, float y) { return x > y ? x : y; });
}

template <int kElements, class Fn>
EMULATED float halved(const __m512& a, const Fn& fn) {
  auto v = lanes<float>(a);
  for (int size = kElements / 2; size > 0; size /= 2) {
    for (int i = 0; i < size; ++i) v[i] = fn(v[i], v[i + size]);
  }
  return v[0];
}

}  // namespace emulated

// --- SSE3, SSSE3 -----------------------------------------------------------------------------------------------------

EMULATED __m128 _mm_movehdup_ps(__m128 a) { return __m128{a[1], a[1], a[3], a[3]}; }
EMULATED __m128i _mm_shuffle_epi8(__m128i a, __m128i b) { return emulated::shuffled_bytes(a, b); }

// --- AVX, AVX2, FMA, AVX-VNNI ----------------------------------------------------------------------------------------

EMULATED __m256i _mm256_setzero_si256() { return __m256i{}; }
EMULATED __m256i _mm256_set1_epi8(char x) { return emulated::all<__m256i>(x); }
EMULATED __m256i _mm256_set1_epi16(short x) { return emulated::all<__m256i>(x); }
EMULATED __m256i _mm256_set1_epi32(int x) { return emulated::all<__m256i>(x); }
EMULATED __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h) {
  const int lanes[8] = {a, b, c, d, e, f, g, h};
  return emulated::load<__m256i>(lanes);
}
EMULATED __m256i _mm256_loadu_si256(const __m256i* p) { return emulated::load<__m256i>(p); }
EMULATED void _mm256_storeu_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof v); }
EMULATED void _mm256_store_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof v); }
EMULATED __m256 _mm256_maskload_ps(const float* p, __m256i mask) {
  const auto wanted = emulated::lanes<int32_t>(mask);
  emulated::Lanes<float, __m256> v;
  for (int i = 0; i < 8; ++i) v[i] = wanted[i] < 0 ? p[i] : 0.0f;
  return v;
}
EMULATED void _mm256_maskstore_ps(float* p, __m256i mask, __m256 v) {
  const auto wanted = emulated::lanes<int32_t>(mask);
  for (int i = 0; i < 8; ++i) {
    if (wanted[i] < 0) p[i] = v[i];
  }
}

EMULATED __m128 _mm256_castps256_ps128(__m256 a) { return __m128{a[0], a[1], a[2], a[3]}; }
EMULATED __m128i _mm256_castsi256_si128(__m256i a) { return __m128i{a[0], a[1]}; }
EMULATED __m256i _mm256_castsi128_si256(__m128i a) { return __m256i{a[0], a[1], 0, 0}; }
EMULATED __m128 _mm256_extractf128_ps(__m256 a, int half) {
  return half ? __m128{a[4], a[5], a[6], a[7]} : _mm256_castps256_ps128(a);
}
EMULATED __m128i _mm256_extracti128_si256(__m256i a, int half) { return __m128i{a[2 * half], a[2 * half + 1]}; }
EMULATED __m256i _mm256_permute2x128_si256(__m256i a, __m256i b, int control) {
  __m256i v{};
  for (int half = 0; half < 2; ++half) {
    const int from = control >> (4 * half);
    if (from & 8) continue;
    const __m256i& source = from & 2 ? b : a;
    v[2 * half] = source[2 * (from & 1)];
    v[2 * half + 1] = source[2 * (from & 1) + 1];
  }
  return v;
}
EMULATED __m256i _mm256_permutevar8x32_epi32(__m256i a, __m256i by) {
  const auto x = emulated::lanes<int32_t>(a), at = emulated::lanes<int32_t>(by);
  emulated::Lanes<int32_t, __m256i> v;
  for (int i = 0; i < 8; ++i) v[i] = x[at[i] & 7];
  return v;
}
EMULATED __m256i _mm256_unpacklo_epi16(__m256i a, __m256i b) { return emulated::interleaved<int16_t, 0>(a, b); }
EMULATED __m256i _mm256_unpackhi_epi16(__m256i a, __m256i b) { return emulated::interleaved<int16_t, 1>(a, b); }
EMULATED __m256i _mm256_shuffle_epi8(__m256i a, __m256i b) { return emulated::shuffled_bytes(a, b); }
EMULATED __m256i _mm256_packs_epi32(__m256i a, __m256i b) { return emulated::packed<int32_t, int16_t>(a, b); }
EMULATED __m256i _mm256_packs_epi16(__m256i a, __m256i b) { return emulated::packed<int16_t, int8_t>(a, b); }
EMULATED __m256i _mm256_packus_epi16(__m256i a, __m256i b) { return emulated::packed<int16_t, uint8_t>(a, b); }
EMULATED __m256i _mm256_cvtepi8_epi16(__m128i a) { return emulated::converted<int8_t, int16_t, __m256i>(a); }
EMULATED __m256i _mm256_cvtepu8_epi16(__m128i a) { return emulated::converted<uint8_t, int16_t, __m256i>(a); }
EMULATED __m256i _mm256_cvtepi8_epi32(__m128i a) { return emulated::converted<int8_t, int32_t, __m256i>(a); }
EMULATED __m256i _mm256_cvtepu8_epi32(__m128i a) { return emulated::converted<uint8_t, int32_t, __m256i>(a); }

EMULATED __m256i _mm256_xor_si256(__m256i a, __m256i b) { return a ^ b; }
EMULATED __m256i _mm256_srai_epi32(__m256i a, int by) {
  return emulated::each<int32_t>(a, a, [by](int32_t x, int32_t) { return x >> by; });
}
EMULATED __m256i _mm256_add_epi32(__m256i a, __m256i b) {
  return emulated::each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
EMULATED __m256i _mm256_sub_epi32(__m256i a, __m256i b) {
  return emulated::each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
EMULATED __m256i _mm256_add_epi16(__m256i a, __m256i b) {
  return emulated::each<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x + y; });
}
EMULATED __m256i _mm256_sub_epi16(__m256i a, __m256i b) {
  return emulated::each<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x - y; });
}
EMULATED __m256i _mm256_madd_epi16(__m256i a, __m256i b) { return emulated::pair_sums(a, b); }
EMULATED __m256i _mm256_maddubs_epi16(__m256i a, __m256i b) { return emulated::saturating_pair_sums(a, b); }
EMULATED __m256i _mm256_dpbusd_avx_epi32(__m256i sums, __m256i a, __m256i b) { return emulated::dpbusd(sums, a, b); }

EMULATED __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) { return emulated::fmadd(a, b, c); }
EMULATED __m256 _mm256_sqrt_ps(__m256 a) { return emulated::sqrt_ps(a); }
EMULATED __m256 _mm256_min_ps(__m256 a, __m256 b) { return emulated::min_ps(a, b); }
EMULATED __m256 _mm256_max_ps(__m256 a, __m256 b) { return emulated::max_ps(a, b); }
EMULATED __m256 _mm256_round_ps(__m256 a, int) { return emulated::round_even(a); }

// --- AVX-512 F, BW, VNNI ---------------------------------------------------------------------------------------------

EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
EMULATED __m512i _mm512_set1_epi8(char x) { return emulated::all<__m512i>(x); }
EMULATED __m512i _mm512_set1_epi16(short x) { return emulated::all<__m512i>(x); }
EMULATED __m512i _mm512_set1_epi32(int x) { return emulated::all<__m512i>(x); }
EMULATED __m512i _mm512_loadu_si512(const void* p) { return emulated::load<__m512i>(p); }
EMULATED void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  emulated::Lanes<float, __m512> v;
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v[i] = static_cast<const float*>(p)[i];
  }
  return v;
}
EMULATED void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(p)[i] = v[i];
  }
}

EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) { return emulated::converted<int8_t, int32_t, __m512i>(a); }
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) { return emulated::converted<uint8_t, int32_t, __m512i>(a); }
EMULATED __m128i _mm512_cvtepi32_epi8(__m512i a) { return emulated::converted<int32_t, int8_t, __m128i>(a); }
EMULATED __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) { return emulated::shuffled_bytes(a, b); }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  return emulated::each<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x + y; });
}
EMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) { return emulated::pair_sums(a, b); }
EMULATED __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) { return emulated::saturating_pair_sums(a, b); }
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) { return emulated::dpbusd(sums, a, b); }

EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return emulated::fmadd(a, b, c); }
EMULATED __m512 _mm512_sqrt_ps(__m512 a) { return emulated::sqrt_ps(a); }
EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) { return emulated::min_ps(a, b); }
EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return emulated::max_ps(a, b); }
EMULATED __m512 _mm512_roundscale_ps(__m512 a, int) { return emulated::round_even(a); }
EMULATED float _mm512_reduce_add_ps(__m512 a) {
  return emulated::halved<16>(a, [](float x, float y) { return x + y; });
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
  return emulated::halved<16>(a, [](float x, float y) { return x > y ? x : y; });
}

// --- AMX -------------------------------------------------------------------------------------------------------------

namespace emulated {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Tiles {
  TileConfig config;
  uint8_t data[8][16][64];
};

inline thread_local Tiles tiles{};
inline std::atomic<long> tile_products{0};

// Memory that tiles may be loaded from; with none, any.
struct Range {
  const char* begin;
  long size;
};
inline const Range* ranges = nullptr;
inline int range_count = 0;
inline std::atomic<long> strays{0};

inline void note_stray(const char* row, long bytes) {
  for (int i = 0; i < range_count; ++i) {
    if (row >= ranges[i].begin && row + bytes <= ranges[i].begin + ranges[i].size) return;
  }
  if (range_count > 0) ++strays;
}

inline void must(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline void must_be_configured(int tile) {
  must(tiles.config.palette == 1, "tiles are used without a configuration");
  must(tile >= 0 && tile < 8 && tiles.config.rows[tile] > 0, "there is no such tile");
}

}  // namespace emulated

inline void _tile_loadconfig(const void* from) {
  emulated::TileConfig config;
  std::memcpy(&config, from, sizeof config);
  emulated::must(config.palette == 1, "only palette 1 has tiles");
  for (uint8_t byte : config.reserved) emulated::must(byte == 0, "a reserved byte of the configuration is not zero");
  for (int i = 0; i < 16; ++i) {
    const bool fits = config.rows[i] <= 16 && config.row_bytes[i] <= 64 && !config.rows[i] == !config.row_bytes[i];
    emulated::must(fits && (i < 8 || config.rows[i] == 0), "a tile of the configuration is too large");
  }
  emulated::tiles = {config, {}};
}

inline void _tile_release() { emulated::tiles = {}; }

inline void _tile_zero(int tile) {
  emulated::must_be_configured(tile);
  std::memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
}

inline void _tile_loadd(int tile, const void* base, long stride) {
  _tile_zero(tile);
  const auto& config = emulated::tiles.config;
  for (int r = 0; r < config.rows[tile]; ++r) {
    const char* row = static_cast<const char*>(base) + r * stride;
    emulated::note_stray(row, config.row_bytes[tile]);
    std::memcpy(emulated::tiles.data[tile][r], row, config.row_bytes[tile]);
  }
}

inline void _tile_stored(int tile, void* base, long stride) {
  emulated::must_be_configured(tile);
  const auto& config = emulated::tiles.config;
  for (int r = 0; r < config.rows[tile]; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, emulated::tiles.data[tile][r], config.row_bytes[tile]);
  }
}

inline void _tile_dpbusd(int sums, int a, int b) {
  for (int tile : {sums, a, b}) emulated::must_be_configured(tile);
  auto& [config, data] = emulated::tiles;
  const int rows = config.rows[sums], columns = config.row_bytes[sums] / 4, depth = config.row_bytes[a] / 4;
  const bool fits = config.rows[a] == rows && config.row_bytes[b] == 4 * columns && config.rows[b] == depth;
  emulated::must(fits && sums != a && sums != b && a != b, "tiles that do not fit are multiplied");
  for (int r = 0; r < rows; ++r) {
    int32_t sum[16];
    std::memcpy(sum, data[sums][r], sizeof sum);
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < columns; ++n) {
        const auto* weight = reinterpret_cast<const int8_t*>(data[b][k] + 4 * n);
        sum[n] = emulated::wrapped_sum(sum[n], emulated::four_products(data[a][r] + 4 * k, weight));
      }
    }
    std::memcpy(data[sums][r], sum, sizeof sum);
  }
  ++emulated::tile_products;
}

#define EMULATED_API extern "C" [[gnu::used, gnu::visibility("default")]] inline

// Products of tiles since the library was loaded.
EMULATED_API long emulated_tile_products() { return emulated::tile_products; }

// From now on, rows of tiles that are not loaded from one of the ranges are counted; the count so far.
EMULATED_API long emulated_strays(const emulated::Range* ranges, int count) {
  emulated::ranges = ranges;
  emulated::range_count = count;
  return emulated::strays;
}

// What the operating system answers to who asks for tiles.
#ifndef EMULATED_PERMISSION
#define EMULATED_PERMISSION 0L
#endif
#define syscall(...) EMULATED_PERMISSION

#undef EMULATED
#undef EMULATED_API
