// One optimizer step on selected rows or columns of many weights, whatever the rule that updates a value.
//
// A rule is a struct with the number of its moments and a call operator: (value, gradient, moments) -> value.
#pragma once
#include <optional>
#include <vector>

#include "arguments.h"
#include "stochastic.h"

namespace clue {

using Tensors = std::vector<Tensor>;

// One weight. Its selected part is a matrix [rows, columns], contiguous in value, grad and every moment.
template <class Rule>
struct Part {
  float* value;  // the master values, or null: then the weight holds the values, rounded at random
  const float* grad;
  float* moments[Rule::moments + 1];
  char* weight;
  const int64_t* index;
  int64_t rows, columns, weight_stride;
  bool by_columns;
  Dtype dtype;
  RandomKey key;
  Rule rule;
};

template <class Rule>
struct Block {
  const Part<Rule>* part;
  int64_t begin, end;  // rows of the selected part
};

template <class Rule>
struct Job {
  std::vector<Part<Rule>> parts;
  std::vector<Block<Rule>> blocks;
  float inverse_scale = 1.0f;
};

// Updates a row of the selected part. `target` takes the rounded values, and holds the old ones if there are no masters.
template <int n, class T, class Rule>
CLUE_INLINE void update_row(const Part<Rule>& part, float inverse_scale, int64_t row, T* target) {
  const int64_t offset = row * part.columns;
  float* value = part.value ? part.value + offset : nullptr;
  const RandomKey key = key_of_row(part.key, static_cast<uint32_t>(row));
  for (int64_t c = 0; c < part.columns; c += n) {
    const int64_t left = part.columns - c;
    Floats<n> moments[Rule::moments + 1];
    for (int i = 0; i < Rule::moments; ++i) moments[i] = widen<n>(part.moments[i] + offset + c, left);
    const Floats<n> g = widen<n>(part.grad + offset + c, left) * inverse_scale;
    const Floats<n> old = value ? widen<n>(value + c, left) : widen<n>(target + c, left);
    const Floats<n> x = part.rule.template operator()<n>(old, g, moments);
    for (int i = 0; i < Rule::moments; ++i) narrow<n>(part.moments[i] + offset + c, moments[i], left);
    if (value) {
      narrow<n>(value + c, x, left);
      narrow<n>(target + c, x, left);
    } else {
      narrow_at_random<n>(target + c, x, random_bits<n>(key, c), left);
    }
  }
}

template <int n, class T, class Rule>
CLUE_INLINE void update_rows(const Block<Rule>& block, float inverse_scale) {
  const Part<Rule>& part = *block.part;
  T* weight = reinterpret_cast<T*>(part.weight);
  for (int64_t row = block.begin; row < block.end; ++row)
    update_row<n>(part, inverse_scale, row, weight + part.index[row] * part.weight_stride);
}

// Selected columns lie nearly alone in their cache lines, so the time goes into moving those: a row is asked for ahead.
template <class T, class Rule>
CLUE_INLINE void fetch_columns(const Part<Rule>& part, int64_t row) {
  const T* weight = reinterpret_cast<const T*>(part.weight) + row * part.weight_stride;
  for (int64_t c = 0; c < part.columns; ++c) __builtin_prefetch(weight + part.index[c], 1);
}

template <int n, class T, class Rule>
CLUE_INLINE void update_columns(const Block<Rule>& block, float inverse_scale) {
  const Part<Rule>& part = *block.part;
  std::vector<T> gathered(part.columns);
  for (int64_t row = block.begin; row < block.end; ++row) {
    if (row + 1 < block.end) fetch_columns<T>(part, row + 1);
    T* weight = reinterpret_cast<T*>(part.weight) + row * part.weight_stride;
    if (!part.value)
      for (int64_t c = 0; c < part.columns; ++c) gathered[c] = weight[part.index[c]];
    update_row<n>(part, inverse_scale, row, gathered.data());
    for (int64_t c = 0; c < part.columns; ++c) weight[part.index[c]] = gathered[c];
  }
}

template <int n, class T, class Rule>
CLUE_INLINE void update_block(const Block<Rule>& block, float inverse_scale) {
  if (block.part->by_columns) return update_columns<n, T>(block, inverse_scale);
  update_rows<n, T>(block, inverse_scale);
}

template <int n, class Rule>
CLUE_INLINE void update_blocks(const Job<Rule>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block<Rule>& block = job.blocks[i];
    switch (block.part->dtype) {
      case Dtype::float32: update_block<n, float>(block, job.inverse_scale); break;
      case Dtype::bfloat16: update_block<n, BFloat16>(block, job.inverse_scale); break;
      case Dtype::float16: update_block<n, Half>(block, job.inverse_scale); break;
    }
  }
}

