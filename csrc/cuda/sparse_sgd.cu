// Stochastic gradient descent on selected rows or columns of many weights in one launch.
#include "sparse_sgd.h"

#include "selected_update.cuh"

namespace clue {
namespace {

template <int count>
struct Sgd : SgdSettings<count> {
  __device__ float operator()(float x, float g, float* moment, const SgdFactors& factors) const {
    float direction = g + factors.weight_decay * x;
    if (count == 1) direction = moment[0] = this->momentum * moment[0] + direction;
    return x - factors.lr * direction;
  }
};

}  // namespace
}  // namespace clue

const char* clue_sparse_sgd(const clue::SelectedPart<clue::SgdFactors>* parts, int64_t count,
                            const clue::SgdSettings<0>* settings, const clue::DeviceNumbers* numbers, int device,
                            void* stream) {
  return clue::selected_update(parts, count, clue::Sgd<0>{*settings}, *numbers, device, stream);
}

const char* clue_sparse_sgd_momentum(const clue::SelectedPart<clue::SgdFactors>* parts, int64_t count,
                                     const clue::SgdSettings<1>* settings, const clue::DeviceNumbers* numbers,
                                     int device, void* stream) {
  return clue::selected_update(parts, count, clue::Sgd<1>{*settings}, *numbers, device, stream);
}
