"""What all tests share: Triton's interpreter where there is no GPU, one thread by default, and the real data."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # only has an effect before the first import of triton

import pytest


def pytest_report_header() -> str:
    """Which versions are tested, and with which instructions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{versions}; PyTorch with {torch.backends.cpu.get_cpu_capability()}, clue_fast with {instruction_set()}"


def instruction_set() -> str:
    """The one that the C++ operators use, or a lesser one that ``make test-portable`` asks for."""
    from clue_fast.ops import backend

    extension = backend.extension()
    if extension is None:
        return "none"
    wanted = os.environ.get("CLUE_FAST_TEST_INSTRUCTION_SET")
    if wanted and not extension.use_instruction_set(wanted):
        pytest.exit(f"this machine has no {wanted}", returncode=0)
    return str(extension.cpu_info()["instruction_set"])


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real inputs; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CLUE_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CLUE_FAST_DATA to its folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, whatever was asked for on the command line."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
