// Products with quantised matrices: sums of a group in integers, one lane for each of SIDE rows, then in f32 over groups.
#pragma once

#include "operand.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

// A value of [SIDE], and the half of one where vectors are shorter.
#if defined(__AVX512VNNI__)
#define VORA_SIDE_PARTS 1
struct Side {
  typedef __m512i Words;
  typedef __m512 Floats;
  static INLINE Words words(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static INLINE Words all(int32_t x) { return _mm512_set1_epi32(x); }
  static INLINE Words low(Words x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static INLINE Words high(Words x) { return low(_mm512_srli_epi16(x, 4)); }
  static INLINE Floats none() { return _mm512_setzero_ps(); }
  static INLINE Floats scales(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <bool SIGNED>
  static INLINE Words add(Words sum, Words w, Words x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static INLINE Floats add_scaled(Floats total, Words sum, Floats scales, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), total);
  }
  static INLINE void keep(float* to, Floats x) { _mm512_storeu_ps(to, x); }
};
#elif defined(__AVX2__)
#define VORA_SIDE_PARTS 2
struct Side {
  typedef __m256i Words;
  typedef __m256 Floats;
  static INLINE Words words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static INLINE Words all(int32_t x) { return _mm256_set1_epi32(x); }
  static INLINE Words low(Words x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static INLINE Words high(Words x) { return low(_mm256_srli_epi16(x, 4)); }
  static INLINE Floats none() { return _mm256_setzero_ps(); }
  static INLINE Floats scales(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <bool SIGNED>
  static INLINE Words add(Words sum, Words w, Words x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    if (SIGNED) {  // the sign of the matrix's number goes to the operand's
      const Words plain = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
      x = _mm256_sign_epi8(x, plain);
      w = _mm256_abs_epi8(plain);
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
  }
  static INLINE Floats add_scaled(Floats total, Words sum, Floats scales, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scales, _mm256_set1_ps(scale)), total);
  }
  static INLINE void keep(float* to, Floats x) { _mm256_storeu_ps(to, x); }
};
#else
#define VORA_SIDE_PARTS 1
INLINE float half(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t exponent = (x >> 10) & 31, fraction = x & 0x3ff;
  float result;
  if (exponent == 0) {
    result = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -result : result;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}
struct Side {
  typedef int32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  static INLINE Words words(const uint8_t* p) {
    Words x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static INLINE Words all(int32_t x) { return Words{} + x; }
  static INLINE Words low(Words x) { return x & 0x0f0f0f0f; }
  static INLINE Words high(Words x) { return (x >> 4) & 0x0f0f0f0f; }
  static INLINE Floats none() { return Floats{}; }
  static INLINE Floats scales(const uint16_t* p) {
    Floats x;
    for (int64_t i = 0; i < SIDE; i++) x[i] = half(p[i]);
    return x;
  }
  template <bool SIGNED>
  static INLINE Words add(Words sum, Words w, Words x) {
    sum += (w & 255) * ((x << 24) >> 24);
    sum += ((w >> 8) & 255) * ((x << 16) >> 24);
    sum += ((w >> 16) & 255) * ((x << 8) >> 24);
    sum += ((w >> 24) & 255) * (x >> 24);
    return sum;
  }
  static INLINE Floats add_scaled(Floats total, Words sum, Floats scales, float scale) {
    return total + __builtin_convertvector(sum, Floats) * (scales * scale);
  }
  static INLINE void keep(float* to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }
};
#endif

constexpr int64_t PARTS = VORA_SIDE_PARTS;
constexpr int64_t PART = SIDE / PARTS;

// y[r * y_step + i] for one SIDE of the matrix, from `w` and `scales` on, or one part of it, and R operands. One SIDE after the
// other is one stream of memory, which processors read fastest.
template <bool IS_INT4, int R>
INLINE void side_dots(const uint8_t* w, const uint16_t* scales, int64_t in, const char* x, int64_t step, bool first,
                      float* y, int64_t y_step) {
  typedef typename Side::Words Words;
  typedef typename Side::Floats Floats;
  constexpr int64_t BYTES = IS_INT4 ? SIDE * GROUP / 2 : SIDE * GROUP;
  const int64_t groups = groups_of(in);
  Floats total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) total[r] = Side::none();
  const char* operands[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) operands[r] = x + r * step;
  const int64_t scales_at = GROUP * groups, starts_at = scales_at + 4 * groups;
  const auto word = [](const char* p) __attribute__((always_inline)) {
    int32_t result;
    __builtin_memcpy(&result, p, sizeof result);
    return result;
  };
  for (int64_t g = 0; g < groups; g++) {
    Words sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = Side::all(word(operands[r] + starts_at + 4 * g));
    const auto add = [&](int64_t quad, Words a) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        sum[r] = Side::add<!IS_INT4>(sum[r], a, Side::all(word(operands[r] + GROUP * g + 4 * quad)));
      }
    };
    const uint8_t* group = w + g * BYTES;
#pragma GCC unroll 8
    for (int64_t at = 0; at < BYTES / 64; at++) {
      const Words a = Side::words(group + 64 * at);
      if (first) __builtin_prefetch(group + 64 * at + AHEAD);
      if (IS_INT4) {
        add(at, Side::low(a));
        add(at + 4, Side::high(a));
      } else {
        add(at, a);
      }
    }
    const Floats of_rows = Side::scales(scales + g * SIDE);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      float scale;
      __builtin_memcpy(&scale, operands[r] + scales_at + 4 * g, sizeof scale);
      total[r] = Side::add_scaled(total[r], sum[r], of_rows, scale);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) Side::keep(y + r * y_step, total[r]);
}

template <bool IS_INT4>
void sides_product(const Matrix& m, int64_t from, int64_t to, const char* x, int64_t step, int64_t rows, float* y,
                   int64_t y_step) {
  const int64_t groups = groups_of(m.in), bytes = groups * (IS_INT4 ? SIDE * GROUP / 2 : SIDE * GROUP);
  const int64_t end = sides_of(to);
  by_rows(rows, [&](int64_t row, auto count) {
    constexpr int R = decltype(count)::value;
    for (int64_t part = 0; part < PARTS; part++) {
      for (int64_t side = from / SIDE; side < end; side++) {
        const uint8_t* w = static_cast<const uint8_t*>(m.values) + side * bytes + part * 4 * PART;
        side_dots<IS_INT4, R>(w, m.scales + side * groups * SIDE + part * PART, m.in, x + row * step, step, row == 0,
                              y + row * y_step + side * SIDE - from + part * PART, y_step);
      }
    }
  });
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
