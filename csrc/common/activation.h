// Activation functions and their derivatives, accurate to a few units in the last place of fp32.
#pragma once
#include <stdexcept>
#include <string>

#include "common/vector.h"

namespace clue {

enum class Activation { silu, gelu_tanh, gelu, relu, relu2 };

inline Activation activation_of(const std::string& name, const char* op) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  throw std::invalid_argument(std::string(op) + ": unknown activation '" + name +
                              "'; choose one of: gelu, gelu_tanh, relu, relu2, silu");
}

// Working precision of an element type: fp32 results carry all of their bits, 16-bit ones have bits to spare.
template <class T>
constexpr bool precise = sizeof(T) == 4;

// exp(-x) / divisor for a divisor of 1 or 2, over- and underflowing to infinity and zero. The result for
// NaN is a number, so that a NaN has to reach the activation through another factor.
// Cody-Waite reduction to |r| <= ln(2)/2, then a minimax polynomial, relative error 3e-9 (5e-6 for 16 bits).
template <int n, class T, int divisor>
CLUE_INLINE Floats<n> exp_minus(Floats<n> x) {
  constexpr float highest = divisor == 1 ? 88.0f : 87.3f;  // the exponent field becomes zero
  constexpr float lowest = -89.4f;
  // Adding this rounds to an integer and leaves integer + exponent bias in the low bits.
  constexpr float round_and_bias = 0x1.8p23f + (128 - divisor);
  const Floats<n> low = constant<n>(lowest), high = constant<n>(highest);
  x = x > low ? x : low;
  x = x < high ? x : high;
  const Floats<n> shifted = round_and_bias - x * 1.44269504f;
  const Floats<n> power = shifted - round_and_bias;
  Floats<n> q, r;
  if (precise<T>) {
    r = -(x + power * 0.693145752f) - power * 1.42860682e-6f;
    q = r * 1.381446706e-3f + 8.368780411e-3f;
    q = q * r + 4.166839421e-2f;
    q = q * r + 1.666652011e-1f;
    q = q * r + 4.999999341e-1f;
  } else {
    r = -(x + power * 0.693147181f);
    q = r * 4.127698975e-2f + 1.675368742e-1f;
    q = q * r + 5.00051363e-1f;
  }
  q = q * r + 1.0f;
  q = q * r + 1.0f;
  return q * (Floats<n>)((Ints<n>)shifted << 23);
}

// 1 / (1 + exp(-x)). Halves on both sides of the fraction keep exp(-x) finite wherever the result is normal.
template <int n, class T>
CLUE_INLINE Floats<n> sigmoid(Floats<n> x) {
  return 0.5f / (0.5f + exp_minus<n, T, 2>(x));
}

// The same, and 1 - sigmoid(x) without cancellation.
template <int n, class T>
CLUE_INLINE Floats<n> sigmoid(Floats<n> x, Floats<n>& complement) {
  const Floats<n> half = exp_minus<n, T, 2>(x);
  const Floats<n> s = 0.5f / (0.5f + half);
  complement = x > 0.0f ? (half + half) * s : 1.0f - s;
  return s;
}

// Each activation gives its value and, for the backward pass, its derivative with it; T is the element type.
struct Silu {
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x) {
    return x * sigmoid<n, T>(x);
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x, Floats<n>& derivative) {
    const Floats<n> s = sigmoid<n, T>(x);
    const Floats<n> act = x * s;
    derivative = s + act * (1.0f - s);
    return act;
  }
};

struct GeluTanh {  // (1 + tanh(u)) / 2 is the sigmoid of 2u
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x) {
    return x * sigmoid<n, T>(x * (1.59576912f + 0.0713548163f * (x * x)));
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x, Floats<n>& derivative) {
    const Floats<n> square = x * x;
    Floats<n> complement;
    const Floats<n> s = sigmoid<n, T>(x * (1.59576912f + 0.0713548163f * square), complement);
    const Floats<n> act = x * s;
    derivative = s + (act * complement) * (1.59576912f + 0.214064449f * square);
    return act;
  }
};

struct Gelu {
  // The normal distribution function Phi(x) and exp(-x^2/2). The lower tail is exp(-z^2) t P(t) with
  // z = |x|/sqrt(2), t = 1 / (1 + z/2), P minimax on z in [0, 10] (relative error 4.3e-8).
  template <int n, class T>
  static CLUE_INLINE Floats<n> distribution(Floats<n> x, Floats<n>& bell) {
    const Floats<n> t = 1.0f / (1.0f + 0.353553391f * magnitude<n>(x));
    bell = exp_minus<n, T, 1>(0.5f * (x * x));
    Floats<n> p = t * -5.906894727e-2f + 2.845748978e-1f;
    p = p * t + -4.871997587e-1f;
    p = p * t + 2.780669972e-1f;
    p = p * t + -2.662555352e-2f;
    p = p * t + 2.026868226e-1f;
    p = p * t + 2.431037740e-1f;
    p = p * t + 2.823753071e-1f;
    p = p * t + 2.820864179e-1f;
    const Floats<n> tail = 0.5f * (bell * (t * p));
    return x < 0.0f ? tail : 1.0f - tail;
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x) {
    Floats<n> bell;
    return x * distribution<n, T>(x, bell);
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x, Floats<n>& derivative) {
    Floats<n> bell;
    const Floats<n> phi = distribution<n, T>(x, bell);
    derivative = phi + (x * bell) * 0.398942280f;
    return x * phi;
  }
};

struct Relu {
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x) {
    return x < 0.0f ? Floats<n>{} : x;
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x, Floats<n>& derivative) {
    derivative = x <= 0.0f ? Floats<n>{} : splat<n>(1.0f);
    return value<n, T>(x);
  }
};

struct Relu2 {
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x) {
    const Floats<n> positive = Relu::value<n, T>(x);
    return positive * positive;
  }
  template <int n, class T>
  static CLUE_INLINE Floats<n> value(Floats<n> x, Floats<n>& derivative) {
    derivative = 2.0f * Relu::value<n, T>(x);
    return value<n, T>(x);
  }
};

}  // namespace clue
