// quantize, dequantize and fake_quantize in every granularity; per-token dynamic quantization.
//
// Memory is walked in its own order. Two shapes of work cover all granularities:
//   pieces   runs of elements that share one scale (per tensor, per axis, per group, per token)
//   vectors  runs in which neighbours have different scales (axis or group axis is not the innermost)

#include <cstring>

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

struct FakeQuantize {
  const float* x;
  float* y;
  uint8_t* mask;
  float low, high;

  void piece(int64_t begin, int64_t n, float scale, int32_t zero_point) const {
    const float* __restrict in = x + begin;
    float* __restrict out = y + begin;
    uint8_t* __restrict inside = mask + begin;
    const float inverse = 1.0f / scale, offset = static_cast<float>(zero_point), lo = low, hi = high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float v = to_grid(in[i], inverse) + offset;
      inside[i] = static_cast<uint8_t>((v >= lo) & (v <= hi));
      out[i] = (clamp(v, lo, hi) - offset) * scale;
    }
  }
  void vector(int64_t begin, int64_t n, const float* __restrict scale, const int32_t* __restrict zero_point) const {
    const float* __restrict in = x + begin;
    float* __restrict out = y + begin;
    uint8_t* __restrict inside = mask + begin;
    const float lo = low, hi = high;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float offset = static_cast<float>(zero_point[i]);
      const float v = to_grid(in[i], 1.0f / scale[i]) + offset;
      inside[i] = static_cast<uint8_t>((v >= lo) & (v <= hi));
      out[i] = (clamp(v, lo, hi) - offset) * scale[i];
    }
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

QFX_API void qfx_fake_quantize(const float* x, float* y, uint8_t* mask, const float* scale, const int32_t* zero_point,
                               int64_t n, int64_t row, int64_t group, int64_t rows, int64_t count, float low,
                               float high, int threads) {
  walk(FakeQuantize{x, y, mask, low, high}, {n, row, group, rows, count}, scale, zero_point, threads);
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
