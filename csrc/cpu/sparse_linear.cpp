// Backward of a linear layer for selected rows or columns of its weight: a gather of columns, then a thin product.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "common/arguments.h"
#include "common/dispatch.h"

namespace clue {
namespace {

// What the copies of 16-bit matrices in fp32 may take: all tokens at once as a rule, since threads that wait for one
// another are slow on a busy machine.
constexpr int64_t copy_bytes = 32 << 20;

// Neighboring columns that are selected together, such as those of an attention head.
struct Span {
  int64_t first, count;
};

// The selected columns of a matrix. `single` lists them one by one where most have no neighbor, which is then faster.
struct Columns {
  std::vector<Span> spans;
  std::vector<int32_t> single;
  int64_t total = 0;
};

struct Job {
  Dtype dtype;
  const char* source;     // [tokens, channels]
  int64_t source_stride;  // in elements
  const Columns* columns;
  char* target;  // [tokens, selected]
  bool widens;  // the target is fp32, the source is not
};

// Columns of one row, one after the other.
template <class T>
CLUE_INLINE void gather_row(const T* source, const Columns& columns, T* target) {
  const int64_t singles = columns.single.size();
  for (int64_t i = 0; i < singles; ++i) target[i] = source[columns.single[i]];
  if (singles) return;
  for (const Span& span : columns.spans) {
    std::memcpy(target, source + span.first, span.count * sizeof(T));
    target += span.count;
  }
}

template <int n, class T>
CLUE_INLINE void gather_rows(const Job& job, int64_t begin, int64_t end) {
  const T* source = reinterpret_cast<const T*>(job.source);
  const int64_t total = job.columns->total;
  if (!job.widens) {
    for (int64_t row = begin; row < end; ++row)
      gather_row(source + row * job.source_stride, *job.columns, reinterpret_cast<T*>(job.target) + row * total);
    return;
  }
  std::vector<T> gathered(total);
  for (int64_t row = begin; row < end; ++row) {
    gather_row(source + row * job.source_stride, *job.columns, gathered.data());
    float* target = reinterpret_cast<float*>(job.target) + row * total;
    for (int64_t i = 0; i < total; i += n)
      narrow<n>(target + i, widen<n>(gathered.data() + i, total - i), total - i);
  }
}

template <int n>
CLUE_INLINE void gather(const Job& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::float32: return gather_rows<n, float>(job, begin, end);
    case Dtype::bfloat16: return gather_rows<n, BFloat16>(job, begin, end);
    case Dtype::float16: return gather_rows<n, Half>(job, begin, end);
  }
}
CLUE_DISPATCH(gather, Job)

Columns all_columns(int64_t channels) { return {{{0, channels}}, {}, channels}; }

Columns columns_of(const Tensor& index, int64_t channels, const char* op) {
  require_type(index, ScalarType::Long, op, "index", "int64");
  require(index.dim() == 1 && (index.size(0) <= 1 || index.stride(0) == 1), op, "index must be contiguous [k]");
  const int64_t* column = static_cast<const int64_t*>(index.const_data_ptr());
  Columns columns;
  columns.total = index.size(0);
  for (int64_t i = 0; i < columns.total; ++i) {
    require(0 <= column[i] && column[i] < channels, op, "index holds ", column[i], ", outside [0, ", channels, ")");
    if (!columns.spans.empty() && columns.spans.back().first + columns.spans.back().count == column[i])
      ++columns.spans.back().count;
    else
      columns.spans.push_back({column[i], 1});
  }
  if (static_cast<int64_t>(columns.spans.size()) > columns.total / 8 && columns.spans.size() > 1)
    columns.single.assign(column, column + columns.total);
  return columns;
}

// Columns of the tokens from `first` on, into the rows of `target`, which are of the dtype of `source` or fp32.
Job copy_of(const Tensor& source, const Columns& columns, int64_t first, const Tensor& target, const char* op,
            const char* name) {
  Job job{};
  job.dtype = dtype_of(source, op, name);
  job.source_stride = source.stride(0);
  job.source = static_cast<const char*>(source.const_data_ptr()) +
               first * job.source_stride * static_cast<int64_t>(source.element_size());
  job.columns = &columns;
  job.target = static_cast<char*>(target.mutable_data_ptr());
  job.widens = target.scalar_type() != source.scalar_type();
  return job;
}

// One side of the product: the selected columns of a matrix in fp32, a view where that is possible, else a copy of a
// run of tokens.
struct Operand {
  Tensor source;
  Columns columns;
  const char* name;
  std::optional<Tensor> copy;

