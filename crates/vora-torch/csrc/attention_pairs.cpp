// The kernels of attention_kernel.cpp for processors that multiply bf16: products of pairs of bf16, summed in f32. The
// softmax's weights and the scores' gradients are rounded to bf16 before they are multiplied, as everywhere in bf16.

#include <immintrin.h>

#include "attention_tiles.h"

namespace vora {
namespace VORA_ISA {
namespace {

constexpr int TALL = 12;
constexpr int WIDE = 2;
constexpr float LOG2_E = 1.44269504f;

INLINE __m512i words(const uint32_t* p) { return _mm512_loadu_si512(p); }

// c [R, W vectors] = or += a [R, 2 k] b [2 k, W vectors] of words; word (row, l) of `a` lies at a[row * lda + l], or where
// ACROSS at a[l * lda + row]. Where `half`, one word more follows, whose high numbers are not there.
template <int R, int W, bool ACROSS, bool ADD>
INLINE void tile(int64_t k, bool half, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                 int64_t ldc) {
  __m512 sum[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) sum[r][w] = ADD ? _mm512_loadu_ps(c + r * ldc + w * V) : _mm512_setzero_ps();
  }
  const auto add = [&](int64_t l, uint32_t there) __attribute__((always_inline)) {
    __m512i x[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) x[w] = _mm512_and_si512(words(b + l * ldb + w * V), _mm512_set1_epi32(there));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512i y = _mm512_set1_epi32((ACROSS ? a[l * lda + r] : a[r * lda + l]) & there);
#pragma GCC unroll 2
      for (int w = 0; w < W; w++) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], (__m512bh)y, (__m512bh)x[w]);
    }
  };
  for (int64_t l = 0; l < k; l++) add(l, 0xffffffffu);
  if (half) add(k, 0xffffu);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) _mm512_storeu_ps(c + r * ldc + w * V, sum[r][w]);
  }
}

template <int W, bool ACROSS, bool ADD>
INLINE void columns(int64_t m, int64_t k, bool half, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                    float* c, int64_t ldc) {
  const int64_t down = ACROSS ? 1 : lda;
  int64_t i = 0;
  for (; i + TALL <= m; i += TALL) tile<TALL, W, ACROSS, ADD>(k, half, a + i * down, lda, b, ldb, c + i * ldc, ldc);
  for (; i + 4 <= m; i += 4) tile<4, W, ACROSS, ADD>(k, half, a + i * down, lda, b, ldb, c + i * ldc, ldc);
  for (; i < m; i++) tile<1, W, ACROSS, ADD>(k, half, a + i * down, lda, b, ldb, c + i * ldc, ldc);
}

// c [m, n] = or += a [m, 2 k] b [2 k, n], n rounded up to whole vectors
template <bool ACROSS, bool ADD>
void product(int64_t m, int64_t n, int64_t k, bool half, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
             float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + WIDE * V <= n; j += WIDE * V) columns<WIDE, ACROSS, ADD>(m, k, half, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; j += V) columns<1, ACROSS, ADD>(m, k, half, a, lda, b + j, ldb, c + j, ldc);
}

INLINE __m256i halved(Vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

INLINE void store_halves(uint32_t* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }

INLINE Vec widened(__m256i x) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

// Up to a vector of bf16, zeros where `there` has none, read and written.
INLINE __m256i halves(const uint16_t* from, __mmask16 there) { return _mm256_maskz_loadu_epi16(there, from); }
INLINE void keep(uint16_t* to, __mmask16 there, __m256i x) { _mm256_mask_storeu_epi16(to, there, x); }

// Calls `each(start, there)` for the vectors of a row of `dim` numbers, the last of which may have fewer.
template <typename Each>
INLINE void each_half(int64_t dim, Each each) {
  int64_t d = 0;
  for (; d + V <= dim; d += V) each(d, static_cast<__mmask16>(0xffff));
  if (d < dim) each(d, static_cast<__mmask16>((1u << (dim - d)) - 1));
}

// Words of two rows' numbers.
INLINE void store_pairs(uint32_t* to, __m256i first, __m256i second) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
}

// 2^x within two units in the last place, 0 below -126: a polynomial of the fraction, and the whole part in the exponent.
INLINE Vec power_of_two(Vec x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-160.0f), (__m512)x);  // minus infinity has no fraction; NaN stays
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = (Vec)_mm512_sub_ps(y, n);
  Vec p = all(1.5403530e-4f);
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, n);
}

