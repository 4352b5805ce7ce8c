// Work split over the threads of the one OpenMP runtime that torch brings.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstdint>

#define QFX_API extern "C" __attribute__((visibility("default")))

namespace qfx {

// A parallel region in the child of a fork waits for threads that exist only in the parent: children run serially.
inline bool forked = false;
inline void mark_forked() { forked = true; }
struct AtFork {
  AtFork() { pthread_atfork(nullptr, nullptr, mark_forked); }
};
inline AtFork at_fork;  // registers when the library is loaded

constexpr int64_t kSerial = 32768;  // elements below which waking a thread costs more than it saves
constexpr int64_t kCacheLine = 64;  // chunks are whole cache lines of bytes, so that no two threads write one line

// body(begin, end) over [0, count), where one step of count takes about `cost` elements of work.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t work = count * std::max<int64_t>(cost, 1);
  const int64_t most = std::min<int64_t>({threads, count, work / (kSerial / 2)});
  if (forked || work < kSerial || most <= 1) {
    body(int64_t{0}, count);
    return;
  }
  int64_t chunk = (count + most - 1) / most;
  if (cost <= 1) chunk = (chunk + kCacheLine - 1) / kCacheLine * kCacheLine;
  const int team = static_cast<int>((count + chunk - 1) / chunk);
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int part = 0; part < team; ++part) {
    const int64_t begin = part * chunk;
    body(begin, std::min(begin + chunk, count));
  }
}

}  // namespace qfx
