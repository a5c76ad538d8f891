// The kernels of decoding that run here.
#pragma once

#include "../isa.h"
#include "kernel.h"

namespace vora {
namespace decode {

// build.rs says which instruction sets the compiler knew.
inline const Kernels& chosen_kernels() {
#if defined(__x86_64__)
  const bool has_avx2 = isa() != Isa::plain && __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool has_avx512 = has_avx2 && isa() == Isa::avx512 && __builtin_cpu_supports("avx512bw") &&
                                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  [[maybe_unused]] const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
#ifdef VORA_HAS_BF16
  if (has_vnni && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::KERNELS;
#endif
#ifdef VORA_HAS_VNNI
  if (has_vnni) return avx512_vnni::KERNELS;
#endif
#ifdef VORA_HAS_AVX512
  if (has_avx512) return avx512::KERNELS;
#endif
#ifdef VORA_HAS_AVX_VNNI
  if (has_avx2 && __builtin_cpu_supports("avxvnni")) return avx_vnni::KERNELS;
#endif
#ifdef VORA_HAS_AVX2
  if (has_avx2) return avx2::KERNELS;
#endif
#endif
  return plain::KERNELS;
}

inline const Kernels& kernels() {
  static const Kernels& chosen = chosen_kernels();
  return chosen;
}

}  // namespace decode
}  // namespace vora
