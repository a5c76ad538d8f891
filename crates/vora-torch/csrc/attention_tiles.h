// What the kernels of attention share in each instruction set that they are compiled for: the walk over tiles.
#pragma once

#include "attention_kernel.h"
#include "vector.h"

namespace vora {
namespace VORA_ISA {
namespace {

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

}  // namespace
}  // namespace VORA_ISA
}  // namespace vora
