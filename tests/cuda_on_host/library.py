"""The operators of csrc/cuda on CPU tensors, by the libraries that `build` makes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor

from clue_fast.ops import backend as backends
from tests.cuda_on_host.build import CSRC, Build, Changes, build

NUMBERS = ("lr", "weight_decay", "step", "seed")
"""Arguments that operators take from the CPU or from the device: here on the CPU, unless `numbers_on_device`."""


SMALL_PIECES = ("int64_t{1} << 31", "20000")
"""Parts of a weight with more values than 32 bits count come in pieces; here much smaller ones do."""


def operators(checks: str = "accesses", changes: Changes = ()) -> Build:
    """All of csrc/cuda."""
    sources = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda").glob("*.cpp")]
    return Build(tuple(sorted(sources)), checks, (SMALL_PIECES, *changes))


class Library:
    """One library of kernels.

    Attributes:
        numbers_on_device: whether operators find lr, weight_decay, step and seed on the device.
        given: tensors that the last operator found on the device.
    """

    def __init__(self, wanted: Build) -> None:
        path, self.namespace = build(wanted)
        self.numbers_on_device = False
        self.given: dict[str, Any] = {}
        self._schemas: torch.library.Library | None = None
        if wanted.with_torch:
            self._define_operators()
            torch.ops.load_library(path)
        self.functions = ctypes.CDLL(str(path))
        self.functions.cuda_on_host_replay.restype = ctypes.c_char_p

    def _define_operators(self) -> None:
        """Each operator of clue_fast_cpp, with its schema."""
        self._schemas = torch.library.Library(self.namespace, "DEF")
        for (_, backend), implementation in backends.IMPLEMENTATIONS.items():
            for name in implementation.names if backend == "cuda" else ():
                schema = str(getattr(torch.ops.clue_fast_cpp, name).default._schema)
                self._schemas.define(schema.removeprefix("clue_fast_cpp::"))

    def give(self, **tensors: Tensor | Sequence[Tensor]) -> None:
        """The memory that the next launches may use, and no byte beside it; errors name it so."""
        self.functions.cuda_on_host_take_all()
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                self._give(name, value)
            else:
                for i, tensor in enumerate(value):
                    self._give(f"{name}[{i}]", tensor)

    def _give(self, name: str, tensor: Tensor) -> None:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin, size = map(ctypes.c_size_t, (tensor.data_ptr(), (last + 1) * tensor.element_size()))
            self.functions.cuda_on_host_give(name.encode(), begin, size)

    def launch_function(self, name: str) -> Callable[..., None]:
        """An operator that is told of the tensors it is given, all of which count as on the device."""
        operator = getattr(getattr(torch.ops, self.namespace), name).default
        names = [argument.name for argument in operator._schema.arguments]

        def launch(*given: Any) -> None:
            self.given = {
                name: value
                for name, value in zip(names, given, strict=False)
                if (is_tensor(value) or (isinstance(value, (list, tuple)) and all(map(is_tensor, value))))
                and (self.numbers_on_device or name not in NUMBERS)
            }
            self.give(**self.given)
            operator(*given)

        return launch

    @contextmanager
    def captured(self) -> Iterator[Callable[[], None]]:
        """Launches within are kept and not run; what it gives runs them all, as a replayed CUDA graph does."""
        self.functions.cuda_on_host_capture(True)
        try:
            yield self._replay
        finally:
            self.functions.cuda_on_host_capture(False)

    def _replay(self) -> None:
        error = self.functions.cuda_on_host_replay()
        if error is not None:
            raise RuntimeError(error.decode())

    @contextmanager
    def as_backend(self, operator: str) -> Iterator[None]:
        """Within, the backend "cuda" of an operator is this library, on CPU tensors."""
        key, backend = (operator, "cuda"), backends.BACKENDS["cuda"]
        implementation = backends.IMPLEMENTATIONS[key]
        backends.IMPLEMENTATIONS[key] = backends.Implementation(implementation.names, self.launch_function)
        backends.BACKENDS["cuda"] = backends.Backend(lambda: None, ("cpu",), "CUDA on the host")
        backends._launch.cache_clear()
        try:
            yield
        finally:
            backends.IMPLEMENTATIONS[key], backends.BACKENDS["cuda"] = implementation, backend
            backends._launch.cache_clear()


@cache
def library(wanted: Build) -> Library:
    """Loads a library once; skips the test where the C++ extension, which knows the schemas, is missing."""
    if wanted.with_torch and backends.extension() is None:
        pytest.skip(str(backends.available()["cpp"]))
    return Library(wanted)
