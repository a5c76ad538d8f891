// What a decoder layer does between its matrix products, one pass forward and one backward each, for f32 and bf16 on
// the CPU: RMS norm, rotary positions, SwiGLU. Plain operators read and write each of these arrays five to ten times.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "element.h"
#include "guard.h"
#include "kernel.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

INLINE float sigmoid(float x) {
  const float s = 1.0f / (1.0f + exponential(-x));
  return x < -88.0f ? 0.0f : s;  // there e^-x no longer fits
}

// x [rows, n], weight [n] -> y [rows, n], inverse [rows] = 1 / rms
template <typename T>
INLINE void rms_forward(const T* x, const T* weight, T* y, float* inverse, int64_t rows, int64_t n, float eps) {
  for (int64_t row = 0; row < rows; row++, x += n, y += n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += load(x[i]) * load(x[i]);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
    inverse[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      T normed;
      store(normed, load(x[i]) * scale);
      store(y[i], load(normed) * load(weight[i]));
    }
  }
}

// dx = inverse * (g w) - x inverse^3 / n * sum(g w x)
template <typename T>
INLINE void rms_backward(const T* g, const T* x, const T* weight, const float* inverse, T* dx, int64_t rows,
                         int64_t n) {
  for (int64_t row = 0; row < rows; row++, g += n, x += n, dx += n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += load(g[i]) * load(weight[i]) * load(x[i]);
    const float scale = inverse[row];
    const float pull = scale * scale * scale * sum / static_cast<float>(n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(dx[i], scale * load(g[i]) * load(weight[i]) - pull * load(x[i]));
  }
}

template <typename T>
INLINE void swiglu_forward(const T* gate, const T* up, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float x = load(gate[i]);
    store(y[i], x * sigmoid(x) * load(up[i]));
  }
}

template <typename T>
INLINE void swiglu_backward(const T* g, const T* gate, const T* up, T* dgate, T* dup, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float x = load(gate[i]), s = sigmoid(x), grad = load(g[i]);
    store(dup[i], grad * x * s);
    store(dgate[i], grad * load(up[i]) * s * (1.0f + x * (1.0f - s)));
  }
}

// The halves of each of `heads` heads turned by one position's angles; `turn` is -1 for the way back.
template <typename T>
INLINE void rotate_heads(const T* x, int64_t stride, const float* cos, const float* sin, float turn, T* y,
                         int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; head++, x += stride, y += 2 * half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
      const float a = load(x[i]), b = load(x[half + i]), s = turn * sin[i];
      store(y[i], a * cos[i] - b * s);
      store(y[half + i], b * cos[i] + a * s);
    }
  }
}

#define RMS_FORWARD(T) (const T* x, const T* w, T* y, float* r, int64_t rows, int64_t n, float eps)
#define RMS_BACKWARD(T) (const T* g, const T* x, const T* w, const float* r, T* dx, int64_t rows, int64_t n)
#define SWIGLU_FORWARD(T) (const T* gate, const T* up, T* y, int64_t n)
#define SWIGLU_BACKWARD(T) (const T* g, const T* gate, const T* up, T* dgate, T* dup, int64_t n)
#define ROTATE(T) \
  (const T* x, int64_t stride, const float* cos, const float* sin, float turn, T* y, int64_t heads, int64_t half)

FOR_EACH_KIND(rms_forward, rms_forward, RMS_FORWARD, (x, w, y, r, rows, n, eps))
FOR_EACH_KIND(rms_backward, rms_backward, RMS_BACKWARD, (g, x, w, r, dx, rows, n))
FOR_EACH_KIND(swiglu_forward, swiglu_forward, SWIGLU_FORWARD, (gate, up, y, n))
FOR_EACH_KIND(swiglu_backward, swiglu_backward, SWIGLU_BACKWARD, (g, gate, up, dgate, dup, n))
FOR_EACH_KIND(rotate, rotate_heads, ROTATE, (x, stride, cos, sin, turn, y, heads, half))

