// Checks of tensor arguments; each error names the operator and the argument.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <sstream>
#include <stdexcept>

#include "common/parallel.h"
#include "common/recording.h"
#include "common/scoring.h"

namespace clue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Dtype { float32, bfloat16, float16 };

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

inline Dtype dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: fail(op, name, " must be float32, bfloat16 or float16");
  }
}

inline void require_type(const Tensor& tensor, ScalarType type, const char* op, const char* name,
                         const char* type_name) {
  require(tensor.scalar_type() == type, op, name, " must be ", type_name);
  require(tensor.is_cpu(), op, name, " must be on the CPU");
}

// [tokens, channels] on the CPU with neighboring channels.
inline void require_matrix(const Tensor& tensor, const char* op, const char* name) {
  require(tensor.is_cpu(), op, name, " must be on the CPU");
  require(tensor.dim() == 2, op, name, " must be [tokens, channels], but has ", tensor.dim(), " dimensions");
  require(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, name, " must have last stride 1");
}

struct Rows {
  void* data;
  int64_t stride;
};

inline Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0)}; }

template <class T>
struct TypedRows {
  T* data;
  int64_t stride;
  explicit CLUE_INLINE TypedRows(const Rows& rows) : data(static_cast<T*>(rows.data)), stride(rows.stride) {}
  CLUE_INLINE T* at(int64_t token, int64_t channel) const { return data + token * stride + channel; }
};

inline void require_like(const Tensor& tensor, const Tensor& other, const char* op, const char* name,
                         const char* other_name) {
  require_matrix(tensor, op, name);
  require(tensor.size(0) == other.size(0) && tensor.size(1) == other.size(1), op, name, " is [", tensor.size(0), ", ",
          tensor.size(1), "], but ", other_name, " is [", other.size(0), ", ", other.size(1), "]");
  require(tensor.scalar_type() == other.scalar_type(), op, name, " and ", other_name, " must have the same dtype");
}

inline const int8_t* group_of(const Tensor& group, int64_t tokens, const char* op) {
  require_type(group, ScalarType::Char, op, "group", "int8");
  require(group.dim() == 1 && group.size(0) == tokens, op, "group must be [", tokens, "], one entry a token");
  require(tokens <= 1 || group.stride(0) == 1, op, "group must be contiguous");
  return static_cast<const int8_t*>(group.const_data_ptr());
}

// float64 [groups, fields, channels] with neighboring channels.
inline Accumulators accumulators_of(const Tensor& statistics, int64_t fields, int64_t channels, const char* op,
                                    const char* name) {
  require_type(statistics, ScalarType::Double, op, name, "float64");
  require(statistics.dim() == 3 && statistics.size(1) == fields && statistics.size(2) == channels, op, name,
          " must be [groups, ", fields, ", ", channels, "]");
  require(channels <= 1 || statistics.stride(2) == 1, op, name, " must have last stride 1");
  return {static_cast<double*>(statistics.mutable_data_ptr()), statistics.size(0), statistics.stride(0),
          statistics.stride(1)};
}

// The fields of a set of sums, of the 5 of activations or the 3 of products; see SUMS in clue_fast/ops/accumulators.py.
inline std::vector<int> fields_of(SumSet set, int fields) {
  if (set == SumSet::moments) return {0, 1};
  if (set == SumSet::magnitude) return {fields == 5 ? 2 : 1};
  return fields == 5 ? std::vector<int>{0, 1, 2, 3, 4} : std::vector<int>{0, 1, 2};
}
inline SumSet sum_set_of(const std::string& name, int fields, const char* op) {
  if (name == "all") return SumSet::all;
  if (name == "moments" && fields == 5) return SumSet::moments;
  if (name == "magnitude") return SumSet::magnitude;
  fail(op, "unknown sums '", name, "'; choose one of: all, magnitude", fields == 5 ? ", moments" : "");
}

// Records with a job, which is a Recording: threads split runs and channels, and then, in the same parallel region,
// fold the sums of the runs, `runs_at_once` at a time. With `in_place` the job itself adds to the accumulators, and
// threads split the channels alone. The thread that has added the last run to the sums of its channels writes their
// scores, if any are asked for.
template <class Job>
void record_in_parallel(Job& job, const Tensor& group, const Tensor& statistics, int fields, const char* op,
                        const char* name, const ScoringArguments& arguments,
                        void (*record)(const Job&, int64_t, int64_t), int64_t tile_length = 8, bool in_place = false) {
  job.sums = accumulators_of(statistics, fields, job.channels, op, name);
  const std::vector<Run> runs = runs_of(group_of(group, job.tokens, op), job.tokens, job.sums.groups, tile_length);
  const Scoring scoring = scoring_of(arguments, statistics, job.channels, op);
  if (job.tokens == 0) return;
  const int64_t count = runs.size(), row = row_length(job.channels), blocks = row / channel_block;
  if (in_place) {
    job.runs = runs.data();
    job.runs_end = job.runs + count;
    return in_parallel(job.channels, channel_block, channel_block * job.tokens, [&](int64_t begin, int64_t end) {
      record(job, begin, end);
      if (scoring.out) score_units(scoring, begin, end);
    });
  }
  const std::vector<int> summed = fields_of(job.set, fields);
  const int64_t asked = summed.size(), size = job.sums.groups * asked * row;  // of the sums of one run
  const int64_t parts = std::min(threads_for(job.tokens * job.channels), std::min(count, runs_at_once) * blocks);
  const int64_t scratch_size = job.sums.groups * asked * span_length;
  const std::unique_ptr<float[]> partial(new float[std::min(count, runs_at_once) * size]);
  const std::unique_ptr<float[]> scratch(new float[parts * scratch_size]);
  const auto record_runs = [&](int64_t first, int64_t begin, int64_t end, float* scratch_of_part) {
    Job mine = job;
    mine.scratch = scratch_of_part;
    for (int64_t at = begin; at < end;) {
      const int64_t run = at / blocks, stop = std::min(end, (run + 1) * blocks);
      mine.runs = runs.data() + first + run;
      mine.runs_end = mine.runs + 1;
      mine.partial = partial.get() + run * size;
      record(mine, (at - run * blocks) * channel_block, std::min(job.channels, (stop - run * blocks) * channel_block));
      at = stop;
    }
  };
  const auto fold_runs = [&](int64_t first, int64_t at_once, int64_t begin, int64_t end) {
    fold({runs.data() + first, at_once, row, partial.get(), job.sums, summed, fields == 5 ? 3 : -1}, begin, end);
    if (scoring.out && first + at_once == count) score_units(scoring, begin, end);
  };
  const int64_t stages = 2 * ((count + runs_at_once - 1) / runs_at_once);
  in_stages(stages, parts, [&](int64_t stage, int64_t part) {
    const int64_t first = stage / 2 * runs_at_once, at_once = std::min(runs_at_once, count - first);
    if (stage % 2 == 0)
      return record_runs(first, at_once * blocks * part / parts, at_once * blocks * (part + 1) / parts,
                         scratch.get() + part * scratch_size);
    fold_runs(first, at_once, blocks * part / parts * channel_block,
              std::min(job.channels, blocks * (part + 1) / parts * channel_block));
  });
}

}  // namespace clue
