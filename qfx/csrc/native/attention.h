// scaled_dot_product_attention in float32: softmax(q k^T * scale + mask) v for every head.
//
// Blocked over queries and keys with a running maximum and sum (FlashAttention, Dao et al., 2022, arXiv:2205.14135), in
// powers of two. The keys and values of one head are packed into scratch in the order in which the micro-kernel reads
// them, for all of its query blocks; one or two queries are not worth that and read them where they lie.

#pragma once

#include "float_math.h"
#include "float_output.h"
#include "heads.h"
#include "team.h"

namespace qfx::f32 {

struct AttentionShape {
  int64_t batch, heads, kv_heads, q_len, kv_len;  // heads is a multiple of kv_heads; neighbours share keys and values
  int64_t head_dim, value_dim;                    // of queries and keys; of values and the result
  HeadStrides q, k, v, out;
  float scale;
  Mask mask;
};

constexpr int kTileRows = kRegisters == 32 ? 12 : 6, kTileCols = 2 * kLanes;  // of the micro-kernel
constexpr int kQueryBlock = 48;                                               // a multiple of kTileRows
constexpr int kKeyBlock = 256;                                                // a multiple of kTileCols
constexpr int kScoreStride = kKeyBlock + 16;  // not a power of two, so that the rows fall into different cache sets
constexpr int64_t kFewQueries = 2;
constexpr float kLog2E = 0x1.715476p0f;

QFX_F32 int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One thread's part of the scratch, in floats. All offsets are multiples of 16.
struct AttentionScratch {
  int64_t keys, values, queries, scores, sums, state, size;

  explicit AttentionScratch(const AttentionShape& s) {
    const int64_t padded = round_up(s.kv_len, kTileCols);
    keys = 0;
    values = keys + round_up(padded * s.head_dim, 16);
    queries = values + round_up(padded * round_up(s.value_dim, kTileCols), 16);
    scores = queries + round_up(kQueryBlock * s.head_dim, 16);
    sums = scores + kTileRows * kScoreStride;
    state = sums + kQueryBlock * round_up(s.value_dim, kTileCols);
    size = state + 2 * round_up(kQueryBlock, 16);
  }
};

// The floats that attention() needs as scratch, of any content.
inline int64_t attention_scratch(const AttentionShape& shape, int threads) {
  return threads * AttentionScratch(shape).size + 16;
}

typedef float Quad __attribute__((vector_size(16)));

// Four columns of four rows: to[i * kTileCols + j] = rows[j][i].
QFX_F32 void transpose_quads(const float* const* rows, float* to) {
  typedef int32_t Pick __attribute__((vector_size(16)));
  constexpr Pick kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7}, kFirst = {0, 1, 4, 5}, kSecond = {2, 3, 6, 7};
  Quad a, b, c, d;
  std::memcpy(&a, rows[0], sizeof a);
  std::memcpy(&b, rows[1], sizeof b);
  std::memcpy(&c, rows[2], sizeof c);
  std::memcpy(&d, rows[3], sizeof d);
  const Quad ab = __builtin_shuffle(a, b, kLow), cd = __builtin_shuffle(c, d, kLow);
  const Quad ab2 = __builtin_shuffle(a, b, kHigh), cd2 = __builtin_shuffle(c, d, kHigh);
  a = __builtin_shuffle(ab, cd, kFirst);
  b = __builtin_shuffle(ab, cd, kSecond);
  c = __builtin_shuffle(ab2, cd2, kFirst);
  d = __builtin_shuffle(ab2, cd2, kSecond);
  std::memcpy(to, &a, sizeof a);
  std::memcpy(to + kTileCols, &b, sizeof b);
  std::memcpy(to + 2 * kTileCols, &c, sizeof c);
  std::memcpy(to + 3 * kTileCols, &d, sizeof d);
}

