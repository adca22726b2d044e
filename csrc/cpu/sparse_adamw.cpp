// AdamW on selected rows or columns of many weights in one call.
#include <torch/csrc/stable/library.h>

#include "adamw.h"
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

struct AdamW : AdamWSettings {
  AdamWFactors of_weight;

  template <int n>
  CLUE_INLINE Floats<n> operator()(Floats<n> x, Floats<n> g, Floats<n>* moment) const {
    moment[0] = beta1 * moment[0] + rest1 * g;
    moment[1] = beta2 * moment[1] + rest2 * (g * g);
    const Floats<n> step = of_weight.rate * (moment[0] / (square_root<n>(moment[1]) * of_weight.root + eps));
    return rounded<n>(of_weight.keep * x) - step;
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
  const SelectedArguments given{values, grads,        {&exp_avgs, &exp_avg_sqs}, weights, indices,    dims,
                                lr,     weight_decay, step,                      seed,    grad_scale, found_inf,
                                "sparse_adamw"};
  update_selected<AdamW>(given, adamw_settings(beta1, beta2, eps), adamw);
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
