// AdamW on selected rows or columns of many weights: the CUDA kernel as an operator of torch.
#include "sparse_adamw.h"

#include <torch/csrc/stable/library.h>

#include "selected_parts.h"

namespace clue {
namespace {

void sparse_adamw(Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors weights,
                  Tensors indices, std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay,
                  const Tensor& step, std::optional<Tensor> seed, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, double beta1, double beta2, double eps) {
  const SelectedArguments given{values, grads,        {&exp_avgs, &exp_avg_sqs}, weights, indices,    dims,
                                lr,     weight_decay, step,                      seed,    grad_scale, found_inf,
                                "sparse_adamw"};
  update_selected(given, adamw_settings(beta1, beta2, eps), clue_sparse_adamw);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CUDA, m) { m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw)); }

}  // namespace clue
