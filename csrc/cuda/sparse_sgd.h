// The C interface between the binding to torch and the CUDA kernels.
#pragma once
#include "selected_update.h"
#include "sgd.h"

// Update all parts on a stream of a device; null, or what went wrong. The parts are taken before they return.
extern "C" {
const char* clue_sparse_sgd(const clue::SelectedPart<clue::SgdFactors>* parts, int64_t count,
                            const clue::SgdSettings<0>* settings, const clue::DeviceNumbers* numbers, int device,
                            void* stream);
const char* clue_sparse_sgd_momentum(const clue::SelectedPart<clue::SgdFactors>* parts, int64_t count,
                                     const clue::SgdSettings<1>* settings, const clue::DeviceNumbers* numbers,
                                     int device, void* stream);
}
