// Matrices for decoding: quantised, in the order that the kernels read, back again, and their products with any number of
// rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../guard.h"
#include "../kernel.h"
#include "choice.h"

namespace {

using namespace vora::decode;

constexpr int INT4_ZERO = 8;

// Zeros, in large pages where they fill some: weights are read from end to end for every token.
at::Tensor large_zeros(at::IntArrayRef size) {
  auto made = at::zeros(size, at::TensorOptions().dtype(at::kByte));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(made.data_ptr());
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, end = (start + made.nbytes()) / PAGE * PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a wish: refusal is no error
#endif
  return made;
}

// One group of GROUP numbers, as ggml's Q8_0 has it.
void quantise_int8(const float* x, int8_t* values, c10::Half* scale) {
  float top = 0;
  for (int64_t i = 0; i < GROUP; i++) top = std::max(top, std::fabs(x[i]));
  const float d = top / 127.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
  for (int64_t i = 0; i < GROUP; i++) {  // rounds halves away from zero
    const float moved = x[i] * inverse;
    const auto cut = static_cast<int32_t>(moved);
    const float rest = moved - static_cast<float>(cut);
    values[i] = static_cast<int8_t>(cut + (rest >= 0.5f) - (rest <= -0.5f));
  }
  *scale = d;
}

// The same as Q4_0: the number of the largest magnitude becomes -8.
void quantise_int4(const float* x, uint8_t* values, c10::Half* scale) {
  float top = 0, largest = 0;
  for (int64_t i = 0; i < GROUP; i++) {
    if (std::fabs(x[i]) > top) top = std::fabs(x[i]), largest = x[i];
  }
  const float d = largest / -8.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
  uint8_t moved[GROUP];
  for (int64_t i = 0; i < GROUP; i++) {
    moved[i] = static_cast<uint8_t>(std::min(15, static_cast<int32_t>(x[i] * inverse + 8.5f)));
  }
  for (int64_t i = 0; i < GROUP / 2; i++) values[i] = static_cast<uint8_t>(moved[i] | moved[i + GROUP / 2] << 4);
  *scale = d;
}

template <typename T>
void read_row(const at::Tensor& weight, int64_t row, float* to) {
  const T* from = in<T>(weight) + row * weight.size(1);
  for (int64_t i = 0; i < weight.size(1); i++) to[i] = load(from[i]);
}

int64_t width_of(const at::Tensor& values) { return values.scalar_type() == at::kChar ? INT8 : INT4; }

// Bytes of one row's group, as saved.
int64_t row_bytes(int64_t width) { return width == INT8 ? GROUP : GROUP / 2; }

// Words of four bytes from [SIDE, words] to [words, SIDE], or back, with `mask` put on each.
void turn_group(const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step, int64_t rows, int64_t words,
                uint32_t mask, bool back) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t word = 0; word < words; word++) {
      const int64_t across = r * (back ? to_step : from_step) + 4 * word, along = 4 * (word * SIDE + r);
      uint32_t x;
      std::memcpy(&x, from + (back ? along : across), 4);
      x ^= mask;
      std::memcpy(to + (back ? across : along), &x, 4);
    }
  }
}

// Between the order of a file, [out, groups, bytes], and that of the kernels, [sides, groups, bytes of SIDE rows].
void turn_all(int64_t width, int64_t out_features, int64_t groups, const uint8_t* from, const uint16_t* from_scales, uint8_t* to,
              uint16_t* to_scales, bool back) {
  const int64_t bytes = row_bytes(width), words = bytes / 4;
  const uint32_t mask = width == INT8 ? 0x80808080u : 0;
  at::parallel_for(0, sides_of(out_features), 1, [&](int64_t first, int64_t end) {
    for (int64_t side = first; side < end; side++) {
      const int64_t row = side * SIDE, rows = std::min(SIDE, out_features - row);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t across = (row * groups + g) * bytes, along = (side * groups + g) * SIDE * bytes;
        turn_group(from + (back ? along : across), groups * bytes, to + (back ? across : along), groups * bytes, rows, words,
                   mask, back);
        for (int64_t r = 0; r < rows; r++) {
          const int64_t of_row = (row + r) * groups + g, of_side = (side * groups + g) * SIDE + r;
          to_scales[back ? of_row : of_side] = from_scales[back ? of_side : of_row];
        }
      }
    }
  });
}

