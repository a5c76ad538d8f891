// Vectors of floats in the instruction set that a file of kernels is compiled for.
#pragma once

#include <cstdint>

#if !defined(VORA_ISA) || !defined(VORA_VECTOR)
#error "build.rs defines VORA_ISA, the namespace, and VORA_VECTOR, the floats of a vector"
#endif

#define INLINE inline __attribute__((always_inline))

namespace vora {
namespace VORA_ISA {
namespace {

typedef float Vec __attribute__((vector_size(VORA_VECTOR * 4)));
typedef int32_t Ints __attribute__((vector_size(VORA_VECTOR * 4)));
typedef float Loose __attribute__((vector_size(VORA_VECTOR * 4), aligned(4), may_alias));

constexpr int64_t V = VORA_VECTOR;

INLINE Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
INLINE Vec all(float x) { return Vec{} + x; }
INLINE float most(float a, float b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x (Cephes' polynomial, two units in the last place), 0 below -87.
INLINE Vec exponential(Vec x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = ((Ints)shifted + 127) << 23;
  return tiny ? Vec{} : p * (Vec)bits;
}

}  // namespace
}  // namespace VORA_ISA
}  // namespace vora
