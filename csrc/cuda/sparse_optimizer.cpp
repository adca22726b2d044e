// One optimizer step on selected rows or columns of many weights: the CUDA kernels as operators of torch.
#include "sparse_optimizer.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/cuda_stream.h"
#include "common/sparse_optimizer_arguments.h"

namespace clue {
namespace {

void require_cuda(const Tensor& tensor, int32_t device, const char* op, const char* name) {
  require(tensor.is_cuda() && tensor.get_device_index() == device, op, name, " must be on the device of the weights");
}

Element element_of(const Tensor& weight, const char* op) {
  switch (dtype_of(weight, op, "weights")) {
    case Dtype::bfloat16: return Element::bfloat16;
    case Dtype::float16: return Element::float16;
    default: return Element::float32;
  }
}

float* cuda_selected_of(const Tensor& tensor, int64_t rows, int64_t columns, int32_t device, const char* op,
                        const char* name) {
  require_cuda(tensor, device, op, name);
  return selected_of(tensor, rows, columns, op, name);
}

const float* number_of(const std::optional<Tensor>& tensor, int32_t device, const char* op, const char* name) {
  if (!tensor) return nullptr;
  require_cuda(*tensor, device, op, name);
  require(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, op, name, " must be one float32");
  return static_cast<const float*>(tensor->const_data_ptr());
}

// Pointers to numbers that are on the CPU or on the device, as they were given.
DeviceNumbers device_numbers_of(const SparseArguments& given, int32_t device) {
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

bool multiple_of(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// The rows [first, first + rows) of a part.
template <class Factors>
DeviceSlice<Factors> piece_of(DeviceSlice<Factors> slice, int64_t first, int64_t rows, int64_t element_size) {
  const int64_t offset = first * slice.columns;
  if (slice.value) slice.value += offset;
  slice.grad += offset;
  slice.aligned = multiple_of(slice.value, 16) && multiple_of(slice.grad, 16);
  for (float*& moment : slice.moments) {
    if (moment) moment += offset;
    slice.aligned = slice.aligned && multiple_of(moment, 16);
  }
  if (slice.by_columns)
    slice.weight = static_cast<char*>(slice.weight) + first * slice.weight_stride * element_size;
  else
    slice.index += first;
  slice.first_position = static_cast<uint32_t>(offset);
  slice.size = static_cast<uint32_t>(rows * slice.columns);
  slice.aligned_rows = !slice.by_columns && slice.columns % 4 == 0 && slice.weight_stride % 4 == 0 &&
                      multiple_of(slice.weight, 4 * element_size);
  return slice;
}

// The selected part of weight i, but for its size, factors and key; rows and columns of it.
template <class Factors>
DeviceSlice<Factors> slice_of(const SparseArguments& given, size_t i, int32_t device, int64_t& rows,
                              int64_t& columns) {
  const char* op = given.op;
  const Tensor &weight = given.weights[i], &index = given.indices[i];
  require_cuda(weight, device, op, "weights");
  require_cuda(index, device, op, "indices");
  require(weight.dim() == 2 && weight.is_contiguous(), op, "weights must be contiguous with two dimensions");
  require(given.dims[i] == 0 || given.dims[i] == 1, op, "dims must be 0 or 1, not ", given.dims[i]);
  require(index.scalar_type() == ScalarType::Long && index.dim() == 1 && index.is_contiguous(), op,
          "indices must be contiguous int64 [k]");
  DeviceSlice<Factors> slice{};
  slice.by_columns = given.dims[i] == 1;
  rows = slice.by_columns ? weight.size(0) : index.size(0);
  columns = slice.by_columns ? index.size(0) : weight.size(1);
  if (given.has_values()) slice.value = cuda_selected_of(given.values[i], rows, columns, device, op, "values");
  slice.grad = cuda_selected_of(given.grads[i], rows, columns, device, op, "grads");
  for (size_t m = 0; m < given.moments.size(); ++m)
    slice.moments[m] = cuda_selected_of((*given.moments[m])[i], rows, columns, device, op, "moments");
  slice.weight = weight.mutable_data_ptr();
  slice.index = static_cast<const int64_t*>(index.const_data_ptr());
  slice.weight_stride = weight.size(1);
  slice.columns = static_cast<uint32_t>(columns);
  slice.number = static_cast<uint32_t>(i);
  slice.element = element_of(weight, op);
  return slice;
}

// All selected parts. Positions within a part are counted in 32 bits, so larger ones come in pieces.
template <class Settings>
std::vector<DeviceSlice<typename Settings::Factors>> slices_of(const SparseArguments& given, const Settings& settings,
                                                               const DeviceNumbers& numbers, int32_t device) {
  require_lists(given);
  std::vector<DeviceSlice<typename Settings::Factors>> slices;
  for (size_t i = 0; i < given.weights.size(); ++i) {
    int64_t rows = 0, columns = 0;
    auto slice = slice_of<typename Settings::Factors>(given, i, device, rows, columns);
    require(given.has_values() || given.seed || slice.element == Element::float32, given.op,
            "without values, 16-bit weights need a seed");
    if (!given.lr.is_cuda()) {
      slice.factors = settings.factors(numbers.lr[i], numbers.weight_decay[i], numbers.step[i]);
      if (given.seed) slice.key = key_of(numbers.seed[i], numbers.step[i]);
    }
    if (rows == 0 || columns == 0) continue;
    const int64_t most = std::max<int64_t>(1, (int64_t{1} << 31) / columns);
    for (int64_t first = 0; first < rows; first += most)
      slices.push_back(piece_of(slice, first, std::min(most, rows - first), given.weights[i].element_size()));
  }
  return slices;
}

// Builds the table and launches.
template <class Settings, class Launch>
void update_selected(const SparseArguments& given, const Settings& settings, Launch launch) {
  if (given.weights.empty()) return;
  const int32_t device = given.weights[0].get_device_index();
  DeviceNumbers numbers = device_numbers_of(given, device);
  const auto slices = slices_of(given, settings, numbers, device);
  if (!given.lr.is_cuda()) numbers.lr = nullptr;
  const char* error = launch(slices.data(), static_cast<int64_t>(slices.size()), &settings, &numbers, device,
                             current_stream(device, given.op));
  require(error == nullptr, given.op, "CUDA: ", error == nullptr ? "" : error);
}

struct Cuda {
  static void update(const SparseArguments& given, const AdamWSettings& settings) {
    update_selected(given, settings, clue_sparse_adamw);
  }
  static void update(const SparseArguments& given, const SgdSettings<0>& settings) {
    update_selected(given, settings, clue_sparse_sgd);
  }
  static void update(const SparseArguments& given, const SgdSettings<1>& settings) {
    update_selected(given, settings, clue_sparse_sgd_momentum);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CUDA, m) {
  m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw<Cuda>));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd<Cuda>));
}

}  // namespace clue