// GROUP numbers of one row.
void read_group(const Matrix& m, int64_t row, int64_t g, float* to) {
  const int64_t at = row / SIDE * groups_of(m.in) + g, r = row % SIDE;
  const auto* group = static_cast<const uint8_t*>(m.values) + at * group_bytes(m.width) + 4 * r;
  const float scale = c10::Half(m.scales[at * SIDE + r], c10::Half::from_bits());
  for (int64_t word = 0; word < row_bytes(m.width) / 4; word++) {
    for (int64_t i = 0; i < 4; i++) {
      const int moved = group[4 * word * SIDE + i];
      float* place = to + 4 * word + i;
      if (m.width == INT8) {
        *place = static_cast<float>(moved - 128) * scale;
      } else {
        *place = static_cast<float>((moved & 15) - INT4_ZERO) * scale;
        place[GROUP / 2] = static_cast<float>((moved >> 4) - INT4_ZERO) * scale;
      }
    }
  }
}

template <typename T>
void dequantise(const Matrix& m, const int64_t* rows, int64_t n, T* to) {
  at::parallel_for(0, n, grain(m.in), [&](int64_t first, int64_t end) {
    float group[GROUP];
    for (int64_t i = first; i < end; i++) {
      for (int64_t g = 0; g < groups_of(m.in); g++) {
        read_group(m, rows[i], g, group);
        const int64_t len = std::min(GROUP, m.in - g * GROUP);
        for (int64_t k = 0; k < len; k++) store(to[i * m.in + g * GROUP + k], group[k]);
      }
    }
  });
}

}  // namespace

