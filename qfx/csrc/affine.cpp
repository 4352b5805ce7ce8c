// quantize, dequantize and fake_quantize in every granularity; per-token dynamic quantization.
//
// Memory is walked in its own order. Two shapes of work cover all granularities:
//   pieces   runs of elements that share one scale (per tensor, per axis, per group, per token)
//   vectors  runs in which neighbours have different scales (axis or group axis is not the innermost)

#include <cstring>
#include <limits>
#include <vector>

#include "numerics.h"
#include "parallel.h"

namespace {

using namespace qfx;

template <class T>
struct Quantize {
  const float* x;
  T* q;
  float low, high;

  void piece(int64_t begin, int64_t n, float scale, int32_t zero_point) const {
    const float* __restrict in = x + begin;
    T* __restrict out = q + begin;
    const float inverse = 1.0f / scale, offset = static_cast<float>(zero_point), lo = low, hi = high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = quantized<T>(in[i], inverse, offset, lo, hi);
  }
  void vector(int64_t begin, int64_t n, const float* __restrict scale, const int32_t* __restrict zero_point) const {
    const float* __restrict in = x + begin;
    T* __restrict out = q + begin;
    const float lo = low, hi = high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] = quantized<T>(in[i], 1.0f / scale[i], static_cast<float>(zero_point[i]), lo, hi);
  }
};

template <class T>
struct Dequantize {
  const T* q;
  float* x;

  void piece(int64_t begin, int64_t n, float scale, int32_t zero_point) const {
    const T* __restrict in = q + begin;
    float* __restrict out = x + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = dequantized(in[i], scale, zero_point);
  }
  void vector(int64_t begin, int64_t n, const float* __restrict scale, const int32_t* __restrict zero_point) const {
    const T* __restrict in = q + begin;
    float* __restrict out = x + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = dequantized(in[i], scale[i], zero_point[i]);
  }
};

// The range of the integers, and the clamp in front of the rounding.
struct Limits {
  float low, high, clamp_low, clamp_high;
  template <bool kClamp>
  float clamped(float x) const {
    return kClamp ? clamp(x, clamp_low, clamp_high) : x;
  }
};

// Without a mask the pointer may be null; without a clamp its bounds are not read.
template <bool kMask, bool kClamp>
struct FakeQuantize {
  const float* x;
  float* y;
  uint8_t* mask;
  Limits limits;
  bool straight_through;

  static void one(float x, float& y, uint8_t& mask, float scale, float inverse, float offset, const Limits& l,
                  bool straight_through) {
    const float v = to_grid(l.clamped<kClamp>(x), inverse) + offset, q = clamp(v, l.low, l.high);
    if (kMask && kClamp) mask = ((q == v) | straight_through) & !(x <= l.clamp_low) & !(x >= l.clamp_high);
    if (kMask && !kClamp) mask = (q == v) | straight_through;
    y = (q - offset) * scale;
  }
  void piece(int64_t begin, int64_t n, float scale, int32_t zero_point) const {
    const float* __restrict in = x + begin;
    float* __restrict out = y + begin;
    uint8_t* __restrict passes = mask + begin;
    const float inverse = 1.0f / scale, offset = static_cast<float>(zero_point);
    const Limits l = limits;
    const bool straight = straight_through;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) one(in[i], out[i], passes[i], scale, inverse, offset, l, straight);
  }
  void vector(int64_t begin, int64_t n, const float* __restrict scale, const int32_t* __restrict zero_point) const {
    const float* __restrict in = x + begin;
    float* __restrict out = y + begin;
    uint8_t* __restrict passes = mask + begin;
    const Limits l = limits;
    const bool straight = straight_through;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      one(in[i], out[i], passes[i], scale[i], 1.0f / scale[i], static_cast<float>(zero_point[i]), l, straight);
  }
};

// Writes the gradient of x, and returns or adds up the terms of the scale's: products in float32, sums in double.
template <bool kClamp>
struct LearnedBackward {
  const float *grad, *x;
  float* grad_x;
  Limits limits;

