// Vectors of n floats and the three element types of activations and weights.
//
// Everything here is always inlined, so that it is compiled for the instruction set of the function that uses it.
// A pair is 2n neighboring channels. The order of the channels inside a pair depends on the element type (see
// channel_of), because a register of packed 16-bit values falls apart into even and odd channels at no cost.
#pragma once
#include <cstdint>
#include <cstring>

#define CLUE_INLINE inline __attribute__((always_inline))

namespace clue {

template <int n>
struct VectorOf {
  typedef float floats __attribute__((vector_size(4 * n)));
  typedef int32_t ints __attribute__((vector_size(4 * n)));
  typedef uint32_t words __attribute__((vector_size(4 * n)));
  typedef uint16_t shorts __attribute__((vector_size(2 * n)));
};
template <int n>
using Floats = typename VectorOf<n>::floats;
template <int n>
using Ints = typename VectorOf<n>::ints;
template <int n>
using Words = typename VectorOf<n>::words;

template <int n>
struct Pair {
  Floats<n> first, second;
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class Vector>
CLUE_INLINE Vector read(const void* address) {
  Vector value;
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <class Vector>
CLUE_INLINE void write(void* address, Vector value) {
  std::memcpy(address, &value, sizeof value);
}

template <int n>
CLUE_INLINE Floats<n> splat(float value) {
  return Floats<n>{} + value;
}
template <int n>
CLUE_INLINE Words<n> choose(Ints<n> mask, Words<n> yes, Words<n> no) {
  return mask ? yes : no;
}
template <int n>
CLUE_INLINE Floats<n> magnitude(Floats<n> x) {
  return (Floats<n>)((Words<n>)x & 0x7fffffffu);
}

// Bits of a bfloat16 in the upper half of each word, the lower half undefined: round to nearest even. A NaN that
// comes from bfloat16 operands, or that the processor made, has no low bits and stays one; others need keep_nan.
template <int n>
CLUE_INLINE Words<n> round_to_bfloat16(Floats<n> x) {
  const Words<n> bits = (Words<n>)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Half precision by integer arithmetic: F16C is not part of every instruction set that must be served.
template <int n>
CLUE_INLINE Floats<n> half_to_float(Words<n> half) {
  const Words<n> sign = (half & 0x8000u) << 16;
  const Words<n> shifted = (half & 0x7fffu) << 13;
  const Words<n> exponent = half & 0x7c00u;
  const Words<n> normal = shifted + (112u << 23);
  const Words<n> special = shifted + (224u << 23);
  const Floats<n> smallest_normal = splat<n>(0x1p-14f);
  const Words<n> subnormal = (Words<n>)((Floats<n>)(shifted + (113u << 23)) - smallest_normal);
  const Words<n> finite = choose<n>(exponent == 0u, subnormal, normal);
  return (Floats<n>)(sign | choose<n>(exponent == 0x7c00u, special, finite));
}
template <int n>
CLUE_INLINE Words<n> float_to_half(Floats<n> x) {
  const Words<n> bits = (Words<n>)x & 0x7fffffffu;
  const Words<n> sign = ((Words<n>)x >> 16) & 0x8000u;
  const Words<n> normal = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  // Adding 0.5 leaves exactly the bits of a subnormal half at the end of the mantissa, rounded to nearest even.
  const Words<n> subnormal = (Words<n>)((Floats<n>)bits + 0.5f) - 0x3f000000u;
  Words<n> half = choose<n>(bits < (113u << 23), subnormal, normal);
  half = choose<n>(bits >= 0x477ff000u, Words<n>{} + 0x7c00u, half);  // 65520 and more is infinity
  return sign | choose<n>(x == x, half, Words<n>{} + 0x7e00u);
}

// Position within a pair of the value in `lane` of its first or second vector.
template <class T>
CLUE_INLINE int channel_of(int n, bool second, int lane) {
  return sizeof(T) == 2 ? 2 * lane + second : lane + (second ? n : 0);
}

template <int n>
CLUE_INLINE Pair<n> load(const float* source) {
  return {read<Floats<n>>(source), read<Floats<n>>(source + n)};
}
template <int n>
CLUE_INLINE Pair<n> load(const BFloat16* source) {
  const Words<n> packed = read<Words<n>>(source);
  return {(Floats<n>)(packed << 16), (Floats<n>)(packed & 0xffff0000u)};
}
template <int n>
CLUE_INLINE Pair<n> load(const Half* source) {
  const Words<n> packed = read<Words<n>>(source);
  return {half_to_float<n>(packed & 0xffffu), half_to_float<n>(packed >> 16)};
}

// Each store returns what a reader of the stored values will see.
template <int n>
CLUE_INLINE Pair<n> store(float* target, Pair<n> x) {
  write(target, x.first);
  write(target + n, x.second);
  return x;
}
template <int n>
CLUE_INLINE Pair<n> store(BFloat16* target, Pair<n> x) {
  const Words<n> even = round_to_bfloat16<n>(x.first);
  const Words<n> odd = round_to_bfloat16<n>(x.second) & 0xffff0000u;
  write(target, (even >> 16) | odd);
  return {(Floats<n>)(even & 0xffff0000u), (Floats<n>)odd};
}
template <int n>
CLUE_INLINE Pair<n> store(Half* target, Pair<n> x) {
  const Words<n> even = float_to_half<n>(x.first);
  const Words<n> odd = float_to_half<n>(x.second);
  write(target, even | (odd << 16));
  return {half_to_float<n>(even), half_to_float<n>(odd)};
}

// n neighboring values in their order, for those whose companions have another element type.
template <int n>
using Shorts = typename VectorOf<n>::shorts;

template <int n>
CLUE_INLINE Floats<n> widen(const float* source) {
  return read<Floats<n>>(source);
}
template <int n>
CLUE_INLINE Floats<n> widen(const BFloat16* source) {
  return (Floats<n>)(__builtin_convertvector(read<Shorts<n>>(source), Words<n>) << 16);
}
template <int n>
CLUE_INLINE Floats<n> widen(const Half* source) {
  return half_to_float<n>(__builtin_convertvector(read<Shorts<n>>(source), Words<n>));
}

template <int n>
CLUE_INLINE void narrow(float* target, Floats<n> x) {
  write(target, x);
}
template <int n>
CLUE_INLINE void narrow(BFloat16* target, Floats<n> x) {
  const Words<n> bits = choose<n>(x == x, round_to_bfloat16<n>(x) >> 16, Words<n>{} + 0x7fc0u);
  write(target, __builtin_convertvector(bits, Shorts<n>));
}
template <int n>
CLUE_INLINE void narrow(Half* target, Floats<n> x) {
  write(target, __builtin_convertvector(float_to_half<n>(x), Shorts<n>));
}

// The first `count` of them; the rest reads as zero and is not written.
template <int n, class T>
CLUE_INLINE Floats<n> widen(const T* source, int64_t count) {
  if (count >= n) return widen<n>(source);
  alignas(64) T buffer[n] = {};
  std::memcpy(buffer, source, count * sizeof(T));
  return widen<n>(buffer);
}
template <int n, class T>
CLUE_INLINE void narrow(T* target, Floats<n> x, int64_t count) {
  if (count >= n) return narrow<n>(target, x);
  alignas(64) T buffer[n];
  narrow<n>(buffer, x);
  std::memcpy(target, buffer, count * sizeof(T));
}

// The first `count` values of a pair, at the end of a row; the rest reads as zero and is not written.
template <int n, class T>
CLUE_INLINE Pair<n> load(const T* source, int64_t count) {
  if (count >= 2 * n) return load<n>(source);
  alignas(64) T buffer[2 * n] = {};
  std::memcpy(buffer, source, count * sizeof(T));
  return load<n>(buffer);
}
template <int n, class T>
CLUE_INLINE Pair<n> store(T* target, Pair<n> x, int64_t count) {
  if (count >= 2 * n) return store<n>(target, x);
  alignas(64) T buffer[2 * n];
  const Pair<n> stored = store<n>(buffer, x);
  std::memcpy(target, buffer, count * sizeof(T));
  return stored;
}

// What a reader of the stored values sees.
template <int n>
CLUE_INLINE Pair<n> rounded_to(const float*, Pair<n> x) {
  return x;
}
template <int n>
CLUE_INLINE Pair<n> rounded_to(const BFloat16*, Pair<n> x) {
  return {(Floats<n>)(round_to_bfloat16<n>(x.first) & 0xffff0000u),
          (Floats<n>)(round_to_bfloat16<n>(x.second) & 0xffff0000u)};
}
template <int n>
CLUE_INLINE Pair<n> rounded_to(const Half*, Pair<n> x) {
  return {half_to_float<n>(float_to_half<n>(x.first)), half_to_float<n>(float_to_half<n>(x.second))};
}

}  // namespace clue
