// What attention.cpp and the kernels of attention_kernel.cpp share. Everything here is plain f32 in rows of `dim`
// numbers, a multiple of LANE: attention.cpp packs and unpacks.
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
  const float* q;     // [queries, groups, dim], scaled by 1 / sqrt(head_dim)
  const float* kt;    // [dim, keys]
  int64_t keys;       // length of a row of kt and vt
  float* lse;         // [queries, groups], log of the softmax's denominator; infinite where no key is attended to
  // Forward only.
  const float* v;     // [keys, dim]
  float* out;         // [queries, groups, dim], written where a run has the query
  // Backward only; the gradients are added to.
  const float* k;     // [keys, dim]
  const float* vt;    // [dim, keys]
  const float* dout;  // [queries, groups, dim]
  const float* delta; // [queries, groups], out . dout
  float* dq;          // [queries, groups, dim], of the scaled q
  float* dk;          // [keys, dim]
  float* dv;          // [keys, dim]
  float* scratch;     // scratch_len(groups) numbers
};

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
  void forward(const Head&); \
  void backward(const Head&); \
  void answer(const Query&); \
  }
VORA_DECLARE(plain)
VORA_DECLARE(avx2)
VORA_DECLARE(avx512)

}  // namespace vora
