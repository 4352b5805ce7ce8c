// Pooling over images of integers, channels last.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "image.h"
#include "pointwise.h"
#include "team.h"

namespace qfx {

struct Pool {
  Image in, out;
  int height, width;  // of a window
  int stride_y, stride_x, top, left, dilation_y, dilation_x;
};

// Which of a window's `size` positions lie within [0, length).
struct Inside {
  int begin, end;
  Inside(int start, int size, int dilation, int length)
      : begin(start >= 0 ? 0 : (-start + dilation - 1) / dilation),
        end(std::min(size, start >= length ? 0 : (length - start + dilation - 1) / dilation)) {}
};

constexpr int kAtOnce = 32;  // channels

template <class T>
void max_pool(const Team& team, const Pool& p, int64_t count, const T* x, T* y) {
  const auto rows = team.share(count * p.out.height);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t n = row / p.out.height;
    const int oy = static_cast<int>(row - n * p.out.height);
    const int start_y = oy * p.stride_y - p.top;
    const Inside iy(start_y, p.height, p.dilation_y, p.in.height);
    for (int ox = 0; ox < p.out.width; ++ox) {
      const int start_x = ox * p.stride_x - p.left;
      const Inside ix(start_x, p.width, p.dilation_x, p.in.width);
      T* to = y + p.out.at(n, oy, ox);
      for (int c = 0; c < p.out.channels; c += kAtOnce) {  // what hangs over belongs to the next position, or to nobody
        const int channels = std::min(kAtOnce, p.out.channels - c);
        typedef T Vector __attribute__((vector_size(kAtOnce)));
        Vector most = Vector{} + std::numeric_limits<T>::min();
        for (int i = iy.begin; i < iy.end; ++i) {
          for (int j = ix.begin; j < ix.end; ++j) {
            Vector v;
            std::memcpy(&v, x + p.in.at(n, start_y + i * p.dilation_y, start_x + j * p.dilation_x) + c, kAtOnce);
            most = v > most ? v : most;
          }
        }
        std::memcpy(to + c, &most, channels);
      }
    }
  }
}

// Means over windows. `with_padding`: positions of the padding count as zeros; `divisor`: what sums are divided by, or 0
// for how many positions count. Reals as in adaptive_mean.
template <class T>
void mean_pool(const Team& team, const Pool& p, bool with_padding, int divisor, int64_t count, const T* x, T* y,
               float scale, int32_t zero_point, const f32::QuantizeTo& to) {
  const auto rows = team.share(count * p.out.height);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t n = row / p.out.height;
    const int oy = static_cast<int>(row - n * p.out.height), start_y = oy * p.stride_y - p.top;
    const Inside iy(start_y, p.height, 1, p.in.height);
    for (int ox = 0; ox < p.out.width; ++ox) {
      const int start_x = ox * p.stride_x - p.left;
      const Inside ix(start_x, p.width, 1, p.in.width);
      const int area = (iy.end - iy.begin) * (ix.end - ix.begin);
      const int padded_y = std::min(start_y + p.height, p.in.height + p.top) - start_y;  // ceil_mode may go further
      const int padded_x = std::min(start_x + p.width, p.in.width + p.left) - start_x;
      const int counted = divisor != 0 ? divisor : with_padding ? padded_y * padded_x : area;
      for (int c = 0; c < p.out.channels; c += kAtOnce) {
        const int channels = std::min(kAtOnce, p.out.channels - c);
        int32_t sums[kAtOnce] = {};
        for (int i = iy.begin; i < iy.end; ++i) {
          for (int j = ix.begin; j < ix.end; ++j) {
            const T* from = x + p.in.at(n, start_y + i, start_x + j) + c;
            for (int k = 0; k < channels; ++k) sums[k] += from[k];
          }
        }
        T* out = y + p.out.at(n, oy, ox) + c;
        for (int k = 0; k < channels; ++k) {
          const float sum = static_cast<float>(sums[k] - area * zero_point) * scale;
          out[k] = rounded<T>(sum / static_cast<float>(counted), to);
        }
      }
    }
  }
}

// Means over windows that partition the image (adaptive pooling, Howard-style global pooling, a mean over both axes):
// output (oy, ox) is of rows [oy * H / out, ceil((oy + 1) * H / out)), and columns alike. As the reference, the reals are
// (sum - count * zero_point) * scale / count in float32, rounded once.
template <class T>
void adaptive_mean(const Team& team, const Pool& p, int64_t count, const T* x, T* y, float scale, int32_t zero_point,
                   const f32::QuantizeTo& to) {
  constexpr int kPart = 64;  // channels at a time
  const int parts = (p.out.channels + kPart - 1) / kPart;
  const int positions = p.out.height * p.out.width;
  const auto tasks = team.share(count * positions * parts);
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t at = task / parts;
    const int first = static_cast<int>(task - at * parts) * kPart;
    const int channels = std::min(kPart, p.out.channels - first);
    const Position o(at, p.out.height, p.out.width);
    const int y0 = o.y * p.in.height / p.out.height, y1 = ((o.y + 1) * p.in.height + p.out.height - 1) / p.out.height;
    const int x0 = o.x * p.in.width / p.out.width, x1 = ((o.x + 1) * p.in.width + p.out.width - 1) / p.out.width;
    int32_t sums[kPart] = {};
    for (int i = y0; i < y1; ++i) {
      for (int j = x0; j < x1; ++j) {
        const T* from = x + p.in.at(o.n, i, j) + first;
        for (int c = 0; c < channels; ++c) sums[c] += from[c];
      }
    }
    const int32_t area = (y1 - y0) * (x1 - x0);
    T* out = y + p.out.at(o.n, o.y, o.x) + first;
    for (int c = 0; c < channels; ++c) {
      const float mean = static_cast<float>(sums[c] - area * zero_point) * scale / static_cast<float>(area);
      out[c] = rounded<T>(mean, to);
    }
  }
}

}  // namespace qfx
