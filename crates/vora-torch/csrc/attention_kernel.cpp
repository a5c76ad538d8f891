// Attention over bands of keys, forward and backward, in tiles that stay in the first cache (Dao et al. 2022: the softmax
// is put together tile by tile, and backward makes its weights anew). build.rs compiles this file once an instruction set,
// so it includes nothing whose inline functions could end up in another one's code.

#include "attention_tiles.h"

namespace vora {
namespace VORA_ISA {
namespace {

// Rows and vectors of a product's tile that registers hold: 16 of them but on AVX-512, which has 32.
constexpr int TALL = VORA_VECTOR == 16 ? 12 : 6;
constexpr int WIDE = 2;

// c [R, W vectors] = or += a [R, k] b [k, W vectors]; element (row, l) of `a` lies at a[row * lda + l], or where ACROSS at
// a[l * lda + row].
template <int R, int W, bool ACROSS, bool ADD>
INLINE void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec sum[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) sum[r][w] = ADD ? load(c + r * ldc + w * V) : Vec{};
  }
  for (int64_t l = 0; l < k; l++) {
    Vec x[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) x[w] = load(b + l * ldb + w * V);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const float y = ACROSS ? a[l * lda + r] : a[r * lda + l];
#pragma GCC unroll 2
      for (int w = 0; w < W; w++) sum[r][w] += y * x[w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int w = 0; w < W; w++) store(c + r * ldc + w * V, sum[r][w]);
  }
}

template <int W, bool ACROSS, bool ADD>
INLINE void columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc) {
  const int64_t down = ACROSS ? 1 : lda;
  int64_t i = 0;
  for (; i + TALL <= m; i += TALL) tile<TALL, W, ACROSS, ADD>(k, a + i * down, lda, b, ldb, c + i * ldc, ldc);
#if VORA_VECTOR == 16
  for (; i + 6 <= m; i += 6) tile<6, W, ACROSS, ADD>(k, a + i * down, lda, b, ldb, c + i * ldc, ldc);
#endif
  for (; i + 2 <= m; i += 2) tile<2, W, ACROSS, ADD>(k, a + i * down, lda, b, ldb, c + i * ldc, ldc);
  for (; i < m; i++) tile<1, W, ACROSS, ADD>(k, a + i * down, lda, b, ldb, c + i * ldc, ldc);
}

// c [m, n] = or += a [m, k] b [k, n], n rounded up to whole vectors
template <bool ACROSS, bool ADD>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc) {
  int64_t j = 0;
  for (; j + WIDE * V <= n; j += WIDE * V) columns<WIDE, ACROSS, ADD>(m, k, a, lda, b + j, ldb, c + j, ldc);
  for (; j < n; j += V) columns<1, ACROSS, ADD>(m, k, a, lda, b + j, ldb, c + j, ldc);
}

// Puts the softmax's weights of one tile in place of its scores, and rescales what came of earlier tiles.
INLINE void soften(float* scores, int64_t width, float* out, int64_t dim, float* max, float* sum) {
  Vec wide = load(scores);
  for (int64_t i = V; i < width; i += V) {
    const Vec x = load(scores + i);
    wide = x > wide ? x : wide;
  }
  float highest = *max;
  for (int64_t i = 0; i < V; i++) highest = most(highest, wide[i]);
  if (highest == -__builtin_inff()) {  // nothing attended to yet
    for (int64_t i = 0; i < width; i += V) store(scores + i, Vec{});
    return;
  }
  Vec total = Vec{};
  for (int64_t i = 0; i < width; i += V) {
    const Vec p = exponential(load(scores + i) - highest);
    store(scores + i, p);
    total += p;
  }
  float added = 0;
  for (int64_t i = 0; i < V; i++) added += total[i];
  if (highest != *max) {
    const float shrink = exponential(all(*max - highest))[0];
    *sum *= shrink;
    for (int64_t d = 0; d < dim; d += V) store(out + d, load(out + d) * shrink);
    *max = highest;
  }
  *sum += added;
}

typedef uint16_t Shorts __attribute__((vector_size(VORA_VECTOR * 2), aligned(2), may_alias));

INLINE Vec read(const float* p) { return load(p); }

INLINE Vec read(const uint16_t* p) {
  const Ints wide = __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Ints);
  return (Vec)(wide << 16);
}

INLINE float total(Vec x) {
  float sum = 0;
#pragma GCC unroll 16
  for (int64_t i = 0; i < V; i++) sum += x[i];
  return sum;
}

// scores[g] = q_g . k for R groups and one key after the other.
template <int R, typename T>
INLINE void score(const Query& s, const float* q, const T* k, int64_t keys, float* scores) {
  for (int64_t i = 0; i < keys; i++, k += s.k_step) {
    Vec sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r] = Vec{};
    for (int64_t d = 0; d < s.dim; d += V) {
      const Vec x = read(k + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r] += x * load(q + r * s.dim + d);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) scores[r * s.scores + i] = total(sum[r]);
  }
}

// out += weights v for R groups and W vectors of them.
template <int R, int W, typename T>
INLINE void mix(const Query& s, const float* weights, const T* v, int64_t keys, float* out) {
  Vec sum[R][W];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) sum[r][w] = load(out + r * s.dim + w * V);
  }
  for (int64_t i = 0; i < keys; i++, v += s.v_step) {
    Vec x[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) x[w] = read(v + w * V);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const float weight = weights[r * s.scores + i];
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) sum[r][w] += weight * x[w];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) store(out + r * s.dim + w * V, sum[r][w]);
  }
}

