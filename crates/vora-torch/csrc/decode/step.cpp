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

// The adapter's part of a linear; null where it has none.
const Lora* lora_of(const Linear& l, int64_t adapter) {
  if (adapter < 1 || adapter > l.num_loras || l.loras[adapter - 1].a.out == 0) return nullptr;
  return &l.loras[adapter - 1];
}

// Its rank, as far as memory for it goes.
int64_t padded_rank(const Linear& l, int64_t adapter) {
  const Lora* lora = lora_of(l, adapter);
  return lora == nullptr ? 0 : groups_of(lora->a.out) * GROUP;
}

// The most numbers that `x A^T` of all these linears has of a row.
int64_t padded_ranks(std::initializer_list<const Linear*> linears) {
  int64_t most = 0, adapters = 0;
  for (const Linear* l : linears) adapters = std::max(adapters, l->num_loras);
  for (int64_t adapter = 1; adapter <= adapters; adapter++) {
    int64_t ranks = 0;
    for (const Linear* l : linears) ranks += padded_rank(*l, adapter);
    most = std::max(most, ranks);
  }
  return most;
}

// Whether some matrix that is multiplied with a layer's input has this width.
bool is_used(const Decoder& d, int64_t width) {
  const auto uses = [&](const Linear& l) {
    bool used = l.base.width == width;
    for (int64_t adapter = 1; adapter <= l.num_loras; adapter++) {
      const Lora* lora = lora_of(l, adapter);
      used = used || (lora != nullptr && lora->a.width == width);
    }
    return used;
  };
  bool used = uses(d.head);
  for (int64_t i = 0; i < d.num_layers && !used; i++) {
    const Layer& l = d.layers[i];
    for (const Linear* linear : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) used = used || uses(*linear);
  }
  return used;
}

// Rows side by side that have one adapter.
struct Run {
  int64_t adapter, from, to;
};

// Memory that all threads share, and of each thread.
struct Memory {
  Memory(const Decoder& d, const Step& s, char* base) : base(base) {
    const int64_t widest = std::max({d.hidden, d.intermediate, d.heads * d.head_dim});
    int64_t ranks = 0, longest = 0;
    for (int64_t i = 0; i < d.num_layers; i++) {
      const Layer& l = d.layers[i];
      ranks = std::max({ranks, padded_ranks({&l.q, &l.k, &l.v}), padded_ranks({&l.o}), padded_ranks({&l.gate, &l.up}),
                        padded_ranks({&l.down})});
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
    for (int64_t width = 0; width < WIDTHS; width++) {
      operands[width] = is_used(d, width) ? bytes(s.rows * operand_bytes(widest)) : nullptr;
    }
    low_operand = bytes(s.rows * 4 * ranks);
    runs = reinterpret_cast<Run*>(bytes(s.rows * static_cast<int64_t>(sizeof(Run))));
    private_bytes = size;
    for (auto& tile : tiles) tile = floats(s.rows * UNIT);
    row = floats(widest);
    scratch = floats(question_scratch(d.heads / d.kv_heads, d.head_dim, longest));
    private_bytes = size - private_bytes;
    size += private_bytes * (s.threads - 1);
  }

  // The rows that adapters act on.
  void find_runs(const Step& s) {
    for (int64_t r = 0; r < s.rows; r++) {
      const int64_t adapter = s.adapters[r];
      if (adapter == 0) continue;
      if (num_runs > 0 && runs[num_runs - 1].to == r && runs[num_runs - 1].adapter == adapter) {
        runs[num_runs - 1].to++;
      } else {
        runs[num_runs++] = {adapter, r, r + 1};
      }
    }
  }

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
  char *operands[WIDTHS], *low_operand;  // the first as each width has them
  Run* runs;
  int64_t num_runs = 0, qkv_step, low_step;
  float *tiles[3], *row, *scratch;
};

// One thread's part of a step.
class Worker {
 public:
  Worker(const Decoder& d, const Step& s, const Memory& m, Meeting& meeting, int64_t thread, int64_t threads)
      : d_(d), s_(s), m_(m), meeting_(meeting), k_(kernels()), thread_(thread), threads_(threads) {
    for (int i = 0; i < 3; i++) tiles_[i] = m.of(m.tiles[i], thread);
    row_ = m.of(m.row, thread);
    scratch_ = m.of(m.scratch, thread);
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

  // A row as the operand of linears, and of its adapter there: once for each width.
  void take(const float* x, int64_t len, int64_t row, Linears linears) const {
    bool taken[WIDTHS] = {};
    const auto once = [&](int64_t width) {
      if (!taken[width]) k_.take(width, x, len, m_.operands[width] + row * operand_bytes(len));
      taken[width] = true;
    };
    for (const Linear* l : linears) {
      const Lora* lora = lora_of(*l, s_.adapters[row]);
      once(l->base.width);
      if (lora != nullptr) once(lora->a.width);
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

  // `x A^T` of each row's adapter at the linears, one after the other, as the operand of its `B`.
  void lower(int64_t len, Linears linears) const {
    if (padded_ranks_of_runs(linears) == 0) return;
    int64_t piece = 0;
    for (int64_t i = 0; i < m_.num_runs; i++) {
      const Run& run = m_.runs[i];
      int64_t at = run.from * m_.low_step;
      for (const Linear* l : linears) {
        const Lora* lora = lora_of(*l, run.adapter);
        if (lora == nullptr) continue;
        const char* x = m_.operands[lora->a.width];
        for (int64_t from = 0; from < lora->a.out; from += UNIT) {
          if (piece++ % threads_ != thread_) continue;
          const int64_t to = std::min(lora->a.out, from + UNIT), step = operand_bytes(len);
          k_.product(lora->a, from, to, x + run.from * step, step, run.to - run.from, tiles_[0], UNIT);
          write(tiles_[0], run.to - run.from, from, to, m_.low + at, m_.low_step);
        }
        at += padded_rank(*l, run.adapter);
      }
    }
    meet();
    const Span own = share(s_.rows, thread_, threads_);
    for (int64_t r = own.from; r < own.to; r++) {
      int64_t at = r * m_.low_step;
      for (const Linear* l : linears) {
        const Lora* lora = lora_of(*l, s_.adapters[r]);
        if (lora == nullptr) continue;
        k_.take(lora->b.width, m_.low + at, lora->a.out, m_.low_operand + 4 * at);
        at += padded_rank(*l, s_.adapters[r]);
      }
    }
    meet();
  }

  int64_t padded_ranks_of_runs(Linears linears) const {
    int64_t ranks = 0;
    for (int64_t i = 0; i < m_.num_runs; i++) {
      for (const Linear* l : linears) ranks += padded_rank(*l, m_.runs[i].adapter);
    }
    return ranks;
  }

  // Calls `each(index, from, to)` for this thread's share of the linears' outputs.
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
        each(index, from, std::min(l->base.out, from + unit));
      }
      first += units;
      index++;
    }
  }

