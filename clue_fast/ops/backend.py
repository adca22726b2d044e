"""The operators in the dispatcher, for torch.compile and export: namespace `clue_fast`, on every device.

Which backend runs an operator, and why not another.

`reference` is plain PyTorch and the definition of every operator; `cpp` is the C++ extension on CPU; `triton`
runs on CUDA, ROCm and XPU, and on CPU tensors in its interpreter; `cuda` is the CUDA part of the extension.
Every backend offers the same launch functions: they write into the tensors they are given and return None.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from clue_fast.errors import BackendError, UnknownNameError

logger = logging.getLogger(__name__)

NAMESPACE = "clue_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator: what it computes on any device, and what it returns for tensors without data."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def define_autograd(name: str, run: Callable[..., Any]) -> None:
    """Give an operator its autograd by hand: `register_autograd` takes none that writes into an argument."""
    _library.impl(name, run, "Autograd")  # type: ignore[no-untyped-call]


BACKENDS = ("reference", "cpp", "triton", "cuda")
ENVIRONMENT_VARIABLE = "CLUE_FAST_BACKEND"
PREFERENCE = {
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}

Launch = Callable[..., None]


@dataclass(frozen=True)
class Operator:
    """One operator: its name, the backends that implement it, and its reference launch functions by name."""

    name: str
    backends: tuple[str, ...]
    reference: Mapping[str, Launch]


@dataclass(frozen=True)
class Choice:
    """The backend an operator runs on, and why that one."""

    name: str
    reason: str


OPERATORS: dict[str, Operator] = {}
_warned = False


def register(name: str, backends: tuple[str, ...], reference: Mapping[str, Launch]) -> None:
    """Make an operator known; each file of this folder does so once."""
    OPERATORS[name] = Operator(name, backends, reference)


@cache
def extension() -> ModuleType | None:
    """The C++ extension `clue_fast._C`, or None where it is not built or does not load."""
    return _load_extension()[0]


@cache
def _load_extension() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("clue_fast._C"), None
    except ModuleNotFoundError:
        return None, "the C++ extension is not built; reinstall clue_fast with a C++ compiler present"
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); reinstall clue_fast against this torch"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which accepts CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> dict[str, str | None]:
    """Every backend with None if it can run in this process, or else the reason why it cannot."""
    return {name: _obstacle(name) for name in BACKENDS}


def _obstacle(backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.is_available() or torch.xpu.is_available() or interpreting():
            return None
        return "no CUDA, ROCm or XPU device"
    module, reason = _load_extension()
    if module is None or backend == "cpp":
        return reason
    if not module.build_info().get("cuda"):
        return "the extension was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def _misfit(backend: str, operator: Operator, device: str) -> str | None:
    """Why a backend that can run here does not run this operator on tensors of a device type."""
    if backend in ("cpp", "cuda"):
        missing = [name for name in operator.reference if not hasattr(torch.ops.clue_fast_cpp, name)]
        if missing:
            return f"the C++ extension is from another version and lacks {missing[0]}; rebuild it"
    if backend == "cpp" and device != "cpu":
        return f"cpp runs on CPU tensors, not on {device}"
    if backend == "cuda" and device != "cuda":
        return f"cuda runs on CUDA tensors, not on {device}"
    if backend == "triton" and device not in ("cuda", "xpu") and not (device == "cpu" and interpreting()):
        return f"triton does not run on {device} tensors (on CPU only in its interpreter, TRITON_INTERPRET=1)"
    return None


def choose(op: str, device: torch.device | str, backend: str | None = None) -> Choice:
    """Pick the backend of an operator for tensors of a device.

    Args:
        op: name of the operator, such as "gated_activation".
        device: where its tensors are.
        backend: forces one; None leaves it to CLUE_FAST_BACKEND, and then to the preference of the device.
            The variable holds for operators that have such a backend; the others keep the preference.

    Raises:
        UnknownNameError: no such operator or backend.
        BackendError: the forced backend cannot run here, or (`backend=` only) lacks this operator.
    """
    kind = torch.device(device).type
    if op not in OPERATORS:
        raise UnknownNameError("operator", op, OPERATORS)
    operator = OPERATORS[op]
    forced, source = backend, "backend="
    if forced is None:
        forced, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if forced is not None and forced not in BACKENDS:
        raise UnknownNameError("backend", forced, BACKENDS)
    skipped = []
    if forced is not None:
        obstacle = _obstacle(forced) or _misfit(forced, operator, kind)
        if obstacle is not None:
            raise BackendError(f"backend {forced!r}, asked for by {source}, cannot run {op}: {obstacle}")
        if forced in operator.backends:
            return Choice(forced, f"forced by {source}")
        if backend is not None:
            raise BackendError(f"{op} has no {forced} backend; choose one of: {', '.join(operator.backends)}")
        skipped.append(f"{forced} does not implement {op}")
    for name in PREFERENCE.get(kind, ("reference",)):
        if name not in operator.backends:
            continue
        obstacle = _obstacle(name) or _misfit(name, operator, kind)
        if obstacle is None:
            return Choice(name, "; ".join(skipped) or f"the fastest for {kind}")
        skipped.append(f"{name}: {obstacle}")
    raise AssertionError(f"{op} lacks a reference")


def launch(op: str, name: str, device: torch.device, backend: str | None) -> Launch:
    """The launch function `name` of an operator, on the backend that `choose` picks."""
    return _launch(op, name, device.type, backend or os.environ.get(ENVIRONMENT_VARIABLE) or None, backend is not None)


@cache
def _launch(op: str, name: str, device: str, forced: str | None, explicit: bool) -> Launch:
    # `forced` is in the key so that a change of the environment variable is seen.
    choice = choose(op, device, forced if explicit else None)
    if choice.name == "reference":
        if device == "cpu" and forced is None:
            _warn_reference(choice.reason)
        return OPERATORS[op].reference[name]
    if choice.name == "triton":
        function: Launch = getattr(importlib.import_module(f"clue_fast.kernels.{op}"), name)
        return function
    overload: Launch = getattr(torch.ops.clue_fast_cpp, name).default
    return overload


def _warn_reference(reason: str) -> None:
    """Say once a process that the fast backend is missing."""
    global _warned
    if not _warned:
        _warned = True
        logger.warning("clue_fast runs on its slower reference backend: %s", reason)