// The keys of a band that query 0 attends to.
template <typename Each>
INLINE void each_range(const Query& s, Each each) {
  int64_t at = 0;
  for (int64_t b = 0; b < s.num_bands; b++) {
    const KeyBand& band = s.bands[b];
    const int64_t from = band.first > band.start ? band.first : band.start, to = least(band.end, band.last + 1);
    if (from >= to) continue;
    each(from, to - from, at);
    at += to - from;
  }
}

template <int R, typename T>
INLINE void answer_groups(const Query& s, int64_t group) {
  const float* q = s.q + group * s.dim;
  float *out = s.out + group * s.dim, *scores = s.scratch;
  int64_t keys = 0;
  each_range(s, [&](int64_t from, int64_t n, int64_t at) {
    score<R>(s, q, static_cast<const T*>(s.k) + from * s.k_step, n, scores + at);
    keys = at + n;
  });
  for (int64_t i = 0; i < R * s.dim; i++) out[i] = 0;
  if (keys == 0) return;
  float sum[R];
  for (int r = 0; r < R; r++) {
    float* row = scores + r * s.scores;
    for (int64_t i = keys; i % V != 0; i++) row[i] = -__builtin_inff();
    float max = -__builtin_inff();
    sum[r] = 0;
    soften(row, keys, out, 0, &max, sum + r);
  }
  each_range(s, [&](int64_t from, int64_t n, int64_t at) {
    const T* v = static_cast<const T*>(s.v) + from * s.v_step;
    int64_t d = 0;
    for (; d + 4 * V <= s.dim; d += 4 * V) mix<R, 4>(s, scores + at, v + d, n, out + d);
    for (; d < s.dim; d += V) mix<R, 1>(s, scores + at, v + d, n, out + d);
  });
  for (int r = 0; r < R; r++) {
    for (int64_t d = 0; d < s.dim; d++) out[r * s.dim + d] /= sum[r];
  }
}

template <typename T>
INLINE void answer_all(const Query& s) {
  int64_t group = 0;
  for (; group + 3 <= s.groups; group += 3) answer_groups<3, T>(s, group);
  for (; group < s.groups; group++) answer_groups<1, T>(s, group);
}

}  // namespace

void answer(const Query& s) {
  if (s.is_bf16) {
    answer_all<uint16_t>(s);
  } else {
    answer_all<float>(s);
  }
}

void forward(const FloatHead& h) {
  float* scores = h.scratch;  // [block_rows, BLOCK_KEYS]
  float* max = scores + block_rows(h.groups) * BLOCK_KEYS;
  blocks(h, [&](const Run& run, const Block& block) {
    const int64_t rows = block.rows(), at = block.start * h.groups;
    float* out = h.out + at * h.dim;
    float* lse = h.lse + at;  // the sum until the end
    for (int64_t r = 0; r < rows; r++) max[r] = -__builtin_inff(), lse[r] = 0;
    for (int64_t i = 0; i < rows * h.dim; i++) out[i] = 0;
    tiles(h, run, block, [&](const KeyBand& band, int64_t from, int64_t to) {
      const int64_t n = to - from;
      product<false, false>(rows, n, h.dim, h.q + at * h.dim, h.dim, h.kt + from, h.keys, scores, BLOCK_KEYS);
      block.hide(scores, band, from, to);
      for (int64_t r = 0; r < rows; r++) {
        soften(scores + r * BLOCK_KEYS, n, out + r * h.dim, h.dim, max + r, lse + r);
      }
      product<false, true>(rows, h.dim, n, scores, BLOCK_KEYS, h.v + from * h.dim, h.dim, out, h.dim);
    });
    for (int64_t r = 0; r < rows; r++) {
      if (lse[r] == 0) {
        lse[r] = __builtin_inff();
        continue;
      }
      const float scale = 1.0f / lse[r];
      for (int64_t d = 0; d < h.dim; d += V) store(out + r * h.dim + d, load(out + r * h.dim + d) * scale);
      lse[r] = max[r] + __builtin_logf(lse[r]);
    }
  });
}

void backward(const FloatHead& h) {
  float* weights = h.scratch;  // [block_rows, BLOCK_KEYS]
  float* grads = weights + block_rows(h.groups) * BLOCK_KEYS;
  blocks(h, [&](const Run& run, const Block& block) {
    const int64_t rows = block.rows(), at = block.start * h.groups;
    const float *q = h.q + at * h.dim, *dout = h.dout + at * h.dim;
    tiles(h, run, block, [&](const KeyBand& band, int64_t from, int64_t to) {
      const int64_t n = to - from;
      product<false, false>(rows, n, h.dim, q, h.dim, h.kt + from, h.keys, weights, BLOCK_KEYS);
      product<false, false>(rows, n, h.dim, dout, h.dim, h.vt + from, h.keys, grads, BLOCK_KEYS);
      block.hide(weights, band, from, to);
      for (int64_t r = 0; r < rows; r++) {
        float *p = weights + r * BLOCK_KEYS, *g = grads + r * BLOCK_KEYS;
        for (int64_t i = 0; i < n; i += V) {
          const Vec w = exponential(load(p + i) - h.lse[at + r]);
          store(p + i, w);
          store(g + i, w * (load(g + i) - h.delta[at + r]));
        }
      }
      product<true, true>(n, h.dim, rows, weights, BLOCK_KEYS, dout, h.dim, h.dv + from * h.dim, h.dim);
      product<true, true>(n, h.dim, rows, grads, BLOCK_KEYS, q, h.dim, h.dk + from * h.dim, h.dim);
      product<false, true>(rows, h.dim, n, grads, BLOCK_KEYS, h.k + from * h.dim, h.dim, h.dq + at * h.dim, h.dim);
    });
  });
}

}  // namespace VORA_ISA
}  // namespace vora
