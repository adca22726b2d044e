"""The CUDA operators' own tests with the compiler's sanitizers for addresses and undefined behaviour.

In processes of their own: Python is not built with the sanitizers, so their runtime is loaded before everything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_on_host.build import ROOT, compiler

# Each takes seconds, and reaches no line that the others do not.
LONG = "follows_float32 or as_exact or on_average or any_shape or number_of_threads or opcheck"


def runtime() -> str:
    """What is loaded first: the sanitizers, and the C++ library whose exceptions they watch."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"):
        command = [compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler()} has no {name}")
        found.append(path)
    return ":".join(found)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves what it ends with
        "CLUE_FAST_TEST_CUDA_ON_HOST": "sanitizers",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_operators_are_clean() -> None:
    files = [str(path) for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"cuda-on-host and not ({LONG})"]
    done = run("-m", "pytest", *options, *files)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


PROVOKE = """
from tests.cuda_on_host.build import Build
from tests.cuda_on_host.library import library
from tests.cuda_on_host.test_stand_in import KERNELS, provoke
provoke(library(Build((KERNELS,), "sanitizers")), {name!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"), [("shift_one_too_far", "heap-buffer-overflow"), ("sum_rows_misaligned", "misaligned address")]
)
def test_the_sanitizers_find_a_mistake(name: str, message: str) -> None:
    done = run("-c", PROVOKE.format(name=name))
    assert done.returncode != 0 and message in done.stderr, done.stderr[-4000:]
    assert "kernels.cu:" in done.stderr  # the line of the source
