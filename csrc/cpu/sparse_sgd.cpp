// Stochastic gradient descent on selected rows or columns of many weights in one call.
#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "selected_update.h"
#include "sgd.h"

namespace clue {
namespace {

template <int count>
struct Sgd : SgdSettings<count> {
  SgdFactors of_weight;

  template <int n>
  CLUE_INLINE Floats<n> operator()(Floats<n> x, Floats<n> g, Floats<n>* moment) const {
    Floats<n> direction = g + of_weight.weight_decay * x;
    if (count == 1) direction = moment[0] = this->momentum * moment[0] + direction;
    return x - of_weight.lr * direction;
  }
};

using PlainJob = Job<Sgd<0>>;
using MomentumJob = Job<Sgd<1>>;
template <int n>
CLUE_INLINE void plain(const PlainJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
template <int n>
CLUE_INLINE void with_momentum(const MomentumJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
CLUE_DISPATCH(plain, PlainJob)
CLUE_DISPATCH(with_momentum, MomentumJob)

void sparse_sgd(Tensors values, Tensors grads, Tensors momenta, Tensors weights, Tensors indices,
                std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay, const Tensor& step,
                std::optional<Tensor> seed, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                double momentum) {
  std::vector<const Tensors*> moments;
  if (momentum != 0) moments.push_back(&momenta);
  const SelectedArguments given{values, grads, moments, weights, indices,    dims,      lr,
                                weight_decay, step, seed, grad_scale, found_inf, "sparse_sgd"};
  if (momentum == 0) return update_selected<Sgd<0>>(given, SgdSettings<0>{0.0f}, plain);
  update_selected<Sgd<1>>(given, SgdSettings<1>{static_cast<float>(momentum)}, with_momentum);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def(
      "sparse_sgd(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] weights, Tensor[] indices, "
      "int[] dims, Tensor lr, Tensor weight_decay, Tensor step, Tensor? seed, Tensor? grad_scale, Tensor? found_inf, "
      "float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) { m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd)); }

}  // namespace clue
