// Backward of a linear layer for selected rows or columns of its weight: a gather of columns, then a thin product.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "dispatch.h"

namespace clue {
namespace {

// Tokens multiplied at a time: as fast as all at once, with copies of bounded size.
constexpr int64_t token_run = 1024;

// Neighboring columns that are selected together, such as those of an attention head.
struct Span {
  int64_t first, count;
};

struct Job {
  Dtype dtype;
  const char* source;     // [tokens, channels]
  int64_t source_stride;  // in elements
  const std::vector<Span>* spans;
  char* target;  // [tokens, selected]
  int64_t selected;
  bool widens;  // the target is fp32, the source is not
};

// Columns of one row, one after the other.
template <class T>
CLUE_INLINE void gather_row(const T* source, const std::vector<Span>& spans, T* target) {
  for (const Span& span : spans) {
    if (span.count == 1)
      *target = source[span.first];
    else
      std::memcpy(target, source + span.first, span.count * sizeof(T));
    target += span.count;
  }
}

template <int n, class T>
CLUE_INLINE void gather_rows(const Job& job, int64_t begin, int64_t end) {
  const T* source = reinterpret_cast<const T*>(job.source);
  if (!job.widens) {
    for (int64_t row = begin; row < end; ++row)
      gather_row(source + row * job.source_stride, *job.spans, reinterpret_cast<T*>(job.target) + row * job.selected);
    return;
  }
  std::vector<T> narrow_row(job.selected);
  for (int64_t row = begin; row < end; ++row) {
    gather_row(source + row * job.source_stride, *job.spans, narrow_row.data());
    float* target = reinterpret_cast<float*>(job.target) + row * job.selected;
    for (int64_t i = 0; i < job.selected; i += n)
      narrow<n>(target + i, widen<n>(narrow_row.data() + i, job.selected - i), job.selected - i);
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

std::vector<Span> spans_of(const Tensor& index, int64_t channels, const char* op) {
  require_type(index, ScalarType::Long, op, "index", "int64");
  require(index.dim() == 1 && (index.size(0) <= 1 || index.stride(0) == 1), op, "index must be contiguous [k]");
  const int64_t* column = static_cast<const int64_t*>(index.const_data_ptr());
  std::vector<Span> spans;
  for (int64_t i = 0; i < index.size(0); ++i) {
    require(0 <= column[i] && column[i] < channels, op, "index holds ", column[i], ", outside [0, ", channels, ")");
    if (!spans.empty() && spans.back().first + spans.back().count == column[i])
      ++spans.back().count;
    else
      spans.push_back({column[i], 1});
  }
  return spans;
}

int64_t total(const std::vector<Span>& spans) {
  int64_t count = 0;
  for (const Span& span : spans) count += span.count;
  return count;
}

// The columns `spans` of `count` tokens, into the rows of `target`, which are of the dtype of `source` or fp32.
void copy_columns(const Tensor& source, const std::vector<Span>& spans, int64_t first, int64_t count,
                  const Tensor& target, const char* op, const char* name) {
  Job job{};
  job.dtype = dtype_of(source, op, name);
  job.source_stride = source.stride(0);
  job.source = static_cast<const char*>(source.const_data_ptr()) +
               first * job.source_stride * static_cast<int64_t>(source.element_size());
  job.spans = &spans;
  job.target = static_cast<char*>(target.mutable_data_ptr());
  job.selected = total(spans);
  job.widens = target.scalar_type() != source.scalar_type();
  in_parallel(count, 1, job.selected, [&](int64_t begin, int64_t end) { gather(job, begin, end); });
}

// The same in fp32: a view where that is possible, else a copy in `buffer`.
Tensor columns_of(Tensor source, const std::vector<Span>& spans, int64_t first, int64_t count,
                  std::optional<Tensor>& buffer, const char* op, const char* name) {
  if (source.scalar_type() == ScalarType::Float && spans.size() == 1) {
    Tensor columns = torch::stable::narrow(source, 1, spans[0].first, spans[0].count);
    return torch::stable::narrow(columns, 0, first, count);
  }
  if (!buffer) buffer = torch::stable::empty({count, total(spans)}, ScalarType::Float);
  copy_columns(source, spans, first, count, *buffer, op, name);
  return torch::stable::narrow(*buffer, 0, 0, count);
}

void sparse_linear_gather(const Tensor& x, const Tensor& index, const Tensor& out) {
  const char* op = "sparse_linear_gather";
  require_matrix(x, op, "x");
  require_matrix(out, op, "out");
  require(out.scalar_type() == x.scalar_type(), op, "x and out must have the same dtype");
  require(out.is_contiguous() && out.size(0) == x.size(0) && out.size(1) == index.numel(), op, "out must be ",
          "contiguous [", x.size(0), ", ", index.numel(), "]");
  copy_columns(x, spans_of(index, x.size(1), op), 0, x.size(0), out, op, "x");
}

void sparse_linear_backward(const Tensor& grad, const Tensor& x, std::optional<Tensor> index, const Tensor& out) {
  const char* op = "sparse_linear_backward";
  require_matrix(grad, op, "grad");
  require_matrix(x, op, "x");
  require(x.scalar_type() == grad.scalar_type(), op, "grad and x must have the same dtype");
  require_type(out, ScalarType::Float, op, "out", "float32");
  const int64_t tokens = grad.size(0), channels = grad.size(1);
  const std::vector<Span> rows = index ? spans_of(*index, channels, op) : std::vector<Span>{{0, channels}};
  require(x.size(0) == tokens, op, "grad has ", tokens, " tokens, but x has ", x.size(0));
  require(out.dim() == 2 && out.size(0) == total(rows) && out.size(1) == x.size(1), op, "out must be [", total(rows),
          ", ", x.size(1), "]");
  Tensor sum = out;
  if (tokens == 0) torch::stable::zero_(sum);
  std::optional<Tensor> grad_buffer, x_buffer;
  for (int64_t first = 0; first < tokens; first += token_run) {
    const int64_t count = std::min(token_run, tokens - first);
    const Tensor selected = columns_of(grad, rows, first, count, grad_buffer, op, "grad");
    const Tensor right = columns_of(x, {{0, x.size(1)}}, first, count, x_buffer, op, "x");
    const Tensor left = torch::stable::transpose(selected, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(sum.get(), sum.get(), left.get(), right.get(), first == 0 ? 0.0 : 1.0, 1.0));
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