// Makes the softmax's weights of one tile of its scores, and rescales what came of earlier tiles.
INLINE void soften(const float* scores, int64_t width, float scale, uint32_t* weights, float* out, int64_t dim,
                   float* max, float* sum) {
  __m512 tops = _mm512_set1_ps(*max);
  for (int64_t i = 0; i < width; i += V) tops = _mm512_max_ps(tops, (__m512)load(scores + i));
  const float highest = _mm512_reduce_max_ps(tops);
  if (highest == -__builtin_inff()) {  // nothing attended to yet
    for (int64_t i = 0; i < width; i += V) store_halves(weights + i / 2, _mm256_setzero_si256());
    return;
  }
  Vec total = Vec{};
  for (int64_t i = 0; i < width; i += V) {
    const Vec p = power_of_two((load(scores + i) - highest) * scale);
    store_halves(weights + i / 2, halved(p));
    total += p;
  }
  if (highest != *max) {
    const float shrink = power_of_two(all((*max - highest) * scale))[0];
    *sum *= shrink;
    for (int64_t d = 0; d < dim; d += V) store(out + d, load(out + d) * shrink);
    *max = highest;
  }
  *sum += _mm512_reduce_add_ps((__m512)total);
}

// Sixteen rows of sixteen words: rows become columns.
INLINE void turn(__m512i (&x)[V]) {
  __m512i y[V];
#pragma GCC unroll 8
  for (int i = 0; i < V; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < V; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Each quarter of x[4 i + j] has column 4 quarter + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i low = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x44), high = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xee);
    y[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < V; i++) x[i] = y[i];
}

// Rows of words as words of two rows' numbers: [rows, dim / 2] -> [rows / 2 rounded up, dim]
INLINE void pair_rows(const uint32_t* from, int64_t rows, int64_t dim, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2, from += dim, to += dim) {
    for (int64_t d = 0; d < dim; d += V) {
      const auto half_row = [&](const uint32_t* row) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d / 2));
      };
      store_pairs(to + d, half_row(from), r + 1 < rows ? half_row(from + dim / 2) : _mm256_setzero_si256());
    }
  }
}

}  // namespace

void pack_across(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint32_t* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; i += V) {
    const int64_t n = least(V, rows - i);
    const auto keys = static_cast<__mmask16>((1u << n) - 1);
    for (int64_t d = 0; d < dim; d += 2 * V) {
      const int64_t numbers = least(2 * V, dim - d);
      const auto there = static_cast<__mmask32>((uint64_t{1} << numbers) - 1);
      __m512i x[V];
#pragma GCC unroll 16
      for (int64_t r = 0; r < V; r++) x[r] = r < n ? _mm512_maskz_loadu_epi16(there, from + (i + r) * step + d) : __m512i{};
      turn(x);
      for (int64_t l = 0; 2 * l < numbers; l++) _mm512_mask_storeu_epi32(to + (d / 2 + l) * to_step + i, keys, x[l]);
    }
  }
}

void pack_pairs(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint32_t* to, int64_t to_dim) {
  for (int64_t i = 0; i < rows; i++, from += step, to += to_dim) {
    const uint16_t* next = from + step;
    if (i + 1 < rows) {
      for (int64_t d = 0; d < dim; d++) to[d] = from[d] | static_cast<uint32_t>(next[d]) << 16;
    } else {
      for (int64_t d = 0; d < dim; d++) to[d] = from[d];
    }
  }
}

void copy_rows(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint16_t* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; i++, from += step, to += to_step) {
    each_half(dim, [&](int64_t d, __mmask16 there) { keep(to + d, there, halves(from + d, there)); });
  }
}

void write_rows(const float* from, int64_t step, int64_t rows, int64_t dim, float scale, uint16_t* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; i++, from += step, to += to_step) {
    each_half(dim, [&](int64_t d, __mmask16 there) {
      keep(to + d, there, halved((Vec)_mm512_maskz_loadu_ps(there, from + d) * scale));
    });
  }
}

void dot_rows(const uint16_t* a, int64_t a_step, const uint16_t* b, int64_t b_step, int64_t rows, int64_t dim, float* to,
              int64_t to_step) {
  for (int64_t i = 0; i < rows; i++, a += a_step, b += b_step, to += to_step) {
    Vec sum = Vec{};
    each_half(dim, [&](int64_t d, __mmask16 there) { sum += widened(halves(a + d, there)) * widened(halves(b + d, there)); });
    *to = _mm512_reduce_add_ps((__m512)sum);
  }
}