  static float one(float grad, float x, float& grad_x, float inverse, float offset, const Limits& l) {
    float v = l.clamped<kClamp>(x) * inverse;
    v = v == v ? v : 0.0f;
    const float rounded = std::nearbyint(v), q = rounded + offset, inside = clamp(q, l.low, l.high);
    const float slope = inside == q ? rounded - v : inside - offset;
    float passes = inside == q ? 1.0f : 0.0f;
    // Products of zeros and ones: of a conjunction g++ makes branches, and then no vectors.
    if (kClamp) passes *= (x <= l.clamp_low ? 0.0f : 1.0f) * (x >= l.clamp_high ? 0.0f : 1.0f);
    grad_x = passes * grad;
    return slope * grad;
  }
  double piece(int64_t begin, int64_t n, float scale, int32_t zero_point) const {
    const float *__restrict g = grad + begin, *__restrict in = x + begin;
    float* __restrict out = grad_x + begin;
    const float inverse = 1.0f / scale, offset = static_cast<float>(zero_point);
    const Limits l = limits;
    constexpr int kLanes = 32;  // partial sums of a fixed number, whatever the width of the machine's registers
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) lanes[k] += one(g[i + k], in[i + k], out[i + k], inverse, offset, l);
    }
    for (int k = 0; i < n; ++i, ++k) lanes[k] += one(g[i], in[i], out[i], inverse, offset, l);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
  }
  void vector(int64_t begin, int64_t n, const float* __restrict scale, const int32_t* __restrict zero_point,
              double* __restrict sums) const {
    const float *__restrict g = grad + begin, *__restrict in = x + begin;
    float* __restrict out = grad_x + begin;
    const Limits l = limits;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      sums[i] += one(g[i], in[i], out[i], 1.0f / scale[i], static_cast<float>(zero_point[i]), l);
  }
};

// Filled by _walk in qfx/kernels.py: five numbers that say which scale an element has.
struct Walk {
  int64_t n, row, group, rows, count;
};

// Rows of `row` elements, groups of `group` within each (the last may be ragged), one scale a group; the scales
// repeat after `count`.
template <class Op>
void pieces(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point, int threads) {
  const int64_t groups = (w.row + w.group - 1) / w.group;
  parallel_for(w.n, 1, threads, [&](int64_t begin, int64_t end) {
    int64_t r = begin / w.row, k = begin % w.row;
    while (begin < end) {
      const int64_t g = k / w.group;
      const int64_t n = std::min(std::min((g + 1) * w.group, w.row) - k, end - begin);
      const int64_t s = (r * groups + g) % w.count;
      op.piece(begin, n, scale[s], zero_point[s]);
      begin += n;
      k += n;
      if (k == w.row) k = 0, ++r;
    }
  });
}

// Runs of `row` elements with a vector of `row` scales each; `group` runs share one vector, `rows` runs (whose last
// group may be ragged) make a block, and the vectors repeat after `count` scales.
template <class Op>
void vectors(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point, int threads) {
  const int64_t groups = (w.rows + w.group - 1) / w.group;
  parallel_for(w.n, 1, threads, [&](int64_t begin, int64_t end) {
    int64_t r = begin / w.row, i = begin % w.row;
    while (begin < end) {
      const int64_t n = std::min(w.row - i, end - begin);
      const int64_t s = ((r / w.rows * groups + r % w.rows / w.group) * w.row) % w.count + i;
      op.vector(begin, n, scale + s, zero_point + s);
      begin += n;
      i = 0;
      ++r;
    }
  });
}

template <class Op>
void walk(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point, int threads) {
  if (w.rows == 0) return pieces(op, w, scale, zero_point, threads);
  return vectors(op, w, scale, zero_point, threads);
}

// Sums over the elements of each scale, of the same bits for any number of threads: the shape alone says how the work
// is cut into parts, and the sums of the parts are added in their order.
constexpr int64_t kPart = 8192;     // elements of a part
constexpr int64_t kMostParts = 64;  // of one vector of scales: each holds a vector of sums

template <class Op>
std::vector<double> sum_pieces(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point,
                               int threads) {
  const int64_t groups = (w.row + w.group - 1) / w.group, cuts = (w.group + kPart - 1) / kPart;
  std::vector<double> parts(w.n / w.row * groups * cuts), sums(w.count);
  parallel_for(static_cast<int64_t>(parts.size()), std::min(w.group, kPart), threads, [&](int64_t begin, int64_t end) {
    int64_t r = begin / cuts / groups, g = begin / cuts % groups, cut = begin % cuts;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = g * w.group + cut * kPart;
      const int64_t last = std::min(std::min(first + kPart, (g + 1) * w.group), w.row);  // may lie before first
      const int64_t s = (r * groups + g) % w.count;
      parts[part] = op.piece(r * w.row + first, last - first, scale[s], zero_point[s]);
      if (++cut == cuts) cut = 0, ++g;
      if (g == groups) g = 0, ++r;
    }
  });
  for (size_t part = 0; part < parts.size(); ++part) sums[part / cuts % w.count] += parts[part];
  return sums;
}

