// What an optimizer step on selected rows or columns is given, on every device.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace clue {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What every rule is given: lists with one entry a weight, and numbers.
struct SelectedArguments {
  const Tensors &values, &grads;
  const std::vector<const Tensors*> moments;
  const Tensors &weights, &indices;
  const std::vector<int64_t>& dims;
  const Tensor &lr, &weight_decay, &step;
  const std::optional<Tensor>&seed, &grad_scale, &found_inf;
  const char* op;
};

}  // namespace clue