// [kv_len / kTileCols][head_dim][kTileCols]; keys behind the last one are zeros.
inline void pack_keys(const float* k, int64_t stride, int64_t kv_len, int64_t head_dim, float* to) {
  for (int64_t panel = 0; panel < kv_len; panel += kTileCols, to += head_dim * kTileCols) {
    for (int j = 0; j < kTileCols; j += 4) {
      const float* rows[4];
      const int64_t there = std::min<int64_t>(4, kv_len - panel - j);
      for (int64_t r = 0; r < 4; ++r) rows[r] = k + (panel + j + r) * stride;
      int64_t i = 0;
      if (there == 4) {
        for (; i + 4 <= head_dim; i += 4) {
          transpose_quads(rows, to + i * kTileCols + j);
          for (const float*& row : rows) row += 4;
        }
        for (int r = 0; r < 4; ++r) rows[r] -= i;
      }
      for (; i < head_dim; ++i) {
        for (int r = 0; r < 4; ++r) to[i * kTileCols + j + r] = r < there ? rows[r][i] : 0.0f;
      }
    }
  }
}

// [value_dim / kTileCols][kv_len][kTileCols]; columns behind the last one are zeros.
inline void pack_values(const float* v, int64_t stride, int64_t kv_len, int64_t value_dim, float* to) {
  const int64_t panel = kv_len * kTileCols, whole = value_dim / kTileCols * kTileCols;
  for (int64_t key = 0; key < kv_len; ++key, to += kTileCols, v += stride) {
    float* out = to;
    for (int64_t i = 0; i < whole; i += kTileCols, out += panel) {
      store(out, load(v + i));
      store(out + kLanes, load(v + i + kLanes));
    }
    if (whole < value_dim) {
      for (int i = 0; i < kTileCols; ++i) out[i] = whole + i < value_dim ? v[whole + i] : 0.0f;
    }
  }
}

// [q_len / kTileRows][head_dim][kTileRows], times `scale`; queries behind the last one are zeros.
inline void pack_queries(const float* q, int64_t stride, int64_t q_len, int64_t head_dim, float scale, float* to) {
  for (int64_t tile = 0; tile < q_len; tile += kTileRows, to += head_dim * kTileRows) {
    for (int r = 0; r < kTileRows; ++r) {
      const bool there = tile + r < q_len;
      const float* row = q + (tile + r) * stride;
      for (int64_t i = 0; i < head_dim; ++i) to[i * kTileRows + r] = there ? row[i] * scale : 0.0f;
    }
  }
}

// sum[r][c] += a[r * kRow + i * kStep] * b[i][c] over i < depth, for one tile.
template <int kRow, int kStep>
QFX_F32 void multiply(const float* a, const float* b, int64_t depth, Vec (&sum)[kTileRows][2]) {
  for (int64_t i = 0; i < depth; ++i, a += kStep, b += kTileCols) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x = all(a[r * kRow]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
}

// The scores (in powers of two) of one tile of queries and `keys` keys, rounded up to whole tiles.
inline void tile_scores(const float* q, const float* packed_keys, int64_t head_dim, int64_t keys, float* scores) {
  for (int64_t j = 0; j < keys; j += kTileCols, packed_keys += head_dim * kTileCols) {
    Vec sum[kTileRows][2] = {};
    multiply<1, kTileRows>(q, packed_keys, head_dim, sum);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      store(scores + r * kScoreStride + j, sum[r][0]);
      store(scores + r * kScoreStride + j + kLanes, sum[r][1]);
    }
  }
}

// sums = sums * keep[r] + weights * values
inline void tile_values(const float* weights, const float* packed_values, int64_t panel, int64_t keys,
                        const float* keep, float* sums, int64_t value_dim) {
  const int64_t width = round_up(value_dim, kTileCols);
  for (int64_t c = 0; c < width; c += kTileCols, packed_values += panel) {
    Vec sum[kTileRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      sum[r][0] = load(sums + r * width + c) * keep[r];
      sum[r][1] = load(sums + r * width + c + kLanes) * keep[r];
    }
    multiply<kScoreStride, 1>(weights, packed_values, keys, sum);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      store(sums + r * width + c, sum[r][0]);
      store(sums + r * width + c + kLanes, sum[r][1]);
    }
  }
}

