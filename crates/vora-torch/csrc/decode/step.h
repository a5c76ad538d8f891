// A decoder and a step of it, as Rust describes them: src/ffi/decode.rs has the same structs.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace vora {
namespace decode {

// What an adapter adds, `(x A^T) B^T`. B has its scaling; A has no rows where the adapter leaves a linear alone.
struct Lora {
  Matrix a;  // [r, in]
  Matrix b;  // [out, r]
};

// The model's own adapter; 0 is none, and those that follow are the ones that have names.
constexpr uint8_t OWN = 1;

// `y = x W^T + b + (x A^T) B^T`, where A and B are those of the row's adapter. A bias may act on rows of the model's own alone.
struct Linear {
  Matrix base;
  const float* bias;
  int64_t bias_is_adapted;
  const Lora* loras;  // of the adapters from 1 to num_loras
  int64_t num_loras;
};

// The norm of each head of q or k.
struct HeadNorm {
  int64_t kind;         // 0 none, 1 root mean square, 2 mean and variance
  const float* weight;  // [dim], or [heads, dim] where `step` is dim
  const float* bias;
  int64_t step;
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float* input_norm;  // [hidden]
  const float* post_norm;   // [hidden]
  HeadNorm q_norm, k_norm;
  int64_t rotates;
  int64_t window;  // 0 where there is none
};

struct Decoder {
  int64_t hidden, intermediate, heads, kv_heads, head_dim;
  int64_t norms_after;  // norms come after attention and MLP
  double eps, head_eps, scale;
  const Layer* layers;
  int64_t num_layers;
  const float* final_norm;
  Linear head;
};

struct Step {
  int64_t rows, threads;
  int64_t page_len, max_pages;
  int64_t pages_are_bf16;
  const int32_t* tables;    // [rows, max_pages]
  const int64_t* lens;      // [rows], tokens before the new one
  const int64_t* ends;      // [rows], tokens up to which it attends
  const float* cos;         // [rows, head_dim / 2]
  const float* sin;
  const uint8_t* adapters;  // [rows], the adapter of each: fastest where rows of one lie side by side
  void* const* keys;        // of each layer, [pages, kv_heads, page_len, head_dim]
  void* const* values;
  const float* x;           // [rows, hidden]
  const int64_t* asked;     // [num_asked], the rows whose logits are asked for
  int64_t num_asked;
  float* logits;            // [num_asked, vocab]
};

}  // namespace decode
}  // namespace vora
