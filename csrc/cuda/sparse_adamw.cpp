// AdamW on selected rows or columns of many weights, on CUDA: checks of the arguments and the table of the launch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "selected_update.h"
#include "stream.h"

namespace clue {
namespace {

constexpr const char* op = "sparse_adamw";
using Tensors = std::vector<Tensor>;

void require_cuda(const Tensor& tensor, int32_t device, const char* name) {
  require(tensor.is_cuda() && tensor.get_device_index() == device, op, name, " must be on the device of the weights");
}

Element element_of(const Tensor& weight) {
  switch (dtype_of(weight, op, "weights")) {
    case Dtype::bfloat16: return Element::bfloat16;
    case Dtype::float16: return Element::float16;
    default: return Element::float32;
  }
}

float* selected_of(const Tensor& tensor, int64_t rows, int64_t columns, int32_t device, const char* name) {
  require_cuda(tensor, device, name);
  require(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32");
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(), op, name,
          " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<float*>(tensor.data_ptr());
}

// One number for each weight; a null pointer for what is not given.
template <class T>
const T* numbers_of(const std::optional<Tensor>& tensor, ScalarType type, size_t count, const char* name) {
  if (!tensor) return nullptr;
  require(tensor->scalar_type() == type, op, name, " has the wrong dtype");
  require(tensor->dim() == 1 && static_cast<size_t>(tensor->size(0)) == count && tensor->is_contiguous(), op, name,
          " must be contiguous [", count, "]");
  return static_cast<const T*>(tensor->const_data_ptr());
}

const float* number_of(const std::optional<Tensor>& tensor, int32_t device, const char* name) {
  if (!tensor) return nullptr;
  require_cuda(*tensor, device, name);
  require(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, op, name, " must be one float32");
  return static_cast<const float*>(tensor->const_data_ptr());
}

bool multiple_of(const void* address, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// The rows [first, first + rows) of a part. Positions within a part are counted in 32 bits: larger ones come in pieces.
SelectedPart piece_of(SelectedPart part, int64_t first, int64_t rows, int64_t element_size) {
  const int64_t offset = first * part.columns;
  if (part.value) part.value += offset;
  part.grad += offset;
  for (float*& moment : part.moments) moment += offset;
  if (part.by_columns)
    part.weight = static_cast<char*>(part.weight) + first * part.weight_stride * element_size;
  else
    part.index += first;
  part.first_row = static_cast<uint32_t>(first);
  part.size = static_cast<uint32_t>(rows * part.columns);
  part.aligned = multiple_of(part.grad, 16) && multiple_of(part.moments[0], 16) && multiple_of(part.moments[1], 16) &&
                 multiple_of(part.value, 16);
  part.aligned_rows = !part.by_columns && part.columns % 4 == 0 && part.weight_stride % 4 == 0 &&
                      multiple_of(part.weight, 4 * element_size);
  return part;
}

void sparse_adamw(Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors weights,
                  Tensors indices, std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay,
                  const Tensor& step, std::optional<Tensor> seed, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf, double beta1, double beta2, double eps) {
  const size_t count = weights.size();
  if (count == 0) return;
  const bool masters = !values.empty();
  for (size_t length : {masters ? values.size() : count, grads.size(), exp_avgs.size(), exp_avg_sqs.size(),
                        indices.size(), dims.size()})
    require(length == count, op, "every list must have ", count, " entries, one a weight");
  require(masters || seed, op, "without values a seed is needed");
  require(lr.is_cuda() == weight_decay.is_cuda() && lr.is_cuda() == step.is_cuda() &&
              (!seed || lr.is_cuda() == seed->is_cuda()),
          op, "lr, weight_decay, step and seed must be in one place, the CPU or the device of the weights");

  const int32_t device = weights[0].get_device_index();
  const AdamWBetas betas = adamw_betas(beta1, beta2, eps);
  const DeviceNumbers numbers{numbers_of<double>(lr, ScalarType::Double, count, "lr"),
                              numbers_of<double>(weight_decay, ScalarType::Double, count, "weight_decay"),
                              numbers_of<int64_t>(step, ScalarType::Long, count, "step"),
                              numbers_of<int64_t>(seed, ScalarType::Long, count, "seed"),
                              number_of(grad_scale, device, "grad_scale"),
                              number_of(found_inf, device, "found_inf")};
  std::vector<SelectedPart> parts;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &index = indices[i];
    require_cuda(weight, device, "weights");
    require(weight.dim() == 2 && weight.is_contiguous(), op, "weights must be contiguous with two dimensions");
    require(dims[i] == 0 || dims[i] == 1, op, "dims must be 0 or 1, not ", dims[i]);
    require_cuda(index, device, "indices");
    require(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous(), op,
            "indices must be contiguous int64 [k]");
    SelectedPart part{};
    part.by_columns = dims[i] == 1;
    const int64_t rows = part.by_columns ? weight.size(0) : index.size(0);
    const int64_t columns = part.by_columns ? index.size(0) : weight.size(1);
    part.value = masters ? selected_of(values[i], rows, columns, device, "values") : nullptr;
    part.grad = selected_of(grads[i], rows, columns, device, "grads");
    part.moments[0] = selected_of(exp_avgs[i], rows, columns, device, "exp_avgs");
    part.moments[1] = selected_of(exp_avg_sqs[i], rows, columns, device, "exp_avg_sqs");
    part.weight = weight.mutable_data_ptr();
    part.index = static_cast<const int64_t*>(index.const_data_ptr());
    part.weight_stride = weight.size(1);
    part.columns = static_cast<uint32_t>(columns);
    part.number = static_cast<uint32_t>(i);
    part.element = element_of(weight);
    if (!lr.is_cuda()) {
      part.factors = adamw_factors(betas, numbers.lr[i], numbers.weight_decay[i], numbers.step[i]);
      if (seed) part.key = key_of(numbers.seed[i], numbers.step[i]);
    }
    if (rows == 0 || columns == 0) continue;
    const int64_t most = std::max<int64_t>(1, (int64_t{1} << 31) / columns);
    for (int64_t first = 0; first < rows; first += most)
      parts.push_back(piece_of(part, first, std::min(most, rows - first), weight.element_size()));
  }
  DeviceNumbers on_device = numbers;
  if (!lr.is_cuda()) on_device.lr = nullptr;
  const char* error = clue_sparse_adamw_cuda(parts.data(), static_cast<int64_t>(parts.size()), betas, on_device,
                                             device, current_stream(device, op));
  require(error == nullptr, op, "CUDA: ", error == nullptr ? "" : error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CUDA, m) { m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw)); }

}  // namespace clue
