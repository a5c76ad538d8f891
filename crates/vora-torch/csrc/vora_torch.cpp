// The few libtorch entry points that tch does not bind. Every function returns null or a negative number
// where libtorch threw; `vora_last_error` then has the first line of its text.

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <vector>

#include "guard.h"
#include "kernel.h"

// Not where they are used: see kernel.h.
extern const float LEAST_EXPONENT = -87.0f, MOST_EXPONENT = 88.0f;

namespace {

std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t n) {
  std::vector<at::Tensor> result;
  result.reserve(n);
  for (size_t i = 0; i < n; i++) result.push_back(*tensors[i]);
  return result;
}

}  // namespace

extern "C" {

const char* vora_last_error() { return last_error.c_str(); }

// A CPU tensor over memory that `owner` keeps alive; `release(owner)` runs when the last view of it is gone.
at::Tensor* vora_from_blob(void* data, const int64_t* shape, size_t dims, int8_t kind, void* owner,
                           void (*release)(void*)) {
  return guard<at::Tensor*>(nullptr, [&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).device(at::kCPU);
    return new at::Tensor(at::from_blob(
        data, at::IntArrayRef(shape, dims), [owner, release](void*) { release(owner); }, options));
  });
}

// Fills a CPU tensor from a generator of its own, so that its values depend on `seed` alone.
int vora_fill_normal(at::Tensor* tensor, double std, uint64_t seed) {
  return guard(-1, [&] {
    at::NoGradGuard no_grad;
    tensor->normal_(0.0, std, at::make_generator<at::CPUGeneratorImpl>(seed));
    return 0;
  });
}

int vora_fill_uniform(at::Tensor* tensor, double bound, uint64_t seed) {
  return guard(-1, [&] {
    at::NoGradGuard no_grad;
    tensor->uniform_(-bound, bound, at::make_generator<at::CPUGeneratorImpl>(seed));
    return 0;
  });
}

// One AdamW step over all tensors of a group (Loshchilov & Hutter 2019; torch.optim.AdamW(fused=True)).
int vora_fused_adamw(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                     at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t n, double lr, double beta1,
                     double beta2, double weight_decay, double eps) {
  return guard(-1, [&] {
    at::NoGradGuard no_grad;
    at::_fused_adamw_(list(params, n), list(grads, n), list(exp_avgs, n), list(exp_avg_sqs, n), {}, list(steps, n),
                      lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    return 0;
  });
}

// The 2-norm over all elements of all tensors, as one 0-dim f32 tensor.
at::Tensor* vora_grad_norm(at::Tensor* const* grads, size_t n) {
  return guard<at::Tensor*>(nullptr, [&] {
    at::NoGradGuard no_grad;
    auto norms = at::_foreach_norm(list(grads, n), 2.0);
    return new at::Tensor(at::linalg_vector_norm(at::stack(norms).to(at::kFloat)));
  });
}

// All tensors times one number, in place; zeros where that is 0, whatever they hold.
int vora_scale(at::Tensor* const* tensors, size_t n, double factor) {
  return guard(-1, [&] {
    at::NoGradGuard no_grad;
    if (factor == 0.0) {
      at::_foreach_zero_(list(tensors, n));
    } else {
      at::_foreach_mul_(list(tensors, n), factor);
    }
    return 0;
  });
}

// The gradients of all leaves behind `tensor`, given that by `tensor`, added to what they have.
int vora_backward(at::Tensor* tensor, at::Tensor* gradient) {
  return guard(-1, [&] {
    tensor->backward(*gradient);
    return 0;
  });
}

// What libtorch's allocator holds on a GPU, in bytes: allocated now, allocated at most, reserved now; and what the driver
// says is free there.
int vora_cuda_memory(int8_t index, uint64_t* allocated, uint64_t* peak, uint64_t* reserved, uint64_t* free) {
  return guard(-1, [&] {
    auto* allocator = c10::getDeviceAllocator(c10::kCUDA);
    auto stats = allocator->getDeviceStats(index);
    // The first of each array is the sum over small and large blocks.
    *allocated = stats.allocated_bytes[0].current;
    *peak = stats.allocated_bytes[0].peak;
    *reserved = stats.reserved_bytes[0].current;
    *free = allocator->getMemoryInfo(index).first;
    return 0;
  });
}

// 1 when bf16 matrix products are faster than f32's here, else 0, also where libtorch is held to an older instruction set
// by ATEN_CPU_CAPABILITY. AMX is, and AVX512-BF16 on AMD's cores. On Intel's, without AMX, one bf16 instruction a cycle
// does no more than two f32 ones: on a Xeon whose AMX a virtual machine hides, 640 x 576 x 1536 takes 84 GFLOP/s in bf16
// and 159 in f32.
int vora_cpu_has_bf16() {
  return guard(0, [&] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool has_leaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
    const bool has_amx = has_leaf && (edx & (1u << 22)) != 0;
    const bool is_fast = has_amx || (__builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel"));
    return at::get_cpu_capability() == "AVX512" && is_fast ? 1 : 0;
#else
    return 0;
#endif
  });
}

}  // extern "C"
