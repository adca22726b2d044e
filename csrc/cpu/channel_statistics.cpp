// Statistics of a tensor by channel and token group, and of its product with the gradient.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/arguments.h"
#include "common/dispatch.h"
#include "common/recording.h"

namespace clue {
namespace {

struct Job : Recording {
  Dtype dtype;
  bool wide;     // float64
  Rows x, grad;  // grad is null for the statistics of x itself
};

template <int n, class T>
struct Activations {
  using Sums = ActivationSums<n, T>;
  TypedRows<const T> x;
  explicit CLUE_INLINE Activations(const Job& job) : x(job.x) {}

  CLUE_INLINE void prepare(const Tile&, int64_t, int64_t, int64_t) const {}
  CLUE_INLINE Stored<n, T> operator()(int64_t token, int64_t c, int64_t left) const {
    return load<n>(x.at(token, c), left);
  }
};

template <int n, class T>
struct Products {
  using Sums = ProductSums<n>;
  TypedRows<const T> x, grad;
  explicit CLUE_INLINE Products(const Job& job) : x(job.x), grad(job.grad) {}

  CLUE_INLINE void prepare(const Tile&, int64_t, int64_t, int64_t) const {}
  CLUE_INLINE Pair<n> operator()(int64_t token, int64_t c, int64_t left) const {
    const Pair<n> a = load<n>(x.at(token, c), left);
    const Pair<n> d = load<n>(grad.at(token, c), left);
    return {a.first * d.first, a.second * d.second};
  }
};

// Values in fp64, such as norms of heads, are few: they are added to the accumulators themselves, token by token.
CLUE_INLINE void add_wide(double* sums, int64_t stride, const double* __restrict values, int64_t begin, int64_t end) {
  double *__restrict sum = sums, *__restrict square = sums + stride, *__restrict magnitude = sums + 2 * stride;
  double *__restrict largest = sums + 3 * stride, *__restrict active = sums + 4 * stride;
  for (int64_t c = begin; c < end; ++c) {
    const double a = values[c], size = std::abs(a);
    sum[c] += a;
    square[c] += a * a;
    magnitude[c] += size;
    largest[c] = size > largest[c] ? size : largest[c];
    active[c] += a > 0 ? 1.0 : 0.0;
  }
}

CLUE_INLINE void add_wide_products(double* sums, int64_t stride, const double* __restrict values,
                                   const double* __restrict slopes, int64_t begin, int64_t end) {
  double *__restrict sum = sums, *__restrict magnitude = sums + stride, *__restrict square = sums + 2 * stride;
  for (int64_t c = begin; c < end; ++c) {
    const double p = values[c] * slopes[c];
    sum[c] += p;
    magnitude[c] += std::abs(p);
    square[c] += p * p;
  }
}

CLUE_INLINE void run_wide(const Job& job, int64_t begin, int64_t end) {
  const TypedRows<const double> x(job.x), grad(job.grad);
  for (const Run* run = job.runs; run != job.runs_end; ++run)
    for (const Tile& tile : run->tiles)
      for (int64_t token = tile.first; tile.group >= 0 && token < tile.first + tile.count; ++token) {
        double* sums = job.sums.data + tile.group * job.sums.group_stride;
        if (grad.data)
          add_wide_products(sums, job.sums.field_stride, x.at(token, 0), grad.at(token, 0), begin, end);
        else
          add_wide(sums, job.sums.field_stride, x.at(token, 0), begin, end);
      }
}

template <int n, template <int, class> class Source, class T>
CLUE_INLINE void run(const Job& job, int64_t begin, int64_t end) {
  record<n, T, typename Source<n, T>::Sums>(job, begin, end, Source<n, T>{job});
}

template <int n, template <int, class> class Source>
CLUE_INLINE void run_dtype(const Job& job, int64_t begin, int64_t end) {
  if (job.wide) return run_wide(job, begin, end);
  switch (job.dtype) {
    case Dtype::float32: return run<n, Source, float>(job, begin, end);
    case Dtype::bfloat16: return run<n, Source, BFloat16>(job, begin, end);
    case Dtype::float16: return run<n, Source, Half>(job, begin, end);
  }
}

template <int n>
CLUE_INLINE void activations(const Job& job, int64_t begin, int64_t end) {
  run_dtype<n, Activations>(job, begin, end);
}
template <int n>
CLUE_INLINE void products(const Job& job, int64_t begin, int64_t end) {
  run_dtype<n, Products>(job, begin, end);
}
CLUE_DISPATCH(activations, Job)
CLUE_DISPATCH(products, Job)

Job job_of(const Tensor& x, const char* op) {
  require_matrix(x, op, "x");
  Job job{};
  job.wide = x.scalar_type() == ScalarType::Double;
  if (!job.wide) job.dtype = dtype_of(x, op, "x");
  job.tokens = x.size(0);
  job.channels = x.size(1);
  job.x = rows_of(x);
  return job;
}

void channel_statistics(const Tensor& x, const Tensor& group, const Tensor& statistics, std::string criterion,
                        OptionalTensor count, OptionalTensor source, OptionalTensor scores) {
  const char* op = "channel_statistics";
  Job job = job_of(x, op);
  record_in_parallel(job, group, statistics, 5, op, "statistics", {criterion, count, source, scores}, activations,
                     8, job.wide);
}

void channel_attribution(const Tensor& x, const Tensor& grad, const Tensor& group,
                         const Tensor& gradient_statistics, std::string criterion, OptionalTensor count,
                         OptionalTensor source, OptionalTensor scores) {
  const char* op = "channel_attribution";
  Job job = job_of(x, op);
  require_like(grad, x, op, "grad", "x");
  job.grad = rows_of(grad);
  record_in_parallel(job, group, gradient_statistics, 3, op, "gradient_statistics",
                     {criterion, count, source, scores}, products, 8, job.wide);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def("channel_statistics(Tensor x, Tensor group, Tensor(a!) statistics, " CLUE_SCORING ") -> ()");
  m.def("channel_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) gradient_statistics, " CLUE_SCORING
        ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics));
  m.impl("channel_attribution", TORCH_BOX(&channel_attribution));
}

}  // namespace clue
