// The scores of units by the closed forms of conflict_score, for the operators that add to the sums they are made of.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace clue {

enum class Criterion { difference, signed_difference, welch, ratio, attribution, forget_attribution };

// What the scores of neighboring units are made of, and where they go; nowhere if out is null.
struct Scoring {
  Criterion criterion;
  const double *forget, *retain;  // the first sum that the criterion reads; most read the next field too
  int64_t field_stride;
  const int64_t *forget_count, *retain_count;  // of each site
  int64_t count_stride;
  const int64_t* offsets;  // [sites + 1], where the units of each site begin; null for one site
  int64_t sites;
  float* out;
};

// The units [begin, end).
void score_units(const Scoring& scoring, int64_t begin, int64_t end);

// The last arguments of an operator that adds to `statistics`: criterion "" or one whose scores it writes as well.
// The criterion reads `source`, or `statistics` themselves. See Scoring in clue_fast/ops/conflict_score.py.
#define CLUE_SCORING "str criterion=\"\", Tensor? count=None, Tensor? source=None, Tensor(s!)? scores=None"
using OptionalTensor = std::optional<torch::stable::Tensor>;
struct ScoringArguments {
  std::string criterion;
  OptionalTensor count, source, scores;
};
Scoring scoring_of(const ScoringArguments& arguments, const torch::stable::Tensor& statistics, int64_t units,
                   const char* op);

}  // namespace clue
