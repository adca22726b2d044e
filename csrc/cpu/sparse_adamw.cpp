// AdamW on selected rows or columns of many weights in one call: fp32 master values and moments of the selected part,
// its rounded values into the weight.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "arguments.h"
#include "dispatch.h"

namespace clue {
namespace {

constexpr int64_t block_elements = 16384;  // what a thread takes at a time

// One weight. Its selected part is a matrix [rows, columns], contiguous in value, grad and both moments.
struct Part {
  float* value;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  char* weight;
  const int64_t* index;
  int64_t rows, columns, weight_stride;
  bool by_columns;
  Dtype dtype;
  float keep, rate, root;  // 1 - lr * weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
};

struct Block {
  const Part* part;
  int64_t begin, end;  // rows of the selected part
};

struct Job {
  std::vector<Block> blocks;
  float beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta, not lost to the rounding of beta
};

// Lane by lane: there is no square root of a vector to write.
template <int n>
CLUE_INLINE Floats<n> square_root(Floats<n> x) {
  Floats<n> y;
  for (int i = 0; i < n; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}

// Keeps a product from being fused with the sum that follows. Decay takes a few units in the last place a step, so
// that PyTorch's rounding of it, left out, adds up to a difference that is seen after some hundred steps.
template <int n>
CLUE_INLINE Floats<n> rounded(Floats<n> product) {
  asm("" : "+m"(product));
  return product;
}

// Updates `columns` neighboring values and writes them to `target`, rounded.
template <int n, class T>
CLUE_INLINE void update(const Job& job, const Part& part, int64_t offset, T* target) {
  float* value = part.value + offset;
  const float* grad = part.grad + offset;
  float* exp_avg = part.exp_avg + offset;
  float* exp_avg_sq = part.exp_avg_sq + offset;
  for (int64_t c = 0; c < part.columns; c += n) {
    const int64_t left = part.columns - c;
    const Floats<n> g = widen<n>(grad + c, left);
    const Floats<n> m = job.beta1 * widen<n>(exp_avg + c, left) + job.rest1 * g;
    const Floats<n> v = job.beta2 * widen<n>(exp_avg_sq + c, left) + job.rest2 * (g * g);
    Floats<n> x = widen<n>(value + c, left);
    x = rounded<n>(part.keep * x) - part.rate * (m / (square_root<n>(v) * part.root + job.eps));
    narrow<n>(exp_avg + c, m, left);
    narrow<n>(exp_avg_sq + c, v, left);
    narrow<n>(value + c, x, left);
    narrow<n>(target + c, x, left);
  }
}

template <int n, class T>
CLUE_INLINE void run_rows(const Job& job, const Part& part, int64_t begin, int64_t end) {
  T* weight = reinterpret_cast<T*>(part.weight);
  for (int64_t row = begin; row < end; ++row)
    update<n, T>(job, part, row * part.columns, weight + part.index[row] * part.weight_stride);
}

template <int n, class T>
CLUE_INLINE void run_columns(const Job& job, const Part& part, int64_t begin, int64_t end) {
  std::vector<T> narrowed(part.columns);
  for (int64_t row = begin; row < end; ++row) {
    T* weight = reinterpret_cast<T*>(part.weight) + row * part.weight_stride;
    update<n, T>(job, part, row * part.columns, narrowed.data());
    for (int64_t c = 0; c < part.columns; ++c) weight[part.index[c]] = narrowed[c];
  }
}

template <int n, class T>
CLUE_INLINE void run_block(const Job& job, const Block& block) {
  if (block.part->by_columns) return run_columns<n, T>(job, *block.part, block.begin, block.end);
  run_rows<n, T>(job, *block.part, block.begin, block.end);
}

template <int n>
CLUE_INLINE void run(const Job& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block& block = job.blocks[i];
    switch (block.part->dtype) {
      case Dtype::float32: run_block<n, float>(job, block); break;
      case Dtype::bfloat16: run_block<n, BFloat16>(job, block); break;
      case Dtype::float16: run_block<n, Half>(job, block); break;
    }
  }
}
CLUE_DISPATCH(run, Job)

// One number for each weight, on the CPU.
template <class T>
const T* numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name,
                    const char* type_name) {
  require_type(tensor, type, op, name, type_name);
  require(tensor.dim() == 1 && static_cast<size_t>(tensor.size(0)) == count && tensor.is_contiguous(), op, name,
          " must be contiguous [", count, "]");
  return static_cast<const T*>(tensor.const_data_ptr());
}

float* selected_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* op, const char* name) {
  require_type(tensor, ScalarType::Float, op, name, "float32");
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous(), op, name,
          " must be contiguous [", rows, ", ", columns, "]");
  return static_cast<float*>(tensor.data_ptr());
}