struct RmsNorm : Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, double eps) {
    const auto x = input.contiguous(), w = weight.contiguous();
    const int64_t n = x.size(-1), rows = n == 0 ? 0 : x.numel() / n;
    auto y = at::empty_like(x), inverse = at::empty({rows}, x.options().dtype(at::kFloat));
    at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
      float* r = out<float>(inverse) + from;
      const int64_t at = from * n, count = to - from;
      const float e = static_cast<float>(eps);
      if (is_bf16(x)) {
        rms_forward_bf16(in<bf16>(x) + at, in<bf16>(w), out<bf16>(y) + at, r, count, n, e);
      } else {
        rms_forward_f32(in<float>(x) + at, in<float>(w), out<float>(y) + at, r, count, n, e);
      }
    });
    ctx->save_for_backward({x, w, inverse});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &w = saved[1], &inverse = saved[2];
    const auto g = grads[0].contiguous();
    SHOWN_AS("vora::rms_norm_backward", g, x, w);
    const int64_t n = x.size(-1), rows = n == 0 ? 0 : x.numel() / n;
    Variable dx, dw;
    if (ctx->needs_input_grad(0)) {
      dx = at::empty_like(x);
      at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
        const float* r = in<float>(inverse) + from;
        const int64_t at = from * n, count = to - from;
        if (is_bf16(x)) {
          rms_backward_bf16(in<bf16>(g) + at, in<bf16>(x) + at, in<bf16>(w), r, out<bf16>(dx) + at, count, n);
        } else {
          rms_backward_f32(in<float>(g) + at, in<float>(x) + at, in<float>(w), r, out<float>(dx) + at, count, n);
        }
      });
    }
    if (ctx->needs_input_grad(1)) {
      const auto normed = x.reshape({rows, n}).to(at::kFloat) * inverse.unsqueeze(1);
      dw = (normed * g.reshape({rows, n})).sum(0).to(w.scalar_type());
    }
    return {dx, dw, Variable()};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_in, const at::Tensor& up_in) {
    const auto gate = gate_in.contiguous(), up = up_in.contiguous();
    auto y = at::empty_like(gate);
    at::parallel_for(0, gate.numel(), WORTH_A_THREAD, [&](int64_t from, int64_t to) {
      if (is_bf16(gate)) {
        swiglu_forward_bf16(in<bf16>(gate) + from, in<bf16>(up) + from, out<bf16>(y) + from, to - from);
      } else {
        swiglu_forward_f32(in<float>(gate) + from, in<float>(up) + from, out<float>(y) + from, to - from);
      }
    });
    ctx->save_for_backward({gate, up});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1];
    const auto g = grads[0].contiguous();
    SHOWN_AS("vora::swiglu_backward", g, gate, up);
    auto dgate = at::empty_like(gate), dup = at::empty_like(up);
    at::parallel_for(0, gate.numel(), WORTH_A_THREAD, [&](int64_t from, int64_t to) {
      if (is_bf16(gate)) {
        swiglu_backward_bf16(in<bf16>(g) + from, in<bf16>(gate) + from, in<bf16>(up) + from, out<bf16>(dgate) + from,
                             out<bf16>(dup) + from, to - from);
      } else {
        swiglu_backward_f32(in<float>(g) + from, in<float>(gate) + from, in<float>(up) + from,
                            out<float>(dgate) + from, out<float>(dup) + from, to - from);
      }
    });
    return {dgate, dup};
  }
};

// x [batch, seq, heads, head_dim] of any strides but the last -> the same, contiguous
at::Tensor rotated(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin, float turn) {
  const auto x = input.stride(-1) == 1 ? input : input.contiguous();
  const int64_t seq = x.size(1), heads = x.size(2), half = x.size(3) / 2, tokens = x.size(0) * seq;
  auto y = at::empty(x.sizes(), x.options());
  at::parallel_for(0, tokens, grain(2 * half * heads), [&](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; token++) {
      const int64_t at = token / seq * x.stride(0) + token % seq * x.stride(1), to_at = token * heads * 2 * half;
      const float *c = in<float>(cos) + token * half, *s = in<float>(sin) + token * half;
      if (is_bf16(x)) {
        rotate_bf16(in<bf16>(x) + at, x.stride(2), c, s, turn, out<bf16>(y) + to_at, heads, half);
      } else {
        rotate_f32(in<float>(x) + at, x.stride(2), c, s, turn, out<float>(y) + to_at, heads, half);
      }
    }
  });
  return y;
}

struct Rotate : Function<Rotate> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1.0f);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    SHOWN_AS("vora::rotate_backward", grads[0], saved[0], saved[1]);
    return {rotated(grads[0], saved[0], saved[1], -1.0f), Variable(), Variable()};
  }
};

}  // namespace

extern "C" {

// x [.., n], weight [n] of the same kind -> [.., n]
at::Tensor* vora_rms_norm(const at::Tensor* x, const at::Tensor* weight, double eps) {
  return guard<at::Tensor*>(nullptr, [&] {
    check(*x, *weight);
    TORCH_CHECK(x->dim() > 0 && weight->dim() == 1 && weight->size(0) == x->size(-1), "rms_norm of ", x->sizes(),
                " with a weight of ", weight->sizes());
    TORCH_CHECK(weight->scalar_type() == x->scalar_type(), "rms_norm of ", x->scalar_type(), " with a weight of ",
                weight->scalar_type());
    SHOWN_AS("vora::rms_norm", *x, *weight);
    return new at::Tensor(RmsNorm::apply(*x, *weight, eps));
  });
}

// silu(gate) * up
at::Tensor* vora_swiglu(const at::Tensor* gate, const at::Tensor* up) {
  return guard<at::Tensor*>(nullptr, [&] {
    check(*gate, *up);
    TORCH_CHECK(gate->sizes() == up->sizes() && gate->scalar_type() == up->scalar_type(), "swiglu of ", gate->sizes(),
                " and ", up->sizes());
    SHOWN_AS("vora::swiglu", *gate, *up);
    return new at::Tensor(SwiGlu::apply(*gate, *up));
  });
}

// x [batch, seq, heads, head_dim], cos and sin [batch, seq, head_dim / 2] in f32, contiguous -> as x
at::Tensor* vora_rotate(const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin) {
  return guard<at::Tensor*>(nullptr, [&] {
    check(*x, *cos);
    TORCH_CHECK(x->dim() == 4 && x->size(3) % 2 == 0, "rotate takes [batch, seq, heads, head_dim], not ", x->sizes());
    const std::vector<int64_t> table = {x->size(0), x->size(1), x->size(3) / 2};
    for (const at::Tensor* t : {cos, sin}) {
      TORCH_CHECK(t->sizes() == table && t->scalar_type() == at::kFloat && t->is_cpu() && t->is_contiguous(),
                  "rotate of ", x->sizes(), " by ", t->sizes());
    }
    SHOWN_AS("vora::rotate", *x, *cos, *sin);
    return new at::Tensor(Rotate::apply(*x, *cos, *sin));
  });
}

}  // extern "C"
