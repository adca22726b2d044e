"""Runs every operator test on each backend that implements the operator; skips say why one is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from clue_fast.errors import BackendError
from clue_fast.ops import backend as backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test module names its operator; a test that takes `backend` runs on each backend of that operator."""
    if "backend" in metafunc.fixturenames:
        operator = backends.OPERATORS[metafunc.module.OPERATOR]
        metafunc.parametrize("backend", operator.backends, indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        backends.choose(request.module.OPERATOR, _device(name), name)
    except BackendError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture
def device(backend: str) -> torch.device:
    return _device(backend)


def _device(backend: str) -> torch.device:
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
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
