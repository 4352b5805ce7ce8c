// What the operators on heads of attention share: where a head lies, and which keys its queries see.

#pragma once

#include <algorithm>
#include <cstdint>

namespace qfx::f32 {

struct HeadStrides {
  int64_t batch, head, token;  // in elements; those of a token's head are adjacent

  int64_t at(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * token; }
};

struct Mask {
  const float* added = nullptr;            // to the scores; -inf hides a key; null: nothing is added
  int64_t batch = 0, head = 0, query = 0;  // strides of `added` in elements, 0 where it broadcasts; keys are adjacent
  bool causal = false;                     // query i sees keys 0 .. i + past only
  int64_t past = 0;                        // keys in front of the first query's own, >= 0

  const float* row(int64_t b, int64_t h, int64_t q) const {
    return added == nullptr ? nullptr : added + b * batch + h * head + q * query;
  }
  // How many of `keys` a query may see, from the first on.
  int64_t visible(int64_t q, int64_t keys) const { return causal ? std::min(keys, q + past + 1) : keys; }
};

}  // namespace qfx::f32
