// One optimizer step on selected rows or columns of many weights: what a launch is told. No header of torch, so that
// nvcc compiles what includes this wherever it is found.
#pragma once
#include <cstdint>

#include "common/sparse_optimizer.h"

namespace clue {

enum class Element : uint32_t { float32, bfloat16, float16 };

// The selected part of one weight, or a range of its rows, as a matrix of `size` values in rows of `columns`.
template <class Factors>
struct DeviceSlice {
  float* value;  // the master values, or null: then the weight holds the values, rounded stochastically
  const float* grad;
  float* moments[2];
  void* weight;
  const int64_t* index;
  int64_t weight_stride;
  uint32_t size, columns;
  uint32_t first_position;  // of the random bits
  uint32_t first_block;     // of the grid
  uint32_t number;          // position of the weight in the lists
  Element element;
  bool by_columns;
  bool aligned;       // value, grad and moments, to 16 bytes
  bool aligned_rows;  // every four values lie in one row of the weight, at a multiple of their size
  RandomKey key;
  Factors factors;  // of the rule, from the learning rate, the weight decay and the step of the weight
};

// On the device, or null. With lr come weight_decay, step and, for stochastic rounding, seed: the kernel then works out
// factors and keys, so that a replayed CUDA graph follows their changes. Otherwise they are in the parts.
struct DeviceNumbers {
  const double *lr, *weight_decay;
  const int64_t *step, *seed;
  const float *grad_scale, *found_inf;
};

}  // namespace clue

// Update all slices on a stream of a device; null, or what went wrong. The slices are taken before they return.
extern "C" {
const char* clue_sparse_adamw(const clue::DeviceSlice<clue::AdamWFactors>* slices, int64_t count,
                              const clue::AdamWSettings* settings, const clue::DeviceNumbers* numbers, int device,
                              void* stream);
const char* clue_sparse_sgd(const clue::DeviceSlice<clue::SgdFactors>* slices, int64_t count,
                            const clue::SgdSettings<0>* settings, const clue::DeviceNumbers* numbers, int device,
                            void* stream);
const char* clue_sparse_sgd_momentum(const clue::DeviceSlice<clue::SgdFactors>* slices, int64_t count,
                                     const clue::SgdSettings<1>* settings, const clue::DeviceNumbers* numbers,
                                     int device, void* stream);
}