extern "C" {

// Zeros for a matrix of these sizes in the order that the kernels read, [sides, groups, bytes] and [sides, groups, SIDE].
int vora_packed_zeros(int64_t width, int64_t out_features, int64_t in_features, at::Tensor** values, at::Tensor** scales) {
  return guard(-1, [&] {
    TORCH_CHECK(is_quantised(width), "no groups in width ", width);
    const int64_t sides = sides_of(out_features), groups = groups_of(in_features);
    *values = new at::Tensor(large_zeros({sides, groups, group_bytes(width)}));
    *scales = new at::Tensor(at::zeros({sides, groups, SIDE}, at::TensorOptions().dtype(at::kHalf)));
    return 0;
  });
}

// Some rows of a weight [rows, in], f32 or bf16, into such a matrix from its row `first` on, the beginning of a side; 1 where it
// has numbers that are not finite, or beyond what scales in f16 can have.
int vora_quantise(const at::Tensor* weight, int64_t width, int64_t first, const at::Tensor* values,
                  const at::Tensor* scales) {
  return guard(-1, [&] {
    check(*weight, *weight);
    TORCH_CHECK(weight->dim() == 2 && is_quantised(width) && first % SIDE == 0 &&
                    sides_of(first + weight->size(0)) <= values->size(0) && groups_of(weight->size(1)) == values->size(1),
                "quantising a weight ", weight->sizes(), " to width ", width, " into ", values->sizes());
    const auto whole = weight->contiguous();
    const int64_t rows = whole.size(0), len = whole.size(1), groups = groups_of(len), bytes = row_bytes(width);
    const uint32_t mask = width == INT8 ? 0x80808080u : 0;
    auto* to = static_cast<uint8_t*>(values->mutable_data_ptr());
    auto* to_scales = scales->mutable_data_ptr<c10::Half>();
    std::atomic<bool> is_finite{true};
    at::parallel_for(0, rows, grain(len), [&](int64_t from, int64_t end) {
      std::vector<float> row(groups * GROUP);
      uint8_t made[GROUP];
      bool finite = true;
      for (int64_t r = from; r < end; r++) {
        if (is_bf16(whole)) read_row<bf16>(whole, r, row.data());
        else read_row<float>(whole, r, row.data());
        const int64_t side = (first + r) / SIDE, lane = (first + r) % SIDE;
        for (int64_t g = 0; g < groups; g++) {
          const float* group = row.data() + g * GROUP;
          const int64_t at = side * groups + g;
          c10::Half* scale = to_scales + at * SIDE + lane;
          if (width == INT8) quantise_int8(group, reinterpret_cast<int8_t*>(made), scale);
          else quantise_int4(group, made, scale);
          turn_group(made, bytes, to + at * SIDE * bytes + 4 * lane, bytes, 1, bytes / 4, mask, false);
          finite = finite && std::isfinite(static_cast<float>(*scale));
          for (int64_t i = 0; i < GROUP; i++) finite = finite && std::isfinite(group[i]);
        }
      }
      if (!finite) is_finite = false;
    });
    return is_finite ? 0 : 1;
  });
}

// Values [out, groups, 32] int8 or [out, groups, 16] uint8 and scales [out, groups] f16, in the order that the kernels read.
int vora_pack(const at::Tensor* values, const at::Tensor* scales, at::Tensor** packed, at::Tensor** packed_scales) {
  return guard(-1, [&] {
    const int64_t width = width_of(*values), rows = values->size(0), groups = values->size(1), sides = sides_of(rows);
    TORCH_CHECK(values->dim() == 3 && values->size(2) == row_bytes(width) && scales->dim() == 2 && scales->size(0) == rows &&
                    scales->size(1) == groups && scales->scalar_type() == at::kHalf,
                "quantised values ", values->sizes(), " with scales ", scales->sizes());
    const auto from = values->contiguous(), from_scales = scales->contiguous();
    auto to = large_zeros({sides, groups, group_bytes(width)});
    auto to_scales = at::zeros({sides, groups, SIDE}, from_scales.options());
    turn_all(width, rows, groups, static_cast<const uint8_t*>(from.const_data_ptr()),
             static_cast<const uint16_t*>(from_scales.const_data_ptr()), static_cast<uint8_t*>(to.mutable_data_ptr()),
             static_cast<uint16_t*>(to_scales.mutable_data_ptr()), false);
    *packed = new at::Tensor(to);
    *packed_scales = new at::Tensor(to_scales);
    return 0;
  });
}

// The way back.
int vora_unpack(const Matrix* m, at::Tensor** values, at::Tensor** scales) {
  return guard(-1, [&] {
    const int64_t groups = groups_of(m->in);
    const auto kind = m->width == INT8 ? at::kChar : at::kByte;
    auto q = at::empty({m->out, groups, row_bytes(m->width)}, at::TensorOptions().dtype(kind));
    auto s = at::empty({m->out, groups}, at::TensorOptions().dtype(at::kHalf));
    turn_all(m->width, m->out, groups, static_cast<const uint8_t*>(m->values), m->scales,
             static_cast<uint8_t*>(q.mutable_data_ptr()), static_cast<uint16_t*>(s.mutable_data_ptr()), true);
    *values = new at::Tensor(q);
    *scales = new at::Tensor(s);
    return 0;
  });
}

// Rows of a quantised matrix, `[n, in]`, in f32 or bf16.
at::Tensor* vora_dequantise(const Matrix* m, const int64_t* rows, int64_t n, int is_bf16) {
  return guard<at::Tensor*>(nullptr, [&] {
    auto made = at::empty({n, m->in}, at::TensorOptions().dtype(is_bf16 != 0 ? at::kBFloat16 : at::kFloat));
    if (is_bf16 != 0) dequantise(*m, rows, n, out<bf16>(made));
    else dequantise(*m, rows, n, out<float>(made));
    return new at::Tensor(made);
  });
}

// x [rows, in] in f32, bias [out] or null -> [rows, out] in f32
at::Tensor* vora_linear(const Matrix* m, const float* bias, const at::Tensor* x_in) {
  return guard<at::Tensor*>(nullptr, [&] {
    TORCH_CHECK(x_in->is_cpu() && x_in->scalar_type() == at::kFloat && x_in->dim() == 2 && x_in->size(1) == m->in,
                "a product of [", m->out, ", ", m->in, "] with ", x_in->scalar_type(), " ", x_in->sizes());
    const auto x = x_in->contiguous();
    const int64_t rows = x.size(0), step = operand_bytes(m->in);
    auto operands = at::empty({rows * step}, at::TensorOptions().dtype(at::kByte));
    auto y = at::empty({rows, m->out}, x.options());
    auto* bytes = static_cast<char*>(operands.mutable_data_ptr());
    float* made = out<float>(y);
    at::parallel_for(0, rows, grain(m->in), [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; r++) kernels().take(m->width, in<float>(x) + r * m->in, m->in, bytes + r * step);
    });
    const int64_t units = (m->out + UNIT - 1) / UNIT;
    at::parallel_for(0, units, grain(UNIT * m->in * std::max<int64_t>(1, rows)), [&](int64_t from_unit, int64_t to_unit) {
      std::vector<float> tile(rows * UNIT);
      for (int64_t unit = from_unit; unit < to_unit; unit++) {
        const int64_t from = unit * UNIT, to = std::min(m->out, from + UNIT);
        kernels().product(*m, from, to, bytes, step, rows, tile.data(), UNIT);
        for (int64_t r = 0; r < rows; r++) {
          for (int64_t i = from; i < to; i++) {
            made[r * m->out + i] = tile[r * UNIT + i - from] + (bias != nullptr ? bias[i] : 0.0f);
          }
        }
      }
    });
    return new at::Tensor(y);
  });
}

}  // extern "C"
