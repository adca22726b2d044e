// One optimizer step on selected rows or columns of many weights, whatever the rule that updates a value.
//
// A rule is a struct with the number of its moments and a call operator: (value, gradient, moments) -> value. It is made
// of settings, the same for all weights, and of what they give for the learning rate, weight decay and step of a weight.
#pragma once
#include <optional>
#include <vector>

#include "arguments.h"
#include "selected_arguments.h"
#include "stochastic.h"

namespace clue {

constexpr int64_t block_values = 16384;  // what a thread takes at a time
constexpr int64_t column_tile = 256;     // values whose cache lines are fetched together

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

// Updates `count` values of the selected part from `offset` on. `rounded` takes what goes into the weight; if there are
// no master values it holds what is there now.
template <int n, class T, class Rule>
CLUE_INLINE void update_values(const Part<Rule>& part, float inverse_scale, int64_t offset, int64_t count, T* rounded) {
  float* value = part.value ? part.value + offset : nullptr;
  for (int64_t i = 0; i < count; i += n) {
    const int64_t left = count - i;
    Floats<n> moments[Rule::moments + 1];
    for (int m = 0; m < Rule::moments; ++m) moments[m] = widen<n>(part.moments[m] + offset + i, left);
    const Floats<n> g = widen<n>(part.grad + offset + i, left) * inverse_scale;
    const Floats<n> old = value ? widen<n>(value + i, left) : widen<n>(rounded + i, left);
    const Floats<n> x = part.rule.template operator()<n>(old, g, moments);
    for (int m = 0; m < Rule::moments; ++m) narrow<n>(part.moments[m] + offset + i, moments[m], left);
    if (value) {
      narrow<n>(value + i, x, left);
      narrow<n>(rounded + i, x, left);
    } else {
      narrow_at_random<n>(rounded + i, x, random_bits<n>(part.key, offset + i), left);
    }
  }
}

template <int n, class T, class Rule>
CLUE_INLINE void update_rows(const Block<Rule>& block, float inverse_scale) {
  const Part<Rule>& part = *block.part;
  T* weight = reinterpret_cast<T*>(part.weight);
  for (int64_t row = block.begin; row < block.end; ++row)
    update_values<n>(part, inverse_scale, row * part.columns, part.columns,
                     weight + part.index[row] * part.weight_stride);
}

// Calls f(value of the weight, its place in the tile) for the selected columns of some rows of the weight.
template <class T, class Rule, class Function>
CLUE_INLINE void for_columns(const Part<Rule>& part, int64_t begin, int64_t end, const Function& f) {
  int64_t place = 0;
  for (int64_t row = begin; row < end; ++row) {
    T* weight = reinterpret_cast<T*>(part.weight) + row * part.weight_stride;
    for (int64_t c = 0; c < part.columns; ++c) f(weight[part.index[c]], place++);
  }
}

template <class T, class Rule>
CLUE_INLINE void fetch_columns(const Part<Rule>& part, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* weight = reinterpret_cast<const T*>(part.weight) + row * part.weight_stride;
    for (int64_t c = 0; c < part.columns; ++c) __builtin_prefetch(weight + part.index[c], 1, 3);
  }
}

