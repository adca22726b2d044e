// The stream that torch works on.
#pragma once
#include <dlfcn.h>

#include "common/arguments.h"

namespace clue {

// The symbol lives in libtorch_cuda, which a CPU build of torch lacks: it is looked up, so that the extension loads
// with either.
inline void* current_stream(int32_t device, const char* op) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  require(function != nullptr, op, "this torch has no CUDA");
  void* stream = nullptr;
  require(function(device, &stream) == AOTI_TORCH_SUCCESS, op, "no CUDA stream on device ", device);
  return stream;
}

}  // namespace clue
