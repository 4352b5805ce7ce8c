// Planes of floats to an image of integers.

#pragma once

#include <cstdint>

#if defined(__SSSE3__)
#include <immintrin.h>
#endif

#include "float_output.h"
#include "image.h"
#include "team.h"

namespace qfx {

// Where each byte of three interleaved vectors comes from: in[part][plane][byte], 128 where it is of another plane.
struct InterleaveThree {
  uint8_t in[3][3][16] = {};
  constexpr InterleaveThree() {
    for (int part = 0; part < 3; ++part) {
      for (int plane = 0; plane < 3; ++plane) {
        for (int i = 0; i < 16; ++i) {
          const int at = part * 16 + i;
          in[part][plane][i] = static_cast<uint8_t>(at % 3 == plane ? at / 3 : 128);
        }
      }
    }
  }
};

// Three planes side by side, as many of `width` positions as come in whole vectors; returns how many.
inline int interleave_three(const uint8_t* a, const uint8_t* b, const uint8_t* c, int width, uint8_t* to) {
  int i = 0;
#if defined(__SSSE3__)
  static constexpr InterleaveThree kFrom;
  const auto load = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  for (; i + 16 <= width; i += 16) {
    const __m128i planes[3] = {load(a + i), load(b + i), load(c + i)};
    for (int part = 0; part < 3; ++part) {
      __m128i out = _mm_shuffle_epi8(planes[0], load(kFrom.in[part][0]));
      for (int plane = 1; plane < 3; ++plane) {
        out = _mm_or_si128(out, _mm_shuffle_epi8(planes[plane], load(kFrom.in[part][plane])));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * 3 + part * 16), out);
    }
  }
#endif
  return i;
}

// [N, C, H, W] in the natural order, to channels last.
template <class T>
void quantize_planes(const Team& team, const float* x, T* q, int64_t count, const Image& out,
                     const f32::QuantizeTo& to) {
  constexpr int kPart = 64, kMost = 4;  // positions, and channels that are interleaved at once
  const int64_t plane = static_cast<int64_t>(out.height) * out.width;
  const auto rows = team.share(count * out.height);
  T parts[kMost][kPart];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t n = row / out.height;
    const int y = static_cast<int>(row - n * out.height);
    for (int begin = 0; begin < out.width; begin += kPart) {
      const int width = out.width - begin < kPart ? out.width - begin : kPart;
      T* at = q + out.at(n, y, begin);
      for (int first = 0; first < out.channels; first += kMost) {
        const int channels = out.channels - first < kMost ? out.channels - first : kMost;
        for (int c = 0; c < channels; ++c) {
          const float* from = x + (n * out.channels + first + c) * plane + static_cast<int64_t>(y) * out.width + begin;
          f32::each_vector(width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            f32::store_bytes(parts[c] + i, f32::quantized(f32::load(from + i, lanes), to), lanes);
          });
        }
        int i = 0;
        if (out.channels == 3 && out.pixel == 3) {
          const auto* planes = reinterpret_cast<const uint8_t*>(parts);
          i = interleave_three(planes, planes + kPart, planes + 2 * kPart, width, reinterpret_cast<uint8_t*>(at));
        }
        for (; i < width; ++i) {
          for (int c = 0; c < channels; ++c) at[i * out.pixel + first + c] = parts[c][i];
        }
      }
    }
  }
}

}  // namespace qfx
