// Attention on the CPU, told which bands of keys each run of queries attends to: an autograd function around the kernels
// of attention_kernel.cpp and attention_pairs.cpp, which it packs operands for.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention_kernel.h"
#include "element.h"
#include "guard.h"
#include "isa.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using vora::FloatHead;
using vora::Head;
using vora::LANE;
using vora::PairedHead;

#if defined(__x86_64__)
#define DISPATCH(FUNCTION, ARGUMENT) \
  void FUNCTION(const ARGUMENT& argument) { \
    switch (isa()) { \
      case Isa::avx512: return vora::avx512::FUNCTION(argument); \
      case Isa::avx2: return vora::avx2::FUNCTION(argument); \
      case Isa::plain: return vora::plain::FUNCTION(argument); \
    } \
  }
#else
#define DISPATCH(FUNCTION, ARGUMENT) \
  void FUNCTION(const ARGUMENT& argument) { vora::plain::FUNCTION(argument); }
#endif
DISPATCH(forward, FloatHead)
DISPATCH(backward, FloatHead)
DISPATCH(answer, vora::Query)

// Whether kernels multiply bf16 as it is.
bool has_pairs() {
#ifdef VORA_HAS_PAIRS
  static const bool has = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

int64_t padded(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

// One head of a [batch, heads, seq, head_dim] tensor of either kind, whose last dimension is contiguous.
struct View {
  View(const at::Tensor& t, int64_t row, int64_t head)
      : data(static_cast<char*>(t.data_ptr()) + (row * t.stride(0) + head * t.stride(1)) * t.element_size()),
        is_bf16(t.scalar_type() == at::kBFloat16),
        step(t.stride(2)),
        seq(t.size(2)),
        dim(t.size(3)) {}

  // Token `i`'s numbers times `scale`, `to_step` apart.
  void read(int64_t i, float scale, float* to, int64_t to_step) const {
    if (is_bf16) {
      const bf16* from = reinterpret_cast<const bf16*>(data) + i * step;
      for (int64_t d = 0; d < dim; d++) to[d * to_step] = load(from[d]) * scale;
    } else {
      const float* from = reinterpret_cast<const float*>(data) + i * step;
      for (int64_t d = 0; d < dim; d++) to[d * to_step] = from[d] * scale;
    }
  }

  bf16* row(int64_t i) const { return reinterpret_cast<bf16*>(data) + i * step; }

  void write(int64_t i, float scale, const float* from) const {
    if (is_bf16) {
      bf16* to = reinterpret_cast<bf16*>(data) + i * step;
      for (int64_t d = 0; d < dim; d++) store(to[d], from[d] * scale);
    } else {
      float* to = reinterpret_cast<float*>(data) + i * step;
      for (int64_t d = 0; d < dim; d++) to[d] = from[d] * scale;
    }
  }

  char* data;
  bool is_bf16;
  int64_t step, seq, dim;
};

// The numbers of one call.
struct Call {
  Call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& runs, const at::Tensor& bands)
      : batch(q.size(0)),
        kv_heads(k.size(1)),
        groups(q.size(1) / k.size(1)),
        queries(q.size(2)),
        keys(k.size(2)),
        dim(padded(q.size(3))),
        key_row(padded(k.size(2)) + LANE),
        scale(1.0f / std::sqrt(static_cast<float>(q.size(3)))),
        bands(reinterpret_cast<const vora::KeyBand*>(bands.const_data_ptr<int64_t>())) {
    const int64_t heads = batch * kv_heads, threads = at::get_num_threads();
    // Few heads are cut, so that each thread has work; the pieces of a head take turns, since later queries cost more.
    parts = heads == 0 || heads >= 2 * threads || queries < 2 * vora::BLOCK_ROWS ? 1 : 2 * threads / heads + 1;
    of_part.resize(batch * parts);
    const auto* run = reinterpret_cast<const vora::Run*>(runs.const_data_ptr<int64_t>());
    const int64_t piece = parts == 1 ? queries : std::max<int64_t>(1, vora::BLOCK_ROWS / groups);
    int64_t turn = 0, covered = 0;
    for (int64_t i = 0; i < runs.size(0); i++, run++) {
      covered += run->end - run->start;
      for (int64_t start = run->start; start < run->end; start += piece) {
        const int64_t end = std::min(run->end, start + piece);
        of_part[run->row * parts + turn++ % parts].push_back({run->row, start, end, run->first_band, run->end_band});
      }
    }
    has_gaps = covered != batch * queries;
  }

  int64_t items() const { return batch * kv_heads * parts; }

  // The part of a head that item `i` is, without the arrays.
  template <typename H>
  H head(int64_t i) const {
    const auto& runs = of_part[row(i) * parts + i % parts];
    H head{};
    head.runs = runs.data();
    head.num_runs = static_cast<int64_t>(runs.size());
    head.bands = bands;
    head.groups = groups;
    head.dim = dim;
    head.keys = key_row;
    return head;
  }

  int64_t row(int64_t i) const { return i / parts / kv_heads; }
  int64_t kv_head(int64_t i) const { return i / parts % kv_heads; }

  // Calls `each(query, packed place)` for the queries of an item in one of its groups.
  template <typename Each>
  void each_query(const Head& head, int64_t group, Each each) const {
    for (int64_t i = 0; i < head.num_runs; i++) {
      for (int64_t q = head.runs[i].start; q < head.runs[i].end; q++) each(q, q * groups + group);
    }
  }

  // Calls `each(first query, queries, packed place)` for an item's runs of queries in one of its groups.
  template <typename Each>
  void each_run(const Head& head, int64_t group, Each each) const {
    for (int64_t i = 0; i < head.num_runs; i++) {
      const int64_t start = head.runs[i].start;
      each(start, head.runs[i].end - start, start * groups + group);
    }
  }

  int64_t batch, kv_heads, groups, queries, keys, dim, key_row;
  float scale;
  int64_t parts;
  bool has_gaps;  // queries without a run
  const vora::KeyBand* bands;
  std::vector<std::vector<vora::Run>> of_part;  // [batch, parts]
};

// Memory for one item after another.
struct Scratch {
  explicit Scratch(int64_t len) : memory(at::zeros({len}, at::kFloat)), next(memory.data_ptr<float>()) {}

  float* take(int64_t len) {
    float* taken = next;
    next += len;
    return taken;
  }

  at::Tensor memory;
  float* next;
};

// Keys that queries of a head attend to, over all queries of all rows.
int64_t pairs_of(const at::Tensor& runs, const at::Tensor& bands) {
  const auto* run = reinterpret_cast<const vora::Run*>(runs.const_data_ptr<int64_t>());
  const auto* band = reinterpret_cast<const vora::KeyBand*>(bands.const_data_ptr<int64_t>());
  int64_t pairs = 0;
  for (int64_t i = 0; i < runs.size(0); i++) {
    for (int64_t b = run[i].first_band; b < run[i].end_band; b++) {
      for (int64_t q = run[i].start; q < run[i].end; q++) {
        const int64_t from = std::max(band[b].start, q + band[b].first), to = std::min(band[b].end, q + band[b].last + 1);
        pairs += std::max<int64_t>(0, to - from);
      }
    }
  }
  return pairs;
}

at::Tensor like_heads(const at::Tensor& t) {
  const int64_t heads = t.size(1), seq = t.size(2), dim = t.size(3);
  return at::empty_strided(t.sizes(), {heads * seq * dim, dim, heads * dim, 1}, t.options());
}

at::Tensor readable(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

#ifdef VORA_HAS_PAIRS
namespace paired = vora::avx512_bf16;
#else
namespace paired {  // never called, see has_pairs
void forward(const PairedHead&) {}
void backward(const PairedHead&) {}
void pack_across(const bf16*, int64_t, int64_t, int64_t, uint32_t*, int64_t) {}
void pack_pairs(const bf16*, int64_t, int64_t, int64_t, uint32_t*, int64_t) {}
void copy_rows(const bf16*, int64_t, int64_t, int64_t, bf16*, int64_t) {}
void write_rows(const float*, int64_t, int64_t, int64_t, float, bf16*, int64_t) {}
void dot_rows(const bf16*, int64_t, const bf16*, int64_t, int64_t, int64_t, float*, int64_t) {}
}  // namespace paired
#endif

// What follows is for heads in bf16. Rows of all queries of an item, [queries, groups, dim], as words.
template <typename ViewOf>
const uint32_t* pack_rows(const Call& call, const Head& head, ViewOf view_of, float* to) {
  auto* rows = reinterpret_cast<bf16*>(to);
  const int64_t step = call.groups * call.dim;
  for (int64_t g = 0; g < call.groups; g++) {
    const View view = view_of(g);
    call.each_run(head, g, [&](int64_t start, int64_t n, int64_t at) {
      paired::copy_rows(view.row(start), view.step, n, view.dim, rows + at * call.dim, step);
    });
  }
  return reinterpret_cast<const uint32_t*>(rows);
}

// The way back, of f32 times `scale`.
template <typename ViewOf>
void unpack_rows(const Call& call, const Head& head, const float* from, float scale, ViewOf view_of) {
  const int64_t step = call.groups * call.dim;
  for (int64_t g = 0; g < call.groups; g++) {
    const View view = view_of(g);
    call.each_run(head, g, [&](int64_t start, int64_t n, int64_t at) {
      paired::write_rows(from + at * call.dim, step, n, view.dim, scale, view.row(start), view.step);
    });
  }
}

const uint32_t* pack_across(const Call& call, const View& view, float* to) {
  auto* words = reinterpret_cast<uint32_t*>(to);
  paired::pack_across(view.row(0), view.step, call.keys, view.dim, words, call.key_row);
  return words;
}

const uint32_t* pack_pairs(const Call& call, const View& view, float* to) {
  auto* words = reinterpret_cast<uint32_t*>(to);
  paired::pack_pairs(view.row(0), view.step, call.keys, view.dim, words, call.dim);
  return words;
}

struct Attention : Function<Attention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_in, const at::Tensor& k_in,
                            const at::Tensor& v_in, const at::Tensor& runs, const at::Tensor& bands) {
    const auto q = readable(q_in), k = readable(k_in), v = readable(v_in);
    const Call call(q, k, runs, bands);
    auto out = like_heads(q);
    // Queries without a run keep zeros, which backward leaves alone as well.
    if (call.has_gaps) out.zero_();
    auto lse = at::empty({call.batch, call.kv_heads, call.queries, call.groups}, q.options().dtype(at::kFloat));
    const bool pairs = q.scalar_type() == at::kBFloat16 && has_pairs();
    const int64_t q_len = call.queries * call.groups * call.dim, k_len = call.keys * call.dim;
    const int64_t tiles = std::max(vora::scratch_len(call.groups), vora::paired_scratch_len(call.groups, call.dim));
    at::parallel_for(0, call.items(), 1, [&](int64_t from, int64_t to) {
      Scratch scratch(2 * q_len + k_len + call.dim * call.key_row + tiles);
      float *q_packed = scratch.take(q_len), *out_packed = scratch.take(q_len), *v_packed = scratch.take(k_len);
      float *kt = scratch.take(call.dim * call.key_row), *rest = scratch.take(tiles);
      const auto of_item = [&](int64_t item, Head& head) {
        const int64_t kv_head = call.row(item) * call.kv_heads + call.kv_head(item);
        head.lse = lse.data_ptr<float>() + kv_head * call.queries * call.groups;
        head.out = out_packed;
        head.scratch = rest;
      };
      for (int64_t item = from; item < to; item++) {
        const int64_t row = call.row(item), kv_head = call.kv_head(item);
        const View k_view(k, row, kv_head), v_view(v, row, kv_head);
        const auto q_view = [&](int64_t g) { return View(q, row, kv_head * call.groups + g); };
        const auto out_view = [&](int64_t g) { return View(out, row, kv_head * call.groups + g); };
        if (pairs) {
          auto head = call.head<PairedHead>(item);
          of_item(item, head);
          head.scale = call.scale;
          head.q = pack_rows(call, head, q_view, q_packed);
          head.kt = pack_across(call, k_view, kt);
          head.v = pack_pairs(call, v_view, v_packed);
          paired::forward(head);
          unpack_rows(call, head, out_packed, 1.0f, out_view);
        } else {
          auto head = call.head<FloatHead>(item);
          of_item(item, head);
          for (int64_t i = 0; i < call.keys; i++) {
            k_view.read(i, 1.0f, kt + i, call.key_row);
            v_view.read(i, 1.0f, v_packed + i * call.dim, 1);
          }
          for (int64_t g = 0; g < call.groups; g++) {
            call.each_query(head, g, [&](int64_t i, int64_t at) {
              q_view(g).read(i, call.scale, q_packed + at * call.dim, 1);
            });
          }
          head.q = q_packed;
          head.kt = kt;
          head.v = v_packed;
          ::forward(head);
          for (int64_t g = 0; g < call.groups; g++) {
            const View made = out_view(g);
            call.each_query(head, g, [&](int64_t i, int64_t at) { made.write(i, 1.0f, out_packed + at * call.dim); });
          }
        }
      }
    });
    ctx->save_for_backward({q, k, v, out, lse, runs, bands});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const auto dout = readable(grads[0]);
    SHOWN_AS("vora::attention_backward", q, k, v, pairs_of(saved[5], saved[6]));
    const Call call(q, k, saved[5], saved[6]);
    auto dq = like_heads(q), dk = like_heads(k), dv = like_heads(v);
    if (call.has_gaps) dq.zero_();
    const bool pairs = q.scalar_type() == at::kBFloat16 && has_pairs();
    const int64_t q_rows = call.queries * call.groups, q_len = q_rows * call.dim, k_len = call.keys * call.dim;
    const int64_t tiles = std::max(vora::scratch_len(call.groups), vora::paired_scratch_len(call.groups, call.dim));
    // The gradients by k and v of one head, [2, keys, dim].
    const auto write_sums = [&](int64_t head, const float* sum) {
      const View dk_view(dk, head / call.kv_heads, head % call.kv_heads);
      const View dv_view(dv, head / call.kv_heads, head % call.kv_heads);
      if (pairs) {
        paired::write_rows(sum, call.dim, call.keys, dk_view.dim, call.scale, dk_view.row(0), dk_view.step);
        paired::write_rows(sum + k_len, call.dim, call.keys, dv_view.dim, 1.0f, dv_view.row(0), dv_view.step);
        return;
      }
      for (int64_t i = 0; i < call.keys; i++) {
        dk_view.write(i, 1.0f, sum + i * call.dim);  // q had the scale
        dv_view.write(i, 1.0f, sum + k_len + i * call.dim);
      }
    };
    const bool in_parts = call.parts > 1;
    const auto sums = at::zeros({in_parts ? call.items() : 0, 2, k_len}, q.options().dtype(at::kFloat));
    at::parallel_for(0, call.items(), 1, [&](int64_t from, int64_t to) {
      Scratch scratch(3 * q_len + q_rows + 3 * k_len + 2 * call.dim * call.key_row + tiles);
      float *q_packed = scratch.take(q_len), *dout_packed = scratch.take(q_len), *dq_packed = scratch.take(q_len);
      float *delta = scratch.take(q_rows), *k_packed = scratch.take(k_len);
      float *kt = scratch.take(call.dim * call.key_row), *vt = scratch.take(call.dim * call.key_row);
      float *rest = scratch.take(tiles), *of_keys = scratch.take(in_parts ? 0 : 2 * k_len);
      const auto of_item = [&](int64_t item, Head& head) {
        const int64_t kv_head = call.row(item) * call.kv_heads + call.kv_head(item);
        head.lse = lse.data_ptr<float>() + kv_head * q_rows;
        head.delta = delta;
        head.dq = dq_packed;
        head.dk = in_parts ? sums.data_ptr<float>() + item * 2 * k_len : of_keys;
        head.dv = head.dk + k_len;
        head.scratch = rest;
      };
      for (int64_t item = from; item < to; item++) {
        if (!in_parts) std::fill_n(of_keys, 2 * k_len, 0.0f);
        const int64_t row = call.row(item), kv_head = call.kv_head(item);
        const View k_view(k, row, kv_head), v_view(v, row, kv_head);
        const auto of_group = [&](const at::Tensor& t) {
          return [&](int64_t g) { return View(t, row, kv_head * call.groups + g); };
        };
        const auto q_view = of_group(q), dout_view = of_group(dout), out_view = of_group(out);
        if (pairs) {
          auto head = call.head<PairedHead>(item);
          of_item(item, head);
          head.scale = call.scale;
          head.q = pack_rows(call, head, q_view, q_packed);
          head.dout = pack_rows(call, head, dout_view, dout_packed);
          head.kt = pack_across(call, k_view, kt);
          head.vt = pack_across(call, v_view, vt);
          head.k = pack_pairs(call, k_view, k_packed);
          for (int64_t g = 0; g < call.groups; g++) {
            const View grad_of = dout_view(g), made_of = out_view(g);
            call.each_run(head, g, [&](int64_t start, int64_t n, int64_t at) {
              paired::dot_rows(grad_of.row(start), grad_of.step, made_of.row(start), made_of.step, n, grad_of.dim,
                               delta + at, call.groups);
            });
          }
          call.each_run(head, 0, [&](int64_t, int64_t n, int64_t at) {
            std::fill_n(dq_packed + at * call.dim, n * call.groups * call.dim, 0.0f);
          });
          paired::backward(head);
          unpack_rows(call, head, dq_packed, call.scale, of_group(dq));
        } else {
          auto head = call.head<FloatHead>(item);
          of_item(item, head);
          for (int64_t i = 0; i < call.keys; i++) {
            k_view.read(i, 1.0f, k_packed + i * call.dim, 1);
            k_view.read(i, 1.0f, kt + i, call.key_row);
            v_view.read(i, 1.0f, vt + i, call.key_row);
          }
          for (int64_t g = 0; g < call.groups; g++) {
            const View q_of = q_view(g), grad_of = dout_view(g), made_of = out_view(g);
            call.each_query(head, g, [&](int64_t i, int64_t at) {
              float *grad = dout_packed + at * call.dim, *made = dq_packed + at * call.dim;
              q_of.read(i, call.scale, q_packed + at * call.dim, 1);
              grad_of.read(i, 1.0f, grad, 1);
              made_of.read(i, 1.0f, made, 1);
              float sum = 0;
              for (int64_t d = 0; d < q_of.dim; d++) sum += grad[d] * made[d];
              delta[at] = sum;
              std::fill_n(made, call.dim, 0.0f);
            });
          }
          head.q = q_packed;
          head.kt = kt;
          head.k = k_packed;
          head.vt = vt;
          head.dout = dout_packed;
          ::backward(head);
          for (int64_t g = 0; g < call.groups; g++) {
            const View dq_view = of_group(dq)(g);
            call.each_query(head, g, [&](int64_t i, int64_t at) {
              dq_view.write(i, call.scale, dq_packed + at * call.dim);
            });
          }
        }
        if (!in_parts) write_sums(item, of_keys);
      }
    });
    if (in_parts) {
      at::parallel_for(0, call.batch * call.kv_heads, 1, [&](int64_t from, int64_t to) {
        for (int64_t head = from; head < to; head++) {
          float* sum = sums.data_ptr<float>() + head * call.parts * 2 * k_len;
          for (int64_t part = 1; part < call.parts; part++) {
            const float* other = sum + part * 2 * k_len;
            for (int64_t i = 0; i < 2 * k_len; i++) sum[i] += other[i];
          }
          write_sums(head, sum);
        }
      });
    }
    return {dq, dk, dv, Variable(), Variable()};
  }
};

