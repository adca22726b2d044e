// Sums over the tokens of one group for a pair of vectors of channels, in registers.
//
// Between tiles they rest in fp32 memory: `fields` times 2n floats side by side, in the order of FIELDS.
#pragma once
#include "common/vector.h"

namespace clue {

template <int n>
CLUE_INLINE Pair<n> read_pair(const float* source) {
  return {read<Floats<n>>(source), read<Floats<n>>(source + n)};
}
template <int n>
CLUE_INLINE void write_pair(float* target, const Pair<n>& x) {
  write(target, x.first);
  write(target + n, x.second);
}
template <int n>
CLUE_INLINE Pair<n> magnitudes(const Pair<n>& x) {
  return {magnitude<n>(x.first), magnitude<n>(x.second)};
}
template <int n>
CLUE_INLINE void add_pair(Pair<n>& sum, const Pair<n>& x) {
  sum.first += x.first;
  sum.second += x.second;
}
template <int n>
CLUE_INLINE void add_squares(Pair<n>& sum, const Pair<n>& x) {
  sum.first += x.first * x.first;
  sum.second += x.second * x.second;
}
// Adds one where the mask is set. With 16 floats a register a mask is one bit a lane, and a masked sum is quickest.
template <int n, class Integers, class Mask>
CLUE_INLINE void count(Integers& sum, Mask mask, Words<n> one) {
  if (n == 16)
    sum = mask ? sum + (Integers)one : sum;
  else
    sum -= (Integers)mask;
}

// The three sums that activations and products share.
template <int n>
struct Moments {
  Pair<n> sum, square, magnitude;

  CLUE_INLINE void add(const Pair<n>& a) {
    add_pair<n>(sum, a);
    add_squares<n>(square, a);
    add_pair<n>(magnitude, magnitudes<n>(a));
  }
};

// The five statistics of an activation.
template <int n, class T>
struct ActivationSums {
  static constexpr int fields = 5;
  Moments<n> moments;
  Pair<n> largest;
  Ints<n> first_active, second_active;

  CLUE_INLINE void load(const float* rest) {
    moments = {read_pair<n>(rest), read_pair<n>(rest + 2 * n), read_pair<n>(rest + 4 * n)};
    largest = read_pair<n>(rest + 6 * n);
    first_active = read<Ints<n>>(rest + 8 * n);
    second_active = read<Ints<n>>(rest + 9 * n);
  }
  CLUE_INLINE void store(float* rest) const {
    write_pair<n>(rest, moments.sum);
    write_pair<n>(rest + 2 * n, moments.square);
    write_pair<n>(rest + 4 * n, moments.magnitude);
    write_pair<n>(rest + 6 * n, largest);
    write(rest + 8 * n, first_active);
    write(rest + 9 * n, second_active);
  }
  CLUE_INLINE void add(const Stored<n, T>& a) {
    moments.add(a);
    const Pair<n> size = magnitudes<n>(a);
    largest.first = size.first > largest.first ? size.first : largest.first;
    largest.second = size.second > largest.second ? size.second : largest.second;
    count<n>(first_active, a.first > 0.0f, constant<n>(1u));
    count<n>(second_active, a.second > 0.0f, constant<n>(1u));
  }
  static CLUE_INLINE Pair<n> field(int index, const float* rest) {
    const float* here = rest + index * 2 * n;
    if (index < 4) return read_pair<n>(here);
    return {__builtin_convertvector(read<Ints<n>>(here), Floats<n>),
            __builtin_convertvector(read<Ints<n>>(here + n), Floats<n>)};
  }
};

// The same of 16-bit values. Their bits are ordered as they are, which halves the work for the largest magnitude and
// the number of positive values; a NaN ranks above infinity and is positive if its sign says so.
template <int n, class T>
struct PackedActivationSums {
  static constexpr int fields = 5;
  Moments<n> moments;
  Packed<n> largest, active;

