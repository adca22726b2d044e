// Stochastic gradient descent on selected rows or columns of many weights: the CUDA kernels as an operator of torch.
#include "sparse_sgd.h"

#include <torch/csrc/stable/library.h>

#include "selected_parts.h"

namespace clue {
namespace {

void sparse_sgd(Tensors values, Tensors grads, Tensors momenta, Tensors weights, Tensors indices,
                std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay, const Tensor& step,
                std::optional<Tensor> seed, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                double momentum) {
  std::vector<const Tensors*> moments;
  if (momentum != 0) moments.push_back(&momenta);
  const SelectedArguments given{values, grads, moments, weights, indices,    dims,      lr,
                                weight_decay, step, seed, grad_scale, found_inf, "sparse_sgd"};
  if (momentum == 0) return update_selected(given, SgdSettings<0>{0.0f}, clue_sparse_sgd);
  update_selected(given, SgdSettings<1>{static_cast<float>(momentum)}, clue_sparse_sgd_momentum);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CUDA, m) { m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd)); }

}  // namespace clue
