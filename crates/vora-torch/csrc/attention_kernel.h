// What attention.cpp and the kernels of attention_kernel.cpp and attention_pairs.cpp share: rows of `dim` numbers, a multiple
// of LANE, which attention.cpp packs and unpacks.
#pragma once

#include <cstdint>

namespace vora {

// `dim` is a multiple of this, the floats of the widest vector; that many numbers more may be read after a row of keys.
constexpr int64_t LANE = 16;

// A tile of the attention's weights: queries times groups, and keys. Two of 24 KB are about the first cache.
constexpr int64_t BLOCK_ROWS = 48;
constexpr int64_t BLOCK_KEYS = 128;

// Rows of a tile: one query at least, with all of its groups.
static inline int64_t block_rows(int64_t groups) { return groups > BLOCK_ROWS ? groups : BLOCK_ROWS; }

// Numbers of scratch that a call wants: two tiles and the rows' largest scores.
static inline int64_t scratch_len(int64_t groups) { return block_rows(groups) * (2 * BLOCK_KEYS + 1); }

// Keys `start..end` for a run of queries: query q attends to key k where q + first <= k <= q + last.
struct KeyBand {
  int64_t start, end, first, last;
};

// Queries `start..end` of a row, and where their bands lie in the list of all.
struct Run {
  int64_t row, start, end, first_band, end_band;
};

// One key-value head of one row, with the `groups` query heads that it serves. A query's rows of all groups lie one
// after the other: [queries, groups, dim].
struct Head {
  const Run* runs;
  int64_t num_runs;
  const KeyBand* bands;
  int64_t groups, dim;
  int64_t keys;       // length of a row of kt and vt
  float* lse;         // [queries, groups], log of the softmax's denominator; infinite where no key is attended to
  float* out;         // [queries, groups, dim], written where a run has the query: forward only
  // Backward only; the gradients are added to.
  const float* delta; // [queries, groups], out . dout
  float* dq;          // [queries, groups, dim], of the scaled q
  float* dk;          // [keys, dim], without the scale in a PairedHead
  float* dv;          // [keys, dim]
  float* scratch;
};

// In f32.
struct FloatHead : Head { // scratch: scratch_len(groups)
  const float* q;     // [queries, groups, dim], scaled by 1 / sqrt(head_dim)
  const float* kt;    // [dim, keys]
  const float* v;     // [keys, dim], forward only
  const float* k;     // [keys, dim], backward only, like all below
  const float* vt;    // [dim, keys]
  const float* dout;  // [queries, groups, dim]
};

// In bf16, two numbers to a word, the first in its low half: what the instruction for products of bf16 takes.
struct PairedHead : Head {  // scratch: paired_scratch_len(groups, dim)
  float scale;           // 1 / sqrt(head_dim), which q does not have
  const uint32_t* q;     // [queries, groups, dim / 2]
  const uint32_t* kt;    // [dim / 2, keys]
  const uint32_t* v;     // [keys, dim]: a key's number and the next key's, forward only
  const uint32_t* k;     // the same, backward only, like all below
  const uint32_t* vt;    // [dim / 2, keys]
  const uint32_t* dout;  // [queries, groups, dim / 2]
};

// Two tiles in f32, three in bf16, two blocks of rows in bf16, and the rows' largest scores.
static inline int64_t paired_scratch_len(int64_t groups, int64_t dim) {
  const int64_t rows = block_rows(groups) + 1;
  return rows * (2 * BLOCK_KEYS + 3 * BLOCK_KEYS / 2 + dim + 1);
}

// One query of one row in all groups of one key-value head, whose keys and values are read where they lie: what
// generation asks for, where packing would cost more than the work.
struct Query {
  const KeyBand* bands;
  int64_t num_bands;
  int64_t groups, dim;
  const float* q;       // [groups, dim], scaled by 1 / sqrt(head_dim)
  const void* k;        // [keys, dim], rows k_step numbers apart; bf16 or f32, and so is v
  const void* v;
  int64_t k_step, v_step;
  bool is_bf16;
  float* out;           // [groups, dim]
  float* scratch;       // [groups, scores], a row of scores as long as all bands and LANE more
  int64_t scores;
};

#define VORA_DECLARE(ISA) \
  namespace ISA { \
  void forward(const FloatHead&); \
  void backward(const FloatHead&); \
  void answer(const Query&); \
  }
VORA_DECLARE(plain)
VORA_DECLARE(avx2)
VORA_DECLARE(avx512)

// For processors that multiply bf16 (AVX512-BF16).
namespace avx512_bf16 {
void forward(const PairedHead&);
void backward(const PairedHead&);
// Rows of `dim` numbers, `step` apart, as words across, [dim / 2, to_step], or with the next row's numbers, [rows, to_dim].
void pack_across(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint32_t* to, int64_t to_step);
void pack_pairs(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint32_t* to, int64_t to_dim);
// Rows of `dim` numbers from one place to another; those of f32 times `scale` and rounded; those of two places multiplied and
// summed, each row to a number.
void copy_rows(const uint16_t* from, int64_t step, int64_t rows, int64_t dim, uint16_t* to, int64_t to_step);
void write_rows(const float* from, int64_t step, int64_t rows, int64_t dim, float scale, uint16_t* to, int64_t to_step);
void dot_rows(const uint16_t* a, int64_t a_step, const uint16_t* b, int64_t b_step, int64_t rows, int64_t dim, float* to,
              int64_t to_step);
}  // namespace avx512_bf16

}  // namespace vora
