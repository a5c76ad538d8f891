// Vectors of decoding's kernels: the sum of one, and bf16 two by two.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../vector.h"
#include "kernel.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

using namespace vora::VORA_ISA;

// Rows of operands that a product takes at once: as many as registers hold.
constexpr int64_t MOST_ROWS = VORA_VECTOR == 16 ? 8 : 4;
// How far ahead of its reading a matrix is asked for, in bytes.
constexpr int64_t AHEAD = 8192;

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls `each(first row, Count<rows>)` for whole MOST_ROWS, then the rest.
template <typename Each>
INLINE void by_rows(int64_t rows, Each each) {
  int64_t r = 0;
  for (; r + MOST_ROWS <= rows; r += MOST_ROWS) each(r, Count<MOST_ROWS>{});
  switch (rows - r) {
    case 1: return each(r, Count<1>{});
    case 2: return each(r, Count<2>{});
    case 3: return each(r, Count<3>{});
#if VORA_VECTOR == 16
    case 4: return each(r, Count<4>{});
    case 5: return each(r, Count<5>{});
    case 6: return each(r, Count<6>{});
    case 7: return each(r, Count<7>{});
#endif
    default: return;
  }
}

// The sums of four vectors: each of them is put together in the same order, whichever of the four it is.
INLINE void sums_of(Vec a, Vec b, Vec c, Vec d, float* to) {
#if VORA_VECTOR == 16
  const auto halved = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); };
  const __m512d ab = (__m512d)halved((__m512)a, (__m512)b), cd = (__m512d)halved((__m512)c, (__m512)d);
  const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif VORA_VECTOR == 8
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  const auto sum = [](Vec x) { return (x[0] + x[1]) + (x[2] + x[3]); };
  to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
#endif
}

INLINE float sum_of(Vec x) {
  float sum[4];
  sums_of(x, x, x, x, sum);
  return sum[0];
}

typedef int32_t LooseInts __attribute__((vector_size(VORA_VECTOR * 4), aligned(1), may_alias));

// 2 V numbers in bf16, those at even places and those at odd ones.
struct Halves {
  Vec even, odd;
};

INLINE Halves halves(const uint16_t* p) {
  const Ints words = *reinterpret_cast<const LooseInts*>(p);
  return {(Vec)(words << 16), (Vec)(words & static_cast<int32_t>(0xffff0000u))};
}

INLINE float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// Numbers in the order that `halves` has them: of each 2 V those at even places, then those at odd ones, and what is left as
// it is.
INLINE void part(const float* x, int64_t len, float* to) {
  const int64_t whole = len / (2 * V) * (2 * V);
  for (int64_t k = 0; k < whole; k += 2 * V) {
    for (int64_t i = 0; i < V; i++) to[k + i] = x[k + 2 * i], to[k + V + i] = x[k + 2 * i + 1];
  }
  for (int64_t k = whole; k < len; k++) to[k] = x[k];
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
