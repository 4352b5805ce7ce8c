// Linear layers with narrow weights on float activations: y[rows, out] = x[rows, in] * dequantize(weight)^T + bias.
//
// Made for few rows, where reading the weights is what takes time. They come in panels of 16 output channels; one step
// through a panel is one cache line, a 32-bit word for each channel with 8 weights of 4 bits or 4 weights of 8 bits:
// qfx/targets/native/weight_only_packing.py draws it. A lane of a vector is an output channel, so no sum crosses lanes.
//
// A field is cut out of the words where it stands, as an integer times a power of two (16^(p % 4) for the nibble at
// position p, 2^24 for every byte); the inputs are divided by that power beforehand, which is exact as long as
// |x| >= 2^-102. A weight then costs one `and` or shuffle, one conversion and one multiply-add.
//
// One row of 4-bit weights has still fewer operations a byte in integers: 32 inputs become multiples of one power of
// two, in three signed digits to the base 256, and vpmaddubsw multiplies each digit by 32 weights at once. Such a block
// is exact but for rounding the inputs to 2^-23 of the largest of them, which is what float32 loses where the zero point
// times the same input cancels. A chunk that is not finite, or tiny, stays in floats.
//
// The order of a sum, for one row and channel, in float32:
//   1. a chunk of a group, at most 256 inputs: -zero_point * sum(x), then + q * x in order of the fields, in kPhases
//      sums of every kPhases-th field, which are added in pairs; or + the exact sums of blocks of 32 inputs;
//   2. times the group's scale, added to the chunks before;
//   3. plus bias.
// kPhases depends on the vectors' width and on how many rows are computed together; no result depends on the threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "team.h"

namespace qfx::weight_only {

constexpr int kPanel = 16;     // output channels
constexpr int64_t kLine = 64;  // bytes of a step
constexpr int64_t kChunk = 256;
constexpr int64_t kBlock = 4;  // steps whose digits int16 can sum: 2 * 15 * 128 * 2 * 4 = 30720
constexpr int64_t kAhead = 2048;     // bytes between the weights that are read and those that are fetched
constexpr int64_t kGroupsAhead = 8;  // the same for scales and zero points

struct Layer {
  int64_t in, out;
  int64_t group;          // inputs that share a scale; the last group may have fewer
  int bits;               // 4 or 8
  const uint8_t* weight;  // [panels, steps, 64]
  const float* scale;     // [panels, groups, 16]
  const int8_t* zero;     // [panels, groups, 16], or null: `middle` is every zero point
  float middle;
  const float* bias;  // [out], or null
};

struct Bfloat16 {
  uint16_t bits;
};

// --- vectors of the machine's width ----------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4;
#else
constexpr int kLanes = 4, kRows = 2;
#endif
// kRows: the most rows whose sums fit into the registers. kDigits: a row of 4-bit weights may be computed in integers.
constexpr bool kDigits = kLanes > 4;
constexpr int kVectors = kPanel / kLanes;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats splat(float x) { return x - Floats{}; }

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats to_floats(Ints integers) { return __builtin_convertvector(integers, Floats); }

inline Floats to_floats(const int8_t* integers) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load<Bytes>(integers), Floats);
}

// Byte `position` of every word as its highest one, over zeros.
template <int position>
inline Words byte_on_top(Words words) {
  typedef int8_t Bytes __attribute__((vector_size(4 * kLanes)));
  Bytes from;
  for (int i = 0; i < 4 * kLanes; ++i) from[i] = i % 4 == 3 ? i % 16 - 3 + position : -1;  // -1 gives zero
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Words)_mm512_shuffle_epi8((__m512i)words, (__m512i)from);
#elif defined(__AVX2__)
  return (Words)_mm256_shuffle_epi8((__m256i)words, (__m256i)from);
#else
  (void)from;
  return (words << (24 - 8 * position)) & 0xFF000000u;
#endif
}

// Four bytes, in every word.
inline Words splat(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word - Words{};
}