// Masks are added in natural units. What is hidden stays -inf; the least float, with which some models hide, stays
// finite in powers of two, so that a row of nothing else comes out as the mean of the values, as in torch.
QFX_F32 Vec masked(Vec score, Vec added) {
  const Vec sum = fma(added, all(kLog2E), score);
  return added == -__builtin_inff() ? added : max(all(-0x1.fffffep127f), sum);
}

// One row of scores becomes weights 2^(score - maximum) with zeros from `visible` to `stored`. The running maximum and
// sum are updated; returns the factor for what was summed before.
inline float weigh(float* scores, const float* added, int64_t visible, int64_t stored, float& maximum, float& total) {
  if (added != nullptr) {
    each_vector(visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      store(scores + i, masked(load(scores + i, lanes), load(added + i, lanes)), lanes);
    });
  }
  const float most = std::max(maximum, largest_over(visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    return load(scores + i, lanes);
  }));
  const float base = most == -__builtin_inff() ? 0.0f : most;  // nothing seen yet: all weights are 0
  const float sum = sum_over(visible, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec w = exp2_nonpositive(load(scores + i, lanes) - base);
    store(scores + i, w, lanes);
    return w;
  });
  for (int64_t i = visible; i < stored; ++i) scores[i] = 0.0f;
  const float keep = exp2_nonpositive(all(maximum - base))[0];
  total = total * keep + sum;
  maximum = most;
  return keep;
}

// One block of at most kQueryBlock queries of one head, with packed keys and values.
template <class T>
void attend_block(const AttentionShape& s, const float* q, Output<T> out, int64_t b, int64_t h, int64_t first,
                  const AttentionScratch& at, float* scratch) {
  const int64_t count = std::min<int64_t>(kQueryBlock, s.q_len - first), width = round_up(s.value_dim, kTileCols);
  float *maxima = scratch + at.state, *totals = maxima + round_up(kQueryBlock, 16), *sums = scratch + at.sums;
  pack_queries(q + s.q.at(b, h, first), s.q.token, count, s.head_dim, s.scale * kLog2E, scratch + at.queries);
  for (int64_t r = 0; r < count; ++r) maxima[r] = -__builtin_inff(), totals[r] = 0.0f;
  std::memset(sums, 0, round_up(count, kTileRows) * width * sizeof(float));
  const int64_t seen = s.mask.visible(first + count - 1, s.kv_len);
  for (int64_t key = 0; key < seen; key += kKeyBlock) {
    for (int64_t tile = 0; tile < count; tile += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, count - tile);
      const auto visible = [&](int64_t row) {  // keys of this block
        return std::clamp<int64_t>(s.mask.visible(first + tile + row, s.kv_len) - key, 0, kKeyBlock);
      };
      const int64_t keys = visible(rows - 1);
      if (keys == 0) continue;
      float *scores = scratch + at.scores, keep[kTileRows] = {};
      tile_scores(scratch + at.queries + tile * s.head_dim, scratch + at.keys + key * s.head_dim, s.head_dim, keys,
                  scores);
      for (int64_t r = 0; r < rows; ++r) {
        const float* added = s.mask.row(b, h, first + tile + r);
        keep[r] = weigh(scores + r * kScoreStride, added == nullptr ? nullptr : added + key, visible(r), keys,
                        maxima[tile + r], totals[tile + r]);
      }
      tile_values(scores, scratch + at.values + key * kTileCols, s.kv_len * kTileCols, keys, keep, sums + tile * width,
                  s.value_dim);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const float inverse = totals[r] == 0.0f ? 0.0f : 1.0f / totals[r];
    const int64_t to = s.out.at(b, h, first + r);
    each_vector(s.value_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      out.put(to + i, load(sums + r * width + i, lanes) * inverse, lanes);
    });
  }
}

