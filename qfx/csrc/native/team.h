// How the work of one step is split over the threads of the one parallel region that runs a whole graph.

#pragma once

#include <algorithm>
#include <cstdint>

namespace qfx {

// One thread of `size`. Every step is called by all of them, takes its own share, and ends before the next barrier.
struct Team {
  int rank;
  int size;

  struct Range {
    int64_t begin, end;
  };

  // This thread's part of [0, count), in whole blocks of `block` but for the last one.
  Range share(int64_t count, int64_t block = 1) const {
    const int64_t blocks = (count + block - 1) / block;
    return {std::min(count, blocks * rank / size * block), std::min(count, blocks * (rank + 1) / size * block)};
  }
};

}  // namespace qfx
