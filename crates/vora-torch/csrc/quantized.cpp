// Weights kept in four or eight bits: made whole again for each product, forward and once more backward, so that between
// the two only the few bits are held.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "element.h"
#include "guard.h"
#include "kernel.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t BLOCK = 64;          // weights that share a scale
constexpr int64_t NESTED_BLOCK = 256;  // scales that share one

// A weight [rows, columns]: int8 `codes` with a scale a row, or NF4 `codes`, two a byte, with nested scales.
struct Kept {
  at::Tensor codes, scales;                // int8: [rows, columns], f32 [rows]; NF4: u8 [(n + 1) / 2], u8 [blocks]
  at::Tensor nested, offset, map, pairs;  // NF4: f32 [blocks / 256], [], [256], [256, 2]: a byte's two values
  int64_t rows, columns;

  Kept(const at::Tensor* const* parts, size_t n, int64_t rows, int64_t columns)
      : codes(*parts[0]), scales(*parts[1]), rows(rows), columns(columns) {
    TORCH_CHECK(n == 2 || n == 6, "a quantized weight of ", n, " parts");
    if (n == 6) nested = *parts[2], offset = *parts[3], map = *parts[4], pairs = *parts[5];
  }

  bool is_nf4() const { return pairs.defined(); }
};

// Where a weight is made whole: for the caller to keep, or for one product alone. Then it is the room of the product before,
// since memory of that size, asked for anew each time, leaves holes between what is kept for the backward pass.
enum class Room { own, shared };

at::Tensor room(Room of, const Kept& kept, at::ScalarType kind) {
  const auto options = at::TensorOptions().dtype(kind).device(at::kCPU);
  if (of == Room::own) return at::empty({kept.rows, kept.columns}, options);
  thread_local at::Tensor shared;
  const int64_t n = kept.rows * kept.columns;
  if (!shared.defined() || shared.scalar_type() != kind || shared.numel() < n) {
    shared = at::Tensor();  // before there is another
    shared = at::empty({n}, options);
  }
  return shared.narrow(0, 0, n).view({kept.rows, kept.columns});
}

// Writes the weights of blocks `from` to `to`; a block has sixteen values, each rounded once.
template <typename T>
void unpack(const uint8_t* codes, const float* scales, const float* table, T* y, int64_t from, int64_t to, int64_t n) {
  for (int64_t block = from; block < to; block++) {
    T values[16];
    for (int i = 0; i < 16; i++) store(values[i], table[i] * scales[block]);
    const int64_t start = block * BLOCK, end = std::min(start + BLOCK, n);
    for (int64_t i = start; i < end; i += 2) {
      const uint8_t byte = codes[i / 2];
      y[i] = values[byte >> 4];
      if (i + 1 < end) y[i + 1] = values[byte & 15];
    }
  }
}

at::Tensor dequantized_nf4(const Kept& kept, at::ScalarType kind, Room of) {
  const int64_t n = kept.rows * kept.columns, blocks = kept.scales.size(0);
  const auto of_nested = kept.nested.repeat_interleave(NESTED_BLOCK).narrow(0, 0, blocks);
  const auto scales = kept.map.index_select(0, kept.scales.to(at::kInt)) * of_nested + kept.offset;  // [blocks]
  if (kept.codes.is_cpu() && (kind == at::kFloat || kind == at::kBFloat16)) {
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = in<float>(kept.pairs)[2 * i + 1];  // the low half of byte i
    const auto y = room(of, kept, kind);
    at::parallel_for(0, blocks, grain(BLOCK), [&](int64_t from, int64_t to) {
      const auto *codes = in<uint8_t>(kept.codes);
      const auto *s = in<float>(scales);
      if (kind == at::kFloat) {
        unpack(codes, s, table, out<float>(y), from, to, n);
      } else {
        unpack(codes, s, table, out<bf16>(y), from, to, n);
      }
    });
    return y;
  }
  const auto values = kept.pairs.index_select(0, kept.codes.to(at::kInt)).view({-1}).narrow(0, 0, n);
  const auto of_block = n == blocks * BLOCK ? values.view({blocks, BLOCK}) * scales.unsqueeze(1)
                                            : values * scales.repeat_interleave(BLOCK).narrow(0, 0, n);
  return of_block.to(kind).view({kept.rows, kept.columns});
}

