// Linear layers with narrow weights on float activations, as a library by itself.

#include "native/weight_only.h"

#include <omp.h>

#include "parallel.h"

namespace {

using namespace qfx;

// One parallel region for both steps.
template <class Float>
void run(const weight_only::Layer& layer, const void* x, int64_t rows, float* arranged, void* y, int threads) {
  const auto both = [&](const Team& team) {
    weight_only::arrange(team, layer, static_cast<const Float*>(x), rows, arranged);
    if (team.size > 1) {
#pragma omp barrier
    }
    weight_only::multiply(team, layer, arranged, rows, static_cast<Float*>(y));
  };
  const int64_t work = rows * layer.in * layer.out / kSerial;
  const int most = forked ? 1 : static_cast<int>(std::min<int64_t>({threads, weight_only::panels(layer), work}));
  if (most <= 1) {
    both(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(most)
  both(Team{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace

// Floats that `arranged` must have for one row.
QFX_API int64_t qfx_weight_only_scratch(int64_t in, int64_t group, int bits) {
  return weight_only::scratch({in, 0, group, bits, nullptr, nullptr, nullptr, 0, nullptr}, 1);
}

QFX_API void qfx_weight_only(const void* x, const uint8_t* weight, const float* scale, const int8_t* zero,
                             const float* bias, float* arranged, void* y, int64_t rows, int64_t in, int64_t out,
                             int64_t group, float middle, int bits, int bfloat16, int threads) {
  const weight_only::Layer layer{in, out, group, bits, weight, scale, zero, middle, bias};
  (bfloat16 ? run<weight_only::Bfloat16> : run<float>)(layer, x, rows, arranged, y, threads);
}
