// Vectors of n floats and the three element types of activations and weights.
//
// Everything here is always inlined, so that it is compiled for the instruction set of the function that uses it.
// A pair is 2n neighboring channels. The order of the channels inside a pair depends on the element type (see
// write_in_order), because a register of packed 16-bit values falls apart into even and odd channels at no cost.
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
  typedef int16_t packed __attribute__((vector_size(4 * n)));
  typedef uint64_t longs __attribute__((vector_size(8 * n)));
};
template <int n>
using Floats = typename VectorOf<n>::floats;
template <int n>
using Ints = typename VectorOf<n>::ints;
template <int n>
using Words = typename VectorOf<n>::words;
template <int n>
using Packed = typename VectorOf<n>::packed;  // the bits of a pair of 16-bit values

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

// A pair as read from memory or written to it; 16-bit values with their bits, in the order of the channels.
template <int n, class T>
struct Stored : Pair<n> {
  Packed<n> bits;
};
template <int n>
struct Stored<n, float> : Pair<n> {};

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
// A constant whose value the compiler does not see: GCC turns a minimum with a known one into a comparison and a
// blend, and builds known integers anew in every iteration instead of keeping them in registers.
template <int n>
CLUE_INLINE Floats<n> constant(float value) {
  Floats<n> vector = splat<n>(value);
#if defined(__x86_64__)
  __asm__("" : "+v"(vector));
#endif
  return vector;
}
template <int n>
CLUE_INLINE Words<n> constant(uint32_t value) {
  Words<n> vector = Words<n>{} + value;
#if defined(__x86_64__)
  __asm__("" : "+v"(vector));
#endif
  return vector;
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
  return bits + constant<n>(0x7fffu) + ((bits >> 16) & constant<n>(1u));
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

// Writes a pair to floats in the order of its channels; 16-bit values fell apart into even and odd ones.
template <int n, class T>
CLUE_INLINE void write_in_order(float* target, const Pair<n>& x) {
  if (sizeof(T) == 2) {
    typedef typename VectorOf<n>::longs Longs;
    const Longs even = __builtin_convertvector((Words<n>)x.first, Longs);
    const Longs odd = __builtin_convertvector((Words<n>)x.second, Longs);
    write(target, even | (odd << 32));
  } else {
    write(target, x.first);
    write(target + n, x.second);
  }
}

template <int n>
CLUE_INLINE Stored<n, float> load(const float* source) {
  return {read<Floats<n>>(source), read<Floats<n>>(source + n)};
}
template <int n>
CLUE_INLINE Stored<n, BFloat16> load(const BFloat16* source) {
  const Words<n> packed = read<Words<n>>(source);
  return {{(Floats<n>)(packed << 16), (Floats<n>)(packed & constant<n>(0xffff0000u))}, (Packed<n>)packed};
}
template <int n>
CLUE_INLINE Stored<n, Half> load(const Half* source) {
  const Words<n> packed = read<Words<n>>(source);
  return {{half_to_float<n>(packed & 0xffffu), half_to_float<n>(packed >> 16)}, (Packed<n>)packed};
}

// A pair as a reader of its memory sees it, rounded to the nearest even.
template <int n>
CLUE_INLINE Stored<n, float> rounded_to(const float*, Pair<n> x) {
  return {x.first, x.second};
}
template <int n>
CLUE_INLINE Stored<n, BFloat16> rounded_to(const BFloat16*, Pair<n> x) {
  const Words<n> upper = constant<n>(0xffff0000u);
  const Words<n> even = round_to_bfloat16<n>(x.first);
  const Words<n> odd = round_to_bfloat16<n>(x.second) & upper;
  return {{(Floats<n>)(even & upper), (Floats<n>)odd}, (Packed<n>)((even >> 16) | odd)};
}
template <int n>
CLUE_INLINE Stored<n, Half> rounded_to(const Half*, Pair<n> x) {
  const Words<n> even = float_to_half<n>(x.first);
  const Words<n> odd = float_to_half<n>(x.second);
  return {{half_to_float<n>(even), half_to_float<n>(odd)}, (Packed<n>)(even | (odd << 16))};
}

template <int n>
CLUE_INLINE void write_stored(float* target, const Stored<n, float>& x) {
  write(target, x.first);
  write(target + n, x.second);
}
template <int n, class T>
CLUE_INLINE void write_stored(T* target, const Stored<n, T>& x) {
  write(target, x.bits);
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
CLUE_INLINE Stored<n, T> load(const T* source, int64_t count) {
  if (count >= 2 * n) return load<n>(source);
  alignas(64) T buffer[2 * n] = {};
  std::memcpy(buffer, source, count * sizeof(T));
  return load<n>(buffer);
}
template <int n, class T>
CLUE_INLINE Stored<n, T> store(T* target, Pair<n> x, int64_t count) {
  const Stored<n, T> stored = rounded_to<n>(target, x);
  if (count >= 2 * n) {
    write_stored<n>(target, stored);
  } else {
    alignas(64) T buffer[2 * n];
    write_stored<n>(buffer, stored);
    std::memcpy(target, buffer, count * sizeof(T));
  }
  return stored;
}

}  // namespace clue
