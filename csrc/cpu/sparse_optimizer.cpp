// One optimizer step on selected rows or columns of many weights in one call: AdamW and stochastic gradient descent.
//
// A rule is a struct with the number of its moments and a call operator: (value, gradient, moments) -> value. It is made
// of settings, the same for all weights, and of what they give for the learning rate, weight decay and step of a weight.
#include "common/sparse_optimizer.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/sparse_optimizer_arguments.h"
#include "common/stochastic.h"

namespace clue {
namespace {

constexpr int64_t block_values = 16384;  // what a thread takes at a time
constexpr int64_t column_tile = 256;     // values whose cache lines are fetched together

// One weight. Its selected part is a matrix [rows, columns], contiguous in value, grad and every moment.
template <class Rule>
struct Slice {
  float* value;  // the master values, or null: then the weight holds the values, rounded stochastically
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
  const Slice<Rule>* slice;
  int64_t begin, end;  // rows of the selected part
};

template <class Rule>
struct Job {
  std::vector<Slice<Rule>> slices;
  std::vector<Block<Rule>> blocks;
  float inverse_scale = 1.0f;
};

// Updates n values of the selected part from `offset` on, of which `left` are there. `rounded` takes what goes into the
// weight; if there are no master values it holds what is there now.
template <int n, bool masters, class T, class Rule>
CLUE_INLINE void update_vector(const Slice<Rule>& slice, float inverse_scale, int64_t offset, int64_t left, T* rounded) {
  Floats<n> moments[Rule::moments + 1];
  for (int m = 0; m < Rule::moments; ++m) moments[m] = widen<n>(slice.moments[m] + offset, left);
  const Floats<n> g = widen<n>(slice.grad + offset, left) * inverse_scale;
  const Floats<n> old = masters ? widen<n>(slice.value + offset, left) : widen<n>(rounded, left);
  const Floats<n> x = slice.rule.template operator()<n>(old, g, moments);
  for (int m = 0; m < Rule::moments; ++m) narrow<n>(slice.moments[m] + offset, moments[m], left);
  if (masters) {
    narrow<n>(slice.value + offset, x, left);
    narrow<n>(rounded, x, left);
  } else {
    round_stochastic<n>(rounded, x, random_bits<n>(slice.key, offset), left);
  }
}

// Updates `count` neighboring values. What is written next, unless that is null, is asked for meanwhile: rows of the
// weight lie apart, so that no processor guesses where the next one begins.
template <int n, bool masters, class T, class Rule>
CLUE_INLINE void update_values(const Slice<Rule>& slice, float inverse_scale, int64_t offset, int64_t count, T* rounded,
                               const T* next) {
  int64_t i = 0;
  for (; i + n <= count; i += n) {
    if (next) __builtin_prefetch(next + i, 1, 3);
    update_vector<n, masters>(slice, inverse_scale, offset + i, n, rounded + i);
  }
  if (i < count) update_vector<n, masters>(slice, inverse_scale, offset + i, count - i, rounded + i);
}

template <int n, bool masters, class T, class Rule>
CLUE_INLINE void update_rows(const Slice<Rule>& slice, const Block<Rule>& block, float inverse_scale) {
  const auto weight = [&](int64_t row) {
    return reinterpret_cast<T*>(slice.weight) + slice.index[row] * slice.weight_stride;
  };
  for (int64_t row = block.begin; row < block.end; ++row) {
    const T* next = row + 1 < block.end ? weight(row + 1) : nullptr;
    update_values<n, masters>(slice, inverse_scale, row * slice.columns, slice.columns, weight(row), next);
  }
}

// Calls f(value of the weight, its place in the tile) for the selected columns of some rows of the weight.
template <class T, class Rule, class Function>
CLUE_INLINE void for_columns(const Slice<Rule>& slice, int64_t begin, int64_t end, const Function& f) {
  int64_t place = 0;
  for (int64_t row = begin; row < end; ++row) {
    T* weight = reinterpret_cast<T*>(slice.weight) + row * slice.weight_stride;
    for (int64_t c = 0; c < slice.columns; ++c) f(weight[slice.index[c]], place++);
  }
}

template <class T, class Rule>
CLUE_INLINE void fetch_columns(const Slice<Rule>& slice, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* weight = reinterpret_cast<const T*>(slice.weight) + row * slice.weight_stride;
    for (int64_t c = 0; c < slice.columns; ++c) __builtin_prefetch(weight + slice.index[c], 1, 3);
  }
}

// Selected columns lie alone in their cache lines, so the time goes into moving those: they are asked for a tile ahead.
template <int n, bool masters, class T, class Rule>
CLUE_INLINE void update_columns(const Slice<Rule>& slice, const Block<Rule>& block, float inverse_scale) {
  const int64_t rows = std::max<int64_t>(1, column_tile / slice.columns);
  std::vector<T> tile(rows * slice.columns);
  fetch_columns<T>(slice, block.begin, std::min(block.end, block.begin + rows));
  for (int64_t begin = block.begin; begin < block.end; begin += rows) {
    const int64_t end = std::min(block.end, begin + rows);
    fetch_columns<T>(slice, end, std::min(block.end, end + rows));
    if (!masters) for_columns<T>(slice, begin, end, [&](T& at, int64_t place) { tile[place] = at; });
    update_values<n, masters, T>(slice, inverse_scale, begin * slice.columns, (end - begin) * slice.columns, tile.data(),
                                 nullptr);
    for_columns<T>(slice, begin, end, [&](T& at, int64_t place) {
      at = tile[place];
    });
  }
}

template <int n, bool masters, class T, class Rule>
CLUE_INLINE void update_part(const Block<Rule>& block, float inverse_scale) {
  const Slice<Rule> slice = *block.slice;  // a copy, which no write can change
  if (slice.by_columns) return update_columns<n, masters, T>(slice, block, inverse_scale);
  update_rows<n, masters, T>(slice, block, inverse_scale);
}

template <int n, class T, class Rule>
CLUE_INLINE void update_block(const Block<Rule>& block, float inverse_scale) {
  if (block.slice->value) return update_part<n, true, T>(block, inverse_scale);
  update_part<n, false, T>(block, inverse_scale);
}

template <int n, class Rule>
CLUE_INLINE void update_blocks(const Job<Rule>& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block<Rule>& block = job.blocks[i];
    switch (block.slice->dtype) {
      case Dtype::float32: update_block<n, float>(block, job.inverse_scale); break;
      case Dtype::bfloat16: update_block<n, BFloat16>(block, job.inverse_scale); break;
      case Dtype::float16: update_block<n, Half>(block, job.inverse_scale); break;
    }
  }
}

