// Statistics of a tensor by channel and token group, and of its product with the gradient.
#include <torch/csrc/stable/library.h>

#include "common/arguments.h"
#include "common/dispatch.h"
#include "common/recording.h"

namespace clue {
namespace {

struct Job : Recording {
  Dtype dtype;
  Rows x, grad;
};

template <int n, class T>
struct Activations {
  using Sums = ActivationSums<n, T>;
  TypedRows<const T> x;
  explicit CLUE_INLINE Activations(const Job& job) : x(job.x) {}

  CLUE_INLINE Stored<n, T> operator()(int64_t token, int64_t c, int64_t left) const {
    return load<n>(x.at(token, c), left);
  }
};

template <int n, class T>
struct Products {
  using Sums = ProductSums<n>;
  TypedRows<const T> x, grad;
  explicit CLUE_INLINE Products(const Job& job) : x(job.x), grad(job.grad) {}

  CLUE_INLINE Pair<n> operator()(int64_t token, int64_t c, int64_t left) const {
    const Pair<n> a = load<n>(x.at(token, c), left);
    const Pair<n> d = load<n>(grad.at(token, c), left);
    return {a.first * d.first, a.second * d.second};
  }
};

template <int n, template <int, class> class Source, class T>
CLUE_INLINE void run(const Job& job, int64_t begin, int64_t end) {
  record<n, T, typename Source<n, T>::Sums>(job, begin, end, Source<n, T>{job});
}

template <int n, template <int, class> class Source>
CLUE_INLINE void run_dtype(const Job& job, int64_t begin, int64_t end) {
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
  job.dtype = dtype_of(x, op, "x");
  job.tokens = x.size(0);
  job.channels = x.size(1);
  job.x = rows_of(x);
  return job;
}

void channel_statistics(const Tensor& x, const Tensor& group, const Tensor& statistics) {
  const char* op = "channel_statistics";
  Job job = job_of(x, op);
  record_in_parallel(job, group, statistics, 5, op, "statistics", activations);
}

void channel_attribution(const Tensor& x, const Tensor& grad, const Tensor& group,
                         const Tensor& gradient_statistics) {
  const char* op = "channel_attribution";
  Job job = job_of(x, op);
  require_like(grad, x, op, "grad", "x");
  job.grad = rows_of(grad);
  record_in_parallel(job, group, gradient_statistics, 3, op, "gradient_statistics", products);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def("channel_statistics(Tensor x, Tensor group, Tensor(a!) statistics) -> ()");
  m.def("channel_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) gradient_statistics) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) {
  m.impl("channel_statistics", TORCH_BOX(&channel_statistics));
  m.impl("channel_attribution", TORCH_BOX(&channel_attribution));
}

}  // namespace clue