void forward(const PairedHead& h) {
  float* scores = h.scratch;  // [block_rows, BLOCK_KEYS]
  float* max = scores + block_rows(h.groups) * BLOCK_KEYS;
  auto* weights = reinterpret_cast<uint32_t*>(max + block_rows(h.groups));  // [block_rows, BLOCK_KEYS / 2]
  const int64_t dim = h.dim, half_dim = dim / 2, half_keys = BLOCK_KEYS / 2;
  blocks(h, [&](const Run& run, const Block& block) {
    const int64_t rows = block.rows(), at = block.start * h.groups;
    float* out = h.out + at * dim;
    float* lse = h.lse + at;  // the sum until the end
    for (int64_t r = 0; r < rows; r++) max[r] = -__builtin_inff(), lse[r] = 0;
    for (int64_t i = 0; i < rows * dim; i++) out[i] = 0;
    tiles(h, run, block, [&](const KeyBand& band, int64_t from, int64_t to) {
      const int64_t n = to - from;
      product<false, false>(rows, n, half_dim, false, h.q + at * half_dim, half_dim, h.kt + from, h.keys, scores,
                            BLOCK_KEYS);
      block.hide(scores, band, from, to);
      for (int64_t r = 0; r < rows; r++) {
        soften(scores + r * BLOCK_KEYS, n, h.scale * LOG2_E, weights + r * half_keys, out + r * dim, dim, max + r, lse + r);
      }
      product<false, true>(rows, dim, n / 2, n % 2 == 1, weights, half_keys, h.v + from * dim, 2 * dim, out, dim);
    });
    for (int64_t r = 0; r < rows; r++) {
      if (lse[r] == 0) {
        lse[r] = __builtin_inff();
        continue;
      }
      const float share = 1.0f / lse[r];
      for (int64_t d = 0; d < dim; d += V) store(out + r * dim + d, load(out + r * dim + d) * share);
      lse[r] = max[r] * h.scale + __builtin_logf(lse[r]);
    }
  });
}

void backward(const PairedHead& h) {
  const int64_t most_rows = block_rows(h.groups), pairs = (most_rows + 1) / 2;
  const int64_t dim = h.dim, half_dim = dim / 2, half_keys = BLOCK_KEYS / 2;
  float *scores = h.scratch, *grads = scores + most_rows * BLOCK_KEYS;  // [rows, BLOCK_KEYS]
  auto* weight_pairs = reinterpret_cast<uint32_t*>(grads + most_rows * BLOCK_KEYS);  // [pairs, BLOCK_KEYS]
  uint32_t* grad_pairs = weight_pairs + pairs * BLOCK_KEYS;                          // [pairs, BLOCK_KEYS]
  uint32_t* grad_rows = grad_pairs + pairs * BLOCK_KEYS;                             // [rows, BLOCK_KEYS / 2]
  const float scale = h.scale * LOG2_E;
  uint32_t *q_pairs = grad_rows + most_rows * half_keys, *dout_pairs = q_pairs + pairs * dim;  // [pairs, dim]
  blocks(h, [&](const Run& run, const Block& block) {
    const int64_t rows = block.rows(), at = block.start * h.groups;
    const uint32_t *q = h.q + at * half_dim, *dout = h.dout + at * half_dim;
    pair_rows(q, rows, dim, q_pairs);
    pair_rows(dout, rows, dim, dout_pairs);
    tiles(h, run, block, [&](const KeyBand& band, int64_t from, int64_t to) {
      const int64_t n = to - from, row_pairs = (rows + 1) / 2;
      product<false, false>(rows, n, half_dim, false, q, half_dim, h.kt + from, h.keys, scores, BLOCK_KEYS);
      product<false, false>(rows, n, half_dim, false, dout, half_dim, h.vt + from, h.keys, grads, BLOCK_KEYS);
      block.hide(scores, band, from, to);
      for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t i = 0; i < n; i += V) {
          __m256i w[2] = {}, g[2] = {};
#pragma GCC unroll 2
          for (int64_t j = 0; j < 2; j++) {
            if (r + j == rows) break;
            const int64_t row = r + j;
            const Vec weight = power_of_two(load(scores + row * BLOCK_KEYS + i) * scale - h.lse[at + row] * LOG2_E);
            w[j] = halved(weight);
            g[j] = halved(weight * (load(grads + row * BLOCK_KEYS + i) - h.delta[at + row]));
            store_halves(grad_rows + row * half_keys + i / 2, g[j]);
          }
          store_pairs(weight_pairs + r / 2 * BLOCK_KEYS + i, w[0], w[1]);
          store_pairs(grad_pairs + r / 2 * BLOCK_KEYS + i, g[0], g[1]);
        }
      }
      product<true, true>(n, dim, row_pairs, false, weight_pairs, BLOCK_KEYS, dout_pairs, dim, h.dv + from * dim, dim);
      product<true, true>(n, dim, row_pairs, false, grad_pairs, BLOCK_KEYS, q_pairs, dim, h.dk + from * dim, dim);
      product<false, true>(rows, dim, n / 2, n % 2 == 1, grad_rows, half_keys, h.k + from * dim, 2 * dim,
                           h.dq + at * dim, dim);
    });
  });
}

}  // namespace VORA_ISA
}  // namespace vora
