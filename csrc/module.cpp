// The Python module clue_fast._C: what was built and what it runs on. The operators register themselves with
// torch as clue_fast_cpp::* when this library is loaded.
#include <pybind11/pybind11.h>

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["torch"] = CLUE_FAST_TORCH;
  info["compiler"] = __VERSION__;
#ifdef CLUE_FAST_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of clue_fast.";
  m.def("build_info", &build_info, "Compiler, torch version and whether the CUDA sources are in.");
}
