// A row of a product's input, as the product takes it.
#pragma once

#include "lanes.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

// Signed numbers times signed ones, where no instruction has an unsigned factor of 8 bits: those of INT8 are then not moved
// by 128, which would make sums of pairs too large for 16 bits.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr int32_t INT8_MOVED = 0;
#else
constexpr int32_t INT8_MOVED = 128;
#endif
constexpr int32_t INT4_MOVED = 8;

// What a quantised operand holds: numbers of 8 bits, a scale for each group, and what a group's sum starts at, which takes back
// that the matrix's numbers are moved.
struct Quantised {
  explicit Quantised(char* at, int64_t len)
      : values(reinterpret_cast<int8_t*>(at)),
        scales(reinterpret_cast<float*>(at + GROUP * groups_of(len))),
        starts(reinterpret_cast<int32_t*>(scales + groups_of(len))) {}

  int8_t* values;
  float* scales;
  int32_t* starts;
};

typedef int8_t Bytes __attribute__((vector_size(VORA_VECTOR)));

// The largest magnitude's 127th part is the scale, as in ggml's Q8_0.
INLINE void quantise(const float* x, int64_t len, int32_t moved, char* to) {
  const Quantised made(to, len);
  for (int64_t g = 0; g < groups_of(len); g++) {
    float group[GROUP] = {};
    const int64_t n = least(GROUP, len - g * GROUP);
    for (int64_t i = 0; i < n; i++) group[i] = x[g * GROUP + i];
    Vec tops = Vec{}, probe = Vec{};
    for (int64_t i = 0; i < GROUP; i += V) {
      const Vec size = load(group + i), back = -size;
      probe += size * 0.0f;  // nothing, unless a number is not finite: then the scale is not either
      const Vec magnitude = size > back ? size : back;
      tops = magnitude > tops ? magnitude : tops;
    }
    float top = 0;
    for (int64_t i = 0; i < V; i++) top = most(top, tops[i]);
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    Ints sums = Ints{};
    int8_t* values = made.values + g * GROUP;
    for (int64_t i = 0; i < GROUP; i += V) {
      const Vec moved_up = load(group + i) * inverse + magic;
      const Ints rounded = ((Ints)moved_up << 10) >> 10;
      const Bytes bytes = __builtin_convertvector(rounded, Bytes);
      __builtin_memcpy(values + i, &bytes, sizeof bytes);
      sums += rounded;
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < V; i++) sum += sums[i];
    made.scales[g] = top / 127.0f + sum_of(probe);
    made.starts[g] = -moved * sum;
  }
}

#if !defined(__AVX512BF16__)
// To the nearest number that bf16 has, ties to even.
INLINE float narrowed(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  float rounded;
  __builtin_memcpy(&rounded, &bits, sizeof rounded);
  return x == x ? rounded : x;
}
#endif

// Rounded to bf16, and zeros up to a whole group.
INLINE void take_bf16(const float* x, int64_t len, char* to) {
#if defined(__AVX512BF16__)
  auto* halves_to = reinterpret_cast<uint16_t*>(to);
  for (int64_t k = 0; k < GROUP * groups_of(len); k += V) {
    const int64_t n = len - k;
    const auto there = static_cast<__mmask16>(n >= V ? 0xffff : n > 0 ? (1u << n) - 1 : 0);
    const __m512 from = _mm512_maskz_loadu_ps(there, x + k);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves_to + k), (__m256i)_mm512_cvtneps_pbh(from));
  }
#else
  auto* parted = reinterpret_cast<float*>(to);
  part(x, len, parted);
  for (int64_t k = 0; k < len; k++) parted[k] = narrowed(parted[k]);
#endif
}

void take(int64_t width, const float* x, int64_t len, char* to) {
  switch (width) {
    case F32: __builtin_memcpy(to, x, static_cast<size_t>(4 * len)); return;
    case BF16: return take_bf16(x, len, to);
    case INT8: return quantise(x, len, INT8_MOVED, to);
    case INT4: return quantise(x, len, INT4_MOVED, to);
    default: return;
  }
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
