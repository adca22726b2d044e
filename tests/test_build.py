"""What the build does where the extension cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("required", [False, True])
def test_a_failed_extension_is_a_slower_package_or_an_error(required: bool, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    compiler = {"CC": "false", "CXX": "false", "PATH": "/usr/bin:/bin"}  # none, and no nvcc
    environment = {**os.environ, **compiler, "CLUE_FAST_REQUIRE_EXTENSION": str(int(required))}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode != 0) == required, done.stderr[-2000:]
    assert ("the reference backend will be used" in done.stderr) != required
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_files_that_are_no_python_are_installed_too(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "clue_fast" / "html_report" / "report.css").read_text()
