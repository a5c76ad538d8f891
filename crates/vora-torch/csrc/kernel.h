// What kernels over the rows of tensors share: the exponential, the instruction sets that they are compiled for, and how they
// reach a tensor's numbers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "isa.h"

// Beyond these e^x is taken for e to them. Not known to the compiler here: it would make branches of them.
extern const float LEAST_EXPONENT, MOST_EXPONENT;

// e^x within two units in the last place (Cephes' polynomial), in a form that compilers vectorise.
INLINE float exponential(float x) {
  x = x < LEAST_EXPONENT ? LEAST_EXPONENT : x;
  x = x > MOST_EXPONENT ? MOST_EXPONENT : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  float shifted = x * 1.44269504f + magic;
  float n = shifted - magic;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#else
#define AVX2
#define AVX512
#endif

// `NAME_f32` and `NAME_bf16`, which call `KERNEL` compiled for the instruction set in use.
#define FOR_KIND(NAME, T, KERNEL, PARAMS, ARGS) \
  void NAME##_plain PARAMS(T) { KERNEL ARGS; } \
  AVX2 void NAME##_avx2 PARAMS(T) { KERNEL ARGS; } \
  AVX512 void NAME##_avx512 PARAMS(T) { KERNEL ARGS; } \
  void NAME PARAMS(T) { \
    switch (isa()) { \
      case Isa::avx512: return NAME##_avx512 ARGS; \
      case Isa::avx2: return NAME##_avx2 ARGS; \
      case Isa::plain: return NAME##_plain ARGS; \
    } \
  }
#define FOR_EACH_KIND(NAME, KERNEL, PARAMS, ARGS) \
  FOR_KIND(NAME##_f32, float, KERNEL, PARAMS, ARGS) \
  FOR_KIND(NAME##_bf16, bf16, KERNEL, PARAMS, ARGS)

inline bool is_bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }

template <typename T>
const T* in(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* out(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Elements below which another thread costs more than it saves; ATen's own figure.
constexpr int64_t WORTH_A_THREAD = 32768;

inline int64_t grain(int64_t row_len) { return std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, row_len)); }

inline void check(const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK(x.is_cpu() && other.is_cpu(), "fused operators run on the CPU");
  TORCH_CHECK(x.scalar_type() == at::kFloat || is_bf16(x), "fused operators take f32 or bf16, not ", x.scalar_type());
}
