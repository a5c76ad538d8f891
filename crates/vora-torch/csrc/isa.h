// The instruction set that kernels are compiled for several times. The one that runs is the one that libtorch runs its own
// kernels in, which ATEN_CPU_CAPABILITY forces: both change together.
#pragma once

#include <ATen/Version.h>

#include <string>

enum class Isa { plain, avx2, avx512 };

inline Isa chosen_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  const std::string libtorchs = at::get_cpu_capability();
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (libtorchs == "AVX512" && has_avx512) return Isa::avx512;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((libtorchs == "AVX512" || libtorchs == "AVX2") && has_avx2) return Isa::avx2;
#endif
  return Isa::plain;
}

inline Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}