template <class T>
const T* cpu_numbers_of(const Tensor& tensor, ScalarType type, size_t count, const char* op, const char* name) {
  require(tensor.is_cpu(), op, name, " must be on the CPU");
  return numbers_of<T>(tensor, type, count, op, name);
}

float number_of(const Tensor& tensor, const char* op, const char* name) {
  require_type(tensor, ScalarType::Float, op, name, "float32");
  require(tensor.numel() == 1, op, name, " must hold one number");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

float* cpu_selected_of(const Tensor& tensor, int64_t rows, int64_t columns, const char* op, const char* name) {
  require(tensor.is_cpu(), op, name, " must be on the CPU");
  return selected_of(tensor, rows, columns, op, name);
}

const int64_t* index_of(const Tensor& index, int64_t size, const char* op) {
  require_type(index, ScalarType::Long, op, "indices", "int64");
  require(index.dim() == 1 && index.is_contiguous(), op, "indices must be contiguous [k]");
  const int64_t* position = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t i = 0; i < index.size(0); ++i)
    require(0 <= position[i] && position[i] < size, op, "an index is ", position[i], ", outside [0, ", size, ")");
  return position;
}

// The selected part of weight i, but for its key and its rule.
template <class Rule>
Slice<Rule> slice_of(const SparseArguments& given, size_t i) {
  const char* op = given.op;
  const Tensor &weight = given.weights[i], &index = given.indices[i];
  require_matrix(weight, op, "weights");
  require(given.dims[i] == 0 || given.dims[i] == 1, op, "dims must be 0 or 1, not ", given.dims[i]);
  Slice<Rule> slice{};
  slice.by_columns = given.dims[i] == 1;
  slice.index = index_of(index, weight.size(given.dims[i]), op);
  slice.rows = slice.by_columns ? weight.size(0) : index.size(0);
  slice.columns = slice.by_columns ? index.size(0) : weight.size(1);
  if (given.has_values()) slice.value = cpu_selected_of(given.values[i], slice.rows, slice.columns, op, "values");
  slice.grad = cpu_selected_of(given.grads[i], slice.rows, slice.columns, op, "grads");
  for (size_t m = 0; m < given.moments.size(); ++m)
    slice.moments[m] = cpu_selected_of((*given.moments[m])[i], slice.rows, slice.columns, op, "moments");
  slice.dtype = dtype_of(weight, op, "weights");
  slice.weight = static_cast<char*>(weight.mutable_data_ptr());
  slice.weight_stride = weight.stride(0);
  require(given.has_values() || given.seed || slice.dtype == Dtype::float32, op,
          "without values, 16-bit weights need a seed");
  return slice;
}

