// Attention over bands of keys, forward and backward, in tiles that stay in the first cache (Dao et al. 2022: the softmax
// is put together tile by tile, and backward makes its weights anew). build.rs compiles this file once an instruction set,
// so it includes nothing whose inline functions could end up in another one's code.

#include "attention_kernel.h"

#if !defined(VORA_ISA) || !defined(VORA_VECTOR)
#error "build.rs defines VORA_ISA, the namespace, and VORA_VECTOR, the floats of a vector"
#endif

#define INLINE inline __attribute__((always_inline))

namespace vora {
namespace VORA_ISA {
namespace {

typedef float Vec __attribute__((vector_size(VORA_VECTOR * 4)));
typedef int32_t Ints __attribute__((vector_size(VORA_VECTOR * 4)));
typedef float Loose __attribute__((vector_size(VORA_VECTOR * 4), aligned(4), may_alias));

constexpr int64_t V = VORA_VECTOR;
// Rows and vectors of a product's tile that registers hold: 16 of them but on AVX-512, which has 32.
constexpr int TALL = VORA_VECTOR == 16 ? 12 : 6;
constexpr int WIDE = 2;

INLINE Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
INLINE Vec all(float x) { return Vec{} + x; }
INLINE float most(float a, float b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x (Cephes' polynomial, two units in the last place), 0 below -87.
INLINE Vec exponential(Vec x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = ((Ints)shifted + 127) << 23;
  return tiny ? Vec{} : p * (Vec)bits;
}

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

// The rows of a run from query `start` to `end`, and the part of a band that any of them attends to.
struct Block {
  int64_t start, end;
  int64_t groups;

  int64_t rows() const { return (end - start) * groups; }
  int64_t first_key(const KeyBand& band) const {
    const int64_t first = start + band.first;
    return first > band.start ? first : band.start;
  }
  int64_t end_key(const KeyBand& band) const { return least(band.end, end + band.last); }

  // Hides what the rows do not attend to among keys `from..to`: minus infinity there, and in the rest of the last vector.
  void hide(float* scores, const KeyBand& band, int64_t from, int64_t to) const {
    const float hidden = -__builtin_inff();
    const int64_t width = (to - from + V - 1) / V * V;
    const bool whole = start + band.last >= to - 1 && end - 1 + band.first <= from;
    for (int64_t r = 0; r < rows(); r++) {
      float* row = scores + r * BLOCK_KEYS;
      if (!whole) {
        const int64_t q = start + r / groups;
        const int64_t first = least(to, q + band.first) - from, end = least(to, q + band.last + 1) - from;
        for (int64_t i = 0; i < first; i++) row[i] = hidden;
        for (int64_t i = end < 0 ? 0 : end; i < to - from; i++) row[i] = hidden;
      }
      for (int64_t i = to - from; i < width; i++) row[i] = hidden;
    }
  }
};

// Calls `each(block, band, from, to)` for the tiles of the keys that a block attends to.
template <typename Each>
INLINE void tiles(const Head& h, const Run& run, const Block& block, Each each) {
  for (int64_t b = run.first_band; b < run.end_band; b++) {
    const KeyBand& band = h.bands[b];
    const int64_t end = block.end_key(band);
    for (int64_t from = block.first_key(band); from < end; from += BLOCK_KEYS) {
      each(band, from, least(end, from + BLOCK_KEYS));
    }
  }
}

template <typename Each>
INLINE void blocks(const Head& h, Each each) {
  const int64_t queries = BLOCK_ROWS / h.groups > 0 ? BLOCK_ROWS / h.groups : 1;
  for (int64_t i = 0; i < h.num_runs; i++) {
    const Run& run = h.runs[i];
    for (int64_t start = run.start; start < run.end; start += queries) {
      each(run, Block{start, least(run.end, start + queries), h.groups});
    }
  }
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

void forward(const Head& h) {
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

void backward(const Head& h) {
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
