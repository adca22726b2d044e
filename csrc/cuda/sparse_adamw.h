// The C interface between the binding to torch and the CUDA kernel.
#pragma once
#include "adamw.h"
#include "selected_update.h"

// Updates all parts on a stream of a device; null, or what went wrong. The parts are taken before it returns.
extern "C" const char* clue_sparse_adamw(const clue::SelectedPart<clue::AdamWFactors>* parts, int64_t count,
                                         const clue::AdamWSettings* settings, const clue::DeviceNumbers* numbers,
                                         int device, void* stream);
