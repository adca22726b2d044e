"""Builds clue_fast and its extension clue_fast._C; without a compiler or torch the package installs without it.

CLUE_FAST_REQUIRE_EXTENSION=1 makes a failed extension an error, CLUE_FAST_NO_EXTENSION=1 leaves it out.
CLUE_FAST_CUDA_ARCH=native compiles for the GPU at hand alone, which takes less time than for every generation.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: one binary for it and every later release
CPP_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
CUDA_ARCH = os.environ.get("CLUE_FAST_CUDA_ARCH", "all-major")
CUDA_FLAGS = ["-std=c++17", "-O3", f"-arch={CUDA_ARCH}", "-Xcompiler", "-fPIC"]


def asked(variable: str) -> bool:
    """Whether an environment variable is set, to anything but 0."""
    return os.environ.get(variable, "") not in ("", "0")


def files(*patterns: str) -> list[str]:
    """Files below csrc, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


class BuildExtension(build_ext):
    """Compiles the extension against the installed torch."""

    def build_extension(self, ext: Extension) -> None:
        """Build the extension, or say in one line why it is left out."""
        try:
            add_torch(ext)
            self.add_cuda(ext)
            self.compile_in_parallel(ext)
            super().build_extension(ext)
        except Exception as error:
            if asked("CLUE_FAST_REQUIRE_EXTENSION"):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"clue_fast: C++ extension not built, the reference backend will be used ({reason})", file=sys.stderr)

    def add_cuda(self, ext: Extension) -> None:
        """Objects of csrc/cuda wherever nvcc is found; they use the CUDA runtime alone and no header of torch."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return
        objects = []
        for file in files("cuda/*.cu"):
            objects.append(str(Path(self.build_temp, f"{file}.o")))
            Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
            command = [nvcc, "-c", file, "-o", objects[-1], "-Icsrc", *CUDA_FLAGS]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                print(f"clue_fast: CUDA sources left out, nvcc failed: {done.stderr[-2000:]}", file=sys.stderr)
                return
        ext.extra_objects += objects
        ext.sources += files("cuda/*.cpp")
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ext.library_dirs += cuda_library_folders(nvcc)
        ext.define_macros += [("CLUE_FAST_CUDA", "1")]

    def compile_in_parallel(self, ext: Extension) -> None:
        """Compile the files side by side and hand the objects to the linking step."""
        options = {
            "output_dir": self.build_temp,
            "macros": ext.define_macros,
            "include_dirs": ext.include_dirs,
            "extra_postargs": ext.extra_compile_args,
            "depends": ext.depends,
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda source: self.compiler.compile([source], **options), ext.sources)
            ext.extra_objects += [target for group in compiled for target in group]
        ext.sources = []
        ext.depends += ext.extra_objects  # or the linking step would not see what changed


def add_torch(ext: Extension) -> None:
    """Headers of pybind11, before the copy that torch brings, and headers and library of torch."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    ext.include_dirs += [pybind11.get_include(), *include_paths()]
    ext.library_dirs += library_paths()
    ext.libraries += ["torch_cpu"]
    ext.define_macros += [("TORCH_TARGET_VERSION", TORCH_TARGET), ("CLUE_FAST_TORCH", f'"{torch.__version__}"')]


def cuda_library_folders(nvcc: str) -> list[str]:
    """Folders that may hold the static CUDA runtime, as nvcc itself names them."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    lines = [line for line in dry_run.splitlines() if "LIBRARIES=" in line]
    return [word[2:].strip('"') for line in lines for word in line.replace('"', " ").split() if word.startswith("-L")]


extension = Extension(
    "clue_fast._C",
    sources=files("*.cpp", "common/*.cpp", "cpu/*.cpp"),
    include_dirs=["csrc"],
    depends=files("**/*.h"),
    extra_compile_args=CPP_FLAGS,
    language="c++",
    optional=not asked("CLUE_FAST_REQUIRE_EXTENSION"),
)
setup(
    packages=[*find_packages(include=["clue_fast", "clue_fast.*"]), "clue_fast.kernels"],
    package_dir={"clue_fast.kernels": "kernels"},
    ext_modules=[] if asked("CLUE_FAST_NO_EXTENSION") else [extension],
    cmdclass={"build_ext": BuildExtension},
)