template <class Op>
std::vector<double> sum_vectors(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point,
                                int threads) {
  const int64_t runs = w.n / w.row, vectors = w.count / w.row, groups = (w.rows + w.group - 1) / w.group;
  // The runs of one vector: all of them, or a group; then several vectors do not repeat.
  const int64_t span = vectors == 1 ? runs : w.group;
  const int64_t height = std::max((span + kMostParts - 1) / kMostParts, (kPart + w.row - 1) / w.row);
  const int64_t cuts = (span + height - 1) / height;
  std::vector<double> parts(vectors * cuts * w.row), sums(w.count);
  parallel_for(vectors * cuts, std::min(span, height) * w.row, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t vector = part / cuts;
      const int64_t start = vectors == 1 ? 0 : vector / groups * w.rows + vector % groups * w.group;
      const int64_t stop = vectors == 1 ? runs : std::min(start + w.group, (vector / groups + 1) * w.rows);
      const int64_t first = start + part % cuts * height, s = vector * w.row;
      for (int64_t run = first; run < std::min(first + height, stop); ++run)
        op.vector(run * w.row, w.row, scale + s, zero_point + s, parts.data() + part * w.row);
    }
  });
  for (int64_t part = 0; part < vectors * cuts; ++part)
    for (int64_t i = 0; i < w.row; ++i) sums[part / cuts * w.row + i] += parts[part * w.row + i];
  return sums;
}

template <class Op>
void sum(const Op& op, const Walk& w, const float* scale, const int32_t* zero_point, double factor, float* result,
         int threads) {
  const auto sums = w.rows == 0 ? sum_pieces(op, w, scale, zero_point, threads)
                                : sum_vectors(op, w, scale, zero_point, threads);
  for (int64_t i = 0; i < w.count; ++i) result[i] = static_cast<float>(sums[i] * factor);
}

// Interleave `channels` planes of `n` pixels, kBlock apart; a constant Channels lets the compiler shuffle registers.
constexpr int64_t kBlock = 512;
template <int Channels, class T>
void interleave(const T* __restrict planes, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < Channels; ++c) out[i * Channels + c] = planes[c * kBlock + i];
}
template <class T>
void interleave(const T* __restrict planes, T* __restrict out, int64_t n, int channels) {
  switch (channels) {
    case 1: return interleave<1>(planes, out, n);
    case 2: return interleave<2>(planes, out, n);
    case 3: return interleave<3>(planes, out, n);
    case 4: return interleave<4>(planes, out, n);
  }
}

}  // namespace

// Planes [batch, channels <= 4, pixels] to pixels [batch, pixels, channels], one scale: what a first convolution reads.
QFX_API void qfx_quantize_interleaved(const float* x, void* q, const float* scale, const int32_t* zero_point,
                                      int64_t batch, int64_t channels, int64_t pixels, float low, float high, int kind,
                                      int threads) {
  with_integer(kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = (pixels + kBlock - 1) / kBlock;
    parallel_for(batch * blocks, channels * kBlock, threads, [&](int64_t begin, int64_t end) {
      T planes[4 * kBlock];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t image = block / blocks, first = block % blocks * kBlock, n = std::min(kBlock, pixels - first);
        for (int64_t c = 0; c < channels; ++c)
          Quantize<T>{x + (image * channels + c) * pixels + first, planes + c * kBlock, low, high}.piece(0, n, *scale,
                                                                                                         *zero_point);
        interleave(planes, static_cast<T*>(q) + (image * pixels + first) * channels, n, static_cast<int>(channels));
      }
    });
  });
}

QFX_API void qfx_quantize(const float* x, void* q, const float* scale, const int32_t* zero_point, int64_t n,
                          int64_t row, int64_t group, int64_t rows, int64_t count, float low, float high, int kind,
                          int threads) {
  with_integer(kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    walk(Quantize<T>{x, static_cast<T*>(q), low, high}, {n, row, group, rows, count}, scale, zero_point, threads);
  });
}

