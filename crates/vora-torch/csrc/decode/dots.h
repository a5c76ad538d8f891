// Products with matrices whose rows lie one after the other: a sum over a row is a vector's worth of sums side by side, put
// together at its end.
#pragma once

#include "lanes.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

// Matrix rows at once: with R operands as many sums as registers hold.
template <int R>
constexpr int tall() {
#if VORA_VECTOR == 16
  return R == 1 ? 8 : R == 2 ? 6 : R <= 4 ? 4 : 3;
#else
  return R == 1 ? 4 : 2;
#endif
}

// Wider tiles keep a processor from looking ahead by itself.
INLINE void ask(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + AHEAD); }

INLINE Vec operand(const char* x, int64_t k) { return load(reinterpret_cast<const float*>(x) + k); }

// Numbers of a row that vectors take; what is left is added one by one.
INLINE int64_t whole(const float*, int64_t in) { return in / V * V; }
INLINE float number(float x) { return x; }

// sum[o][r] of O rows of the matrix and R operands.
template <int O, int R>
INLINE void add_up(const float* w, int64_t in, const char* x, int64_t step, bool first, Vec (&sum)[O][R]) {
  for (int64_t k = 0; k < whole(w, in); k += V) {
    Vec a[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      a[o] = load(w + o * in + k);
      if (R > 1 && first) ask(w + o * in + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec b = operand(x + r * step, k);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) sum[o][r] += a[o] * b;
    }
  }
}

INLINE float number(uint16_t x) { return widened(x); }

#if defined(__AVX512BF16__)
INLINE int64_t whole(const uint16_t*, int64_t in) { return in; }

template <int O, int R>
INLINE void add_up(const uint16_t* w, int64_t in, const char* x, int64_t step, bool first, Vec (&sum)[O][R]) {
  const auto add = [&](int64_t k, __mmask32 there) __attribute__((always_inline)) {
    __m512i a[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      a[o] = _mm512_maskz_loadu_epi16(there, w + o * in + k);
      if (R > 1 && first) ask(w + o * in + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i b = _mm512_loadu_si512(x + r * step + 2 * k);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) {
        sum[o][r] = (Vec)_mm512_dpbf16_ps((__m512)sum[o][r], (__m512bh)a[o], (__m512bh)b);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * V <= in; k += 2 * V) add(k, 0xffffffffu);
  if (k < in) add(k, static_cast<__mmask32>((uint64_t{1} << (in - k)) - 1));
}
#else
INLINE int64_t whole(const uint16_t*, int64_t in) { return in / (2 * V) * (2 * V); }

template <int O, int R>
INLINE void add_up(const uint16_t* w, int64_t in, const char* x, int64_t step, bool first, Vec (&sum)[O][R]) {
  for (int64_t k = 0; k < whole(w, in); k += 2 * V) {
    Halves a[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; o++) {
      a[o] = halves(w + o * in + k);
      if (R > 1 && first) ask(w + o * in + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec even = operand(x + r * step, k), odd = operand(x + r * step, k + V);
#pragma GCC unroll 8
      for (int o = 0; o < O; o++) {
        sum[o][r] += a[o].even * even;
        sum[o][r] += a[o].odd * odd;
      }
    }
  }
}
#endif

// Puts together the sums of a tile.
template <int O, int R>
INLINE void put_sums(const Vec (&sum)[O][R], float* y, int64_t y_step) {
  constexpr int N = O * R;
#pragma GCC unroll 16
  for (int i = 0; i < N; i += 4) {
    const int last = N - 1;
    const int at[4] = {i, i + 1 < N ? i + 1 : last, i + 2 < N ? i + 2 : last, i + 3 < N ? i + 3 : last};
    float sums[4];
    sums_of(sum[at[0] % O][at[0] / O], sum[at[1] % O][at[1] / O], sum[at[2] % O][at[2] / O], sum[at[3] % O][at[3] / O],
            sums);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      if (i + j < N) y[at[j] / O * y_step + at[j] % O] = sums[j];
    }
  }
}

// y[r * y_step + o] for O rows of the matrix and R operands.
template <int O, int R, typename T>
INLINE void dots(const T* w, int64_t in, const char* x, int64_t step, bool first, float* y, int64_t y_step) {
  Vec sum[O][R] = {};
  add_up<O, R>(w, in, x, step, first, sum);
  put_sums<O, R>(sum, y, y_step);
  for (int64_t k = whole(w, in); k < in; k++) {
    for (int r = 0; r < R; r++) {
      const float of_row = reinterpret_cast<const float*>(x + r * step)[k];
      for (int o = 0; o < O; o++) y[r * y_step + o] = __builtin_fmaf(number(w[o * in + k]), of_row, y[r * y_step + o]);
    }
  }
}

template <typename T>
void rows_product(const Matrix& m, int64_t from, int64_t to, const char* x, int64_t step, int64_t rows, float* y,
                  int64_t y_step) {
  const T* w = static_cast<const T*>(m.values);
  by_rows(rows, [&](int64_t row, auto count) {
    constexpr int R = decltype(count)::value, O = tall<R>();
    const char* of_rows = x + row * step;
    float* to_rows = y + row * y_step;
    int64_t o = from;
    for (; o + O <= to; o += O) dots<O, R>(w + o * m.in, m.in, of_rows, step, row == 0, to_rows + o - from, y_step);
    for (; o < to; o++) dots<1, R>(w + o * m.in, m.in, of_rows, step, row == 0, to_rows + o - from, y_step);
  });
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