// Selected columns lie alone in their cache lines, so the time goes into moving those: they are asked for a tile ahead.
template <int n, class T, class Rule>
CLUE_INLINE void update_columns(const Block<Rule>& block, float inverse_scale) {
  const Part<Rule>& part = *block.part;
  const int64_t rows = std::max<int64_t>(1, column_tile / part.columns);
  std::vector<T> tile(rows * part.columns);
  fetch_columns<T>(part, block.begin, std::min(block.end, block.begin + rows));
  for (int64_t begin = block.begin; begin < block.end; begin += rows) {
    const int64_t end = std::min(block.end, begin + rows);
    fetch_columns<T>(part, end, std::min(block.end, end + rows));
    if (!part.value) for_columns<T>(part, begin, end, [&](T& at, int64_t place) { tile[place] = at; });
    update_values<n>(part, inverse_scale, begin * part.columns, (end - begin) * part.columns, tile.data());
    for_columns<T>(part, begin, end, [&](T& at, int64_t place) {
      at = tile[place];
    });
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
const T* numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name) {
  require(tensor.is_cpu() && tensor.scalar_type() == type, op, name, " is on another device or of another dtype");
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

// The selected part of weight i, but for its key and its rule.
template <class Rule>
Part<Rule> part_of(const SelectedArguments& given, size_t i) {
  const char* op = given.op;
  const Tensor &weight = given.weights[i], &index = given.indices[i];
  require_matrix(weight, op, "weights");
  require(given.dims[i] == 0 || given.dims[i] == 1, op, "dims must be 0 or 1, not ", given.dims[i]);
  Part<Rule> part{};
  part.by_columns = given.dims[i] == 1;
  part.index = index_of(index, weight.size(given.dims[i]), op);
  part.rows = part.by_columns ? weight.size(0) : index.size(0);
  part.columns = part.by_columns ? index.size(0) : weight.size(1);
  if (!given.values.empty()) part.value = selected_of(given.values[i], part.rows, part.columns, op, "values");
  part.grad = selected_of(given.grads[i], part.rows, part.columns, op, "grads");
  for (size_t m = 0; m < given.moments.size(); ++m)
    part.moments[m] = selected_of((*given.moments[m])[i], part.rows, part.columns, op, "moments");
  part.dtype = dtype_of(weight, op, "weights");
  part.weight = static_cast<char*>(weight.mutable_data_ptr());
  part.weight_stride = weight.stride(0);
  require(!given.values.empty() || given.seed || part.dtype == Dtype::float32, op,
          "without values, 16-bit weights need a seed");
  return part;
}

// Checks the arguments, splits the selected parts into blocks and has threads `run` them.
template <class Rule, class Settings>
void update_selected(const SelectedArguments& given, const Settings& settings,
                     void (*run)(const Job<Rule>&, int64_t, int64_t)) {
  const char* op = given.op;
  const size_t count = given.weights.size();
  const bool masters = !given.values.empty();
  for (size_t length : {masters ? given.values.size() : count, given.grads.size(), given.indices.size(),
                        given.dims.size()})
    require(length == count, op, "every list must have ", count, " entries, one a weight");
  for (const Tensors* list : given.moments) require(list->size() == count, op, "every weight needs its moments");
  const double* lr = numbers_of<double>(given.lr, ScalarType::Double, count, op, "lr");
  const double* decay = numbers_of<double>(given.weight_decay, ScalarType::Double, count, op, "weight_decay");
  const int64_t* step = numbers_of<int64_t>(given.step, ScalarType::Long, count, op, "step");
  const int64_t* seed = given.seed ? numbers_of<int64_t>(*given.seed, ScalarType::Long, count, op, "seed") : nullptr;
  if (given.found_inf && number_of(*given.found_inf, op, "found_inf") != 0.0f) return;

  Job<Rule> job;
  if (given.grad_scale) job.inverse_scale = 1.0f / number_of(*given.grad_scale, op, "grad_scale");
  for (size_t i = 0; i < count; ++i) {
    job.parts.push_back(part_of<Rule>(given, i));
    job.parts[i].rule = {settings, settings.factors(lr[i], decay[i], step[i])};
    if (seed) job.parts[i].key = key_of(seed[i], step[i]);
  }
  for (const Part<Rule>& part : job.parts) {
    if (part.columns == 0) continue;
    const int64_t rows = std::max<int64_t>(1, block_values / part.columns);
    for (int64_t row = 0; row < part.rows; row += rows)
      job.blocks.push_back({&part, row, std::min(part.rows, row + rows)});
  }
  in_parallel(static_cast<int64_t>(job.blocks.size()), 1, block_values,
              [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

}  // namespace clue