// One number for each weight, on the CPU.
template <class T>
const T* numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name,
                    const char* type_name) {
  require_type(tensor, type, op, name, type_name);
  require(tensor.dim() == 1 && static_cast<size_t>(tensor.size(0)) == count && tensor.is_contiguous(), op, name,
          " must be contiguous [", count, "]");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline float number_of(const Tensor& tensor, const char* op, const char* name) {
  require_type(tensor, ScalarType::Float, op, name, "float32");
  require(tensor.numel() == 1, op, name, " must hold one number");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

inline float* selected_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* op, const char* name) {
  require_type(tensor, ScalarType::Float, op, name, "float32");
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(), op, name,
          " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<float*>(tensor.data_ptr());
}

inline const int64_t* index_of(const Tensor& index, int64_t size, const char* op) {
  require_type(index, ScalarType::Long, op, "indices", "int64");
  require(index.dim() == 1 && index.is_contiguous(), op, "indices must be contiguous [k]");
  const int64_t* position = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.size(0); ++i)
    require(0 <= position[i] && position[i] < size, op, "an index is ", position[i], ", outside [0, ", size, ")");
  return position;
}

// The selected parts of all weights, in blocks of about 16384 values; rules and keys are left to the operator.
template <class Rule>
Job<Rule> job_of(const Tensors& values, const Tensors& grads, const std::vector<const Tensors*>& moments,
                 const Tensors& weights, const Tensors& indices, const std::vector<int64_t>& dims, const char* op) {
  const size_t count = weights.size();
  const bool masters = !values.empty();
  for (size_t length : {masters ? values.size() : count, grads.size(), indices.size(), dims.size()})
    require(length == count, op, "every list must have ", count, " entries, one a weight");
  for (const Tensors* list : moments) require(list->size() == count, op, "there must be moments for every weight");

  Job<Rule> job;
  job.parts.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Part<Rule>& part = job.parts[i];
    const Tensor& weight = weights[i];
    require_matrix(weight, op, "weights");
    require(dims[i] == 0 || dims[i] == 1, op, "dims must be 0 or 1, not ", dims[i]);
    part.by_columns = dims[i] == 1;
    part.index = index_of(indices[i], weight.size(dims[i]), op);
    part.rows = part.by_columns ? weight.size(0) : indices[i].size(0);
    part.columns = part.by_columns ? indices[i].size(0) : weight.size(1);
    part.value = masters ? selected_of(values[i], part.rows, part.columns, op, "values") : nullptr;
    part.grad = selected_of(grads[i], part.rows, part.columns, op, "grads");
    for (size_t m = 0; m < moments.size(); ++m)
      part.moments[m] = selected_of((*moments[m])[i], part.rows, part.columns, op, "moments");
    part.dtype = dtype_of(weight, op, "weights");
    part.weight = static_cast<char*>(weight.mutable_data_ptr());
    part.weight_stride = weight.stride(0);
    if (part.columns == 0) continue;
    const int64_t rows = std::max<int64_t>(1, 16384 / part.columns);
    for (int64_t row = 0; row < part.rows; row += rows)
      job.blocks.push_back({&part, row, std::min(part.rows, row + rows)});
  }
  return job;
}

}  // namespace clue
