// h = act(gate) * up and its gradients, alone or with the statistics of h, or of h * dL/dh, recorded on the way.
#include <torch/csrc/stable/library.h>

#include "common/activation.h"
#include "common/arguments.h"
#include "common/dispatch.h"
#include "common/recording.h"

namespace clue {
namespace {

struct Job : Recording {
  Dtype dtype;
  Activation activation;
  Rows gate, up, out;             // forward
  Rows grad, grad_gate, grad_up;  // backward
};

// Forward, whole rows of a tile first, as they lie in memory; what is recorded is then h as stored, from the cache.
template <int n, class T, class Act>
struct Forward {
  using Sums = ActivationSums<n, T>;
  static constexpr bool has_moments = true;
  TypedRows<const T> gate, up;
  TypedRows<T> out;
  explicit CLUE_INLINE Forward(const Job& job) : gate(job.gate), up(job.up), out(job.out) {}

  CLUE_INLINE void compute(int64_t token, int64_t c, int64_t left) const {
    const Pair<n> g = load<n>(gate.at(token, c), left);
    const Pair<n> u = load<n>(up.at(token, c), left);
    const Pair<n> h = {Act::template value<n, T>(g.first) * u.first, Act::template value<n, T>(g.second) * u.second};
    store<n>(out.at(token, c), h, left);
  }
  CLUE_INLINE void prepare(const Tile& tile, int64_t begin, int64_t end, int64_t left) const {
    for (int64_t token = tile.first; token < tile.first + tile.count; ++token)
      for (int64_t c = begin; c < end; c += 2 * n) compute(token, c, left - (c - begin));
  }
  CLUE_INLINE Stored<n, T> operator()(int64_t token, int64_t c, int64_t left) const {
    return load<n>(static_cast<const T*>(out.at(token, c)), left);
  }
};

// Backward, a pair of channels of one token at a time; returns h * dL/dh, h being recomputed.
template <int n, class T, class Act>
struct Backward {
  using Sums = ProductSums<n>;
  static constexpr bool has_moments = false;
  TypedRows<const T> grad, gate, up;
  TypedRows<T> grad_gate, grad_up;
  explicit CLUE_INLINE Backward(const Job& job)
      : grad(job.grad), gate(job.gate), up(job.up), grad_gate(job.grad_gate), grad_up(job.grad_up) {}