// One query a row without gradients: keys and values are read where they lie.
at::Tensor answered(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, const at::Tensor& runs,
                    const at::Tensor& bands) {
  const auto q = readable(q_in), k = readable(k_in), v = readable(v_in);
  const Call call(q, k, runs, bands);
  auto out = like_heads(q);
  if (call.has_gaps) out.zero_();
  const int64_t scores = call.keys + LANE, len = call.groups * call.dim;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, call.keys * call.dim));
  at::parallel_for(0, call.batch * call.kv_heads, grain, [&](int64_t from, int64_t to) {
    Scratch scratch(2 * len + call.groups * scores);
    vora::Query query{};
    float *q_packed = scratch.take(len), *out_packed = scratch.take(len);
    query.scratch = scratch.take(call.groups * scores);
    for (int64_t item = from; item < to; item++) {
      const int64_t row = item / call.kv_heads, kv_head = item % call.kv_heads;
      const auto& of_row = call.of_part[row * call.parts];
      if (of_row.empty()) continue;
      const View k_view(k, row, kv_head), v_view(v, row, kv_head);
      for (int64_t g = 0; g < call.groups; g++) {
        View(q, row, kv_head * call.groups + g).read(0, call.scale, q_packed + g * call.dim, 1);
      }
      query.bands = call.bands + of_row[0].first_band;
      query.num_bands = of_row[0].end_band - of_row[0].first_band;
      query.groups = call.groups;
      query.dim = call.dim;
      query.q = q_packed;
      query.k = k_view.data;
      query.v = v_view.data;
      query.k_step = k_view.step;
      query.v_step = v_view.step;
      query.is_bf16 = k_view.is_bf16;
      query.out = out_packed;
      query.scores = scores;
      answer(query);
      for (int64_t g = 0; g < call.groups; g++) {
        View(out, row, kv_head * call.groups + g).write(0, 1.0f, out_packed + g * call.dim);
      }
    }
  });
  return out;
}

}  // namespace