// One query, with keys and values where they lie.
template <class T>
void attend_row(const AttentionShape& s, const float* q, const float* k, const float* v, Output<T> out,
                int64_t b, int64_t h, int64_t query, const AttentionScratch& at, float* scratch) {
  const int64_t kv_head = h / (s.heads / s.kv_heads), seen = s.mask.visible(query, s.kv_len);
  const float* x = q + s.q.at(b, h, query);
  float *scores = scratch + at.keys, *sums = scratch + at.sums;
  const auto four = [&](const float* base, int64_t stride, int64_t key, const float** rows) {
    for (int r = 0; r < 4; ++r) rows[r] = base + std::min(key + r, seen - 1) * stride;
  };
  const float* rows[4];
  for (int64_t key = 0; key < seen; key += 4) {
    four(k + s.k.at(b, kv_head, 0), s.k.token, key, rows);
    Vec sum[4] = {};
    each_vector(s.head_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec part = load(x + i, lanes);
      for (int r = 0; r < 4; ++r) sum[r] = fma(part, load(rows[r] + i, lanes), sum[r]);
    });
    for (int r = 0; r < 4; ++r) scores[key + r] = f32::sum(sum[r]) * (s.scale * kLog2E);
  }
  float maximum = -__builtin_inff(), total = 0.0f;
  weigh(scores, s.mask.row(b, h, query), seen, round_up(seen, 4), maximum, total);
  std::memset(sums, 0, s.value_dim * sizeof(float));
  for (int64_t key = 0; key < seen; key += 4) {
    four(v + s.v.at(b, kv_head, 0), s.v.token, key, rows);
    each_vector(s.value_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec sum = load(sums + i, lanes);
      for (int r = 0; r < 4; ++r) sum = fma(all(scores[key + r]), load(rows[r] + i, lanes), sum);
      store(sums + i, sum, lanes);
    });
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  const int64_t to = s.out.at(b, h, query);
  each_vector(s.value_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    out.put(to + i, load(sums + i, lanes) * inverse, lanes);
  });
}

// q is [batch, heads, q_len, head_dim], k [batch, kv_heads, kv_len, head_dim], v [batch, kv_heads, kv_len, value_dim],
// the result [batch, heads, q_len, value_dim], each in its strides. A query that sees no key gives zeros, as in torch.
// The result may overwrite q. Scratch: attention_scratch() floats, for all threads.
template <class T>
void attention(const Team& team, const float* q, const float* k, const float* v, Output<T> out,
               const AttentionShape& s, float* scratch) {
  const AttentionScratch at(s);
  scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64 / sizeof(float) + team.rank * at.size;
  const int64_t block = s.q_len <= kFewQueries ? 1 : kQueryBlock, blocks = (s.q_len + block - 1) / block;
  const auto [begin, end] = team.share(s.batch * s.heads * blocks);
  int64_t packed = -1;  // whose keys and values lie in the scratch
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i % blocks * block, h = i / blocks % s.heads, b = i / blocks / s.heads;
    if (block == 1) {
      attend_row(s, q, k, v, out, b, h, first, at, scratch);
      continue;
    }
    const int64_t kv_head = h / (s.heads / s.kv_heads), wanted = b * s.kv_heads + kv_head;
    if (packed != wanted) {
      pack_keys(k + s.k.at(b, kv_head, 0), s.k.token, s.kv_len, s.head_dim, scratch + at.keys);
      pack_values(v + s.v.at(b, kv_head, 0), s.v.token, s.kv_len, s.value_dim, scratch + at.values);
      packed = wanted;
    }
    attend_block(s, q, out, b, h, first, at, scratch);
  }
}

}  // namespace qfx::f32