  // Outputs `from..to` of all rows, `[rows, UNIT]`, of the linear `index` of those that share an operand.
  void product(Linears linears, int64_t index, int64_t from, int64_t to, int64_t len, float* y) const {
    const Linear& l = **(linears.begin() + index);
    k_.product(l.base, from, to, m_.operands[l.base.width], operand_bytes(len), s_.rows, y, UNIT);
    if (l.bias != nullptr) {
      for (int64_t r = 0; r < s_.rows; r++) {
        if (l.bias_is_adapted != 0 && s_.adapters[r] != OWN) continue;
        for (int64_t i = from; i < to; i++) y[r * UNIT + i - from] += l.bias[i];
      }
    }
    for (int64_t i = 0; i < m_.num_runs; i++) {
      const Run& run = m_.runs[i];
      const Lora* lora = lora_of(l, run.adapter);
      if (lora == nullptr) continue;
      int64_t low = run.from * m_.low_step;
      for (int64_t before = 0; before < index; before++) low += padded_rank(**(linears.begin() + before), run.adapter);
      float* added = tiles_[2];
      k_.product(lora->b, from, to, m_.low_operand + 4 * low, 4 * m_.low_step, run.to - run.from, added, UNIT);
      for (int64_t r = run.from; r < run.to; r++) {
        for (int64_t j = 0; j < to - from; j++) y[r * UNIT + j] += added[(r - run.from) * UNIT + j];
      }
    }
  }

  void write(const float* tile, int64_t rows, int64_t from, int64_t to, float* y, int64_t y_step) const {
    for (int64_t r = 0; r < rows; r++) {
      std::copy(tile + r * UNIT, tile + r * UNIT + to - from, y + r * y_step + from);
    }
  }

  void project(const Layer& l) const {
    const int64_t q_len = d_.heads * d_.head_dim, k_len = d_.kv_heads * d_.head_dim;
    const int64_t places[] = {0, q_len, q_len + k_len};
    const Linears linears = {&l.q, &l.k, &l.v};
    each_unit(linears, [&](int64_t index, int64_t from, int64_t to) {
      product(linears, index, from, to, d_.hidden, tiles_[0]);
      write(tiles_[0], s_.rows, from, to, m_.qkv + places[index], m_.qkv_step);
    });
  }

  // Onto the residual stream, or beside it where its norm comes first.
  void add_product(const Linear& l, int64_t len) const {
    each_unit({&l}, [&](int64_t index, int64_t from, int64_t to) {
      product({&l}, index, from, to, len, tiles_[0]);
      if (d_.norms_after != 0) return write(tiles_[0], s_.rows, from, to, m_.y, d_.hidden);
      for (int64_t r = 0; r < s_.rows; r++) {
        float* x = m_.x + r * d_.hidden + from;
        for (int64_t i = 0; i < to - from; i++) x[i] += tiles_[0][r * UNIT + i];
      }
    });
  }

  void gate(const Layer& l) const {
    const Linears linears = {&l.gate, &l.up};
    each_unit({&l.gate}, [&](int64_t, int64_t from, int64_t to) {
      product(linears, 0, from, to, d_.hidden, tiles_[0]);
      product(linears, 1, from, to, d_.hidden, tiles_[1]);
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
    const Matrix& head = d_.head.base;
    const auto eps = static_cast<float>(d_.eps);
    for (int64_t i = own.from; i < own.to; i++) {
      float* x = m_.x + s_.asked[i] * d_.hidden;
      if (norm_of_y != nullptr) {
        k_.rms_norm(m_.y + s_.asked[i] * d_.hidden, norm_of_y, d_.hidden, eps, row_);
        for (int64_t j = 0; j < d_.hidden; j++) x[j] += row_[j];
      }
      k_.rms_norm(x, d_.final_norm, d_.hidden, eps, row_);
      k_.take(head.width, row_, d_.hidden, m_.operands[head.width] + i * operand_bytes(d_.hidden));
    }
    meet();
    each_unit({&d_.head}, [&](int64_t, int64_t from, int64_t to) {
      k_.product(head, from, to, m_.operands[head.width], operand_bytes(d_.hidden), s_.num_asked, tiles_[0], UNIT);
      for (int64_t i = 0; i < s_.num_asked; i++) {
        std::copy(tiles_[0] + i * UNIT, tiles_[0] + i * UNIT + to - from, s_.logits + i * head.out + from);
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
    Memory places(*decoder, *step, memory + (64 - address % 64) % 64);
    places.find_runs(*step);
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
