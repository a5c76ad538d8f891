// Attention of one token over keys and values that lie in pages.
#pragma once

#include "lanes.h"

namespace vora {
namespace decode {
namespace VORA_ISA {
namespace {

// Keys or values of a run of tokens in one page.
template <typename T>
struct PageRun {
  const T* at;
  int64_t n;
  int64_t place;   // of the first token among all
  const T* ahead;  // what is read after it

  // Asks for what lies as far into the next run as token `i` into this one: processors do not look ahead over pages.
  INLINE void ask(int64_t i, int64_t dim) const {
    const char* next = reinterpret_cast<const char*>(ahead + i * dim);
    for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
  }
};

// Calls `each(PageRun)` over the pages of keys or values, after which `then` is read.
template <typename T, typename Each>
INLINE void by_page(const Question& s, const char* base, const char* then, Each each) {
  for (int64_t token = s.first; token < s.end;) {
    const int64_t page = token / s.page_len, slot = token % s.page_len;
    const int64_t n = least(s.page_len - slot, s.end - token);
    const bool is_last = token + n == s.end;
    const char* ahead = is_last ? then + s.table[s.first / s.page_len] * s.page_bytes : base + s.table[page + 1] * s.page_bytes;
    const T* of_page = reinterpret_cast<const T*>(base + s.table[page] * s.page_bytes);
    each(PageRun<T>{of_page + slot * s.dim, n, token - s.first, reinterpret_cast<const T*>(ahead)});
    token += n;
  }
}

// 2 V numbers as vectors: of bf16 those at even and at odd places, of f32 the first and the second half.
INLINE Halves two(const uint16_t* p) { return halves(p); }
INLINE Halves two(const float* p) { return {load(p), load(p + V)}; }
INLINE float one(uint16_t x) { return widened(x); }
INLINE float one(float x) { return x; }

// scores[g * step + i] = q_g . key i for G groups; q as `two` has keys.
template <int G, typename T>
INLINE void score(const float* q, const PageRun<T>& keys, int64_t dim, float* scores, int64_t step) {
  constexpr int K = 4;
  const int64_t n = keys.n;
  const int64_t whole = dim / (2 * V) * (2 * V);
  for (int64_t i = 0; i < n; i += K) {
    const int64_t there = least(K, n - i);
    const T* key[K];
    for (int j = 0; j < K; j++) {
      key[j] = keys.at + (i + least(j, there - 1)) * dim;
      keys.ask(i + j, dim);
    }
    Vec sum[G][K] = {};
    for (int64_t d = 0; d < whole; d += 2 * V) {
      Halves k[K];
#pragma GCC unroll 4
      for (int j = 0; j < K; j++) k[j] = two(key[j] + d);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const Vec even = load(q + g * dim + d), odd = load(q + g * dim + d + V);
#pragma GCC unroll 4
        for (int j = 0; j < K; j++) {
          sum[g][j] += k[j].even * even;
          sum[g][j] += k[j].odd * odd;
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      float sums[K];
      sums_of(sum[g][0], sum[g][1], sum[g][2], sum[g][3], sums);
      for (int64_t j = 0; j < there; j++) {
        float rest = 0;
        for (int64_t d = whole; d < dim; d++) rest = __builtin_fmaf(one(key[j][d]), q[g * dim + d], rest);
        scores[g * step + i + j] = sums[j] + rest;
      }
    }
  }
}

// out[g * dim ..] += weights times values, C times 2 V numbers of each, in the order that `two` has them.
template <int G, int C, typename T>
INLINE void mix(const float* weights, int64_t step, const PageRun<T>& run, int64_t d, int64_t dim, float* out) {
  Halves sum[G][C];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      const float* from = out + g * dim + 2 * c * V;
      sum[g][c] = {load(from), load(from + V)};
    }
  }
  const T* values = run.at + d;
  for (int64_t i = 0; i < run.n; i++, values += dim) {
    if (d == 0) run.ask(i, dim);
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      const Halves v = two(values + 2 * c * V);
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const Vec weight = all(weights[g * step + i]);
        sum[g][c].even += v.even * weight;
        sum[g][c].odd += v.odd * weight;
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
      float* to = out + g * dim + 2 * c * V;
      store(to, sum[g][c].even);
      store(to + V, sum[g][c].odd);
    }
  }
}

// Scores become weights that are not yet divided by their sum, which is returned.
INLINE float soften(float* scores, int64_t n) {
  for (int64_t i = n; i % V != 0; i++) scores[i] = -__builtin_inff();
  Vec tops = all(-__builtin_inff());
  for (int64_t i = 0; i < n; i += V) {
    const Vec x = load(scores + i);
    tops = x > tops ? x : tops;
  }
  float top = tops[0];
  for (int64_t i = 1; i < V; i++) top = most(top, tops[i]);
  Vec sum = Vec{};
  for (int64_t i = 0; i < n; i += V) {
    const Vec weight = exponential(load(scores + i) - top);
    store(scores + i, weight);
    sum += weight;
  }
  return sum_of(sum);
}

template <int G, typename T>
INLINE void attend_groups(const Question& s, int64_t group, float* q, float* scores, int64_t step) {
  const int64_t dim = s.dim, n = s.end - s.first, whole = dim / (2 * V) * (2 * V);
  constexpr bool HALVES = sizeof(T) == 2;
  for (int g = 0; g < G; g++) {
    const float* from = s.q + (group + g) * dim;
    if (HALVES) part(from, dim, q + g * dim);
    else __builtin_memcpy(q + g * dim, from, static_cast<size_t>(4 * dim));
  }
  by_page<T>(s, s.keys, s.values, [&](const PageRun<T>& run) __attribute__((always_inline)) {
    score<G>(q, run, dim, scores + run.place, step);
  });
  float sum[G];
  for (int g = 0; g < G; g++) sum[g] = soften(scores + g * step, n);
  float* out = q;  // no longer asked with
  for (int64_t i = 0; i < G * dim; i++) out[i] = 0;
  // Another group of heads comes back to the same keys, the next head's keys lie after this one's.
  const char* then = group + G < s.groups ? s.keys : s.keys + s.page_len * dim * static_cast<int64_t>(sizeof(T));
  by_page<T>(s, s.values, then, [&](const PageRun<T>& run) __attribute__((always_inline)) {
    const float* weights = scores + run.place;
    int64_t d = 0;
    for (; d + 4 * V <= whole; d += 4 * V) mix<G, 2>(weights, step, run, d, dim, out + d);
    for (; d < whole; d += 2 * V) mix<G, 1>(weights, step, run, d, dim, out + d);
    for (; d < dim; d++) {
      for (int g = 0; g < G; g++) {
        float* to = out + g * dim + d;
        for (int64_t i = 0; i < run.n; i++) *to = __builtin_fmaf(one(run.at[i * dim + d]), weights[g * step + i], *to);
      }
    }
  });
  for (int g = 0; g < G; g++) {
    const float *from = out + g * dim, share = 1.0f / sum[g];
    float* to = s.out + (group + g) * dim;
    for (int64_t d = 0; d < dim; d++) {
      const int64_t in_pair = d % (2 * V), base = d - in_pair;
      const bool paired = HALVES && d < whole;
      to[paired ? base + (in_pair < V ? 2 * in_pair : 2 * (in_pair - V) + 1) : d] = from[d] * share;
    }
  }
}

template <typename T>
INLINE void attend_all(const Question& s) {
  float *q = s.scratch, *scores = q + s.groups * s.dim;
  const int64_t step = scores_step(s.end - s.first);
  int64_t group = 0;
  for (; group + 4 <= s.groups; group += 4) attend_groups<4, T>(s, group, q, scores, step);
  switch (s.groups - group) {
    case 1: return attend_groups<1, T>(s, group, q, scores, step);
    case 2: return attend_groups<2, T>(s, group, q, scores, step);
    case 3: return attend_groups<3, T>(s, group, q, scores, step);
    default: return;
  }
}

void attend(const Question& s) {
  if (s.is_bf16) return attend_all<uint16_t>(s);
  attend_all<float>(s);
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace decode
}  // namespace vora
