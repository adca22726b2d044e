// AdamW on selected rows or columns of many weights in one call.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "dispatch.h"
#include "selected_update.h"

namespace clue {
namespace {

// Lane by lane: there is no square root of a vector to write.
template <int n>
CLUE_INLINE Floats<n> square_root(Floats<n> x) {
  Floats<n> y;
  for (int i = 0; i < n; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

// Keeps a product from being fused with the sum that follows. Decay takes a few units in the last place a step, so
// that PyTorch's rounding of it, left out, adds up to a difference that is seen after some hundred steps.
template <int n>
CLUE_INLINE Floats<n> rounded(Floats<n> product) {
  asm("" : "+m"(product));
  return product;
}

struct AdamW {
  static constexpr int moments = 2;
  float beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta, before beta is rounded to fp32
  float keep, rate, root;                 // 1 - lr * weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)

  AdamW() = default;
  AdamW(double beta1, double beta2, double eps, double lr, double weight_decay, int64_t step)
      : beta1(beta1), rest1(1 - beta1), beta2(beta2), rest2(1 - beta2), eps(eps), keep(1 - lr * weight_decay),
        rate(lr / (1 - std::pow(beta1, step))), root(1 / std::sqrt(1 - std::pow(beta2, step))) {}

  template <int n>
  CLUE_INLINE Floats<n> operator()(Floats<n> x, Floats<n> g, Floats<n>* moment) const {
    moment[0] = beta1 * moment[0] + rest1 * g;
    moment[1] = beta2 * moment[1] + rest2 * (g * g);
    return rounded<n>(keep * x) - rate * (moment[0] / (square_root<n>(moment[1]) * root + eps));
  }
};

using AdamWJob = Job<AdamW>;
template <int n>
CLUE_INLINE void adamw(const AdamWJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
CLUE_DISPATCH(adamw, AdamWJob)

void sparse_adamw(Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors weights,
                  Tensors indices, std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay,
                  const Tensor& step, std::optional<Tensor> seed, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, double beta1, double beta2, double eps) {
  const char* op = "sparse_adamw";
  if (found_inf && number_of(*found_inf, op, "found_inf") != 0.0f) return;
  const size_t count = weights.size();
  AdamWJob job = job_of<AdamW>(values, grads, {&exp_avgs, &exp_avg_sqs}, weights, indices, dims, op);
  if (grad_scale) job.inverse_scale = 1.0f / number_of(*grad_scale, op, "grad_scale");
  const double* rates = numbers_of<double>(lr, ScalarType::Double, count, op, "lr", "float64");
  const double* decays = numbers_of<double>(weight_decay, ScalarType::Double, count, op, "weight_decay", "float64");
  const int64_t* steps = numbers_of<int64_t>(step, ScalarType::Long, count, op, "step", "int64");
  require(seed.has_value() || !values.empty() || count == 0, op, "without values a seed is needed");
  const int64_t* seeds = seed ? numbers_of<int64_t>(*seed, ScalarType::Long, count, op, "seed", "int64") : nullptr;
  for (size_t i = 0; i < count; ++i) {
    job.parts[i].rule = AdamW(beta1, beta2, eps, rates[i], decays[i], steps[i]);
    if (seeds) job.parts[i].key = key_of(seeds[i], steps[i]);
  }
  in_parallel(static_cast<int64_t>(job.blocks.size()), 1, 16384,
              [&](int64_t begin, int64_t end) { adamw(job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def(
      "sparse_adamw(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
      "Tensor? seed, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) { m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw)); }

}  // namespace clue
