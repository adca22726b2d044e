// The rules of the optimizers: the numbers that every device works out in the same way. No header of torch, so that
// nvcc compiles what includes this wherever it is found.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/random_bits.h"

namespace clue {

// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), of one weight:
// value = keep * value - rate * exp_avg / (root * sqrt(exp_avg_sq) + eps).
struct AdamWFactors {
  float keep, rate, root;
};

// The same for all weights; 1 - beta is taken before beta is rounded to fp32.
struct AdamWSettings {
  using Factors = AdamWFactors;
  static constexpr int moments = 2;
  double exact_beta1, exact_beta2;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;

  HOST_DEVICE AdamWFactors factors(double lr, double weight_decay, int64_t step) const {
    const double correction1 = 1 - pow(exact_beta1, static_cast<double>(step));
    const double correction2 = 1 - pow(exact_beta2, static_cast<double>(step));
    return {static_cast<float>(1 - lr * weight_decay), static_cast<float>(lr / correction1),
            static_cast<float>(1 / sqrt(correction2))};
  }
};

inline AdamWSettings adamw_settings(double beta1, double beta2, double eps) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  return {beta1, beta2, narrow(beta1), narrow(1 - beta1), narrow(beta2), narrow(1 - beta2), narrow(eps)};
}

// Stochastic gradient descent, of one weight: value -= lr * momentum, where momentum takes
// gradient + weight_decay * value.
struct SgdFactors {
  float lr, weight_decay;
};

// The same for all weights. Without momentum there are no moments.
template <int count>
struct SgdSettings {
  using Factors = SgdFactors;
  static constexpr int moments = count;
  float momentum;

  HOST_DEVICE SgdFactors factors(double lr, double weight_decay, int64_t) const {
    return {static_cast<float>(lr), static_cast<float>(weight_decay)};
  }
};

}  // namespace clue