  CLUE_INLINE void load(const float* rest) {
    moments = {read_pair<n>(rest), read_pair<n>(rest + 2 * n), read_pair<n>(rest + 4 * n)};
    largest = read<Packed<n>>(rest + 6 * n);
    active = read<Packed<n>>(rest + 8 * n);
  }
  CLUE_INLINE void store(float* rest) const {
    write_pair<n>(rest, moments.sum);
    write_pair<n>(rest + 2 * n, moments.square);
    write_pair<n>(rest + 4 * n, moments.magnitude);
    write(rest + 6 * n, largest);
    write(rest + 8 * n, active);
  }
  CLUE_INLINE void add(const Stored<n, T>& a) {
    moments.add(a);
    const Packed<n> size = (Packed<n>)((Words<n>)a.bits & constant<n>(0x7fff7fffu));
    largest = size > largest ? size : largest;
    count<n>(active, a.bits > 0, constant<n>(0x00010001u));
  }
  static CLUE_INLINE Pair<n> field(int index, const float* rest) {
    const float* here = rest + index * 2 * n;
    if (index < 3) return read_pair<n>(here);
    if (index == 3) return clue::load<n>(reinterpret_cast<const T*>(here));
    const Words<n> counts = read<Words<n>>(here);
    return {__builtin_convertvector((Ints<n>)(counts & 0xffffu), Floats<n>),
            __builtin_convertvector((Ints<n>)(counts >> 16), Floats<n>)};
  }
};
template <int n>
struct ActivationSums<n, BFloat16> : PackedActivationSums<n, BFloat16> {};
template <int n>
struct ActivationSums<n, Half> : PackedActivationSums<n, Half> {};

// The three statistics of a product activation * gradient.
template <int n>
struct ProductSums {
  static constexpr int fields = 3;
  Moments<n> moments;

  CLUE_INLINE void load(const float* rest) {
    moments.sum = read_pair<n>(rest);
    moments.magnitude = read_pair<n>(rest + 2 * n);
    moments.square = read_pair<n>(rest + 4 * n);
  }
  CLUE_INLINE void store(float* rest) const {
    write_pair<n>(rest, moments.sum);
    write_pair<n>(rest + 2 * n, moments.magnitude);
    write_pair<n>(rest + 4 * n, moments.square);
  }
  CLUE_INLINE void add(const Pair<n>& p) { moments.add(p); }
  static CLUE_INLINE Pair<n> field(int index, const float* rest) { return read_pair<n>(rest + index * 2 * n); }
};

// Parts of these, where no more is asked for: sum and sum of squares, or the sum of magnitudes.
template <int n>
struct MomentSums {
  static constexpr int fields = 2;
  Pair<n> sum, square;

  CLUE_INLINE void load(const float* rest) {
    sum = read_pair<n>(rest);
    square = read_pair<n>(rest + 2 * n);
  }
  CLUE_INLINE void store(float* rest) const {
    write_pair<n>(rest, sum);
    write_pair<n>(rest + 2 * n, square);
  }
  CLUE_INLINE void add(const Pair<n>& a) {
    add_pair<n>(sum, a);
    add_squares<n>(square, a);
  }
  static CLUE_INLINE Pair<n> field(int index, const float* rest) { return read_pair<n>(rest + index * 2 * n); }
};
template <int n>
struct MagnitudeSums {
  static constexpr int fields = 1;
  Pair<n> magnitude;

  CLUE_INLINE void load(const float* rest) { magnitude = read_pair<n>(rest); }
  CLUE_INLINE void store(float* rest) const { write_pair<n>(rest, magnitude); }
  CLUE_INLINE void add(const Pair<n>& a) { add_pair<n>(magnitude, magnitudes<n>(a)); }
  static CLUE_INLINE Pair<n> field(int, const float* rest) { return read_pair<n>(rest); }
};

}  // namespace clue
