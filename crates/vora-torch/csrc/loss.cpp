// The losses over a vocabulary, one pass forward and one backward each, for f32 and bf16 logits on the CPU. Plain operators
// hold the same rows up to five times, in f32: logits, their softmax, its gradient, and the casts between.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "guard.h"
#include "kernel.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// A row that is not to be predicted (`CrossEntropyLoss.ignore_index`).
constexpr int64_t IGNORED = -100;

// lse[row] = log sum exp x[row]
template <typename T>
INLINE void log_sums(const T* x, float* lse, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; row++, x += n) {
    float max = load(x[0]);
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; i++) max = load(x[i]) > max ? load(x[i]) : max;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += exponential(load(x[i]) - max);
    lse[row] = max + std::log(sum);
  }
}

// dx = scale * softmax(x)
template <typename T>
INLINE void scaled_softmax(const T* x, float lse, float scale, T* dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(dx[i], scale * exponential(load(x[i]) - lse));
}

// sum of p (log p - log q), where p and q are the softmax of `t` and `x`
template <typename T>
INLINE void divergence(const T* t, const T* x, float t_lse, float x_lse, float* sum, int64_t n) {
  const float shift = t_lse - x_lse;
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += exponential(load(t[i]) - t_lse) * (load(t[i]) - load(x[i]) - shift);
  *sum = total;
}

// dx = scale * (q - p)
template <typename T>
INLINE void apart(const T* t, const T* x, float t_lse, float x_lse, float scale, T* dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    store(dx[i], scale * (exponential(load(x[i]) - x_lse) - exponential(load(t[i]) - t_lse)));
  }
}

#define LOG_SUMS(T) (const T* x, float* lse, int64_t rows, int64_t n)
#define SCALED_SOFTMAX(T) (const T* x, float lse, float scale, T* dx, int64_t n)
#define DIVERGENCE(T) (const T* t, const T* x, float t_lse, float x_lse, float* sum, int64_t n)
#define APART(T) (const T* t, const T* x, float t_lse, float x_lse, float scale, T* dx, int64_t n)

FOR_EACH_KIND(log_sums, log_sums, LOG_SUMS, (x, lse, rows, n))
FOR_EACH_KIND(scaled_softmax, scaled_softmax, SCALED_SOFTMAX, (x, lse, scale, dx, n))
FOR_EACH_KIND(divergence, divergence, DIVERGENCE, (t, x, t_lse, x_lse, sum, n))
FOR_EACH_KIND(apart, apart, APART, (t, x, t_lse, x_lse, scale, dx, n))

at::Tensor log_sums(const at::Tensor& x) {
  const int64_t rows = x.size(0), n = x.size(1);
  auto lse = at::empty({rows}, x.options().dtype(at::kFloat));
  at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
    float* sums = out<float>(lse) + from;
    if (is_bf16(x)) {
      log_sums_bf16(in<bf16>(x) + from * n, sums, to - from, n);
    } else {
      log_sums_f32(in<float>(x) + from * n, sums, to - from, n);
    }
  });
  return lse;
}

// The sum of `rows` losses as a scalar; in f64, since there may be many.
at::Tensor summed(const std::vector<float>& rows, const at::Tensor& like) {
  auto sum = at::empty({}, like.options().dtype(at::kFloat));
  *out<float>(sum) = static_cast<float>(std::accumulate(rows.begin(), rows.end(), 0.0));
  return sum;
}

float number(const at::Tensor& t, int64_t at) { return is_bf16(t) ? load(in<bf16>(t)[at]) : in<float>(t)[at]; }

