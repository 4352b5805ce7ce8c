// Exact sums of products of bytes, in plain C++: what runs where no other dot_*.h does.

#pragma once

#include <cstdint>

namespace qfx {

// What every Dot is: `kLanes` sums in a Vec; a panel holds a row's data as Data, `kUnit` of them meet as many weights of
// each lane in one dot(). A tile is `kRows` rows by `kVecs` Vecs. Data enter as uint8.
struct DotPortable {
  typedef int32_t Vec __attribute__((vector_size(32)));
  using Data = int32_t;
  using Weight = int8_t;
  static constexpr int kLanes = 8, kUnit = 1, kRows = 4, kVecs = 2;

  static Vec zero() { return Vec{}; }
  static Vec splat(const Data* data) { return Vec{} + *data; }
  static Vec weights(const Weight* w) {
    typedef int8_t Bytes __attribute__((vector_size(8)));
    Bytes bytes;
    __builtin_memcpy(&bytes, w, sizeof bytes);
    return __builtin_convertvector(bytes, Vec);
  }
  static Vec dot(Vec sum, Vec data, Vec w) { return sum + data * w; }
  static void store(int32_t* to, Vec sum) { __builtin_memcpy(to, &sum, sizeof sum); }

  // `count` bytes, each exclusive-or'd with `flip`, as Data; may write 63 bytes further.
  static void widen(Data* to, const uint8_t* from, int count, uint8_t flip) {
    for (int i = 0; i < count; ++i) to[i] = from[i] ^ flip;
  }
};

}  // namespace qfx
