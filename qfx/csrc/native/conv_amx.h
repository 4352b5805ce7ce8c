// Convolutions of any kernel, stride and dilation, and linear layers, by the tiles of AMX.
//
// A block is 32 output positions by 32 channels: four tiles of 16 x 16 sums. A step takes 64 elements of depth: two
// tiles of data and two of weights make four products, 16 cycles each, so that every load serves two of them.
//
// The rows of a tile of data may lie at any fixed distance. So nothing is gathered where the windows of 16 outputs are
// at a fixed distance in the input: along a row; along an image too if one counts the positions between two rows, whose
// sums are dropped; along all images where there is nothing between them. Such a stretch of positions is a line. The
// last sixteen of a line begins earlier rather than reading behind the input, and drops what the one before computed.
// Elsewhere the windows are gathered as in conv.h.
//
// Blocks of positions are walked before tiles of channels: the weights of 32 channels (18 kB for 3 x 3 x 64) stay in
// the first-level cache, or near, while the data pass by, of which neighbouring blocks and the taps of a window share
// most. A chunk of blocks is what is walked for one tile of channels; its data stay in the second-level cache for the
// next. With many channels the weights of a tile are there as well: a step has 64 cycles for its 2 kB of them.
//
// The unit that multiplies tiles works beside those for vectors. So what follows the sums of one block is spread over
// the steps of the next: one after the other, either would wait for as long as a reorder buffer is too short.

#pragma once

#include "conv.h"
#include "dot_vnni.h"

#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace qfx {

enum class Line { kNone, kRow, kImage, kAll };  // kNone: windows are gathered

struct ConvAmx {
  Conv conv;         // groups is 1, depth a multiple of 64; where there is a line, so is length
  Line line;
  int64_t distance;  // input elements between the positions of a line
  int pitch;         // from one row of outputs to the next in a line
  int chunk;         // positions, a multiple of 32
};

// Without tiles conv.h does it: the weights of a step are those of its panels for DotAvx512Vnni, 16 times [32][4].
#if !defined(__AMX_INT8__)

inline int64_t amx_scratch(const ConvAmx& c) { return PanelScratch<DotAvx512Vnni>::size(c.conv); }

template <class Epilogue>
void conv_amx(const Team& team, const ConvAmx& c, int64_t count, const void* in, const int8_t* weight,
              const Epilogue& epilogue, void* scratch) {
  conv<DotAvx512Vnni>(team, c.conv, count, in, weight, epilogue, scratch);
}

#else

namespace amx {

constexpr int kRows = 16, kDepth = 64;  // of a tile of data
constexpr int kBlock = 32, kBlockChannels = 32;
// A product by tiles takes as long for one row as for 16: below this it takes no less time than one of vectors.
constexpr int kFewest = 4;

// Where one row of a block's sums goes.
struct Place {
  int64_t out, other;
  int row;
};

struct Block {
  const uint8_t* data[2];  // the first row of each tile of data; the second is null where there is but one
  int places;
  Place place[kBlock];
};

// The output positions of `count` images in sixteens.
struct Sixteens {
  bool gathered;
  int64_t rows, pitch, length;  // rows of outputs in a line, their distance, positions in a line
  int64_t per_line, all;

  Sixteens(const ConvAmx& c, int64_t count)
      : Sixteens(c, count, c.line == Line::kRow ? 1 : c.line == Line::kImage ? c.conv.out.height : total(c, count)) {}

 private:
  static int64_t total(const ConvAmx& c, int64_t count) { return count * c.conv.out.height; }
  Sixteens(const ConvAmx& c, int64_t count, int64_t line_rows) : gathered(c.line == Line::kNone) {
    rows = line_rows;
    pitch = gathered ? c.conv.out.width : c.pitch;
    length = (rows - 1) * pitch + c.conv.out.width;
    if (length < kRows && !gathered) {  // all samples of a small batch
      gathered = true;
      pitch = c.conv.out.width;
      length = rows * pitch;
    }
    per_line = (length + kRows - 1) / kRows;
    all = total(c, count) / rows * per_line;
  }
};

// A block of sums, and what of it has not been through the epilogue yet.
struct Rest {
  const int32_t* sums;
  const Place* place;
  int left, channel, valid;

