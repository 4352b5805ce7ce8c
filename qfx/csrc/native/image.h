// Where the elements of an activation lie: channels last, with a border around each image that holds the zero point, so
// that a window that hangs over the edge reads zeros without a branch.

#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"

namespace qfx {

struct Image {
  int height, width, channels;      // without the border
  int top, left, bottom, right;     // the border
  int64_t image, row, pixel;        // steps, in elements; pixel >= channels where several values share one buffer

  int64_t at(int64_t n, int y, int x) const { return n * image + (y + top) * row + (x + left) * pixel; }
};

// Element offsets of the output positions, image by image, row by row: a position is known by its number.
struct Position {
  int64_t n;
  int y, x;
  Position() = default;
  Position(int64_t number, int height, int width) : n(number / (height * width)) {
    const int rest = static_cast<int>(number - n * (height * width));
    y = rest / width;
    x = rest - y * width;
  }
  void next(int height, int width) {
    if (++x < width) return;
    x = 0;
    if (++y < height) return;
    y = 0;
    ++n;
  }
};

// Fill the borders of `count` images. The images' buffers are reused within a run, so that every producer does this.
inline void fill_border(const Team& team, const Image& m, int64_t count, void* data, int value) {
  if (m.top + m.left + m.bottom + m.right == 0) return;
  auto* bytes = static_cast<uint8_t*>(data);
  const int stored = m.top + m.height + m.bottom;
  const auto rows = team.share(count * stored);
  const int64_t whole = (m.left + m.width + m.right) * m.pixel;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t n = i / stored;
    const int y = static_cast<int>(i - n * stored) - m.top;
    uint8_t* row = bytes + n * m.image + (y + m.top) * m.row;
    if (y < 0 || y >= m.height) {
      std::memset(row, value, whole);
      continue;
    }
    std::memset(row, value, m.left * m.pixel);
    std::memset(row + (m.left + m.width) * m.pixel, value, m.right * m.pixel);
  }
}

}  // namespace qfx
