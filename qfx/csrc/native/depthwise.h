// Depthwise convolutions, vectorized over channels: every channel has a kernel of its own, and no sum crosses channels.

#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "dot_portable.h"
#include "image.h"
#include "team.h"

namespace qfx {

constexpr int kDepthwise = 16;  // channels at a time

struct Depthwise {
  Image in, out, other;
  int64_t step_y, step_x;  // input elements from one output position to the next
  int64_t first;           // from in.at(n, 0, 0) to the first element of the window of output position (0, 0)
  const int32_t* offsets;  // of the window's elements, from its first, in the order of the weights
  int taps;                // an even number: some may be of weight zero
  uint8_t flip;            // as for Conv
};

// What is known of the windows of a row: elements side by side, their taps in pairs of two rows, column by column; from
// one window to the next kStride of them. With a width of 0 nothing is, and any two taps are a pair.
template <int kHeight, int kWidth, int kStride>
struct Windows {};

// Weights: [blocks of channels][taps / 2][kDepthwise][2], int16, in the order of kInterleaved.
constexpr int kInterleaved[kDepthwise] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

// Exact sums of one position.
template <class Dot>
struct DepthwiseSums {
  static void run(const uint8_t* x, const Depthwise& c, const int16_t* w, int32_t* sums) {
#if defined(__AVX2__)
    const __m128i flips = _mm_set1_epi8(static_cast<char>(c.flip));
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int tap = 0; tap < c.taps; tap += 2, w += 2 * kDepthwise) {
      const __m256i a = widened(x + c.offsets[tap], flips), b = widened(x + c.offsets[tap + 1], flips);
      low = add(low, _mm256_unpacklo_epi16(a, b), w);
      high = add(high, _mm256_unpackhi_epi16(a, b), w + kDepthwise);
    }
    store(sums, low, high);
#else
    DepthwiseSums<DotPortable>::run(x, c, w, sums);
#endif
  }

#if defined(__AVX2__)
  // Of kPositions side by side: what two rows of a column give is interleaved once, for all windows that it is in.
  template <int kPositions, int kHeight, int kWidth, int kStride>
  [[gnu::noinline, gnu::noclone]] static void run(Windows<kHeight, kWidth, kStride>, const uint8_t* x,
                                                  const Depthwise& c, const int16_t* w, int32_t* sums) {
    const __m128i flips = _mm_set1_epi8(static_cast<char>(c.flip));
    const int64_t column = c.offsets[2] - c.offsets[0];
    __m256i low[kPositions], high[kPositions];
#pragma GCC unroll 4
    for (int i = 0; i < kPositions; ++i) low[i] = high[i] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int row = 0; row < kHeight; row += 2, w += 2 * kWidth * kDepthwise) {
      const uint8_t *upper = x + c.offsets[row * kWidth], *lower = x + c.offsets[row * kWidth + 1];
#pragma GCC unroll 16
      for (int k = 0; k < (kPositions - 1) * kStride + kWidth; ++k, upper += column, lower += column) {
        const __m256i a = widened(upper, flips), b = row + 1 < kHeight ? widened(lower, flips) : _mm256_setzero_si256();
        const __m256i lows = _mm256_unpacklo_epi16(a, b), highs = _mm256_unpackhi_epi16(a, b);
#pragma GCC unroll 4
        for (int i = 0; i < kPositions; ++i) {
          const int tap = k - i * kStride;
          if (tap < 0 || tap >= kWidth) continue;
          low[i] = add(low[i], lows, w + 2 * tap * kDepthwise);
          high[i] = add(high[i], highs, w + (2 * tap + 1) * kDepthwise);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPositions; ++i) store(sums + i * kDepthwise, low[i], high[i]);
  }

 private:
  static __m256i widened(const uint8_t* x, __m128i flips) {
    return _mm256_cvtepu8_epi16(_mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), flips));
  }
  static __m256i add(__m256i sum, __m256i pairs, const int16_t* w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))));
  }
  // `low`: channels 0-3 and 8-11, `high`: 4-7 and 12-15.
  static void store(int32_t* sums, __m256i low, __m256i high) {
    auto* to = reinterpret_cast<__m256i*>(sums);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
#endif
};

template <>
struct DepthwiseSums<DotPortable> {
  static void run(const uint8_t* x, const Depthwise& c, const int16_t* w, int32_t* sums) {
    for (int j = 0; j < kDepthwise; ++j) sums[j] = 0;
    for (int tap = 0; tap < c.taps; tap += 2, w += 2 * kDepthwise) {
      const uint8_t *a = x + c.offsets[tap], *b = x + c.offsets[tap + 1];
      for (int i = 0; i < kDepthwise; ++i) {
        const int j = kInterleaved[i];
        sums[j] += (a[j] ^ c.flip) * w[2 * i] + (b[j] ^ c.flip) * w[2 * i + 1];
      }
    }
  }
};

template <class Dot, int kHeight, int kWidth, int kStride, class Epilogue>
[[gnu::noinline, gnu::noclone]] void conv_depthwise(const Team& team, Windows<kHeight, kWidth, kStride> windows,
                                                    const Depthwise& c, int64_t count, const void* in,
                                                    const int16_t* weight,
                                                    const Epilogue epilogue) {  // a copy, as for conv
  constexpr int kPositions = 4;
  const auto* x = static_cast<const uint8_t*>(in);
  const int blocks = (c.out.channels + kDepthwise - 1) / kDepthwise;
  const auto tasks = team.share(count * c.out.height * blocks);
  alignas(32) int32_t sums[kPositions * kDepthwise];
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t row = task / blocks, n = row / c.out.height;
    const int y = static_cast<int>(row - n * c.out.height), channel = static_cast<int>(task - row * blocks) * kDepthwise;
    const int16_t* w = weight + static_cast<int64_t>(channel) * c.taps;
    const uint8_t* window = x + c.in.at(n, 0, 0) + c.first + y * c.step_y + channel;
    const int left = c.out.channels - channel, valid = left < kDepthwise ? left : kDepthwise;
    int i = 0;
    const auto finish = [&](int positions) {
      for (int k = 0; k < positions; ++k, ++i, window += c.step_x) {
        epilogue.template run<kDepthwise>(sums + k * kDepthwise, channel, channel, valid, c.out.at(n, y, i),
                                          c.other.at(n, y, i));
      }
    };
#if defined(__AVX2__)
    if constexpr (kWidth > 0 && !std::is_same_v<Dot, DotPortable>) {
      for (; i + kPositions <= c.out.width; finish(kPositions)) {
        DepthwiseSums<Dot>::template run<kPositions>(windows, window, c, w, sums);
      }
    }
#endif
    for (; i < c.out.width; finish(1)) DepthwiseSums<Dot>::run(window, c, w, sums);
  }
}

}  // namespace qfx
