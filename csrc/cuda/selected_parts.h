// Checks of the arguments of an optimizer step on CUDA, and the table of its launch.
#pragma once
#include <optional>
#include <vector>

#include "cpu/arguments.h"
#include "selected_arguments.h"
#include "selected_update.h"
#include "stream.h"

namespace clue {

inline void require_cuda(const Tensor& tensor, int32_t device, const char* op, const char* name) {
  require(tensor.is_cuda() && tensor.get_device_index() == device, op, name, " must be on the device of the weights");
}

inline Element element_of(const Tensor& weight, const char* op) {
  switch (dtype_of(weight, op, "weights")) {
    case Dtype::bfloat16: return Element::bfloat16;
    case Dtype::float16: return Element::float16;
    default: return Element::float32;
  }
}

inline float* selected_of(const Tensor& tensor, int64_t rows, int64_t columns, int32_t device, const char* op,
                          const char* name) {
  require_cuda(tensor, device, op, name);
  require(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32");
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(), op, name,
          " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<float*>(tensor.data_ptr());
}

template <class T>
const T* numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name) {
  require(tensor.scalar_type() == type, op, name, " has the wrong dtype");
  require(tensor.dim() == 1 && static_cast<size_t>(tensor.size(0)) == count && tensor.is_contiguous(), op, name,
          " must be contiguous [", count, "]");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline const float* number_of(const std::optional<Tensor>& tensor, int32_t device, const char* op, const char* name) {
  if (!tensor) return nullptr;
  require_cuda(*tensor, device, op, name);
  require(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, op, name, " must be one float32");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// Pointers to numbers that are on the CPU or on the device, as they were given.
inline DeviceNumbers numbers_of(const SelectedArguments& given, int32_t device) {
  const char* op = given.op;
  const size_t count = given.weights.size();
  const bool on_device = given.lr.is_cuda();
  require(given.weight_decay.is_cuda() == on_device && given.step.is_cuda() == on_device &&
              (!given.seed || given.seed->is_cuda() == on_device),
          op, "lr, weight_decay, step and seed must be in one place, the CPU or the device of the weights");
  return {numbers_of<double>(given.lr, ScalarType::Double, count, op, "lr"),
          numbers_of<double>(given.weight_decay, ScalarType::Double, count, op, "weight_decay"),
          numbers_of<int64_t>(given.step, ScalarType::Long, count, op, "step"),
          given.seed ? numbers_of<int64_t>(*given.seed, ScalarType::Long, count, op, "seed") : nullptr,
          number_of(given.grad_scale, device, op, "grad_scale"),
          number_of(given.found_inf, device, op, "found_inf")};
}

inline bool multiple_of(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// The rows [first, first + rows) of a part.
template <class Factors>
SelectedPart<Factors> piece_of(SelectedPart<Factors> part, int64_t first, int64_t rows, int64_t element_size) {
  const int64_t offset = first * part.columns;
  if (part.value) part.value += offset;
  part.grad += offset;
  part.aligned = multiple_of(part.value, 16) && multiple_of(part.grad, 16);
  for (float*& moment : part.moments) {
    if (moment) moment += offset;
    part.aligned = part.aligned && multiple_of(moment, 16);
  }
  if (part.by_columns)
    part.weight = static_cast<char*>(part.weight) + first * part.weight_stride * element_size;
  else
    part.index += first;
  part.first_position = static_cast<uint32_t>(offset);
  part.size = static_cast<uint32_t>(rows * part.columns);
  part.aligned_rows = !part.by_columns && part.columns % 4 == 0 && part.weight_stride % 4 == 0 &&
                      multiple_of(part.weight, 4 * element_size);
  return part;
}

// The selected part of weight i, but for its size, factors and key; rows and columns of it.
template <class Factors>
SelectedPart<Factors> part_of(const SelectedArguments& given, size_t i, int32_t device, int64_t& rows,
                              int64_t& columns) {
  const char* op = given.op;
  const Tensor &weight = given.weights[i], &index = given.indices[i];
  require_cuda(weight, device, op, "weights");
  require_cuda(index, device, op, "indices");
  require(weight.dim() == 2 && weight.is_contiguous(), op, "weights must be contiguous with two dimensions");
  require(given.dims[i] == 0 || given.dims[i] == 1, op, "dims must be 0 or 1, not ", given.dims[i]);
  require(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous(), op,
          "indices must be contiguous int64 [k]");
  SelectedPart<Factors> part{};
  part.by_columns = given.dims[i] == 1;
  rows = part.by_columns ? weight.size(0) : index.size(0);
  columns = part.by_columns ? index.size(0) : weight.size(1);
  if (!given.values.empty()) part.value = selected_of(given.values[i], rows, columns, device, op, "values");
  part.grad = selected_of(given.grads[i], rows, columns, device, op, "grads");
  for (size_t m = 0; m < given.moments.size(); ++m)
    part.moments[m] = selected_of((*given.moments[m])[i], rows, columns, device, op, "moments");
  part.weight = weight.mutable_data_ptr();
  part.index = static_cast<const int64_t*>(index.const_data_ptr());
  part.weight_stride = weight.size(1);
  part.columns = static_cast<uint32_t>(columns);
  part.number = static_cast<uint32_t>(i);
  part.element = element_of(weight, op);
  return part;
}

// All selected parts. Positions within a part are counted in 32 bits, so larger ones come in pieces.
template <class Settings>
std::vector<SelectedPart<typename Settings::Factors>> parts_of(const SelectedArguments& given, const Settings& settings,
                                                               const DeviceNumbers& numbers, int32_t device) {
  const size_t count = given.weights.size();
  const bool masters = !given.values.empty();
  for (size_t length : {masters ? given.values.size() : count, given.grads.size(), given.indices.size(),
                        given.dims.size()})
    require(length == count, given.op, "every list must have ", count, " entries, one a weight");
  for (const Tensors* list : given.moments)
    require(list->size() == count, given.op, "there must be moments for every weight");
  std::vector<SelectedPart<typename Settings::Factors>> parts;
  for (size_t i = 0; i < count; ++i) {
    int64_t rows = 0, columns = 0;
    auto part = part_of<typename Settings::Factors>(given, i, device, rows, columns);
    require(masters || given.seed || part.element == Element::float32, given.op,
            "without values, 16-bit weights need a seed");
    if (!given.lr.is_cuda()) {
      part.factors = settings.factors(numbers.lr[i], numbers.weight_decay[i], numbers.step[i]);
      if (given.seed) part.key = key_of(numbers.seed[i], numbers.step[i]);
    }
    if (rows == 0 || columns == 0) continue;
    const int64_t most = std::max<int64_t>(1, (int64_t{1} << 31) / columns);
    for (int64_t first = 0; first < rows; first += most)
      parts.push_back(piece_of(part, first, std::min(most, rows - first), given.weights[i].element_size()));
  }
  return parts;
}

// Builds the table and launches.
template <class Settings, class Launch>
void update_selected(const SelectedArguments& given, const Settings& settings, Launch launch) {
  if (given.weights.empty()) return;
  const int32_t device = given.weights[0].get_device_index();
  DeviceNumbers numbers = numbers_of(given, device);
  const auto parts = parts_of(given, settings, numbers, device);
  if (!given.lr.is_cuda()) numbers.lr = nullptr;
  const char* error = launch(parts.data(), static_cast<int64_t>(parts.size()), &settings, &numbers, device,
                             current_stream(device, given.op));
  require(error == nullptr, given.op, "CUDA: ", error == nullptr ? "" : error);
}

}  // namespace clue