QFX_API void qfx_dequantize(const void* q, float* x, const float* scale, const int32_t* zero_point, int64_t n,
                            int64_t row, int64_t group, int64_t rows, int64_t count, int kind, int threads) {
  with_integer(kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    walk(Dequantize<T>{static_cast<const T*>(q), x}, {n, row, group, rows, count}, scale, zero_point, threads);
  });
}

// The mask may be null: then none is written. A bound that is NaN is none.
QFX_API void qfx_fake_quantize(const float* x, float* y, uint8_t* mask, const float* scale, const int32_t* zero_point,
                               int64_t n, int64_t row, int64_t group, int64_t rows, int64_t count, float low,
                               float high, float clamp_low, float clamp_high, int straight_through, int threads) {
  const Limits limits{low, high, clamp_low, clamp_high};
  with_bool(mask != nullptr, [&](auto has_mask) {
    with_bool(clamp_low == clamp_low || clamp_high == clamp_high, [&](auto has_clamp) {
      const FakeQuantize<has_mask.value, has_clamp.value> op{x, y, mask, limits, straight_through != 0};
      walk(op, {n, row, group, rows, count}, scale, zero_point, threads);
    });
  });
}

QFX_API void qfx_fake_quantize_learned_backward(const float* grad, const float* x, float* grad_x, float* grad_scale,
                                                const float* scale, const int32_t* zero_point, int64_t n, int64_t row,
                                                int64_t group, int64_t rows, int64_t count, float low, float high,
                                                float clamp_low, float clamp_high, double gradient_scale,
                                                int threads) {
  const Limits limits{low, high, clamp_low, clamp_high};
  with_bool(clamp_low == clamp_low || clamp_high == clamp_high, [&](auto has_clamp) {
    const LearnedBackward<has_clamp.value> op{grad, x, grad_x, limits};
    sum(op, {n, row, group, rows, count}, scale, zero_point, gradient_scale, grad_scale, threads);
  });
}

QFX_API void qfx_fake_quantize_backward(const float* grad, const uint8_t* mask, float* out, int64_t n, int threads) {
  parallel_for(n, 1, threads, [&](int64_t begin, int64_t end) {
    const float* __restrict in = grad;
    const uint8_t* __restrict inside = mask;
    float* __restrict to = out;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = in[i] * static_cast<float>(inside[i]);
  });
}

// NaN if there is one, as torch.aminmax.
QFX_API void qfx_min_max(const float* x, float* low, float* high, int64_t n, int threads) {
  struct Extremes {
    float low, high;
    int nan;
  };
  std::vector<Extremes> parts((n + kPart - 1) / kPart);
  parallel_for(static_cast<int64_t>(parts.size()), kPart, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const float* __restrict in = x + part * kPart;
      const int64_t count = std::min(kPart, n - part * kPart);
      float least = in[0], most = in[0];
      int nan = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(| : nan)
      for (int64_t i = 0; i < count; ++i) {
        least = in[i] < least ? in[i] : least;
        most = in[i] > most ? in[i] : most;
        nan |= in[i] != in[i];
      }
      parts[part] = {least, most, nan};
    }
  });
  Extremes all = parts[0];
  for (const Extremes& part : parts) {
    all.low = std::min(all.low, part.low);
    all.high = std::max(all.high, part.high);
    all.nan |= part.nan;
  }
  *low = all.nan ? std::numeric_limits<float>::quiet_NaN() : all.low;
  *high = all.nan ? std::numeric_limits<float>::quiet_NaN() : all.high;
}

// Symmetric, one scale a row: scale = max(absmax / half_range, smallest).
QFX_API void qfx_quantize_per_token(const float* x, void* q, float* scale, int64_t rows, int64_t row, float half_range,
                                    float smallest, int zero_point, float low, float high, int kind, int threads) {
  with_integer(kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Quantize<T> op{x, static_cast<T*>(q), low, high};
    parallel_for(rows, row, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        // Bits of |x| order as floats do, infinity and NaN last, so that the maximum keeps a NaN as torch.amax does.
        const float* __restrict in = x + r * row;
        uint32_t most = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < row; ++i) {
          uint32_t bits;
          std::memcpy(&bits, in + i, sizeof bits);
          bits &= 0x7fffffffu;
          most = std::max(most, bits);
        }
        float absmax;
        std::memcpy(&absmax, &most, sizeof absmax);
        const float s = absmax / half_range;
        scale[r] = s < smallest ? smallest : s;
        op.piece(r * row, row, scale[r], zero_point);
      }
    });
  });
}
