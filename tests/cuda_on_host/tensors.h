// For the operators of csrc/cuda: a tensor is on the device if the stand-in was told of its memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

extern "C" bool cuda_on_host_is_given(uintptr_t address);

namespace cuda_on_host {
inline bool is_given(const torch::stable::Tensor& tensor) {
  return tensor.numel() == 0 || cuda_on_host_is_given(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
}
}  // namespace cuda_on_host
