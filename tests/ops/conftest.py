"""Runs every operator test on each backend that implements the operator; skips say why one is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from clue_fast.errors import BackendError
from clue_fast.ops import backend as backends
from tests.cuda_on_host.library import library, operators

LESSER_INSTRUCTION_SETS = ("baseline", "x86-64-v3")  # the best that the machine has is what "cpp" runs
REQUIRE_GPU = os.environ.get("CLUE_FAST_TEST_REQUIRE_GPU") == "1"  # make gpu-check: what cannot run is no success
ON_HOST = "CUDA on the CPU"
CHECKS = os.environ.get("CLUE_FAST_TEST_CUDA_ON_HOST", "accesses")  # tests/cuda_on_host/test_sanitizers.py sets it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test module names its operator; a test that takes `backend` runs on each backend of that operator."""
    if "backend" in metafunc.fixturenames:
        implemented = backends.operators()[metafunc.module.OPERATOR]
        cases = [pytest.param((name, None), id=name) for name in implemented]
        if "cpp" in implemented:
            slow = pytest.mark.slow
            cases += [pytest.param(("cpp", name), id=f"cpp-{name}", marks=slow) for name in LESSER_INSTRUCTION_SETS]
        if "cuda" in implemented:
            cases.append(pytest.param(("cuda", ON_HOST), id="cuda-on-host"))
        metafunc.parametrize("backend", cases, indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name, instruction_set = request.param
    if instruction_set == ON_HOST:
        with library(operators(CHECKS)).as_backend(request.module.OPERATOR):
            yield name
        return
    try:
        backends.choose(request.module.OPERATOR, _device(name), name)
    except BackendError as error:
        (pytest.fail if REQUIRE_GPU else pytest.skip)(str(error))
    if instruction_set is None:
        yield name
        return
    extension = backends.extension()
    best = extension.cpu_info()["instruction_set"]
    if not extension.use_instruction_set(instruction_set):
        pytest.skip(f"this machine has no {instruction_set}")
    yield name
    extension.use_instruction_set(best)


@pytest.fixture
def device(backend: str) -> torch.device:
    return _device(backend)


def _device(backend: str) -> torch.device:
    """The GPU, where the backend runs on it: the stand-in for CUDA does not."""
    on_gpu = "cuda" in (backends.BACKENDS[backend].devices or ()) and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
