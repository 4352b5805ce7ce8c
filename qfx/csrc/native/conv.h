// Convolutions of any kernel, stride, dilation and groups, and linear layers, as products of panels.
//
// A panel holds, for a block of output positions, the elements of their windows one behind the other (im2col), widened
// to what the dot product takes. All channels of the block are computed before the next panel is gathered.

#pragma once

#include <algorithm>
#include <cstdint>

#include "image.h"
#include "team.h"
#include "tile.h"

namespace qfx {

struct Conv {
  Image in, out, other;
  int64_t step_y, step_x;   // input elements from one output position to the next
  int64_t first;            // from in.at(n, 0, 0) to the first element of the window of output position (0, 0)
  const int32_t* offsets;   // of the window's runs of contiguous elements, from its first
  int runs, length;
  int depth;                // elements of a window, rounded up to the dot product's unit
  int groups, channels;     // output channels of one group
  int64_t group_step;       // input elements from one group's channels to the next group's
  int rows;                 // output positions of a panel
  int parts;                // into how many parts the channels of a group are split between threads
  uint8_t flip;             // 128 where data are int8: they are read as uint8, 128 higher
};

template <class Dot>
struct PanelScratch {
  // Bytes for one thread.
  static int64_t size(const Conv& c) {
    return static_cast<int64_t>(c.rows) * (row(c) * sizeof(typename Dot::Data) + 2 * sizeof(int64_t)) + 256;
  }
  static int64_t row(const Conv& c) { return (c.depth + 63) / 64 * 64 + 64; }
};

// One function for all layers of one kind of epilogue: g++ would make one for each, and take seconds over them.
template <class Dot, class Epilogue>
[[gnu::noinline, gnu::noclone]] void conv(const Team& team, const Conv& c, int64_t count, const void* in,
                                          const int8_t* weight,
                                          const Epilogue epilogue,  // a copy: stores of bytes could change any other
                                          void* scratch) {
  using Data = typename Dot::Data;
  constexpr int N = kChannels<Dot>;
  const auto* x = static_cast<const uint8_t*>(in);
  const int height = c.out.height, width = c.out.width;
  const int64_t positions = count * height * width, blocks = (positions + c.rows - 1) / c.rows;
  const int tiles = (c.channels + N - 1) / N;
  const int64_t tile_size = static_cast<int64_t>(c.depth) * N;
  const int64_t row = PanelScratch<Dot>::row(c);
  auto* out_at = static_cast<int64_t*>(scratch);
  auto* other_at = out_at + c.rows;
  auto* panel = reinterpret_cast<Data*>((reinterpret_cast<uintptr_t>(other_at + c.rows) + 63) & ~uintptr_t{63});
  alignas(64) int32_t sums[Dot::kRows * N];

  // Part by part, so that a thread reads its own channels' weights only; what it gathers twice is less.
  const int64_t sources = blocks * c.groups;  // a panel is of one block and one group
  const auto tasks = team.share(sources * c.parts);
  int64_t gathered = -1;
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int part = static_cast<int>(task / sources);
    const int64_t source = task - part * sources, block = source / c.groups;
    const int group = static_cast<int>(source - block * c.groups);
    const int64_t start = block * c.rows;
    const int rows = static_cast<int>(std::min<int64_t>(c.rows, positions - start));
    if (source != gathered) {
      gathered = source;
      Position p(start, height, width);
      for (int r = 0; r < rows; ++r, p.next(height, width)) {
        out_at[r] = c.out.at(p.n, p.y, p.x);
        other_at[r] = c.other.at(p.n, p.y, p.x);
        const uint8_t* window = x + c.in.at(p.n, 0, 0) + c.first + p.y * c.step_y + p.x * c.step_x + group * c.group_step;
        Data* to = panel + r * row;
        for (int i = 0; i < c.runs; ++i, to += c.length) Dot::widen(to, window + c.offsets[i], c.length, c.flip);
      }
    }
    const int begin = tiles * part / c.parts, end = tiles * (part + 1) / c.parts;
    for (int t = begin; t < end; ++t) {
      const int8_t* w = weight + (static_cast<int64_t>(group) * tiles + t) * tile_size;
      const int channel = group * c.channels + t * N, valid = std::min(N, c.channels - t * N);
      const int padded = (group * tiles + t) * N;  // where the tile's bias and scales are
      for (int r = 0; r < rows; r += Dot::kRows) {
        const int some = std::min(Dot::kRows, rows - r);
        tile<Dot>(some, panel + r * row, row, w, c.depth, sums);
        for (int i = 0; i < some; ++i) {
          epilogue.template run<N>(sums + i * N, padded, channel, valid, out_at[r + i], other_at[r + i]);
        }
      }
    }
  }
}

}  // namespace qfx
