// Products of two activations, one for each sample and head: sums of (left[i][k] - a) (right[k][j] - b), exact.
//
// The right operand is packed like weights, by each thread for the products that it works on. Zero points come in
// afterwards: sum of left * right - a * (sum of right's column) - b * (sum of left's row) + depth * a * b.

#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"
#include "tile.h"

namespace qfx {

struct Factor {
  int64_t sample, head, row, column;  // steps, in elements
  uint8_t flip;                       // 128 where the bytes are read 128 higher (left) or lower (right)
  int32_t zero_point;                 // of what is read

  int64_t at(int64_t n, int64_t h) const { return n * sample + h * head; }
};

struct Matmul {
  Factor left, right;  // left.column is 1
  int heads, rows, columns;
  int length;  // summed over
  int depth;   // the same, rounded up to the dot product's unit
  int block;   // rows of a panel
};

// One thread's memory.
template <class Dot>
struct MatmulScratch {
  static constexpr int N = kChannels<Dot>;
  int64_t row;  // elements of a row of the panel
  int64_t tiles, panel, weight, columns, sums, size;

  explicit MatmulScratch(const Matmul& m)
      : row((m.depth + 63) / 64 * 64 + 64), tiles((m.columns + N - 1) / N) {
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
      const int64_t from = at;
      at += (bytes + 63) / 64 * 64;
      return from;
    };
    panel = take((m.block + Dot::kRows) * row * sizeof(typename Dot::Data));
    weight = take(tiles * N * m.depth + 64);
    columns = take(tiles * N * sizeof(int32_t));
    sums = take(m.block * sizeof(int32_t));
    size = at + 64;
  }
};

// One right operand in the order of packed weights, and what its columns' sums and both zero points add to a product.
template <class Dot>
void pack_right(const Matmul& m, const uint8_t* from, int8_t* to, int32_t* added) {
  constexpr int N = kChannels<Dot>, U = Dot::kUnit;
  const int32_t a = m.left.zero_point, b = m.right.zero_point;
  for (int first = 0; first < m.columns; first += N, added += N) {
    const int some = std::min(N, m.columns - first);
    std::fill(added, added + N, 0);
    for (int k = 0; k < m.depth; k += U, to += N * U) {
      const int units = std::min(U, m.length - k);
      const uint8_t* source = from + k * m.right.row + first * m.right.column;
      if (some < N || units < U) std::fill(to, to + N * U, 0);
      const auto gather = [&](int64_t row, int64_t column) __attribute__((always_inline)) {
        for (int u = 0; u < units; ++u) {
          for (int c = 0; c < some; ++c) {
            const auto value = static_cast<int8_t>(source[u * row + c * column] ^ m.right.flip);
            to[c * U + u] = value;
            added[c] += value;
          }
        }
      };
      if (m.right.column == 1) {
        gather(m.right.row, 1);
      } else if (m.right.row == 1) {
        gather(1, m.right.column);
      } else {
        gather(m.right.row, m.right.column);
      }
    }
    for (int c = 0; c < N; ++c) added[c] = a * (m.length * b - added[c]);
  }
}

template <class Dot, class Epilogue>
[[gnu::noinline, gnu::noclone]] void matmul(const Team& team, const Matmul& m, int64_t count, const void* left,
                                            const void* right, Epilogue epilogue, void* memory) {
  using Data = typename Dot::Data;
  constexpr int N = kChannels<Dot>;
  const MatmulScratch<Dot> plan(m);
  auto* scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  auto* panel = reinterpret_cast<Data*>(scratch + plan.panel);
  auto* weight = reinterpret_cast<int8_t*>(scratch + plan.weight);
  auto* row_sums = reinterpret_cast<int32_t*>(scratch + plan.sums);
  auto* added = reinterpret_cast<int32_t*>(scratch + plan.columns);
  epilogue.bias = added;
  alignas(64) int32_t sums[Dot::kRows * N];

  const int blocks = (m.rows + m.block - 1) / m.block;
  const auto tasks = team.share(count * m.heads * blocks);
  int64_t packed = -1;
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t product = task / blocks, n = product / m.heads, h = product - n * m.heads;
    const int start = static_cast<int>(task - product * blocks) * m.block, rows = std::min(m.block, m.rows - start);
    if (product != packed) {
      packed = product;
      pack_right<Dot>(m, static_cast<const uint8_t*>(right) + m.right.at(n, h), weight, added);
    }
    const uint8_t* from = static_cast<const uint8_t*>(left) + m.left.at(n, h) + start * m.left.row;
    for (int r = 0; r < rows; ++r) {
      Data* to = panel + r * plan.row;
      Dot::widen(to, from + r * m.left.row, m.length, m.left.flip);
      int32_t sum = 0;
      for (int k = 0; k < m.length; ++k) sum += to[k];
      row_sums[r] = -m.right.zero_point * sum;
    }
    for (int t = 0; t < plan.tiles; ++t) {
      const int valid = std::min(N, m.columns - t * N);
      for (int r = 0; r < rows; r += Dot::kRows) {
        const int some = std::min(Dot::kRows, rows - r);
        tile<Dot>(some, panel + r * plan.row, plan.row, weight + static_cast<int64_t>(t) * m.depth * N, m.depth, sums);
        for (int i = 0; i < some; ++i) {
          for (int c = 0; c < N; ++c) sums[i * N + c] += row_sums[r + i];
          const int64_t at = (product * m.rows + start + r + i) * m.columns;
          epilogue.template run<N>(sums + i * N, t * N, t * N, valid, at, at);
        }
      }
    }
  }
}

}  // namespace qfx
