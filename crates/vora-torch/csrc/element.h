// The numbers that kernels read and write: f32 and bf16, computed with in f32 and rounded once.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

using bf16 = uint16_t;

INLINE float load(float x) { return x; }

INLINE float load(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

INLINE void store(float& to, float x) { to = x; }

INLINE void store(bf16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to = static_cast<bf16>(x == x ? rounded : 0x7fc0);
}