const int64_t* index_of(const Tensor& index, int64_t size, const char* op) {
  require_type(index, ScalarType::Long, op, "indices", "int64");
  require(index.dim() == 1 && index.is_contiguous(), op, "indices must be contiguous [k]");
  const int64_t* position = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.size(0); ++i)
    require(0 <= position[i] && position[i] < size, op, "an index is ", position[i], ", outside [0, ", size, ")");
  return position;
}

using Tensors = std::vector<Tensor>;

void sparse_adamw(Tensors values, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors weights,
                  Tensors indices, std::vector<int64_t> dims, const Tensor& lr, const Tensor& weight_decay,
                  const Tensor& step, double beta1, double beta2, double eps) {
  const char* op = "sparse_adamw";
  const size_t count = weights.size();
  for (size_t length : {values.size(), grads.size(), exp_avgs.size(), exp_avg_sqs.size(), indices.size(), dims.size()})
    require(length == count, op, "every list must have ", count, " entries, one a weight");
  const double* rates = numbers_of<double>(lr, ScalarType::Double, count, op, "lr", "float64");
  const double* decays = numbers_of<double>(weight_decay, ScalarType::Double, count, op, "weight_decay", "float64");
  const int64_t* steps = numbers_of<int64_t>(step, ScalarType::Long, count, op, "step", "int64");

  std::vector<Part> parts(count);
  Job job{};
  job.beta1 = static_cast<float>(beta1);
  job.rest1 = static_cast<float>(1 - beta1);
  job.beta2 = static_cast<float>(beta2);
  job.rest2 = static_cast<float>(1 - beta2);
  job.eps = static_cast<float>(eps);
  for (size_t i = 0; i < count; ++i) {
    Part& part = parts[i];
    const Tensor& weight = weights[i];
    require_matrix(weight, op, "weights");
    require(dims[i] == 0 || dims[i] == 1, op, "dims must be 0 or 1, not ", dims[i]);
    part.by_columns = dims[i] == 1;
    part.index = index_of(indices[i], weight.size(dims[i]), op);
    part.rows = part.by_columns ? weight.size(0) : indices[i].size(0);
    part.columns = part.by_columns ? indices[i].size(0) : weight.size(1);
    part.value = selected_of(values[i], part.rows, part.columns, op, "values");
    part.grad = selected_of(grads[i], part.rows, part.columns, op, "grads");
    part.exp_avg = selected_of(exp_avgs[i], part.rows, part.columns, op, "exp_avgs");
    part.exp_avg_sq = selected_of(exp_avg_sqs[i], part.rows, part.columns, op, "exp_avg_sqs");
    part.dtype = dtype_of(weight, op, "weights");
    part.weight = static_cast<char*>(weight.mutable_data_ptr());
    part.weight_stride = weight.stride(0);
    part.keep = static_cast<float>(1 - rates[i] * decays[i]);
    part.rate = static_cast<float>(rates[i] / (1 - std::pow(beta1, steps[i])));
    part.root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, steps[i])));
    if (part.columns == 0) continue;
    const int64_t rows = std::max<int64_t>(1, block_elements / part.columns);
    for (int64_t row = 0; row < part.rows; row += rows)
      job.blocks.push_back({&part, row, std::min(part.rows, row + rows)});
  }
  in_parallel(static_cast<int64_t>(job.blocks.size()), 1, block_elements,
              [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def(
      "sparse_adamw(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
      "float beta1, float beta2, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) { m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw)); }

}  // namespace clue
