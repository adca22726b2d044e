// Stochastic gradient descent with momentum and weight decay: the numbers that every device works out in the same way.
#pragma once
#include <cstdint>

#include "random_bits.h"

namespace clue {

// Of one weight: value -= lr * momentum, where momentum takes gradient + weight_decay * value.
struct SgdFactors {
  float lr, weight_decay;
};

// The same for all weights. Without momentum there are no moments.
template <int count>
struct SgdSettings {
  using Factors = SgdFactors;
  static constexpr int moments = count;
  float momentum;

  CLUE_ANYWHERE SgdFactors factors(double lr, double weight_decay, int64_t) const {
    return {static_cast<float>(lr), static_cast<float>(weight_decay)};
  }
};

}  // namespace clue
