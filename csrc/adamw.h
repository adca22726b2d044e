// Numbers of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that every device works out the same way.
#pragma once
#include <cmath>
#include <cstdint>

#include "random_bits.h"

namespace clue {

// The same for all weights. rest: 1 - beta, before beta is rounded to fp32.
struct AdamWBetas {
  double exact1, exact2;
  float beta1, rest1, beta2, rest2, eps;
};

inline AdamWBetas adamw_betas(double beta1, double beta2, double eps) {
  return {beta1,
          beta2,
          static_cast<float>(beta1),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(eps)};
}

// Of one weight: value = keep * value - rate * exp_avg / (root * sqrt(exp_avg_sq) + eps).
struct AdamWFactors {
  float keep, rate, root;
};

CLUE_ANYWHERE AdamWFactors adamw_factors(const AdamWBetas& betas, double lr, double weight_decay, int64_t step) {
  const double correction1 = 1 - pow(betas.exact1, static_cast<double>(step));
  const double correction2 = 1 - pow(betas.exact2, static_cast<double>(step));
  return {static_cast<float>(1 - lr * weight_decay), static_cast<float>(lr / correction1),
          static_cast<float>(1 / sqrt(correction2))};
}

}  // namespace clue