// Checks the arguments, splits the selected parts into blocks and has threads `run` them.
template <class Rule, class Settings>
void update_selected(const SparseArguments& given, const Settings& settings,
                     void (*run)(const Job<Rule>&, int64_t, int64_t)) {
  const char* op = given.op;
  const size_t count = given.weights.size();
  require_lists(given);
  const double* lr = cpu_numbers_of<double>(given.lr, ScalarType::Double, count, op, "lr");
  const double* decay = cpu_numbers_of<double>(given.weight_decay, ScalarType::Double, count, op, "weight_decay");
  const int64_t* step = cpu_numbers_of<int64_t>(given.step, ScalarType::Long, count, op, "step");
  const int64_t* seed = given.seed ? cpu_numbers_of<int64_t>(*given.seed, ScalarType::Long, count, op, "seed") : nullptr;
  if (given.found_inf && number_of(*given.found_inf, op, "found_inf") != 0.0f) return;

  Job<Rule> job;
  if (given.grad_scale) job.inverse_scale = 1.0f / number_of(*given.grad_scale, op, "grad_scale");
  for (size_t i = 0; i < count; ++i) {
    job.slices.push_back(slice_of<Rule>(given, i));
    job.slices[i].rule = {settings, settings.factors(lr[i], decay[i], step[i])};
    if (seed) job.slices[i].key = key_of(seed[i], step[i]);
  }
  for (const Slice<Rule>& slice : job.slices) {
    if (slice.columns == 0) continue;
    const int64_t rows = std::max<int64_t>(1, block_values / slice.columns);
    for (int64_t row = 0; row < slice.rows; row += rows)
      job.blocks.push_back({&slice, row, std::min(slice.rows, row + rows)});
  }
  in_parallel(static_cast<int64_t>(job.blocks.size()), 1, block_values,
              [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

// The rules.

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

struct AdamW : AdamWSettings {
  AdamWFactors of_weight;

  template <int n>
  CLUE_INLINE Floats<n> operator()(Floats<n> x, Floats<n> g, Floats<n>* moment) const {
    moment[0] = beta1 * moment[0] + one_minus_beta1 * g;
    moment[1] = beta2 * moment[1] + one_minus_beta2 * (g * g);
    const Floats<n> step = of_weight.rate * (moment[0] / (square_root<n>(moment[1]) * of_weight.root + eps));
    return rounded<n>(of_weight.keep * x) - step;
  }
};

using AdamWJob = Job<AdamW>;
template <int n>
CLUE_INLINE void adamw(const AdamWJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
CLUE_DISPATCH(adamw, AdamWJob)

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

using SgdJob = Job<Sgd<0>>;
using MomentumSgdJob = Job<Sgd<1>>;
template <int n>
CLUE_INLINE void sgd(const SgdJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
template <int n>
CLUE_INLINE void momentum_sgd(const MomentumSgdJob& job, int64_t begin, int64_t end) {
  update_blocks<n>(job, begin, end);
}
CLUE_DISPATCH(sgd, SgdJob)
CLUE_DISPATCH(momentum_sgd, MomentumSgdJob)

struct Cpu {
  static void update(const SparseArguments& given, const AdamWSettings& settings) {
    update_selected<AdamW>(given, settings, adamw);
  }
  static void update(const SparseArguments& given, const SgdSettings<0>& settings) {
    update_selected<Sgd<0>>(given, settings, sgd);
  }
  static void update(const SparseArguments& given, const SgdSettings<1>& settings) {
    update_selected<Sgd<1>>(given, settings, momentum_sgd);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def(
      "sparse_adamw(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
      "Tensor? seed, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps) -> ()");
  m.def(
      "sparse_sgd(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] weights, Tensor[] indices, "
      "int[] dims, Tensor lr, Tensor weight_decay, Tensor step, Tensor? seed, Tensor? grad_scale, Tensor? found_inf, "
      "float momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) {
  m.impl("sparse_adamw", TORCH_BOX(&sparse_adamw<Cpu>));
  m.impl("sparse_sgd", TORCH_BOX(&sparse_sgd<Cpu>));
}

}  // namespace clue
