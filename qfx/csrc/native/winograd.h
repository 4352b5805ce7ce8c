// 3x3 convolutions of stride 1 by the minimal filtering algorithm F(2x2, 3x3), exactly, in integers.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1. Four outputs of a
// channel cost 16 products in place of 36. With the kernel's transform G doubled, its elements are integers of at most
// 9 * 128 and those of the data of at most 4 * 255, so that int16 holds both; the outputs come out four times too large,
// which a shift undoes exactly. Sums may wrap on the way, the outputs do not.
//
// For machines that multiply int16 as their narrowest integers (AVX2 without VNNI).

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "dot_avx2.h"
#include "image.h"
#include "team.h"
#include "tile.h"

namespace qfx {

struct Winograd {
  Image in, out, other;
  int64_t first;   // from in.at(n, 0, 0) to the first element of the window of output position (0, 0)
  int depth;       // input channels, a multiple of 16
  int channels;    // output channels
  int rows;        // squares of 2 x 2 outputs in a block
  int parts;       // into how many parts the channels are split between threads
  uint8_t flip;    // as for Conv
};

constexpr int kPoints = 16;  // of a transformed square

inline int64_t winograd_scratch(const Winograd& c) {
  const int64_t data = int64_t{kPoints} * c.rows * c.depth * 2;
  return data + int64_t{kPoints} * c.rows * kChannels<DotAvx2Wide> * 4 + c.rows * int64_t{sizeof(Position)} + 256;
}

namespace winograd {

// B^T d B of one square, 16 channels at a time; point i of channel c goes to to[i * step + c].
inline void transform_data(const uint8_t* from, int64_t row, int64_t pixel, int depth, uint8_t flip, int16_t* to,
                           int64_t step) {
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (int c = 0; c < depth; c += 16) {
    __m256i t[4][4];
    for (int x = 0; x < 4; ++x) {
      __m256i d[4];
      for (int y = 0; y < 4; ++y) {
        const auto* at = reinterpret_cast<const __m128i*>(from + y * row + x * pixel + c);
        d[y] = _mm256_cvtepu8_epi16(_mm_xor_si128(_mm_loadu_si128(at), flips));
      }
      t[0][x] = _mm256_sub_epi16(d[0], d[2]);
      t[1][x] = _mm256_add_epi16(d[1], d[2]);
      t[2][x] = _mm256_sub_epi16(d[2], d[1]);
      t[3][x] = _mm256_sub_epi16(d[1], d[3]);
    }
    for (int y = 0; y < 4; ++y) {
      const __m256i v[4] = {_mm256_sub_epi16(t[y][0], t[y][2]), _mm256_add_epi16(t[y][1], t[y][2]),
                            _mm256_sub_epi16(t[y][2], t[y][1]), _mm256_sub_epi16(t[y][1], t[y][3])};
      for (int x = 0; x < 4; ++x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (y * 4 + x) * step + c), v[x]);
      }
    }
  }
}

// A^T m A / 4 of one square, 8 channels: point i is at from[i * step]; out[y][x].
inline void transform_sums(const int32_t* from, int64_t step, __m256i out[2][2]) {
  __m256i t[2][4];
  for (int x = 0; x < 4; ++x) {
    __m256i m[4];
    for (int y = 0; y < 4; ++y) m[y] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + (y * 4 + x) * step));
    t[0][x] = _mm256_add_epi32(_mm256_add_epi32(m[0], m[1]), m[2]);
    t[1][x] = _mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3]);
  }
  for (int y = 0; y < 2; ++y) {
    out[y][0] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_add_epi32(t[y][0], t[y][1]), t[y][2]), 2);
    out[y][1] = _mm256_srai_epi32(_mm256_sub_epi32(_mm256_sub_epi32(t[y][1], t[y][2]), t[y][3]), 2);
  }
}

}  // namespace winograd

// Packed weights: [tiles][kPoints][depth / 2][kChannels][2], int16, the transformed kernel.
template <class Epilogue>
void conv_winograd(const Team& team, const Winograd& c, int64_t count, const void* in, const void* weight,
                   const Epilogue& epilogue, void* scratch) {
  using Dot = DotAvx2Wide;
  constexpr int N = kChannels<Dot>;
  const auto* x = static_cast<const uint8_t*>(in);
  const auto* w = static_cast<const int16_t*>(weight);
  const int height = (c.out.height + 1) / 2, width = (c.out.width + 1) / 2;
  const int64_t squares = count * height * width, blocks = (squares + c.rows - 1) / c.rows;
  const int tiles = (c.channels + N - 1) / N;
  const int64_t step = static_cast<int64_t>(c.rows) * c.depth, sums_step = static_cast<int64_t>(c.rows) * N;
  auto* data = reinterpret_cast<int16_t*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  auto* sums = reinterpret_cast<int32_t*>(data + kPoints * step);
  auto* at = reinterpret_cast<Position*>(sums + kPoints * sums_step);

  const auto tasks = team.share(blocks * c.parts);
  int64_t gathered = -1;
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int part = static_cast<int>(task / blocks);  // part by part: a thread reads its own channels' weights only
    const int64_t block = task - part * blocks, start = block * c.rows;
    const int rows = static_cast<int>(std::min<int64_t>(c.rows, squares - start));
    if (block != gathered) {
      gathered = block;
      Position p(start, height, width);
      for (int r = 0; r < rows; ++r, p.next(height, width)) {
        at[r] = p;
        const uint8_t* window = x + c.in.at(p.n, 2 * p.y, 2 * p.x) + c.first;
        winograd::transform_data(window, c.in.row, c.in.pixel, c.depth, c.flip, data + r * c.depth, step);
      }
    }
    for (int t = tiles * part / c.parts; t < tiles * (part + 1) / c.parts; ++t) {
      const int channel = t * N, valid = std::min(N, c.channels - channel);
      for (int point = 0; point < kPoints; ++point) {
        const int16_t* panel = w + (static_cast<int64_t>(t) * kPoints + point) * c.depth * N;
        for (int r = 0; r < rows; r += Dot::kRows) {
          const int some = std::min(Dot::kRows, rows - r);
          tile<Dot>(some, data + point * step + r * c.depth, c.depth, panel, c.depth, sums + point * sums_step + r * N);
        }
      }
      for (int r = 0; r < rows; ++r) {
        alignas(32) int32_t result[2][2][N];
        for (int half = 0; half < N; half += 8) {
          __m256i out[2][2];
          winograd::transform_sums(sums + r * N + half, sums_step, out);
          for (int y = 0; y < 2; ++y) {
            for (int z = 0; z < 2; ++z) _mm256_store_si256(reinterpret_cast<__m256i*>(&result[y][z][half]), out[y][z]);
          }
        }
        for (int y = 0; y < 2 && 2 * at[r].y + y < c.out.height; ++y) {
          for (int z = 0; z < 2 && 2 * at[r].x + z < c.out.width; ++z) {
            const int64_t to = c.out.at(at[r].n, 2 * at[r].y + y, 2 * at[r].x + z);
            const int64_t other = c.other.at(at[r].n, 2 * at[r].y + y, 2 * at[r].x + z);
            epilogue.template run<N>(result[y][z], channel, channel, valid, to, other);
          }
        }
      }
    }
  }
}

}  // namespace qfx