extern "C" {

// q [batch, heads, queries, head_dim], k and v [batch, kv_heads, keys, head_dim] of one kind, f32 or bf16; runs [n, 5] and
// bands [m, 4] as the structs of attention_kernel.h have them, runs in order and apart -> as q
at::Tensor* vora_attention(const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* runs,
                           const at::Tensor* bands) {
  return guard<at::Tensor*>(nullptr, [&] {
    TORCH_CHECK(q->dim() == 4 && k->dim() == 4 && k->sizes() == v->sizes() && q->size(0) == k->size(0) &&
                    q->size(3) == k->size(3) && k->size(1) > 0 && q->size(1) % k->size(1) == 0,
                "attention of q ", q->sizes(), ", k ", k->sizes(), ", v ", v->sizes());
    const auto kind = q->scalar_type();
    TORCH_CHECK(q->is_cpu() && (kind == at::kFloat || kind == at::kBFloat16) && k->scalar_type() == kind &&
                    v->scalar_type() == kind,
                "attention takes q, k and v of one kind, f32 or bf16, on the CPU");
    SHOWN_AS("vora::attention", *q, *k, *v, pairs_of(*runs, *bands));
    const bool wants_grad = at::GradMode::is_enabled() && (q->requires_grad() || k->requires_grad() || v->requires_grad());
    if (q->size(2) == 1 && q->size(3) % LANE == 0 && !wants_grad) {
      return new at::Tensor(answered(*q, *k, *v, *runs, *bands));
    }
    return new at::Tensor(Attention::apply(*q, *k, *v, *runs, *bands));
  });
}

}  // extern "C"
