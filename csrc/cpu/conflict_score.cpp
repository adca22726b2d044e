// The score of every unit of every site from its statistics, by a closed formula in fp64.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/arguments.h"
#include "common/dispatch.h"

namespace clue {
namespace {

enum class Criterion { difference, ratio, attribution };

struct Job {
  Criterion criterion;
  const double *forget, *retain;  // the first sum that the criterion reads; "difference" reads the next field too
  int64_t field_stride;
  const int64_t *forget_count, *retain_count;
  int64_t count_stride;
  const int64_t* offsets;
  int64_t sites;
  float* out;
};

// The units [begin, end) of one site; a plain loop, which the compiler turns into vector code.
template <Criterion criterion>
CLUE_INLINE void score_site(const Job& job, int64_t begin, int64_t end, double forget_count, double retain_count) {
  const double *forget = job.forget, *retain = job.retain;
  for (int64_t unit = begin; unit < end; ++unit) {
    const double forget_mean = forget[unit] / forget_count;
    const double retain_mean = retain[unit] / retain_count;
    double score;
    if (criterion == Criterion::ratio) {
      score = forget_mean / (retain_mean + 0.01);
    } else if (criterion == Criterion::attribution) {
      score = forget_mean - retain_mean;
    } else {
      double forget_variance = forget[unit + job.field_stride] / forget_count - forget_mean * forget_mean;
      double retain_variance = retain[unit + job.field_stride] / retain_count - retain_mean * retain_mean;
      forget_variance = forget_variance < 0 ? 0 : forget_variance;  // NaN stays NaN
      retain_variance = retain_variance < 0 ? 0 : retain_variance;
      score = std::abs(forget_mean - retain_mean) / std::sqrt(0.5 * (forget_variance + retain_variance) + 1e-12);
    }
    job.out[unit] = static_cast<float>(score);
  }
}

template <Criterion criterion>
CLUE_INLINE void score_sites(const Job& job, int64_t begin, int64_t end) {
  int64_t site = std::upper_bound(job.offsets, job.offsets + job.sites, begin) - job.offsets - 1;
  for (; begin < end; ++site) {
    const int64_t stop = std::min(end, job.offsets[site + 1]);
    score_site<criterion>(job, begin, stop, job.forget_count[site * job.count_stride],
                          job.retain_count[site * job.count_stride]);
    begin = stop;
  }
}

template <int n>
CLUE_INLINE void score_units(const Job& job, int64_t begin, int64_t end) {
  switch (job.criterion) {
    case Criterion::difference: return score_sites<Criterion::difference>(job, begin, end);
    case Criterion::ratio: return score_sites<Criterion::ratio>(job, begin, end);
    case Criterion::attribution: return score_sites<Criterion::attribution>(job, begin, end);
  }
}
CLUE_DISPATCH(score_units, Job)

constexpr const char* op = "conflict_score";

void read_statistics(Job& job, const Tensor& statistics, int64_t fields, int64_t field, int64_t units,
                     const char* name) {
  const Accumulators sums = accumulators_of(statistics, fields, units, op, name);
  require(sums.groups >= 2, op, name, " must have the rows of two groups, forget and retain");
  job.forget = sums.data + field * sums.field_stride;
  job.retain = job.forget + sums.group_stride;
  job.field_stride = sums.field_stride;
}

void conflict_score(const Tensor& statistics, std::optional<Tensor> gradient_statistics, const Tensor& count,
                    const Tensor& offsets, std::string criterion, const Tensor& out) {
  require_type(out, ScalarType::Float, op, "out", "float32");
  const int64_t units = out.numel();
  require(out.dim() == 1 && (units <= 1 || out.stride(0) == 1), op, "out must be [units], contiguous");

  Job job{};
  if (criterion == "difference") {
    job.criterion = Criterion::difference;
    read_statistics(job, statistics, 5, 0, units, "statistics");
  } else if (criterion == "ratio") {
    job.criterion = Criterion::ratio;
    read_statistics(job, statistics, 5, 2, units, "statistics");
  } else if (criterion == "attribution") {
    job.criterion = Criterion::attribution;
    require(gradient_statistics.has_value(), op, "criterion 'attribution' needs gradient_statistics");
    read_statistics(job, *gradient_statistics, 3, 1, units, "gradient_statistics");
  } else {
    fail(op, "unknown criterion '", criterion, "'; choose one of: attribution, difference, ratio");
  }

  require_type(offsets, ScalarType::Long, op, "offsets", "int64");
  require(offsets.dim() == 1 && offsets.size(0) >= 1 && (offsets.size(0) == 1 || offsets.stride(0) == 1), op,
          "offsets must be [sites + 1], contiguous");
  job.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  job.sites = offsets.size(0) - 1;
  require(job.offsets[0] == 0 && job.offsets[job.sites] == units &&
              std::is_sorted(job.offsets, job.offsets + job.sites + 1),
          op, "offsets must rise from 0 to the ", units, " units");

  require_type(count, ScalarType::Long, op, "count", "int64");
  require(count.dim() == 2 && count.size(0) >= 2 && count.size(1) == job.sites, op, "count must be [groups, ",
          job.sites, "]");
  job.forget_count = static_cast<const int64_t*>(count.const_data_ptr());
  job.retain_count = job.forget_count + count.stride(0);
  job.count_stride = count.stride(1);

  job.out = static_cast<float*>(out.mutable_data_ptr());
  in_parallel(units, 1, 1, [&](int64_t begin, int64_t end) { score_units(job, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(clue_fast_cpp, m) {
  m.def(
      "conflict_score(Tensor statistics, Tensor? gradient_statistics, Tensor count, Tensor offsets, str criterion, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(clue_fast_cpp, CPU, m) { m.impl("conflict_score", TORCH_BOX(&conflict_score)); }

}  // namespace clue
