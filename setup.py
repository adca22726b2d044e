"""Builds clue_fast and its extension clue_fast._C; without a compiler or torch the package installs without it."""

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
COMPILE_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def sources(folder: str, suffix: str) -> list[str]:
    """Sources below csrc, relative to the root as setuptools wants them, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


class BuildExtension(build_ext):
    """Compiles the extension against the installed torch; a failure costs the extension, not the installation."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension, or say in one line why it is left out."""
        try:
            self.add_torch(ext)
            self.add_cuda(ext)
            self.compile_in_parallel(ext)
            super().build_extension(ext)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"clue_fast: C++ extension not built, the reference backend will be used ({reason})", file=sys.stderr)

    def add_torch(self, ext: Extension) -> None:
        """Headers and library of torch; its copy of pybind11 serves too."""
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        ext.libraries += ["torch_cpu"]
        ext.define_macros += [("TORCH_TARGET_VERSION", TORCH_TARGET), ("CLUE_FAST_TORCH", f'"{torch.__version__}"')]

    def add_cuda(self, ext: Extension) -> None:
        """Objects of csrc/cuda wherever nvcc is found; they use the CUDA runtime alone and no header of torch."""
        nvcc = shutil.which("nvcc")
        files = sources("cuda", ".cu")
        if nvcc is None or not files:
            return
        objects = [str(Path(self.build_temp, f"{file}.o")) for file in files]
        try:
            for file, target in zip(files, objects, strict=True):
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                command = [
                    nvcc,
                    "-c",
                    file,
                    "-o",
                    target,
                    "-O3",
                    "-std=c++17",
                    "-Icsrc",
                    "-arch=all-major",
                    "-Xcompiler",
                    "-fPIC",
                ]
                subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            print(f"clue_fast: CUDA sources left out, nvcc failed: {error.stderr[-2000:]}", file=sys.stderr)
            return
        ext.extra_objects += objects
        ext.sources += sources("cuda", ".cpp")
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


def cuda_library_folders(nvcc: str) -> list[str]:
    """Folders that may hold the static CUDA runtime, as nvcc itself names them."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    lines = [line for line in dry_run.splitlines() if "LIBRARIES=" in line]
    return [word[2:].strip('"') for line in lines for word in line.replace('"', " ").split() if word.startswith("-L")]


extension = Extension(
    "clue_fast._C",
    sources=[*sources("", ".cpp"), *sources("cpu", ".cpp")],
    include_dirs=["csrc"],
    depends=sources("", ".h") + sources("cpu", ".h") + sources("cuda", ".h"),
    extra_compile_args=COMPILE_FLAGS,
    language="c++",
    optional=True,
)
setup(
    packages=[*find_packages(include=["clue_fast", "clue_fast.*"]), "clue_fast.kernels"],
    package_dir={"clue_fast.kernels": "kernels"},
    ext_modules=[] if os.environ.get("CLUE_FAST_NO_EXTENSION") else [extension],
    cmdclass={"build_ext": BuildExtension},
)
