// The second stage of every recording: sums of runs into the accumulators.
#include "common/recording.h"

#include "common/dispatch.h"

namespace clue {
namespace {

// A plain loop over the channels, which the compiler turns into vector code.
template <int n>
CLUE_INLINE void folded(const Folding& folding, int64_t begin, int64_t end) {
  const float* partial = folding.partial;
  for (int64_t run = 0; run < folding.run_count; ++run)
    for (int64_t g = 0; g < folding.sums.groups; ++g) {
      const std::vector<int>& groups = folding.runs[run].groups;
      const bool occurs = std::find(groups.begin(), groups.end(), g) != groups.end();
      for (int field : folding.fields) {
        const float* row = partial;
        partial += folding.row_length;
        if (!occurs) continue;
        double* target = folding.sums.data + g * folding.sums.group_stride + field * folding.sums.field_stride;
        if (field == folding.maximum_field)
          for (int64_t c = begin; c < end; ++c) target[c] = row[c] > target[c] ? row[c] : target[c];
        else
          for (int64_t c = begin; c < end; ++c) target[c] += row[c];
      }
    }
}
CLUE_DISPATCH(folded, Folding)

}  // namespace

void fold(const Folding& folding, int64_t begin, int64_t end) { folded(folding, begin, end); }

}  // namespace clue