struct CrossEntropy : Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& targets_in) {
    const auto x = logits.contiguous(), targets = targets_in.contiguous();
    const int64_t rows = x.size(0), n = x.size(1);
    const auto lse = log_sums(x);
    std::vector<float> losses(rows);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t target = in<int64_t>(targets)[row];
      if (target == IGNORED) continue;
      TORCH_CHECK_INDEX(0 <= target && target < n, "a target ", target, " among ", n, " logits");
      losses[row] = in<float>(lse)[row] - number(x, row * n + target);
    }
    ctx->save_for_backward({x, lse, targets});
    return summed(losses, x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &lse = saved[1], &targets = saved[2];
    SHOWN_AS("vora::cross_entropy_backward", x);
    const float scale = grads[0].item<float>();
    const int64_t rows = x.size(0), n = x.size(1);
    auto dx = at::empty_like(x);
    at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        const int64_t target = in<int64_t>(targets)[row], at = row * n;
        const float sum = in<float>(lse)[row], share = target == IGNORED ? 0.0f : scale;
        if (is_bf16(x)) {
          bf16* to_row = out<bf16>(dx) + at;
          scaled_softmax_bf16(in<bf16>(x) + at, sum, share, to_row, n);
          if (target != IGNORED) store(to_row[target], scale * (exponential(number(x, at + target) - sum) - 1.0f));
        } else {
          float* to_row = out<float>(dx) + at;
          scaled_softmax_f32(in<float>(x) + at, sum, share, to_row, n);
          if (target != IGNORED) to_row[target] -= scale;
        }
      }
    });
    return {dx, Variable()};
  }
};

struct Divergence : Function<Divergence> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& teacher, const at::Tensor& logits) {
    const auto t = teacher.contiguous(), x = logits.contiguous();
    const int64_t rows = x.size(0), n = x.size(1);
    const auto t_lse = log_sums(t), x_lse = log_sums(x);
    std::vector<float> losses(rows);
    at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        const float p = in<float>(t_lse)[row], q = in<float>(x_lse)[row];
        if (is_bf16(x)) {
          divergence_bf16(in<bf16>(t) + row * n, in<bf16>(x) + row * n, p, q, &losses[row], n);
        } else {
          divergence_f32(in<float>(t) + row * n, in<float>(x) + row * n, p, q, &losses[row], n);
        }
      }
    });
    ctx->save_for_backward({t, x, t_lse, x_lse});
    return summed(losses, x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &t = saved[0], &x = saved[1], &t_lse = saved[2], &x_lse = saved[3];
    SHOWN_AS("vora::kl_divergence_backward", t, x);
    const float scale = grads[0].item<float>();
    const int64_t rows = x.size(0), n = x.size(1);
    auto dx = at::empty_like(x);
    at::parallel_for(0, rows, grain(n), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        const float p = in<float>(t_lse)[row], q = in<float>(x_lse)[row];
        if (is_bf16(x)) {
          apart_bf16(in<bf16>(t) + row * n, in<bf16>(x) + row * n, p, q, scale, out<bf16>(dx) + row * n, n);
        } else {
          apart_f32(in<float>(t) + row * n, in<float>(x) + row * n, p, q, scale, out<float>(dx) + row * n, n);
        }
      }
    });
    return {Variable(), dx};
  }
};

}  // namespace

extern "C" {

// logits [rows, n], targets [rows] in i64, -100 where there is none -> the sum of -log softmax(logits)[target], f32
at::Tensor* vora_cross_entropy(const at::Tensor* logits, const at::Tensor* targets) {
  return guard<at::Tensor*>(nullptr, [&] {
    check(*logits, *targets);
    TORCH_CHECK(logits->dim() == 2 && logits->size(1) > 0 && targets->dim() == 1 &&
                    targets->size(0) == logits->size(0) && targets->scalar_type() == at::kLong,
                "cross entropy of ", logits->sizes(), " and ", targets->sizes(), " ", targets->scalar_type());
    SHOWN_AS("vora::cross_entropy", *logits, *targets);
    return new at::Tensor(CrossEntropy::apply(*logits, *targets));
  });
}

// teacher and logits [rows, n] of one kind -> the sum of p (log p - log q) of their softmax p and q, f32; no gradient goes
// to the teacher
at::Tensor* vora_kl_divergence(const at::Tensor* teacher, const at::Tensor* logits) {
  return guard<at::Tensor*>(nullptr, [&] {
    check(*logits, *teacher);
    TORCH_CHECK(logits->dim() == 2 && logits->size(1) > 0 && teacher->sizes() == logits->sizes() &&
                    teacher->scalar_type() == logits->scalar_type(),
                "divergence of ", teacher->sizes(), " and ", logits->sizes());
    SHOWN_AS("vora::kl_divergence", *teacher, *logits);
    return new at::Tensor(Divergence::apply(*teacher, *logits));
  });
}

}  // extern "C"
