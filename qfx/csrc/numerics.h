// The one formula of rounding, as in qfx/affine.py: clamp(round_half_even(x * inverse) + zero_point, low, high).
// Every step is one float32 operation (built without contraction), so that results equal ATen's bit for bit.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace qfx {

// Codes of element types, as in qfx/kernels.py.
enum Kind : int { kUint8 = 0, kInt8 = 1, kFloat32 = 2 };

// On the grid of scale 1/inverse, before zero point and clamp; NaN becomes 0, so that it ends at the zero point.
inline float to_grid(float x, float inverse) {
  const float v = std::nearbyint(x * inverse);
  return v == v ? v : 0.0f;
}

// NaN passes through, as through torch.clamp.
inline float clamp(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Call fn with a null pointer of the element type that `kind` names.
template <class Fn>
void with_integer(int kind, const Fn& fn) {
  if (kind == kUint8) fn(static_cast<uint8_t*>(nullptr));
  if (kind == kInt8) fn(static_cast<int8_t*>(nullptr));
}

template <class Fn>
void with_number(int kind, const Fn& fn) {
  with_integer(kind, fn);
  if (kind == kFloat32) fn(static_cast<float*>(nullptr));
}

// Call fn with std::true_type or std::false_type.
template <class Fn>
void with_bool(bool value, const Fn& fn) {
  if (value) fn(std::true_type{});
  else fn(std::false_type{});
}

// The difference wraps as torch's int32 does, instead of being undefined for absurd zero points.
template <class T>
inline float dequantized(T q, float scale, int32_t zero_point) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(q) - static_cast<uint32_t>(zero_point))) * scale;
}
template <>
inline float dequantized<float>(float x, float, int32_t) {
  return x;
}

template <class T>
inline T quantized(float x, float inverse, float zero_point, float low, float high) {
  return static_cast<T>(static_cast<int32_t>(clamp(to_grid(x, inverse) + zero_point, low, high)));
}

}  // namespace qfx
