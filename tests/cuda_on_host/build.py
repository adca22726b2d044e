"""Builds csrc/cuda for the CPU, with the headers of this folder in the place of CUDA's.

Three things of CUDA C++ are no C++ and are written out first, line by line, so that messages name the lines of the
source: launches with <<<>>>, parameters that are a __grid_constant__ (a reference here: a copy would cost every
thread 32 KB), and which tensors are on the device: those that the stand-in was told of.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"

COMMON = ("-std=c++17", "-fPIC", "-g1", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas")
CHECKS = {
    # The compiler calls the functions of access.cpp, once a vector; the sanitizer's own runtime is not linked.
    "accesses": ("-O2", "-fno-tree-sra", "-fsanitize=thread"),
    "sanitizers": ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
"""What a library is checked by: the stand-in itself, or the sanitizers for addresses and undefined behaviour."""

Changes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Build:
    """A library of kernels, and of the operators that launch them.

    Attributes:
        sources: .cu and .cpp files.
        checks: a key of CHECKS.
        changes: text of the sources -> what takes its place; how tests put mistakes in.
    """

    sources: tuple[Path, ...]
    checks: str = "accesses"
    changes: Changes = ()

    @property
    def with_torch(self) -> bool:
        return any(source.suffix == ".cpp" for source in self.sources)

    def translated(self, namespace: str) -> dict[str, str]:
        """The sources as C++, by the names of the files that they go to."""
        texts = {source: source.read_text(encoding="utf-8") for source in self.sources}
        for old, new in self.changes:
            assert any(old in text for text in texts.values()), f"no source has {old!r}"
            texts = {source: text.replace(old, new) for source, text in texts.items()}
        return {f"{source.name}.cpp": translate(text, source, namespace) for source, text in texts.items()}


def translate(text: str, source: Path, namespace: str) -> str:
    """CUDA C++ as C++, with the same lines."""
    launch = r"([\w:]+(?:<[^;(){}]*>)?)<<<(.*?)>>>\("
    text = re.sub(
        launch,
        r'::cuda_on_host::launch("\1", {\2}, [](const auto&... given) { \1(given...); }, ',
        text,
        flags=re.DOTALL,
    )
    text = re.sub(r"const __grid_constant__ ([\w:<>, ]+?) (\w+)(?=[,)])", r"const \1& \2", text)
    text = re.sub(r"([\w.]+)\.is_cuda\(\)", r"cuda_on_host::is_given(\1)", text)
    text = re.sub(r"([\w.]+)->is_cuda\(\)", r"cuda_on_host::is_given(*\1)", text)
    text = text.replace("LIBRARY_IMPL(clue_fast_cpp, CUDA,", f"LIBRARY_IMPL({namespace}, CPU,")
    header = "cuda_runtime.h" if source.suffix == ".cu" else "tensors.h"
    return f'#include "{header}"\n#line 1 "{source}"\n{text}'


@cache
def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++", "c++"])), None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(wanted: Build) -> tuple[Path, str]:
    """The library and the namespace of its operators; what was built before is taken from build/cuda_on_host."""
    key = _key(repr(wanted), *_headers(), *wanted.sources)
    namespace = f"cuda_on_host_{key}"
    library = CACHE / f"{namespace}.so"
    if not library.exists():
        with _folder(library.stem) as folder:
            objects = _compile(wanted, namespace, folder)
            link = ["-shared", "-Wl,-Bsymbolic", *(CHECKS[wanted.checks] if wanted.checks == "sanitizers" else ())]
            if wanted.with_torch:
                link += [*_torch("library_paths", "-L"), "-ltorch_cpu"]
            _run([compiler(), *objects, "-o", str(folder / library.name), *link])
            os.replace(folder / library.name, library)
    return library, namespace


def _compile(wanted: Build, namespace: str, folder: Path) -> list[str]:
    """Objects of the sources, side by side, and of the stand-in."""
    tasks = [lambda name=name: _own_object(HERE / name) for name in ("execution.cpp", "access.cpp")]
    for name, text in wanted.translated(namespace).items():
        (folder / name).write_text(text, encoding="utf-8")
        # The host's part has nothing that access.cpp looks at.
        plain = name.endswith(".cpp.cpp") and wanted.checks == "accesses"
        options = ("-O0",) if plain else CHECKS[wanted.checks]
        tasks.append(lambda name=name, options=options: _object(folder / name, folder / f"{name}.o", options))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [str(done.result()) for done in [pool.submit(task) for task in tasks]]


def _own_object(source: Path) -> Path:
    """Of the stand-in, which is not checked itself."""
    target = CACHE / f"{source.stem}_{_key(*_headers(), source)}.o"
    if not target.exists():
        with _folder(target.stem) as folder:
            os.replace(_object(source, folder / target.name, ("-O2",)), target)
    return target


def _object(source: Path, target: Path, options: tuple[str, ...]) -> Path:
    includes = [f"-I{HERE}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", *_torch("include_paths", "-isystem")]
    _run([compiler(), "-c", str(source), "-o", str(target), *COMMON, *options, *includes])
    return target


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    """Of this process alone: several may build the same."""
    folder = CACHE / f"{name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def _torch(kind: str, option: str) -> list[str]:
    from torch.utils import cpp_extension

    return [f"{option}{path}" for path in getattr(cpp_extension, kind)()]


def _headers() -> list[Path]:
    return [*HERE.rglob("*.h"), *CSRC.rglob("*.h"), HERE / "build.py"]


def _key(*parts: str | Path) -> str:
    """Of text and files, the compiler and torch: whatever a build depends on."""
    import torch

    texts = [f"{part}\n{part.read_text(encoding='utf-8')}" for part in sorted(p for p in parts if isinstance(p, Path))]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    everything = [version, torch.__version__, *(part for part in parts if isinstance(part, str)), *texts]
    return hashlib.sha256("\n".join(everything).encode()).hexdigest()[:16]
