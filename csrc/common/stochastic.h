// Stochastic rounding to 16 bits: up with the probability of the part that is cut off, so that the mean is exact.
#pragma once
#include "common/random_bits.h"
#include "common/vector.h"

namespace clue {

// Random bits for each of n neighboring values from a position on.
template <int n>
CLUE_INLINE Words<n> random_bits(RandomKey key, int64_t position) {
  Words<n> x;
  for (int lane = 0; lane < n; ++lane) x[lane] = static_cast<uint32_t>(position) + lane;
  x += key.first;
  x = (x ^ (x >> 16)) * mix_first;
  x = ((x ^ (x >> 15)) + key.second) * mix_second;
  return x ^ (x >> 16);
}

template <int n>
CLUE_INLINE void round_stochastic(float* target, Floats<n> x, Words<n>) {
  narrow<n>(target, x);
}
template <int n>
CLUE_INLINE void round_stochastic(BFloat16* target, Floats<n> x, Words<n> random) {
  const Words<n> bits = ((Words<n>)x + (random >> 16)) >> 16;
  const Words<n> special = ((Words<n>)x >> 16) | choose<n>(x == x, Words<n>{}, Words<n>{} + 0x40u);
  const Ints<n> finite = ((Words<n>)x & 0x7fffffffu) < 0x7f800000u;
  write(target, __builtin_convertvector(choose<n>(finite, bits, special), Shorts<n>));
}
template <int n>
CLUE_INLINE void round_stochastic(Half* target, Floats<n> x, Words<n> random) {
  const Words<n> bits = (Words<n>)x & 0x7fffffffu;
  const Words<n> sign = ((Words<n>)x >> 16) & 0x8000u;
  const Words<n> normal = ((bits + (random >> 19)) >> 13) - (112u << 10);
  // In units of the smallest subnormal, plus a uniform number below one, whole units are what is left.
  const Floats<n> uniform = __builtin_convertvector((Ints<n>)(random >> 9), Floats<n>) * 0x1p-23f;
  const Floats<n> units = (Floats<n>)bits * 0x1p24f + uniform;
  const Ints<n> tiny = bits < (113u << 23);
  const Words<n> subnormal = (Words<n>)__builtin_convertvector(tiny ? units : Floats<n>{}, Ints<n>);
  Words<n> half = choose<n>(tiny, subnormal, normal);
  half = choose<n>(half > 0x7c00u, Words<n>{} + 0x7c00u, half);
  half = choose<n>(bits >= 0x7f800000u, Words<n>{} + 0x7c00u, half);
  write(target, __builtin_convertvector(sign | choose<n>(x == x, half, Words<n>{} + 0x7e00u), Shorts<n>));
}

template <int n, class T>
CLUE_INLINE void round_stochastic(T* target, Floats<n> x, Words<n> random, int64_t count) {
  if (count >= n) return round_stochastic<n>(target, x, random);
  alignas(64) T buffer[n];
  round_stochastic<n>(buffer, x, random);
  std::memcpy(target, buffer, count * sizeof(T));
}

}  // namespace clue
