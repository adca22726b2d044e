// AdamW on selected rows or columns of many weights in one launch.
#include "sparse_adamw.h"

#include "selected_update.cuh"

namespace clue {
namespace {

struct AdamW : AdamWSettings {
  __device__ float operator()(float x, float g, float* moment, const AdamWFactors& factors) const {
    moment[0] = beta1 * moment[0] + rest1 * g;
    moment[1] = beta2 * moment[1] + rest2 * (g * g);
    const float step = factors.rate * (moment[0] / (sqrtf(moment[1]) * factors.root + eps));
    // Not fused with the difference: PyTorch rounds this product, and what is left out adds up over the steps.
    return __fmul_rn(factors.keep, x) - step;
  }
};

}  // namespace
}  // namespace clue

extern "C" const char* clue_sparse_adamw(const clue::SelectedPart<clue::AdamWFactors>* parts, int64_t count,
                                         const clue::AdamWSettings* settings, const clue::DeviceNumbers* numbers,
                                         int device, void* stream) {
  return clue::selected_update(parts, count, clue::AdamW{*settings}, *numbers, device, stream);
}
