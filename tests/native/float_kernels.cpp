// The float operators of qfx/csrc/native behind a C ABI, for test_float_kernels.py, each in a region of its own.

#include <omp.h>

#include "../../qfx/csrc/native/activations.h"
#include "../../qfx/csrc/native/attention.h"
#include "../../qfx/csrc/native/elementwise.h"
#include "../../qfx/csrc/native/embedding.h"
#include "../../qfx/csrc/native/float_math.h"
#include "../../qfx/csrc/native/norm.h"
#include "../../qfx/csrc/native/softmax.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace qfx;
using namespace qfx::f32;

template <class Fn>
void on_team(int threads, const Fn& fn) {
#pragma omp parallel num_threads(threads)
  fn(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Where results go, from Python; either pointer may be null. Quantize and dequantize know both types of integers, each
// other operator one, to spare the compiler: uint8 or int8 as it is written below.
struct Sink {
  float* floats;
  void* integers;
  QuantizeTo to;
};

template <class T>
Output<T> output(const Sink* sink) {
  return {sink->floats, static_cast<T*>(sink->integers), sink->to};
}

// One function as an activation.
template <Vec (*fn)(Vec)>
struct Function {
  QFX_F32 Vec operator()(Vec x) const { return fn(x); }
};

// In the order of ACTIVATIONS in test_float_kernels.py; of FUNCTIONS there the one below.
template <class Fn>
void with_activation(int kind, float a, float b, const Fn& fn) {
  switch (kind) {
    case 0: return fn(Relu{});
    case 1: return fn(Clamp{a, b});
    case 2: return fn(LeakyRelu{a});
    case 3: return fn(HardSigmoid{});
    case 4: return fn(HardSwish{});
    case 5: return fn(Elu{a});
    case 6: return fn(Sigmoid{});
    case 7: return fn(Silu{});
    case 8: return fn(Tanh{});
    case 9: return fn(Gelu{});
    case 10: return fn(GeluTanh{});
  }
}

template <class Fn>
void with_function(int kind, const Fn& fn) {
  switch (kind) {
    case 0: return fn(Function<f32::exp>{});
    case 1: return fn(Function<exp_nonpositive>{});
    case 2: return fn(Function<exp2_nonpositive>{});
    case 3: return fn(Function<expm1_nonpositive>{});
    case 4: return fn(Function<f32::erf>{});
  }
}

}  // namespace

EXPORT int lanes() { return kLanes; }

EXPORT void activation(int threads, int kind, float a, float b, const float* x, const Sink* sink, int64_t count) {
  with_activation(kind, a, b, [&](const auto& f) {
    on_team(threads, [&](const Team& team) { activate(team, f, x, output<uint8_t>(sink), count); });
  });
}

EXPORT void function(int kind, const float* x, float* y, int64_t count) {
  with_function(kind, [&](const auto& f) { activate(Team{0, 1}, f, x, Output<uint8_t>{y, nullptr, {}}, count); });
}

EXPORT void arithmetic(int threads, int kind, const float* a, int64_t a_rows, const float* b, int64_t b_rows,
                       const Sink* sink, int64_t rows, int64_t cols) {
  const Operand left{a, a_rows}, right{b, b_rows};
  const Output<int8_t> out = output<int8_t>(sink);
  on_team(threads, [&](const Team& team) {
    if (kind == 0) binary(team, Add{}, left, right, out, rows, cols);
    if (kind == 1) binary(team, Subtract{}, left, right, out, rows, cols);
    if (kind == 2) binary(team, Multiply{}, left, right, out, rows, cols);
    if (kind == 3) binary(team, Divide{}, left, right, out, rows, cols);
  });
}

EXPORT void quantize_floats(int threads, int is_signed, const float* x, const Sink* sink, int64_t count) {
  on_team(threads, [&](const Team& team) {
    if (is_signed) quantize(team, x, static_cast<int8_t*>(sink->integers), sink->to, count);
    else quantize(team, x, static_cast<uint8_t*>(sink->integers), sink->to, count);
  });
}

EXPORT void dequantize_integers(int threads, int is_signed, const void* q, float* x, float scale, int zero_point,
                                int64_t count) {
  on_team(threads, [&](const Team& team) {
    if (is_signed) dequantize(team, static_cast<const int8_t*>(q), x, scale, zero_point, count);
    else dequantize(team, static_cast<const uint8_t*>(q), x, scale, zero_point, count);
  });
}

EXPORT void mask_of_bools(int threads, const uint8_t* keep, float* added, int64_t count) {
  on_team(threads, [&](const Team& team) { additive_mask(team, keep, added, count); });
}

EXPORT void norm(int threads, int is_rms, const float* x, const float* residual, const float* weight, const float* bias,
                 const Sink* sink, float* sum_out, int64_t rows, int64_t cols, float eps) {
  const Output<int8_t> out = output<int8_t>(sink);
  on_team(threads, [&](const Team& team) {
    if (is_rms) rms_norm(team, x, residual, weight, out, sum_out, rows, cols, eps);
    else layer_norm(team, x, residual, weight, bias, out, sum_out, rows, cols, eps);
  });
}

EXPORT void softmax_rows(int threads, const float* x, const Sink* sink, const Mask* mask, const int64_t* sizes,
                         float scale) {
  on_team(threads, [&](const Team& team) {
    softmax(team, x, output<uint8_t>(sink), *mask, sizes[0], sizes[1], sizes[2], sizes[3], scale);
  });
}

EXPORT int64_t attention_scratch_floats(const AttentionShape* shape, int threads) {
  return attention_scratch(*shape, threads);
}

EXPORT void attend(int threads, const float* q, const float* k, const float* v, const Sink* sink,
                   const AttentionShape* shape, float* scratch) {
  on_team(threads, [&](const Team& team) { attention(team, q, k, v, output<int8_t>(sink), *shape, scratch); });
}

EXPORT int gather(int threads, const int64_t* index, const float* table, float* y, int64_t count, int64_t rows,
                  int64_t cols) {
  int good = 1;
#pragma omp parallel num_threads(threads) reduction(&& : good)
  good = embedding(Team{omp_get_thread_num(), omp_get_num_threads()}, index, table, y, count, rows, cols);
  return good;
}
