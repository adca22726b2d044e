// The Python module clue_fast._C: what was built and what it runs on. The operators register themselves with
// torch as clue_fast_cpp::* when this library is loaded.
#include <pybind11/pybind11.h>

#include <torch/csrc/stable/ops.h>

#include "common/dispatch.h"

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["interface"] = 3;  // what INTERFACE of clue_fast/ops/backend.py asks for: raise both when arguments change
  info["torch"] = CLUE_FAST_TORCH;
  info["compiler"] = __VERSION__;
#ifdef CLUE_FAST_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

static py::dict cpu_info() {
  py::dict info;
  info["instruction_set"] = clue::name_of(clue::instruction_set());
  info["threads"] = torch::stable::get_num_threads();
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of clue_fast.";
  m.def("build_info", &build_info, "Compiler, torch version and whether the CUDA sources are in.");
  m.def("cpu_info", &cpu_info, "Instruction set in use and number of threads.");
  m.def("use_instruction_set", &clue::use_instruction_set, py::arg("name"),
        "Use 'baseline', 'x86-64-v3' or 'x86-64-v4' from now on; False if this machine cannot. For tests.");
}
