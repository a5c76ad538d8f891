// The kernels of decoding in one instruction set. build.rs compiles this file once for each, so it includes nothing whose
// inline functions could end up in another one's code.

#include "attend.h"
#include "dots.h"
#include "groups.h"
#include "operand.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

void product(const Matrix& m, int64_t from, int64_t to, const char* x, int64_t step, int64_t rows, float* y,
             int64_t y_step) {
  switch (m.width) {
    case F32: return rows_product<float>(m, from, to, x, step, rows, y, y_step);
    case BF16: return rows_product<uint16_t>(m, from, to, x, step, rows, y, y_step);
    case INT8: return sides_product<false>(m, from, to, x, step, rows, y, y_step);
    case INT4: return sides_product<true>(m, from, to, x, step, rows, y, y_step);
    default: return;
  }
}

void rms_norm(const float* x, const float* weight, int64_t len, float eps, float* y) {
  Vec squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * V <= len; i += 2 * V) {
    const Vec a = load(x + i), b = load(x + i + V);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  float rest = 0;
  for (int64_t j = i; j < len; j++) rest = __builtin_fmaf(x[j], x[j], rest);
  const float mean = (sum_of(squares[0] + squares[1]) + rest) / static_cast<float>(len);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (int64_t j = 0; j < i; j += V) store(y + j, load(x + j) * scale * load(weight + j));
  for (; i < len; i++) y[i] = x[i] * scale * weight[i];
}

void swiglu(const float* gate, const float* up, int64_t len, float* y) {
  const auto gated = [](Vec g, Vec u) { return g / (1.0f + exponential(-g)) * u; };
  int64_t i = 0;
  for (; i + V <= len; i += V) store(y + i, gated(load(gate + i), load(up + i)));
  if (i == len) return;
  float g[V] = {}, u[V] = {}, to[V];
  for (int64_t j = i; j < len; j++) g[j - i] = gate[j], u[j - i] = up[j];
  store(to, gated(load(g), load(u)));
  for (int64_t j = i; j < len; j++) y[j] = to[j - i];
}

}  // namespace

const Kernels KERNELS = {take, product, rms_norm, swiglu, attend};

}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