// No instruction: keeps g++ from taking all products before it adds one, which needs more registers than there are.
inline __attribute__((always_inline)) Words settled(Words sums) {
#if defined(__AVX2__)
  __asm__("" : "+v"(sums));
#endif
  return sums;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Adds to the int16 of `sums` the sums of two neighbouring products: unsigned bytes up to 15 by signed ones.
inline Words add_products(Words sums, Words bytes, Words by) {
  return settled((Words)_mm512_add_epi16((__m512i)sums, _mm512_maddubs_epi16((__m512i)bytes, (__m512i)by)));
}

// int32 sums of two neighbouring int16.
inline Ints widen(Words sums) { return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__)
inline Words add_products(Words sums, Words bytes, Words by) {
  return settled((Words)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)bytes, (__m256i)by)));
}

inline Ints widen(Words sums) { return (Ints)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#else
inline Words add_products(Words sums, Words, Words) { return sums; }  // kDigits is false: not called
inline Ints widen(Words sums) { return (Ints)sums; }
#endif

// --- the two widths of weights ---------------------------------------------------------------------------------------

// The fields of a word in the order in which they are multiplied: field p holds input `input(p)` of the step, and is
// `factor(p)` times too large.
template <int kBits>
struct Fields;

template <>
struct Fields<4> {
  static constexpr int kCount = 8;
  // Bytes hold inputs 0..3 in their lower nibbles, 4..7 in the upper ones.
  static constexpr int input(int p) { return p / 2 + 4 * (p % 2); }
  static constexpr float factor(int p) { return 1 << 4 * (p % 4); }

  template <int p>
  static Words cut(Words& words) {
    if (p == 4) words >>= 16;  // so that four masks serve eight nibbles, and stay in registers
    return words & (0xFu << 4 * (p % 4));
  }
};

template <>
struct Fields<8> {
  static constexpr int kCount = 4;
  static constexpr int input(int p) { return p; }
  static constexpr float factor(int) { return 1 << 24; }

  template <int p>
  static Words cut(Words& words) {
    return byte_on_top<p>(words);
  }
};

// --- geometry --------------------------------------------------------------------------------------------------------

// A group takes whole steps, and is cut into chunks. Every count is of one panel.
struct Geometry {
  int64_t fields, groups, group_steps, group_chunks, steps, chunks;

  explicit Geometry(const Layer& layer) : fields(32 / layer.bits), groups((layer.in + layer.group - 1) / layer.group) {
    const int64_t last = layer.in - (groups - 1) * layer.group;
    group_steps = (layer.group + fields - 1) / fields;
    group_chunks = (layer.group + kChunk - 1) / kChunk;
    steps = (groups - 1) * group_steps + (last + fields - 1) / fields;
    chunks = (groups - 1) * group_chunks + (last + kChunk - 1) / kChunk;
  }

  // Floats that `arrange` makes of a row: for each chunk its correction and whether it is in digits, then the values.
  int64_t row() const { return 2 * chunks + steps * fields; }
};

inline int64_t panels(const Layer& layer) { return (layer.out + kPanel - 1) / kPanel; }

// Floats of scratch for `rows` rows.
inline int64_t scratch(const Layer& layer, int64_t rows) { return rows * Geometry(layer).row(); }

// body(first row, integral_constant<int, rows>) over tiles of kRows, ..., 4, 2, 1 rows.
template <int kMost = kRows, class Body>
inline void for_tiles(int64_t rows, const Body& body, int64_t first = 0) {
  for (; first + kMost <= rows; first += kMost) body(first, std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) for_tiles<kMost / 2>(rows, body, first);
}

// --- inputs ----------------------------------------------------------------------------------------------------------

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

inline void read(const float* x, Eight& to) {
  typedef float Anywhere __attribute__((vector_size(32), aligned(4), may_alias));
  to = *reinterpret_cast<const Anywhere*>(x);  // g++ makes two halves of a memcpy
}

inline void read(const Bfloat16* x, Eight& to) {
  typedef uint16_t Narrow __attribute__((vector_size(16)));
  typedef uint32_t Wide __attribute__((vector_size(32)));
  to = (Eight)(__builtin_convertvector(load<Narrow>(x), Wide) << 16);
}

inline void absolute(const Eight& x, Eight& to) { to = (Eight)((EightInts)x & 0x7FFFFFFF); }

inline void larger(const Eight& a, const Eight& b, Eight& to) { to = a > b ? a : b; }

// The sum and the largest of eight, by halves.
inline float total(const Eight& x) {
  Eight sums = x + __builtin_shuffle(x, EightInts{4, 5, 6, 7, 0, 1, 2, 3});
  sums += __builtin_shuffle(sums, EightInts{2, 3, 0, 1, 6, 7, 4, 5});
  return sums[0] + sums[1];
}

inline float largest(const Eight& x) {
  Eight most;
  larger(x, __builtin_shuffle(x, EightInts{4, 5, 6, 7, 0, 1, 2, 3}), most);
  larger(most, __builtin_shuffle(most, EightInts{2, 3, 0, 1, 6, 7, 4, 5}), most);
  return std::max(float(most[0]), float(most[1]));
}

// A chunk of one row's inputs into every `stride`-th float of `to`; returns their sum.
template <int kBits, int stride, class In>
inline float arrange_chunk(const In* x, int64_t count, float* to) {
  using F = Fields<kBits>;
  Eight factors, sums = {};
  for (int p = 0; p < 8; ++p) factors[p] = 1.0f / F::factor(p % F::kCount);
  for (int64_t k = 0; k < count; k += 8, to += 8 * stride) {
    Eight values;
    if (k + 8 <= count) {
      read(x + k, values);
    } else {
      In rest[8] = {};
      std::memcpy(rest, x + k, (count - k) * sizeof(In));
      read(rest, values);
    }
    sums += values;
    if (kBits == 4) values = __builtin_shuffle(values, EightInts{0, 4, 1, 5, 2, 6, 3, 7});
    values *= factors;
    const int64_t kept = std::min<int64_t>(8, (count - k + F::kCount - 1) / F::kCount * F::kCount);
    if (stride == 1 && kept == 8) {
      std::memcpy(to, &values, sizeof values);
    } else {
      for (int p = 0; p < kept; ++p) to[p * stride] = values[p];
    }
  }
  return total(sums);
}

// At most 32 inputs in digits: for every four inputs their lowest digits, the middle ones, the highest ones; behind
// them the float that one is worth. Adds what the digits stand for to `sum`. False: no digits can stand for the inputs.
inline __attribute__((always_inline)) bool arrange_block(const Eight* values, int steps, uint8_t* to, float& sum) {
  typedef uint8_t Sixteen __attribute__((vector_size(16)));
  Eight most = {}, sizes = {};
  for (int i = 0; i < steps; ++i) {
    Eight size;
    absolute(values[i], size);
    larger(most, size, most);
    sizes += size;
  }

  // The largest becomes 2^22 to 2^23 / 1.005: three digits of -128 to 127 end at 127 * (1 + 256 + 65536).
  const float top = largest(most), above = top * 1.005f;
  uint32_t exponent;
  std::memcpy(&exponent, &above, sizeof exponent);
  exponent = top == 0 ? 127 : exponent >> 23;
  if (exponent < 23 || exponent > 254 || std::isnan(total(sizes))) return false;
  const uint32_t up_bits = (276 - exponent) << 23, down_bits = (exponent - 22) << 23;
  float up, down;
  std::memcpy(&up, &up_bits, sizeof up);
  std::memcpy(&down, &down_bits, sizeof down);

  Eight rounded = {};
  for (int i = 0; i < steps; ++i) {
    const Eight scaled = values[i] * up;
    const Eight half = (Eight)(((EightInts)scaled & INT32_MIN) | 0x3F000000);  // 0.5 with the sign of `scaled`
    const EightInts integers = __builtin_convertvector(scaled + half, EightInts);
    rounded += __builtin_convertvector(integers, Eight);
    const EightInts digits = (integers + 0x808080) ^ 0x808080;
    for (int part = 0; part < 2; ++part, to += 12) {
      Sixteen bytes;
      std::memcpy(&bytes, reinterpret_cast<const uint8_t*>(&digits) + 16 * part, sizeof bytes);
      bytes = __builtin_shuffle(bytes, Sixteen{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
      std::memcpy(to, &bytes, sizeof bytes);  // what follows goes over the last four
    }
  }
  std::memcpy(to, &down, sizeof down);
  sum += total(rounded) * down;
  return true;
}

// A chunk of one row in digits: a block takes no more bytes than its floats would. False as for a block.
template <class In>
inline bool arrange_digits(const In* x, int64_t count, float* to, float& sum) {
  constexpr int64_t kInputs = 8 * kBlock;
  Eight values[kBlock];
  int64_t k = 0;
  for (; k + kInputs <= count; k += kInputs) {
    for (int i = 0; i < kBlock; ++i) read(x + k + 8 * i, values[i]);
    if (!arrange_block(values, kBlock, reinterpret_cast<uint8_t*>(to + k), sum)) return false;
  }
  if (k == count) return true;
  In rest[kInputs] = {};
  std::memcpy(rest, x + k, (count - k) * sizeof(In));
  for (int i = 0; i < kBlock; ++i) read(rest + 8 * i, values[i]);
  return arrange_block(values, static_cast<int>((count - k + 7) / 8), reinterpret_cast<uint8_t*>(to + k), sum);
}

template <int kBits, class In>
void arrange_rows(const Team& team, const Layer& layer, const In* x, int64_t rows, float* arranged) {
  const Geometry geometry(layer);
  const Team::Range share = team.share(geometry.chunks);
  const float correction = layer.zero ? -1.0f : -layer.middle;
  for_tiles(rows, [&](int64_t first, auto tile) {
    constexpr int kTile = decltype(tile)::value;
    float* corrections = arranged + first * geometry.row();
    float* in_digits = corrections + geometry.chunks * kTile;
    float* values = in_digits + geometry.chunks * kTile;
    for (int64_t chunk = share.begin; chunk < share.end; ++chunk) {
      const int64_t group = chunk / geometry.group_chunks, part = chunk % geometry.group_chunks;
      const int64_t begin = group * layer.group + part * kChunk;
      const int64_t end = std::min({begin + kChunk, (group + 1) * layer.group, layer.in});
      float* to = values + (group * geometry.group_steps * geometry.fields + part * kChunk) * kTile;
      if constexpr (kDigits && kBits == 4 && kTile == 1) {
        float sum = 0;
        const bool fits = geometry.group_steps >= kBlock &&  // in less, blocks end too often to gain
                          arrange_digits(x + first * layer.in + begin, end - begin, to, sum);
        in_digits[chunk] = fits;
        corrections[chunk] = correction * sum;
        if (fits) continue;
      }
      for (int r = 0; r < kTile; ++r) {
        const float sum = arrange_chunk<kBits, kTile>(x + (first + r) * layer.in + begin, end - begin, to + r);
        corrections[chunk * kTile + r] = correction * sum;
      }
    }
  });
}

// Step 1 of 2: the inputs as the weights meet them, into `arranged` (`scratch` floats). In is float or Bfloat16.
//
// Layers of one input, `in`, `group`, `bits` and zero points in common (`middle`, or all by group) can share it.
template <class In>
void arrange(const Team& team, const Layer& layer, const In* x, int64_t rows, float* arranged) {
  (layer.bits == 4 ? arrange_rows<4, In> : arrange_rows<8, In>)(team, layer, x, rows, arranged);
}

// --- products --------------------------------------------------------------------------------------------------------

// Sums of a panel by one tile of rows.
template <int kTile>
using Sums = Floats[kTile][kVectors];

template <int kBits, int kTile>
struct Product {
  using F = Fields<kBits>;
  static constexpr int kPhases = std::clamp(8 / (kTile * kVectors), 1, 4);  // 8 sums hide a multiply-add's latency

  // Adds `steps` steps to `sums`.
  static inline __attribute__((always_inline)) void add(const uint8_t* line, const float* x, int64_t steps,
                                                        Sums<kTile>& sums) {
    Sums<kTile> phases[kPhases] = {};
    std::memcpy(phases[0], sums, sizeof sums);
    for (int64_t i = 0; i < steps; ++i, line += kLine, x += F::kCount * kTile) {
      __builtin_prefetch(line + kAhead);
      step(line, x, phases, std::make_integer_sequence<int, F::kCount>{});
    }
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = phases[0][r][v];
        if constexpr (kPhases == 2) sums[r][v] += phases[1][r][v];
        if constexpr (kPhases == 4)
          sums[r][v] = (sums[r][v] + phases[1][r][v]) + (phases[2][r][v] + phases[3][r][v]);
      }
    }
  }

  template <int... p>
  static inline __attribute__((always_inline)) void step(const uint8_t* line, const float* x,
                                                         Sums<kTile> (&phases)[kPhases],
                                                         std::integer_sequence<int, p...>) {
    Words words[kVectors];
    for (int v = 0; v < kVectors; ++v) words[v] = load<Words>(line + v * sizeof(Words));
    (field<p>(words, x + p * kTile, phases[p % kPhases]), ...);
  }

  template <int p>
  static inline __attribute__((always_inline)) void field(Words (&words)[kVectors], const float* x, Sums<kTile>& sums) {
    Floats weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = to_floats((Ints)F::template cut<p>(words[v]));
    for (int r = 0; r < kTile; ++r) {
      const Floats input = splat(x[r]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(weights[v], input, sums[r][v]);
    }
  }
};

// Adds a block of at most kBlock steps by one row in digits to `sums`.
inline __attribute__((always_inline)) void add_block(const uint8_t* line, const uint8_t* digits, int64_t steps,
                                                     Sums<1>& sums) {
  Words low[kVectors] = {}, middle[kVectors] = {}, high[kVectors] = {};
  const auto add = [&](const Words (&bytes)[kVectors]) __attribute__((always_inline)) {
    const Words by[3] = {splat(digits), splat(digits + 4), splat(digits + 8)};
    for (int v = 0; v < kVectors; ++v) {
      const Words each = bytes[v] & 0x0F0F0F0Fu;
      low[v] = add_products(low[v], each, by[0]);
      middle[v] = add_products(middle[v], each, by[1]);
      high[v] = add_products(high[v], each, by[2]);
    }
    digits += 12;
  };
#pragma GCC unroll 4
  for (int64_t i = 0; i < steps; ++i, line += kLine) {
    __builtin_prefetch(line + kAhead);
    Words bytes[kVectors];
    for (int v = 0; v < kVectors; ++v) bytes[v] = load<Words>(line + v * sizeof(Words));
    add(bytes);
    for (int v = 0; v < kVectors; ++v) bytes[v] >>= 4;
    add(bytes);
  }
  float one;
  std::memcpy(&one, digits, sizeof one);
  for (int v = 0; v < kVectors; ++v) {
    const Floats upper = to_floats((widen(high[v]) << 8) + widen(middle[v]));
    sums[0][v] = multiply_add(multiply_add(upper, splat(256.0f), to_floats(widen(low[v]))), splat(one), sums[0][v]);
  }
}

// As Product::add, by one row in digits.
inline __attribute__((always_inline)) void add_digits(const uint8_t* line, const float* x, int64_t steps,
                                                      Sums<1>& sums) {
  const uint8_t* digits = reinterpret_cast<const uint8_t*>(x);
  for (; steps >= kBlock; steps -= kBlock, line += kBlock * kLine, digits += kBlock * 8 * sizeof(float))
    add_block(line, digits, kBlock, sums);
  if (steps > 0) add_block(line, digits, steps, sums);
}

// One panel by kTile rows of arranged inputs, without bias.
template <int kBits, int kTile>
void multiply_panel(const Layer& layer, const Geometry& geometry, int64_t panel, const float* arranged,
                    float (&out)[kTile][kPanel]) {
  constexpr int64_t kChunkSteps = kChunk / Fields<kBits>::kCount;
  const float* corrections = arranged;
  const float* in_digits = arranged + geometry.chunks * kTile;
  const float* x = in_digits + geometry.chunks * kTile;
  const uint8_t* line = layer.weight + panel * geometry.steps * kLine;
  const float* scale = layer.scale + panel * geometry.groups * kPanel;
  const int8_t* zero = layer.zero ? layer.zero + panel * geometry.groups * kPanel : nullptr;
  Sums<kTile> results = {};
  for (int64_t done = 0; done < geometry.steps; scale += kPanel, zero += zero ? kPanel : 0) {
    __builtin_prefetch(scale + kGroupsAhead * kPanel);
    __builtin_prefetch(zero + kGroupsAhead * kPanel);
    const int64_t end = std::min(done + geometry.group_steps, geometry.steps);
    while (done < end) {
      const int64_t steps = std::min(kChunkSteps, end - done);
      Sums<kTile> sums;
      for (int r = 0; r < kTile; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = splat(corrections[r]);
          if (zero) sums[r][v] *= to_floats(zero + v * kLanes);
        }
      }
      bool added = false;
      if constexpr (kDigits && kBits == 4 && kTile == 1) {
        added = *in_digits != 0;
        if (added) add_digits(line, x, steps, sums);
      }
      if (!added) Product<kBits, kTile>::add(line, x, steps, sums);
      line += steps * kLine;
      x += steps * Fields<kBits>::kCount * kTile;
      done += steps;
      corrections += kTile;
      in_digits += kTile;
      for (int r = 0; r < kTile; ++r)
        for (int v = 0; v < kVectors; ++v)
          results[r][v] = multiply_add(sums[r][v], load<Floats>(scale + v * kLanes), results[r][v]);
    }
  }
  std::memcpy(out, results, sizeof out);
}

inline void write(float value, float* to) { *to = value; }

// Round half to even; NaN stays a quiet NaN.
inline void write(float value, Bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value == value ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}

template <int kBits, class Out>
void multiply_rows(const Team& team, const Layer& layer, const float* arranged, int64_t rows, Out* y) {
  const Geometry geometry(layer);
  const Team::Range share = team.share(panels(layer));
  for (int64_t panel = share.begin; panel < share.end; ++panel) {
    const int64_t channel = panel * kPanel;
    const int count = static_cast<int>(std::min<int64_t>(kPanel, layer.out - channel));
    for_tiles(rows, [&](int64_t first, auto tile) {
      constexpr int kTile = decltype(tile)::value;
      float sums[kTile][kPanel];
      multiply_panel<kBits, kTile>(layer, geometry, panel, arranged + first * geometry.row(), sums);
      for (int r = 0; r < kTile; ++r) {
        Out* to = y + (first + r) * layer.out + channel;
        for (int i = 0; i < count; ++i) write(layer.bias ? sums[r][i] + layer.bias[channel + i] : sums[r][i], to + i);
      }
    });
  }
}

// Step 2 of 2, behind a barrier: y[rows, out] of what `arrange` made. Out is float or Bfloat16.
template <class Out>
void multiply(const Team& team, const Layer& layer, const float* arranged, int64_t rows, Out* y) {
  (layer.bits == 4 ? multiply_rows<4, Out> : multiply_rows<8, Out>)(team, layer, arranged, rows, y);
}

}  // namespace qfx::weight_only
