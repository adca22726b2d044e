// What an optimizer step on selected rows or columns is given, on every device: the operators' argument lists.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/arguments.h"
#include "common/sparse_optimizer.h"

namespace clue {

using Tensors = std::vector<Tensor>;

// What every rule is given: lists with one entry per weight, and numbers.
struct SparseArguments {
  const char* op;
  const Tensors &values, &grads;
  const std::vector<const Tensors*> moments;
  const Tensors &weights, &indices;
  const std::vector<int64_t>& dims;
  const Tensor &lr, &weight_decay, &step;
  const std::optional<Tensor>&seed, &grad_scale, &found_inf;

  bool has_values() const { return !values.empty(); }
};

// Every list has one entry per weight; the values may be left out.
inline void require_lists(const SparseArguments& given) {
  const size_t count = given.weights.size();
  for (size_t length : {given.has_values() ? given.values.size() : count, given.grads.size(), given.indices.size(),
                        given.dims.size()})
    require(length == count, given.op, "every list must have ", count, " entries, one per weight");
  for (const Tensors* list : given.moments) require(list->size() == count, given.op, "every weight needs its moments");
}

// One number for each weight, wherever it is.
template <class T>
const T* numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name) {
  require(tensor.scalar_type() == type, op, name, " has the wrong dtype");
  require(tensor.dim() == 1 && static_cast<size_t>(tensor.size(0)) == count && tensor.is_contiguous(), op, name,
          " must be contiguous [", count, "]");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A float32 matrix of the selected part, wherever it is.
inline float* selected_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* op, const char* name) {
  require(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32");
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(), op, name,
          " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<float*>(tensor.data_ptr());
}

// The operators of a device, which says in `Device::update(arguments, settings)` how it takes a step of a rule.
template <class Device>
void sparse_adamw(Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors weights,
                  Tensors indices, std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay,
                  const Tensor& step, std::optional<Tensor> seed, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, double beta1, double beta2, double eps) {
  const SparseArguments given{"sparse_adamw", values, grads,        {&exp_avgs, &exp_avg_sqs}, weights, indices,
                              dims,           lr,     weight_decay, step,                      seed,    grad_scale,
                              found_inf};
  Device::update(given, adamw_settings(beta1, beta2, eps));
}

template <class Device>
void sparse_sgd(Tensors values, Tensors grads, Tensors momenta, Tensors weights, Tensors indices,
                std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay, const Tensor& step,
                std::optional<Tensor> seed, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                double momentum) {
  std::vector<const Tensors*> moments;
  if (momentum != 0) moments.push_back(&momenta);
  const SparseArguments given{"sparse_sgd", values,       grads, moments, weights,    indices,  dims,
                              lr,           weight_decay, step,  seed,    grad_scale, found_inf};
  if (momentum == 0) return Device::update(given, SgdSettings<0>{0.0f});
  Device::update(given, SgdSettings<1>{static_cast<float>(momentum)});
}

}  // namespace clue
