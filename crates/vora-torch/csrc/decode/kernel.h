// What decoding's kernels and their callers share: matrices as they lie in memory, operands, and the kernels' table. Nothing
// here is specific to an instruction set; kernel.cpp is compiled once for each.
#pragma once

#include <cstdint>

namespace vora {
namespace decode {

// How a matrix's numbers are kept. The last two have a scale for every GROUP of them along a row.
enum Width : int64_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int64_t WIDTHS = 4;

constexpr int64_t GROUP = 32;
// Rows of a quantised matrix that lie side by side.
constexpr int64_t SIDE = 16;
// Rows of a matrix that a thread multiplies before it does something with what came of them; a multiple of SIDE.
constexpr int64_t UNIT = 48;

inline int64_t groups_of(int64_t len) { return (len + GROUP - 1) / GROUP; }
inline int64_t sides_of(int64_t rows) { return (rows + SIDE - 1) / SIDE; }
inline bool is_quantised(int64_t width) { return width == INT8 || width == INT4; }
// Bytes of one group of SIDE rows.
inline int64_t group_bytes(int64_t width) { return width == INT8 ? SIDE * GROUP : SIDE * GROUP / 2; }

// `[out, in]`. In F32 and BF16 the rows lie one after the other, as libtorch has them. In INT8 and INT4 they lie
// `[out / SIDE, in / GROUP, 8, SIDE, 4]`: four neighbouring numbers of each of SIDE rows make a vector of 64 bytes, so that
// a row's sum stays in one lane. INT8 keeps a number plus 128; INT4 keeps it plus 8, and numbers 16 apart within a group in
// one byte, the first in its low half. Scales are halves, `[out / SIDE, in / GROUP, SIDE]`.
struct Matrix {
  int64_t width, out, in;
  const void* values;
  const uint16_t* scales;
};

// Bytes of an operand of `len` numbers: a row of a product's input, as `take` makes it for a width.
inline int64_t operand_bytes(int64_t len) { return 4 * GROUP * groups_of(len); }

// One key-value head of one token, with the `groups` query heads that it serves.
struct Question {
  int64_t groups, dim;
  const float* q;        // [groups, dim], rotated and scaled
  const char* keys;      // this head of page 0; slots of a page lie `dim` numbers apart
  const char* values;
  int64_t page_bytes;    // from a page to the next
  int64_t page_len;
  const int32_t* table;  // the row's pages
  int64_t first, end;    // tokens that it attends to
  bool is_bf16;
  float* out;            // [groups, dim]
  float* scratch;        // question_scratch
};

// Floats of scratch: q in another order, and a row of scores for each group, as long as all tokens and a vector more.
inline int64_t scores_step(int64_t tokens) { return (tokens + 2 * SIDE) / SIDE * SIDE; }
inline int64_t question_scratch(int64_t groups, int64_t dim, int64_t tokens) {
  return groups * (dim + scores_step(tokens));
}

struct Kernels {
  // The operand of a row of `len` numbers.
  void (*take)(int64_t width, const float* x, int64_t len, char* to);
  // Rows `from..to` of a matrix times `rows` operands that lie `step` bytes apart: y[row * y_step + i], where y has room for
  // whole SIDEs and `from` is a multiple of SIDE. A number of y is summed in one order, whatever else is asked for.
  void (*product)(const Matrix& matrix, int64_t from, int64_t to, const char* x, int64_t step, int64_t rows, float* y,
                  int64_t y_step);
  // y = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, int64_t len, float eps, float* y);
  // y = silu(gate) * up
  void (*swiglu)(const float* gate, const float* up, int64_t len, float* y);
  void (*attend)(const Question& question);
};

#define VORA_DECODE_KERNELS(ISA) \
  namespace ISA { \
  extern const Kernels KERNELS; \
  }
VORA_DECODE_KERNELS(plain)
VORA_DECODE_KERNELS(avx2)
VORA_DECODE_KERNELS(avx_vnni)
VORA_DECODE_KERNELS(avx512)
VORA_DECODE_KERNELS(avx512_vnni)
VORA_DECODE_KERNELS(avx512_bf16)

}  // namespace decode
}  // namespace vora
