// float16 for the stand-in, rounded to nearest even; NaN becomes 0x7fff, as cuda_fp16.h has it.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
using half = __half;

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return std::copysign(magnitude, x.bits >> 15 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Below 2^-14 numbers are multiples of 2^-24.
  const int exponent = magnitude < 0x1p-14f ? -13 : std::ilogb(magnitude) + 1;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  // 1024 units make the next exponent: a carry takes care of itself.
  return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 13) << 10)))};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