  CLUE_INLINE void compute(int64_t token, int64_t c, int64_t left) const { (*this)(token, c, left); }
  CLUE_INLINE void prepare(const Tile& tile, int64_t begin, int64_t end, int64_t left) const {
    for (int64_t token = tile.first; tile.group < 0 && token < tile.first + tile.count; ++token)
      for (int64_t c = begin; c < end; c += 2 * n) compute(token, c, left - (c - begin));
  }
  CLUE_INLINE Pair<n> operator()(int64_t token, int64_t c, int64_t left) const {
    const Pair<n> g = load<n>(gate.at(token, c), left);
    const Pair<n> u = load<n>(up.at(token, c), left);
    const Pair<n> d = load<n>(grad.at(token, c), left);
    Pair<n> slope;
    const Pair<n> act = {Act::template value<n, T>(g.first, slope.first),
                         Act::template value<n, T>(g.second, slope.second)};
    store<n>(grad_gate.at(token, c), {d.first * u.first * slope.first, d.second * u.second * slope.second}, left);
    store<n>(grad_up.at(token, c), {d.first * act.first, d.second * act.second}, left);
    const Pair<n> h = rounded_to<n>(grad_up.data, {act.first * u.first, act.second * u.second});
    return {h.first * d.first, h.second * d.second};
  }
};

// Without recording, of the tokens [begin, end); with it, of one run and the channels [begin, end).
template <int n, class T, class Step>
CLUE_INLINE void run(const Job& job, int64_t begin, int64_t end) {
  const Step step{job};
  if (job.runs) {
    if constexpr (Step::has_moments)
      if (job.set == SumSet::moments) return record<n, T, MomentSums<n>>(job, begin, end, step);
    if (job.set == SumSet::magnitude) return record<n, T, MagnitudeSums<n>>(job, begin, end, step);
    return record<n, T, typename Step::Sums>(job, begin, end, step);
  }
  for (int64_t token = begin; token < end; ++token)
    for (int64_t c = 0; c < job.channels; c += 2 * n) step.compute(token, c, job.channels - c);
}

template <int n, template <int, class, class> class Step, class T>
CLUE_INLINE void run_activation(const Job& job, int64_t begin, int64_t end) {
  switch (job.activation) {
    case Activation::silu: return run<n, T, Step<n, T, Silu>>(job, begin, end);
    case Activation::gelu_tanh: return run<n, T, Step<n, T, GeluTanh>>(job, begin, end);
    case Activation::gelu: return run<n, T, Step<n, T, Gelu>>(job, begin, end);
    case Activation::relu: return run<n, T, Step<n, T, Relu>>(job, begin, end);
    case Activation::relu2: return run<n, T, Step<n, T, Relu2>>(job, begin, end);
  }
}

template <int n, template <int, class, class> class Step>
CLUE_INLINE void run_dtype(const Job& job, int64_t begin, int64_t end) {
  switch (job.dtype) {
    case Dtype::float32: return run_activation<n, Step, float>(job, begin, end);
    case Dtype::bfloat16: return run_activation<n, Step, BFloat16>(job, begin, end);
    case Dtype::float16: return run_activation<n, Step, Half>(job, begin, end);
  }
}

template <int n>
CLUE_INLINE void forward(const Job& job, int64_t begin, int64_t end) {
  run_dtype<n, Forward>(job, begin, end);
}
template <int n>
CLUE_INLINE void backward(const Job& job, int64_t begin, int64_t end) {
  run_dtype<n, Backward>(job, begin, end);
}
CLUE_DISPATCH(forward, Job)
CLUE_DISPATCH(backward, Job)

Job job_of(const Tensor& gate, const Tensor& up, const std::string& activation, const char* op) {
  require_matrix(gate, op, "gate");
  require_like(up, gate, op, "up", "gate");
  Job job{};
  job.dtype = dtype_of(gate, op, "gate");
  job.activation = activation_of(activation, op);
  job.tokens = gate.size(0);
  job.channels = gate.size(1);
  job.gate = rows_of(gate);
  job.up = rows_of(up);
  return job;
}

Job forward_job(const Tensor& gate, const Tensor& up, const Tensor& out, const std::string& activation,
                const char* op) {
  Job job = job_of(gate, up, activation, op);
  require_like(out, gate, op, "out", "gate");
  job.out = rows_of(out);
  return job;
}

Job backward_job(const Tensor& grad, const Tensor& gate, const Tensor& up, const Tensor& grad_gate,
                 const Tensor& grad_up, const std::string& activation, const char* op) {
  Job job = job_of(gate, up, activation, op);
  require_like(grad, gate, op, "grad", "gate");
  require_like(grad_gate, gate, op, "grad_gate", "gate");
  require_like(grad_up, gate, op, "grad_up", "gate");
  job.grad = rows_of(grad);
  job.grad_gate = rows_of(grad_gate);
  job.grad_up = rows_of(grad_up);
  return job;
}

using Function = void (*)(const Job&, int64_t, int64_t);

void by_tokens(const Job& job, Function function) {
  in_parallel(job.tokens, 1, job.channels, [&](int64_t begin, int64_t end) { function(job, begin, end); });
}

void gated_activation(const Tensor& gate, const Tensor& up, const Tensor& out, std::string activation) {
  by_tokens(forward_job(gate, up, out, activation, "gated_activation"), forward);
}

void gated_activation_record(const Tensor& gate, const Tensor& up, const Tensor& out, std::string activation,
                             const Tensor& group, const Tensor& statistics, std::string sums,
                             std::string criterion, OptionalTensor count, OptionalTensor source,
                             OptionalTensor scores) {
  const char* op = "gated_activation_record";
  Job job = forward_job(gate, up, out, activation, op);
  job.set = sum_set_of(sums, 5, op);
  const int64_t tile_length = job.dtype == Dtype::float32 ? 8 : 16;  // of 4,096 channels, 128 kB that are counted next
  record_in_parallel(job, group, statistics, 5, op, "statistics", {criterion, count, source, scores}, forward,
                     tile_length);
}

void gated_activation_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, const Tensor& grad_gate,
                               const Tensor& grad_up, std::string activation) {
  by_tokens(backward_job(grad, gate, up, grad_gate, grad_up, activation, "gated_activation_backward"), backward);
}

void gated_activation_backward_record(const Tensor& grad, const Tensor& gate, const Tensor& up,
                                      const Tensor& grad_gate, const Tensor& grad_up, std::string activation,
                                      const Tensor& group, const Tensor& gradient_statistics, std::string sums,
                                      std::string criterion, OptionalTensor count, OptionalTensor source,
                                      OptionalTensor scores) {
  const char* op = "gated_activation_backward_record";
  Job job = backward_job(grad, gate, up, grad_gate, grad_up, activation, op);
  job.set = sum_set_of(sums, 3, op);
  record_in_parallel(job, group, gradient_statistics, 3, op, "gradient_statistics",
                     {criterion, count, source, scores}, backward);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def("gated_activation(Tensor gate, Tensor up, Tensor(a!) out, str activation) -> ()");
  m.def(
      "gated_activation_record(Tensor gate, Tensor up, Tensor(a!) out, str activation, Tensor group, "
      "Tensor(b!) statistics, str sums=\"all\", " CLUE_SCORING ") -> ()");
  m.def(
      "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) grad_gate, Tensor(b!) grad_up, "
      "str activation) -> ()");
  m.def(
      "gated_activation_backward_record(Tensor grad, Tensor gate, Tensor up, Tensor(a!) grad_gate, "
      "Tensor(b!) grad_up, str activation, Tensor group, Tensor(c!) gradient_statistics, "
      "str sums=\"all\", " CLUE_SCORING ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) {
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_record", TORCH_BOX(&gated_activation_record));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("gated_activation_backward_record", TORCH_BOX(&gated_activation_backward_record));
}

}  // namespace clue
