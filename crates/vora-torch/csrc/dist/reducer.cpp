// Gradients summed over all processes by c10d's Reducer, in buckets, while the backward pass goes on.
#include "group.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "../guard.h"

namespace {

// A bucket's sum over all processes, which `Waits` can end.
class SumHook : public c10d::CppCommHookInterface<Group> {
 public:
  explicit SumHook(const Group& group) : c10d::CppCommHookInterface<Group>(group) {}

  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    std::vector<at::Tensor> tensors{bucket.getBufferRef()};
    *state_.reduced += tensors[0].nbytes();
    return state_.waits->watch(state_.group->allreduce(tensors)->getFuture());
  }
};

struct Gradients {
  std::shared_ptr<Waits> waits;
  std::shared_ptr<c10d::Reducer> reducer;
  std::vector<at::Tensor> parameters;
  std::shared_ptr<std::vector<char>> arrived;  // in the pass that is summed
  std::vector<unsigned> hooks;

  ~Gradients() {
    for (size_t i = 0; i < hooks.size(); i++) parameters[i].remove_hook(hooks[i]);
  }

  void arm() {
    if (reducer->should_rebuild_buckets()) reducer->rebuild_buckets();
    std::fill(arrived->begin(), arrived->end(), 0);
    reducer->prepare_for_backward({});
  }

  void finish() {
    std::vector<at::Tensor> rest, zeros;
    for (size_t i = 0; i < parameters.size(); i++) {
      if ((*arrived)[i] != 0) continue;
      rest.push_back(parameters[i]);
      zeros.push_back(at::zeros({}, parameters[i].options().requires_grad(false)).expand(parameters[i].sizes()));
    }
    if (!rest.empty()) torch::autograd::backward(rest, zeros);
    if (!parameters.empty()) waits->queued(parameters[0].device());
  }
};

}  // namespace

extern "C" {

// Of the same parameters, in the same order, in every process.
Gradients* vora_gradients_new(Group* group, at::Tensor* const* tensors, size_t n, int64_t bucket_bytes) {
  return guard<Gradients*>(nullptr, [&] {
    auto gradients = std::make_unique<Gradients>();
    gradients->waits = group->waits;
    auto& parameters = gradients->parameters;
    for (size_t i = 0; i < n; i++) parameters.push_back(*tensors[i]);
    c10d::verify_params_across_processes(group->group, parameters, std::nullopt);
    auto limit = static_cast<size_t>(bucket_bytes);
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(parameters, {limit});
    // The last parameters get their gradients first.
    std::reverse(buckets.begin(), buckets.end());
    std::unordered_map<size_t, std::string> names;
    for (size_t i = 0; i < n; i++) names[i] = std::to_string(i);
    gradients->reducer = std::make_shared<c10d::Reducer>(
        parameters, buckets, group->group, std::vector<bool>(n, false), bucket_bytes,
        /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true, names, bucket_bytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>{});
    gradients->reducer->register_comm_hook(std::make_unique<SumHook>(*group));
    gradients->arrived = std::make_shared<std::vector<char>>(n, 0);
    for (size_t i = 0; i < n; i++) {
      auto note = [arrived = gradients->arrived, i](const at::Tensor&) { (*arrived)[i] = 1; };
      gradients->hooks.push_back(parameters[i].register_hook(note));
    }
    // A first pass in which nothing arrives: the buckets are made anew by the order of what arrived in the first pass, and
    // this way they are the same in every run, whatever its first batch was.
    gradients->arm();
    gradients->finish();
    return gradients.release();
  });
}

void vora_gradients_free(Gradients* gradients) { delete gradients; }

// The next backward pass ends with sums over all processes; those before it only add to what this process has.
int vora_gradients_arm(Gradients* gradients) {
  return guard(-1, [&] {
    gradients->arm();
    return 0;
  });
}

// After that pass: what it did not reach takes part as well, with what it has by now.
int vora_gradients_finish(Gradients* gradients) {
  return guard(-1, [&] {
    gradients->finish();
    return 0;
  });
}

}  // extern "C"