template <typename T>
void scale_row(const int8_t* codes, float scale, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(y[i], static_cast<float>(codes[i]) * scale);
}

at::Tensor dequantized_int8(const Kept& kept, at::ScalarType kind, Room of) {
  const auto scales = kept.scales * (1.0 / 127.0);  // [rows]
  if (kept.codes.is_cpu() && (kind == at::kFloat || kind == at::kBFloat16)) {
    const int64_t n = kept.columns;
    const auto y = room(of, kept, kind);
    at::parallel_for(0, kept.rows, grain(n), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        const auto* codes = in<int8_t>(kept.codes) + row * n;
        const float scale = in<float>(scales)[row];
        if (kind == at::kFloat) {
          scale_row(codes, scale, out<float>(y) + row * n, n);
        } else {
          scale_row(codes, scale, out<bf16>(y) + row * n, n);
        }
      }
    });
    return y;
  }
  return (kept.codes.to(at::kFloat) * scales.unsqueeze(1)).to(kind);
}

at::Tensor dequantized(const Kept& kept, at::ScalarType kind, Room of) {
  return kept.is_nf4() ? dequantized_nf4(kept, kind, of) : dequantized_int8(kept, kind, of);
}

struct QuantizedLinear : Function<QuantizedLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& bias,
                            const Kept& kept) {
    ctx->saved_data["rows"] = kept.rows;
    ctx->saved_data["columns"] = kept.columns;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->save_for_backward({kept.codes, kept.scales, kept.nested, kept.offset, kept.map, kept.pairs});
    return at::linear(x, dequantized(kept, x.scalar_type(), Room::shared), bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t rows = ctx->saved_data["rows"].toInt(), columns = ctx->saved_data["columns"].toInt();
    const at::Tensor* parts[] = {&saved[0], &saved[1], &saved[2], &saved[3], &saved[4], &saved[5]};
    const Kept kept(parts, saved[5].defined() ? 6 : 2, rows, columns);
    const auto g = grads[0].reshape({-1, rows});  // [tokens, rows]
    SHOWN_AS("vora::quantized_linear_backward", g, kept.codes);
    Variable dx, dbias;
    if (ctx->needs_input_grad(0)) {
      auto shape = grads[0].sizes().vec();
      shape.back() = columns;
      dx = g.mm(dequantized(kept, g.scalar_type(), Room::shared)).view(shape);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(1)) dbias = g.sum(0);
    return {dx, dbias, Variable()};
  }
};

}  // namespace

extern "C" {

// The parts of a weight [rows, columns] -> that weight
at::Tensor* vora_dequantize(const at::Tensor* const* parts, size_t n, int64_t rows, int64_t columns, int8_t kind) {
  return guard<at::Tensor*>(nullptr, [&] {
    at::NoGradGuard no_grad;
    return new at::Tensor(dequantized(Kept(parts, n, rows, columns), static_cast<at::ScalarType>(kind), Room::own));
  });
}

// x [.., columns], bias [rows] or null -> [.., rows]
at::Tensor* vora_quantized_linear(const at::Tensor* x, const at::Tensor* bias, const at::Tensor* const* parts, size_t n,
                                  int64_t rows, int64_t columns) {
  return guard<at::Tensor*>(nullptr, [&] {
    TORCH_CHECK(x->dim() > 0 && x->size(-1) == columns, "a linear of ", columns, " features takes ", x->sizes());
    const Kept kept(parts, n, rows, columns);
    SHOWN_AS("vora::quantized_linear", *x, kept.codes);
    const auto b = bias == nullptr ? std::optional<at::Tensor>() : std::optional<at::Tensor>(*bias);
    return new at::Tensor(QuantizedLinear::apply(*x, b, kept));
  });
}

}  // extern "C"
