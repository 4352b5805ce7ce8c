// Depthwise convolutions, vectorized over channels: every channel has a kernel of its own, and no sum crosses channels.

#pragma once

#include <cstdint>
#include <cstring>

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
  const int32_t* offsets;  // of the window's elements, from its first
  int taps;                // an even number: the last may be one of weight zero
  uint8_t flip;            // as for Conv
};

// Exact sums of one position; kTaps is the number of taps, or 0 where it is not known before.
// Weights: [blocks of channels][taps / 2][kDepthwise][2], int16, in the order of kInterleaved.
constexpr int kInterleaved[kDepthwise] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};

template <class Dot>
struct DepthwiseSums {
  template <int kTaps>
  static void run(const uint8_t* x, const Depthwise& c, const int16_t* w, int32_t* sums) {
#if defined(__AVX2__)
    const int taps = kTaps == 0 ? c.taps : kTaps;
    const __m128i flips = _mm_set1_epi8(static_cast<char>(c.flip));
    __m256i low = _mm256_setzero_si256(), high = low;  // channels 0-3 and 8-11, 4-7 and 12-15
#pragma GCC unroll 16
    for (int tap = 0; tap < taps; tap += 2) {
      __m256i data[2];
      for (int i = 0; i < 2; ++i) {
        const auto* at = reinterpret_cast<const __m128i*>(x + c.offsets[tap + i]);
        data[i] = _mm256_cvtepu8_epi16(_mm_xor_si128(_mm_loadu_si128(at), flips));
      }
      const auto* pair = reinterpret_cast<const __m256i*>(w + tap * kDepthwise);
      const __m256i w_low = _mm256_loadu_si256(pair), w_high = _mm256_loadu_si256(pair + 1);
      low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(data[0], data[1]), w_low));
      high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(data[0], data[1]), w_high));
    }
    auto* to = reinterpret_cast<__m256i*>(sums);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
#else
    DepthwiseSums<DotPortable>::template run<kTaps>(x, c, w, sums);
#endif
  }
};

template <>
struct DepthwiseSums<DotPortable> {
  template <int kTaps>
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

template <class Dot, int kTaps, class Epilogue>
void conv_depthwise_taps(const Team& team, const Depthwise& c, int64_t count, const void* in, const int16_t* weight,
                         const Epilogue& epilogue) {
  const auto* x = static_cast<const uint8_t*>(in);
  const int blocks = (c.out.channels + kDepthwise - 1) / kDepthwise;
  const auto tasks = team.share(count * c.out.height * blocks);
  alignas(32) int32_t sums[kDepthwise];
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t row = task / blocks, n = row / c.out.height;
    const int y = static_cast<int>(row - n * c.out.height), channel = static_cast<int>(task - row * blocks) * kDepthwise;
    const int16_t* w = weight + static_cast<int64_t>(channel) * c.taps;
    const uint8_t* window = x + c.in.at(n, 0, 0) + c.first + y * c.step_y + channel;
    const int left = c.out.channels - channel, valid = left < kDepthwise ? left : kDepthwise;
    for (int i = 0; i < c.out.width; ++i, window += c.step_x) {
      DepthwiseSums<Dot>::template run<kTaps>(window, c, w, sums);
      epilogue.template run<kDepthwise>(sums, channel, channel, valid, c.out.at(n, y, i), c.other.at(n, y, i));
    }
  }
}

template <class Dot, class Epilogue>
void conv_depthwise(const Team& team, const Depthwise& c, int64_t count, const void* in, const int16_t* weight,
                    const Epilogue& epilogue) {
  if (c.taps == 10) return conv_depthwise_taps<Dot, 10>(team, c, count, in, weight, epilogue);  // 3 x 3
  conv_depthwise_taps<Dot, 0>(team, c, count, in, weight, epilogue);
}

}  // namespace qfx
