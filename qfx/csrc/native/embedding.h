// Rows of a table by index, and rotary position embedding (Su et al., 2021, arXiv:2104.09864).

#pragma once

#include "float_vector.h"
#include "heads.h"
#include "team.h"

namespace qfx::f32 {

// y[i] = table[index[i]]; table is [rows, cols], y [count, cols]. False if an index of this thread's share is out of
// range: its row is then zeros.
template <class Index>
bool embedding(const Team& team, const Index* index, const float* table, float* y, int64_t count, int64_t rows,
               int64_t cols) {
  const auto [begin, end] = team.share(count);
  bool good = true;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = static_cast<int64_t>(index[i]);
    if (row >= 0 && row < rows) {
      std::memcpy(y + i * cols, table + row * cols, cols * sizeof(float));
    } else {
      std::memset(y + i * cols, 0, cols * sizeof(float));
      good = false;
    }
  }
  return good;
}

// Cosines and sines, each with rows of `rotated` entries (one for each element), or of half as many where the elements
// that are turned together share one.
struct RotaryTable {
  const float* cosine;
  const float* sine;
  int64_t batch, token;  // strides in elements, 0 where it broadcasts
  bool shared;
};

// Element i is turned with i + half: y_i = x_i cos_i - x_(i+half) sin_i, y_(i+half) = x_(i+half) cos_(i+half) + x_i
// sin_(i+half). The row's entries of the table begin at `cosine` and `sine`.
QFX_F32 void rotate_halves(const float* x, float* y, const float* cosine, const float* sine, bool shared,
                           int64_t half) {
  const int64_t second = shared ? 0 : half;
  each_vector(half, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec a = load(x + i, lanes), b = load(x + half + i, lanes);
    store(y + i, a * load(cosine + i, lanes) - b * load(sine + i, lanes), lanes);
    store(y + half + i, b * load(cosine + second + i, lanes) + a * load(sine + second + i, lanes), lanes);
  });
}

// 0 0 1 1 ...: the entries of a shared table at i / 2.
QFX_F32 Vec load_twice(const float* p, int64_t entries) {
  const Vec v = load(p, First{entries});
  return __builtin_shuffle(v, lane_numbers() >> 1);
}
QFX_F32 Vec table_entries(const float* p, int64_t i, bool shared, Whole) {
  return shared ? load_twice(p + i / 2, kLanes / 2) : load(p + i);
}
QFX_F32 Vec table_entries(const float* p, int64_t i, bool shared, First lanes) {
  return shared ? load_twice(p + i / 2, lanes.count / 2) : load(p + i, lanes);
}

// Element i is turned with its neighbour: pairs (0, 1), (2, 3), ...
QFX_F32 void rotate_pairs(const float* x, float* y, const float* cosine, const float* sine, bool shared,
                          int64_t rotated) {
  const IntVec numbers = lane_numbers(), sign = numbers << 31 ^ INT32_MIN;  // minus in even lanes
  each_vector(rotated, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec a = load(x + i, lanes), swapped = __builtin_shuffle(a, numbers ^ 1);
    const Vec turned = from_bits(bits(swapped) ^ sign);
    store(y + i, a * table_entries(cosine, i, shared, lanes) + turned * table_entries(sine, i, shared, lanes), lanes);
  });
}

// x and y are [batch, heads, tokens, head_dim] in any strides, y may be x. Of a head the first `rotated` elements, an even
// number, are turned, in pairs of neighbours (`interleaved`) or of halves; the others are copied.
inline void rotary(const Team& team, const float* x, float* y, const RotaryTable& table, HeadStrides from,
                   HeadStrides to, bool interleaved, int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim,
                   int64_t rotated) {
  const auto [begin, end] = team.share(batch * tokens);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / tokens, t = i % tokens, entry = b * table.batch + t * table.token;
    const float* cosine = table.cosine + entry;
    const float* sine = table.sine + entry;
    for (int64_t h = 0; h < heads; ++h) {
      const float* in = x + from.at(b, h, t);
      float* out = y + to.at(b, h, t);
      if (interleaved) rotate_pairs(in, out, cosine, sine, table.shared, rotated);
      else rotate_halves(in, out, cosine, sine, table.shared, rotated / 2);
      if (in != out) std::memcpy(out + rotated, in + rotated, (head_dim - rotated) * sizeof(float));
    }
  }
}

}  // namespace qfx::f32
