// What follows the exact sums of a layer: scale, bias, an addition, an activation, rounding. Every step is one float32
// operation in the order of the reference, so that the integers are the same.

#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"
#include "float_vector.h"

namespace qfx {

using f32::First;
using f32::IntVec;
using f32::Vec;
using f32::Whole;

QFX_F32 IntVec load_ints(const int32_t* p) {
  IntVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The second operand of an addition behind a layer.
struct NoOther {
  template <class Lanes>
  QFX_F32 Vec add(Vec y, int64_t, Lanes) const {
    return y;
  }
};

template <class T>
struct IntegerOther {
  const T* data;
  float scale;
  int32_t zero_point;
  template <class Lanes>
  QFX_F32 Vec add(Vec y, int64_t at, Lanes lanes) const {
    return y + __builtin_convertvector(f32::load_bytes(data + at, lanes) - zero_point, Vec) * scale;
  }
};

struct FloatOther {
  const float* data;
  template <class Lanes>
  QFX_F32 Vec add(Vec y, int64_t at, Lanes lanes) const {
    return y + f32::load(data + at, lanes);
  }
};

struct Identity {
  QFX_F32 Vec operator()(Vec y) const { return y; }
};

// clamp(round_half_even(y * inverse) + zero_point, low, high). The bounds are integers, so that they may come before the
// rounding; what is within them is rounded by an addition that leaves no bits for a fraction (2^23 + 2^22).
template <class T>
struct Quantized {
  T* data;
  float inverse;
  int32_t zero_point;
  float low, high;  // less the zero point
  template <class Lanes>
  QFX_F32 void store(Vec y, int64_t at, Lanes lanes) const {
    f32::store_bytes(data + at, rounded(y), lanes);
  }
  QFX_F32 void store(Vec a, Vec b, int64_t at) const { f32::store_bytes(data + at, rounded(a), rounded(b)); }

 private:
  QFX_F32 IntVec rounded(Vec y) const {
    constexpr float kWhole = 12582912.0f;
    const Vec v = f32::min(f32::max(y * inverse, f32::all(low)), f32::all(high)) + kWhole;
    return f32::bits(v) - (f32::bits(f32::all(kWhole)) - zero_point);
  }
};

struct Floats {
  float* data;
  template <class Lanes>
  QFX_F32 void store(Vec y, int64_t at, Lanes lanes) const {
    f32::store(data + at, y, lanes);
  }
  QFX_F32 void store(Vec a, Vec b, int64_t at) const {
    f32::store(data + at, a);
    f32::store(data + at + f32::kLanes, b);
  }
};

// `bias` holds the integer bias and what the data's zero point adds to the sums; `shift` a float bias, or null. All by
// output channel, each group's filled up to whole tiles: `padded` counts there, `channel` in the output.
template <class Other, class Activation, class Out>
struct Epilogue {
  const int32_t* bias;
  const float* scale;
  const float* shift;
  Other other;
  Activation activation;
  Out out;

  // N sums of one position, of which `valid` are channels.
  template <int N>
  QFX_F32 void run(const int32_t* sums, int padded, int channel, int valid, int64_t out_at, int64_t other_at) const {
    constexpr int kLanes = f32::kLanes;
    out_at += channel;
    other_at += channel;
#pragma GCC unroll 8
    for (int j = 0; j < N; j += 2 * kLanes) {
      if (j + kLanes < N && j + 2 * kLanes <= valid) {
        out.store(value(sums + j, padded + j, other_at + j, Whole{}),
                  value(sums + j + kLanes, padded + j + kLanes, other_at + j + kLanes, Whole{}), out_at + j);
        continue;
      }
#pragma GCC unroll 2
      for (int k = j; k < N && k < j + 2 * kLanes; k += kLanes) {
        if (k + kLanes <= valid) {
          out.store(value(sums + k, padded + k, other_at + k, Whole{}), out_at + k, Whole{});
        } else if (k < valid) {
          const First lanes{valid - k};
          out.store(value(sums + k, padded + k, other_at + k, lanes), out_at + k, lanes);
        }
      }
    }
  }

 private:
  template <class Lanes>
  QFX_F32 Vec value(const int32_t* sums, int padded, int64_t other_at, Lanes lanes) const {
    Vec y = __builtin_convertvector(load_ints(sums) + load_ints(bias + padded), Vec) * f32::load(scale + padded);
    if (shift != nullptr) y = y + f32::load(shift + padded);
    return activation(other.add(y, other_at, lanes));
  }
};

}  // namespace qfx
