// A token for every row through all layers and the head: one team of threads, which meet where a part needs all of what came
// before it. A row's numbers do not depend on the other rows, nor on how many threads there are.
//
// The residual stream and whatever is no product's input is f32. A product's input is rounded once, to the width that its
// matrix has.

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../element.h"
#include "../guard.h"
#include "choice.h"
#include "meeting.h"
#include "step.h"

namespace {

using namespace vora::decode;

struct Span {
  int64_t from, to;
};

Span share(int64_t n, int64_t thread, int64_t threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// Memory that all threads share, and of each thread.
struct Memory {
  Memory(const Decoder& d, const Step& s, char* base) : base(base) {
    const int64_t widest = std::max({d.hidden, d.intermediate, d.heads * d.head_dim});
    int64_t ranks = 0, longest = 0;
    for (int64_t i = 0; i < d.num_layers; i++) {
      const Layer& l = d.layers[i];
      ranks = std::max({ranks, padded_rank(l.q) + padded_rank(l.k) + padded_rank(l.v), padded_rank(l.o),
                        padded_rank(l.gate) + padded_rank(l.up), padded_rank(l.down)});
    }
    for (int64_t r = 0; r < s.rows; r++) longest = std::max(longest, s.ends[r]);
    x = floats(s.rows * d.hidden);
    y = floats(s.rows * d.hidden);
    qkv_step = (d.heads + 2 * d.kv_heads) * d.head_dim;
    qkv = floats(s.rows * qkv_step);
    attended = floats(s.rows * d.heads * d.head_dim);
    gated = floats(s.rows * d.intermediate);
    low_step = ranks;
    low = floats(s.rows * ranks);
    operand = bytes(s.rows * operand_bytes(widest));
    lora_operand = bytes(ranks == 0 ? 0 : s.rows * operand_bytes(widest));
    low_operand = bytes(s.rows * 4 * ranks);
    private_bytes = size;
    for (auto& tile : tiles) tile = floats(s.rows * UNIT);
    row = floats(widest);
    scratch = floats(question_scratch(d.heads / d.kv_heads, d.head_dim, longest));
    private_bytes = size - private_bytes;
    size += private_bytes * (s.threads - 1);
  }

  static int64_t padded_rank(const Linear& l) { return groups_of(l.lora_a.out) * GROUP; }

  char* bytes(int64_t len) {
    char* taken = base + size;
    size += (len + 63) / 64 * 64;
    return taken;
  }
  float* floats(int64_t len) { return reinterpret_cast<float*>(bytes(4 * len)); }

  // A place of the first thread's own memory, in another one's.
  float* of(float* place, int64_t thread) const { return place + thread * private_bytes / 4; }

  char* base;
  int64_t size = 0, private_bytes = 0;
  float *x, *y, *qkv, *attended, *gated, *low;
  char *operand, *lora_operand, *low_operand;
  int64_t qkv_step, low_step;
  float *tiles[3], *row, *scratch;
};

bool has_lora(const Linear& l) { return l.lora_a.out > 0; }

// One thread's part of a step.
class Worker {
 public:
  Worker(const Decoder& d, const Step& s, const Memory& m, Meeting& meeting, int64_t thread, int64_t threads)
      : d_(d), s_(s), m_(m), meeting_(meeting), k_(kernels()), thread_(thread), threads_(threads) {
    for (int i = 0; i < 3; i++) tiles_[i] = m.of(m.tiles[i], thread);
    row_ = m.of(m.row, thread);
    scratch_ = m.of(m.scratch, thread);
    for (int64_t r = 0; r < s.rows; r++) any_adapted_ = any_adapted_ || s.adapted[r] != 0;
  }

  void run() {
    const Span own = share(s_.rows, thread_, threads_);
    std::copy(s_.x + own.from * d_.hidden, s_.x + own.to * d_.hidden, m_.x + own.from * d_.hidden);
    const float* norm_of_y = nullptr;  // what is still to be added to the residual stream, where norms come after
    for (int64_t i = 0; i < d_.num_layers; i++) {
      const Layer& l = d_.layers[i];
      const bool after = d_.norms_after != 0;
      take_residual(norm_of_y, after ? nullptr : l.input_norm, {&l.q, &l.k, &l.v});
      project(l);
      meet();
      keep(l, i);
      meet();
      attend(l, i);
      meet();
      take_rows(m_.attended, d_.heads * d_.head_dim, {&l.o});
      add_product(l.o, d_.heads * d_.head_dim);
      meet();
      take_residual(after ? l.input_norm : nullptr, after ? nullptr : l.post_norm, {&l.gate, &l.up});
      gate(l);
      meet();
      take_rows(m_.gated, d_.intermediate, {&l.down});
      add_product(l.down, d_.intermediate);
      meet();
      norm_of_y = after ? l.post_norm : nullptr;
    }
    answer(norm_of_y);
  }

 private:
  using Linears = std::initializer_list<const Linear*>;

  void meet() const {
    if (threads_ > 1) meeting_.meet(threads_);
  }

  bool adapts(const Linear& l) const { return any_adapted_ && has_lora(l); }

  // A row as the operand of linears, and of their adapters.
  void take(const float* x, int64_t len, int64_t row, Linears linears) const {
    const int64_t width = (*linears.begin())->base.width, at = row * operand_bytes(len);
    k_.take(width, x, len, m_.operand + at);
    for (const Linear* l : linears) {
      if (adapts(*l) && l->lora_a.width != width) return k_.take(l->lora_a.width, x, len, m_.lora_operand + at);
    }
  }

  void take_rows(const float* x, int64_t len, Linears linears) const {
    const Span own = share(s_.rows, thread_, threads_);
    for (int64_t r = own.from; r < own.to; r++) take(x + r * len, len, r, linears);
    meet();
    lower(len, linears);
  }

  // The same with the residual stream, after it got what a layer made, normed, where `norm_of_y` says so; `norm` is that of
  // the linears' input.
  void take_residual(const float* norm_of_y, const float* norm, Linears linears) const {
    const Span own = share(s_.rows, thread_, threads_);
    const auto eps = static_cast<float>(d_.eps);
    for (int64_t r = own.from; r < own.to; r++) {
      float* x = m_.x + r * d_.hidden;
      if (norm_of_y != nullptr) {
        k_.rms_norm(m_.y + r * d_.hidden, norm_of_y, d_.hidden, eps, row_);
        for (int64_t i = 0; i < d_.hidden; i++) x[i] += row_[i];
      }
      if (norm != nullptr) k_.rms_norm(x, norm, d_.hidden, eps, row_);
      take(norm != nullptr ? row_ : x, d_.hidden, r, linears);
    }
    meet();
    lower(d_.hidden, linears);
  }

  // `x A^T` of the linears that have adapters, one after the other, as the operand of their `B`.
  void lower(int64_t len, Linears linears) const {
    bool any = false;
    for (const Linear* l : linears) any = any || adapts(*l);
    if (!any) return;
    int64_t at = 0;
    for (const Linear* l : linears) {
      if (has_lora(*l)) {
        const Span units = share((l->lora_a.out + UNIT - 1) / UNIT, thread_, threads_);
        for (int64_t unit = units.from; unit < units.to; unit++) {
          const int64_t from = unit * UNIT, to = std::min(l->lora_a.out, from + UNIT);
          const char* x = l->lora_a.width == l->base.width ? m_.operand : m_.lora_operand;
          k_.product(l->lora_a, from, to, x, operand_bytes(len), s_.rows, tiles_[0], UNIT);
          write(tiles_[0], from, to, m_.low + at, m_.low_step);
        }
        at += Memory::padded_rank(*l);
      }
    }
    meet();
    const Span own = share(s_.rows, thread_, threads_);
    for (int64_t r = own.from; r < own.to; r++) {
      at = 0;
      for (const Linear* l : linears) {
        if (!has_lora(*l)) continue;
        const int64_t place = r * m_.low_step + at;
        k_.take(l->lora_b.width, m_.low + place, l->lora_a.out, m_.low_operand + 4 * place);
        at += Memory::padded_rank(*l);
      }
    }
    meet();
  }

  // Calls `each(index, linear, from, to)` for this thread's share of the linears' outputs.
  template <typename Each>
  void each_unit(Linears linears, Each each) const {
    int64_t outputs = 0;
    for (const Linear* l : linears) outputs += l->base.out;
    // Small pieces where else some threads would have one more to do than others.
    const int64_t unit = outputs >= 8 * UNIT * threads_ || threads_ == 1 ? UNIT : SIDE;
    int64_t total = 0;
    for (const Linear* l : linears) total += (l->base.out + unit - 1) / unit;
    const Span own = share(total, thread_, threads_);
    int64_t index = 0, first = 0;
    for (const Linear* l : linears) {
      const int64_t units = (l->base.out + unit - 1) / unit;
      for (int64_t u = std::max(own.from, first); u < std::min(own.to, first + units); u++) {
        const int64_t from = (u - first) * unit;
        each(index, *l, from, std::min(l->base.out, from + unit));
      }
      first += units;
      index++;
    }
  }

  // Outputs `from..to` of all rows, `[rows, UNIT]`; `low` is where the linear's part of `low` begins.
  void product(const Linear& l, int64_t from, int64_t to, int64_t len, int64_t low, float* y) const {
    k_.product(l.base, from, to, m_.operand, operand_bytes(len), s_.rows, y, UNIT);
    if (l.bias != nullptr) {
      for (int64_t r = 0; r < s_.rows; r++) {
        if (l.bias_is_adapted != 0 && s_.adapted[r] == 0) continue;
        for (int64_t i = from; i < to; i++) y[r * UNIT + i - from] += l.bias[i];
      }
    }
    if (!adapts(l)) return;
    float* added = tiles_[2];
    k_.product(l.lora_b, from, to, m_.low_operand + 4 * low, 4 * m_.low_step, s_.rows, added, UNIT);
    for (int64_t r = 0; r < s_.rows; r++) {
      if (s_.adapted[r] == 0) continue;
      for (int64_t i = 0; i < to - from; i++) y[r * UNIT + i] += added[r * UNIT + i];
    }
  }

  void write(const float* tile, int64_t from, int64_t to, float* y, int64_t y_step) const {
    for (int64_t r = 0; r < s_.rows; r++) {
      std::copy(tile + r * UNIT, tile + r * UNIT + to - from, y + r * y_step + from);
    }
  }

  void project(const Layer& l) const {
    const int64_t q_len = d_.heads * d_.head_dim, k_len = d_.kv_heads * d_.head_dim;
    const int64_t places[] = {0, q_len, q_len + k_len};
    const int64_t q_rank = Memory::padded_rank(l.q);
    const int64_t lows[] = {0, q_rank, q_rank + Memory::padded_rank(l.k)};
    each_unit({&l.q, &l.k, &l.v}, [&](int64_t index, const Linear& linear, int64_t from, int64_t to) {
      product(linear, from, to, d_.hidden, lows[index], tiles_[0]);
      write(tiles_[0], from, to, m_.qkv + places[index], m_.qkv_step);
    });
  }

  // Onto the residual stream, or beside it where its norm comes first.
  void add_product(const Linear& l, int64_t len) const {
    each_unit({&l}, [&](int64_t, const Linear& linear, int64_t from, int64_t to) {
      product(linear, from, to, len, 0, tiles_[0]);
      if (d_.norms_after != 0) return write(tiles_[0], from, to, m_.y, d_.hidden);
      for (int64_t r = 0; r < s_.rows; r++) {
        float* x = m_.x + r * d_.hidden + from;
        for (int64_t i = 0; i < to - from; i++) x[i] += tiles_[0][r * UNIT + i];
      }
    });
  }

  void gate(const Layer& l) const {
    const int64_t up_low = Memory::padded_rank(l.gate);
    each_unit({&l.gate}, [&](int64_t, const Linear&, int64_t from, int64_t to) {
      product(l.gate, from, to, d_.hidden, 0, tiles_[0]);
      product(l.up, from, to, d_.hidden, up_low, tiles_[1]);
      for (int64_t r = 0; r < s_.rows; r++) {
        k_.swiglu(tiles_[0] + r * UNIT, tiles_[1] + r * UNIT, to - from, m_.gated + r * d_.intermediate + from);
      }
    });
  }

  int64_t number_bytes() const { return s_.pages_are_bf16 != 0 ? 2 : 4; }
  int64_t head_bytes() const { return s_.page_len * d_.head_dim * number_bytes(); }
  int64_t page_bytes() const { return d_.kv_heads * head_bytes(); }

  // Turns q, and puts keys and values of the new tokens into their pages.
  void keep(const Layer& l, int64_t layer) const {
    const int64_t dim = d_.head_dim, groups = d_.heads / d_.kv_heads;
    const Span own = share(s_.rows * d_.kv_heads, thread_, threads_);
    for (int64_t item = own.from; item < own.to; item++) {
      const int64_t row = item / d_.kv_heads, head = item % d_.kv_heads;
      float* qkv = m_.qkv + row * m_.qkv_step;
      for (int64_t q_head = head * groups; q_head < (head + 1) * groups; q_head++) {
        float* q = qkv + q_head * dim;
        turn(l, l.q_norm, q_head, row, q);
        for (int64_t i = 0; i < dim; i++) q[i] *= static_cast<float>(d_.scale);
      }
      float *k = qkv + (d_.heads + head) * dim, *v = k + d_.kv_heads * dim;
      turn(l, l.k_norm, head, row, k);
      const int64_t len = s_.lens[row], page = s_.tables[row * s_.max_pages + len / s_.page_len];
      const int64_t place = page * page_bytes() + head * head_bytes() + len % s_.page_len * dim * number_bytes();
      put(k, static_cast<char*>(s_.keys[layer]) + place);
      put(v, static_cast<char*>(s_.values[layer]) + place);
    }
  }

  void put(const float* x, char* to) const {
    if (s_.pages_are_bf16 == 0) {
      std::memcpy(to, x, 4 * d_.head_dim);
      return;
    }
    auto* halves = reinterpret_cast<bf16*>(to);
    for (int64_t i = 0; i < d_.head_dim; i++) store(halves[i], x[i]);
  }

  void attend(const Layer& l, int64_t layer) const {
    const int64_t dim = d_.head_dim, groups = d_.heads / d_.kv_heads;
    const Span own = share(s_.rows * d_.kv_heads, thread_, threads_);
    for (int64_t item = own.from; item < own.to; item++) {
      const int64_t row = item / d_.kv_heads, head = item % d_.kv_heads;
      Question question{};
      question.groups = groups;
      question.dim = dim;
      question.q = m_.qkv + row * m_.qkv_step + head * groups * dim;
      question.keys = static_cast<const char*>(s_.keys[layer]) + head * head_bytes();
      question.values = static_cast<const char*>(s_.values[layer]) + head * head_bytes();
      question.page_bytes = page_bytes();
      question.page_len = s_.page_len;
      question.table = s_.tables + row * s_.max_pages;
      question.first = l.window > 0 ? std::max<int64_t>(0, s_.lens[row] + 1 - l.window) : 0;
      question.end = s_.ends[row];
      question.is_bf16 = s_.pages_are_bf16 != 0;
      question.out = m_.attended + (row * d_.heads + head * groups) * dim;
      question.scratch = scratch_;
      k_.attend(question);
    }
  }

  // The logits that are asked for.
  void answer(const float* norm_of_y) const {
    const Span own = share(s_.num_asked, thread_, threads_);
    const auto eps = static_cast<float>(d_.eps);
    for (int64_t i = own.from; i < own.to; i++) {
      float* x = m_.x + s_.asked[i] * d_.hidden;
      if (norm_of_y != nullptr) {
        k_.rms_norm(m_.y + s_.asked[i] * d_.hidden, norm_of_y, d_.hidden, eps, row_);
        for (int64_t j = 0; j < d_.hidden; j++) x[j] += row_[j];
      }
      k_.rms_norm(x, d_.final_norm, d_.hidden, eps, row_);
      k_.take(d_.head.base.width, row_, d_.hidden, m_.operand + i * operand_bytes(d_.hidden));
    }
    meet();
    each_unit({&d_.head}, [&](int64_t, const Linear& l, int64_t from, int64_t to) {
      k_.product(l.base, from, to, m_.operand, operand_bytes(d_.hidden), s_.num_asked, tiles_[0], UNIT);
      for (int64_t i = 0; i < s_.num_asked; i++) {
        std::copy(tiles_[0] + i * UNIT, tiles_[0] + i * UNIT + to - from, s_.logits + i * l.base.out + from);
      }
    });
  }

  // One head of q or k, normed and rotated where the layer does so.
  void turn(const Layer& l, const HeadNorm& norm, int64_t head, int64_t row, float* x) const {
    const int64_t dim = d_.head_dim, half = dim / 2;
    if (norm.kind != 0) {
      float mean = 0, square = 0;
      for (int64_t i = 0; i < dim && norm.kind == 2; i++) mean += x[i] / static_cast<float>(dim);
      for (int64_t i = 0; i < dim; i++) square += (x[i] - mean) * (x[i] - mean);
      const float scale = 1.0f / std::sqrt(square / static_cast<float>(dim) + static_cast<float>(d_.head_eps));
      const int64_t at = head * norm.step;
      for (int64_t i = 0; i < dim; i++) {
        x[i] = (x[i] - mean) * scale * norm.weight[at + i] + (norm.bias != nullptr ? norm.bias[at + i] : 0.0f);
      }
    }
    if (l.rotates == 0) return;
    const float *cos = s_.cos + row * half, *sin = s_.sin + row * half;
    for (int64_t i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      x[i] = a * cos[i] - b * sin[i];
      x[half + i] = b * cos[i] + a * sin[i];
    }
  }

  const Decoder& d_;
  const Step& s_;
  const Memory& m_;
  Meeting& meeting_;
  const Kernels& k_;
  const int64_t thread_, threads_;
  float *tiles_[3], *row_, *scratch_;
  bool any_adapted_ = false;
};

}  // namespace

extern "C" {

// Bytes of memory that a step wants, besides what its logits take.
int64_t vora_decode_memory(const Decoder* decoder, const Step* step) { return Memory(*decoder, *step, nullptr).size + 64; }

// Keys and values of the new tokens go into their pages, and logits to `step.logits`.
int vora_decode_step(const Decoder* decoder, const Step* step, char* memory) {
  return guard(-1, [&] {
    TORCH_CHECK(step->rows > 0 && step->threads > 0, "a decoding step of ", step->rows, " rows");
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const Memory places(*decoder, *step, memory + (64 - address % 64) % 64);
    Meeting meeting;
#ifdef _OPENMP
    if (step->threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(step->threads))
      Worker(*decoder, *step, places, meeting, omp_get_thread_num(), omp_get_num_threads()).run();
      return 0;
    }
#endif
    Worker(*decoder, *step, places, meeting, 0, 1).run();
    return 0;
  });
}

}  // extern "C"