  template <class Epilogue>
  [[gnu::always_inline]] void finish(int most, const Epilogue& epilogue) {
    const int rows = std::min(most, left);
    const auto run = [&](int channels) __attribute__((always_inline)) {
      for (const Place* p = place; p < place + rows; ++p) {
        const int32_t* from = sums + p->row * kBlockChannels;
        epilogue.template run<kBlockChannels>(from, channel, channel, channels, p->out, p->other);
      }
    };
    if (valid == kBlockChannels) {
      run(kBlockChannels);  // without a branch for each row
    } else {
      run(valid);
    }
    left -= rows;
    place += rows;
  }
};

// The sums of a block, int32 [kBlock][kBlockChannels]; `between` is called once a step.
template <class Between>
[[gnu::always_inline]] inline void multiply(const Block& block, int64_t distance, const int32_t* offsets, int runs,
                                            int length, const int8_t* weight, int32_t* sums, const Between& between) {
  constexpr int64_t kRow = 4 * kBlockChannels;  // bytes of a row of weights and of sums
  const uint8_t *data = block.data[0], *second = block.data[1];
  settle_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int run = 0; run < runs; ++run) {
    const int64_t begin = offsets[run];
    for (int64_t at = begin; at < begin + length; at += kDepth, weight += kRow * kDepth / 4) {
      _tile_loadd(4, data + at, distance);
      _tile_loadd(6, weight, kRow);
      _tile_loadd(7, weight + kRow / 2, kRow);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      if (second != nullptr) {
        _tile_loadd(5, second + at, distance);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
      between();
    }
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kBlockChannels / 2, kRow);
  if (second == nullptr) return;
  sums += kRows * kBlockChannels;
  _tile_stored(2, sums, kRow);
  _tile_stored(3, sums + kBlockChannels / 2, kRow);
}

// Where the positions of one sixteen come from and go to; `panel`: of its windows, where they are gathered.
inline void place_sixteen(const ConvAmx& amx, const Sixteens& all, int64_t number, const uint8_t* x, uint8_t* panel,
                          Block& block, int half) {
  const Conv& c = amx.conv;
  const int height = c.out.height, width = c.out.width;
  const int64_t line = number / all.per_line, fresh = (number - line * all.per_line) * kRows;
  const int64_t first = all.gathered ? fresh : std::min(fresh, all.length - kRows);
  const int64_t end = std::min(first + kRows, all.length), row = PanelScratch<DotAvx512Vnni>::row(c);
  const auto window = [&](int64_t n, int y, int x_at) {
    return x + c.in.at(n, 0, 0) + c.first + y * c.step_y + x_at * c.step_x;
  };
  int64_t y = line * all.rows + first / all.pitch, n = y / height;
  int64_t x_at = first % all.pitch;
  y -= n * height;
  block.data[half] = all.gathered ? panel : window(n, static_cast<int>(y), 0) + x_at * amx.distance;
  for (int64_t v = first; v < end; ++v) {
    if (v >= fresh && x_at < width) {
      const int at_y = static_cast<int>(y), at_x = static_cast<int>(x_at);
      const int r = static_cast<int>(v - first);
      block.place[block.places++] = {c.out.at(n, at_y, at_x), c.other.at(n, at_y, at_x), half * kRows + r};
      if (all.gathered) {
        const uint8_t* from = window(n, at_y, at_x);
        uint8_t* to = panel + r * row;
        for (int i = 0; i < c.runs; ++i, to += c.length) {
          DotAvx512Vnni::widen(to, from + c.offsets[i], c.length, c.flip);
        }
      }
    }
    if (++x_at < all.pitch) continue;
    x_at = 0;
    if (++y < height) continue;
    y = 0;
    ++n;
  }
}

}  // namespace amx

// Bytes for one thread: for panels of vectors, or for blocks and what is gathered for them.
inline int64_t amx_scratch(const ConvAmx& c) {
  const int64_t rows = c.line == Line::kNone ? c.chunk : amx::kRows;
  const int64_t blocks = c.chunk / amx::kBlock * int64_t{sizeof(amx::Block)};
  using Panel = PanelScratch<DotAvx512Vnni>;
  return std::max(Panel::size(c.conv), rows * Panel::row(c.conv) + blocks + 256);
}

template <class Epilogue>
[[gnu::noinline, gnu::noclone]] void conv_amx(const Team& team, const ConvAmx& c, int64_t count, const void* in,
                                              const int8_t* weight, const Epilogue epilogue, void* scratch) {
  using namespace amx;
  if (count * c.conv.out.height * c.conv.out.width < kFewest || !permitted()) {
    return conv<DotAvx512Vnni>(team, c.conv, count, in, weight, epilogue, scratch);
  }
  const Sixteens sixteens(c, count);
  const int64_t blocks = (sixteens.all + 1) / 2, per_chunk = c.chunk / kBlock;
  const int64_t tiles = (c.conv.channels + kBlockChannels - 1) / kBlockChannels;
  const int64_t row = PanelScratch<DotAvx512Vnni>::row(c.conv);
  const int steps = c.conv.depth / kDepth;
  auto* const places = static_cast<Block*>(scratch);
  auto* panel = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(places + per_chunk) + 63) & ~uintptr_t{63});
  alignas(64) int32_t sums[2][kBlock * kBlockChannels];
  const int32_t start = 0;
  const int32_t* offsets = sixteens.gathered ? &start : c.conv.offsets;
  const int runs = sixteens.gathered ? 1 : c.conv.runs, length = sixteens.gathered ? c.conv.depth : c.conv.length;
  const int64_t distance = sixteens.gathered ? row : c.distance;

  const Tiles registers;
  Rest rest{};
  const auto units = team.share(blocks * tiles);  // of one block and one tile of channels
  for (int64_t unit = units.begin; unit < units.end; ++unit) {
    const int64_t chunk = unit / (per_chunk * tiles) * per_chunk, size = std::min(per_chunk, blocks - chunk);
    const int64_t begin = chunk * tiles, t = (unit - begin) / size, slot = unit - begin - t * size;
    Block& block = places[slot];
    if (unit - std::max(begin, units.begin) < size) {  // the first unit here of this block
      if (slot == 0) rest.finish(kBlock, epilogue);    // of the chunk before, whose places are given up now
      block.data[1] = nullptr;
      block.places = 0;
      const int64_t first = 2 * (chunk + slot);
      for (int half = 0; half < 2 && first + half < sixteens.all; ++half) {
        uint8_t* windows = panel + (2 * slot + half) * kRows * row;
        place_sixteen(c, sixteens, first + half, static_cast<const uint8_t*>(in), windows, block, half);
      }
    }
    const int share = (rest.left + steps - 1) / steps;
    int32_t* const to = sums[unit & 1];
    multiply(block, distance, offsets, runs, length, weight + t * c.conv.depth * kBlockChannels, to,
             [&]() __attribute__((always_inline)) { rest.finish(share, epilogue); });
    const int channel = static_cast<int>(t) * kBlockChannels;
    rest = {to, block.place, block.places, channel, std::min(kBlockChannels, c.conv.channels - channel)};
  }
  rest.finish(kBlock, epilogue);
}

#endif

}  // namespace qfx