  Operand(Tensor source, Columns columns, int64_t run, const char* name)
      : source(source), columns(columns), name(name) {
    if (source.scalar_type() == ScalarType::Float && columns.spans.size() == 1) return;
    copy = torch::stable::empty({std::min(run, source.size(0)), columns.total}, ScalarType::Float);
  }

  Tensor rows(int64_t first, int64_t count) {
    if (copy) return torch::stable::narrow(*copy, 0, 0, count);
    Tensor part = torch::stable::narrow(source, 1, columns.spans[0].first, columns.total);
    return torch::stable::narrow(part, 0, first, count);
  }
};

// Both copies, in one go.
void copy_run(const Operand& left, const Operand& right, int64_t first, int64_t count, const char* op) {
  std::vector<Job> jobs;
  int64_t work = 0;
  for (const Operand* side : {&left, &right}) {
    if (!side->copy) continue;
    jobs.push_back(copy_of(side->source, side->columns, first, *side->copy, op, side->name));
    work += side->columns.total;
  }
  if (jobs.empty()) return;
  in_parallel(count, 1, work, [&](int64_t begin, int64_t end) {
    for (const Job& job : jobs) gather(job, begin, end);
  });
}

void sparse_linear_gather(const Tensor& x, const Tensor& index, const Tensor& out) {
  const char* op = "sparse_linear_gather";
  require_matrix(x, op, "x");
  require_matrix(out, op, "out");
  require(out.scalar_type() == x.scalar_type(), op, "x and out must have the same dtype");
  require(out.is_contiguous() && out.size(0) == x.size(0) && out.size(1) == index.numel(), op, "out must be ",
          "contiguous [", x.size(0), ", ", index.numel(), "]");
  const Columns columns = columns_of(index, x.size(1), op);
  const Job job = copy_of(x, columns, 0, out, op, "x");
  in_parallel(x.size(0), 1, columns.total, [&](int64_t begin, int64_t end) { gather(job, begin, end); });
}

void sparse_linear_backward(const Tensor& grad, const Tensor& x, std::optional<Tensor> index, const Tensor& out) {
  const char* op = "sparse_linear_backward";
  require_matrix(grad, op, "grad");
  require_matrix(x, op, "x");
  require(x.scalar_type() == grad.scalar_type(), op, "grad and x must have the same dtype");
  require_type(out, ScalarType::Float, op, "out", "float32");
  const int64_t tokens = grad.size(0), channels = grad.size(1);
  require(x.size(0) == tokens, op, "grad has ", tokens, " tokens, but x has ", x.size(0));
  const Columns selected = index ? columns_of(*index, channels, op) : all_columns(channels);
  const int64_t token_bytes = sizeof(float) * std::max<int64_t>(1, selected.total + x.size(1));
  const int64_t run =
      grad.scalar_type() == ScalarType::Float ? tokens : std::max<int64_t>(256, copy_bytes / token_bytes);
  Operand left(grad, selected, run, "grad"), right(x, all_columns(x.size(1)), run, "x");
  require(out.dim() == 2 && out.size(0) == left.columns.total && out.size(1) == right.columns.total, op,
          "out must be [", left.columns.total, ", ", right.columns.total, "]");
  Tensor sum = out;
  if (tokens == 0) torch::stable::zero_(sum);
  for (int64_t first = 0; first < tokens; first += run) {
    const int64_t count = std::min(run, tokens - first);
    copy_run(left, right, first, count, op);
    const Tensor rows = left.rows(first, count);
    const Tensor transposed = torch::stable::transpose(rows, 0, 1), factor = right.rows(first, count);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(sum.get(), sum.get(), transposed.get(), factor.get(),
                                                           first == 0 ? 0.0 : 1.0, 1.0));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def("sparse_linear_gather(Tensor x, Tensor index, Tensor(a!) out) -> ()");
  m.def("sparse_linear_backward(Tensor grad, Tensor x, Tensor? index, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) {
  m.impl("sparse_linear_gather", TORCH_BOX(&sparse_linear_gather));
  m.impl("sparse_linear_backward", TORCH_BOX(&sparse_linear_backward));
}

}  // namespace clue
