"""Which backend runs an operator, and why not another; and the operators in torch's dispatcher.

`reference` is plain PyTorch and the definition of every operator; `cpp` is the C++ extension on CPU; `triton`
runs on CUDA, ROCm and XPU, and on CPU tensors in its interpreter; `cuda` is the CUDA part of the extension.

An operator is a file of this folder with one or more launch functions, which write into the tensors they are given and
return None. `IMPLEMENTATIONS` says for each operator and backend where its launch functions are; `choose` picks the
backend, `launch` finds the function. `define` makes what is computed known to torch as `clue_fast::NAME`, for
torch.compile and export; eager calls go past that (`run`).
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

from clue_fast.deprecated import warn
from clue_fast.errors import BackendError, UnknownNameError

logger = logging.getLogger(__name__)

Launch = Callable[..., None]


# The backends: whether each can run in this process, and on which devices.

INTERFACE = 3
"""Of the arguments that the extension takes; one that was built before they changed is passed over."""


@cache
def extension() -> ModuleType | None:
    """The C++ extension `clue_fast._C`, or None where it is not built or does not load."""
    return _load_extension()[0]


@cache
def _load_extension() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("clue_fast._C")
    except ModuleNotFoundError:
        return None, "the C++ extension is not built; reinstall clue_fast with a C++ compiler present"
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); reinstall clue_fast against this torch"
    if module.build_info().get("interface") != INTERFACE:
        return None, "the C++ extension is from another version of clue_fast; reinstall it to rebuild the extension"
    return module, None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which accepts CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _cpp_unavailable() -> str | None:
    return _load_extension()[1]


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or torch.xpu.is_available() or interpreting():
        return None
    return "no CUDA, ROCm or XPU device"


def _cuda_unavailable() -> str | None:
    module, reason = _load_extension()
    if module is None:
        return reason
    if not module.build_info().get("cuda"):
        return "the C++ extension was built without CUDA; reinstall clue_fast with nvcc on the PATH"
    return None if torch.cuda.is_available() else "no CUDA device"


@dataclass(frozen=True)
class Backend:
    """One way to run operators.

    Attributes:
        unavailable_reason: why it cannot run in this process, or None if it can.
        devices: types of the devices on whose tensors it runs; None for all.
        title: devices, as errors name them.
    """

    unavailable_reason: Callable[[], str | None]
    devices: tuple[str, ...] | None
    title: str

    def runs_on(self, device: str) -> bool:
        """Whether it takes tensors on a type of device."""
        return self.devices is None or device in self.devices


BACKENDS: dict[str, Backend] = {
    "reference": Backend(lambda: None, None, "any"),
    "cpp": Backend(_cpp_unavailable, ("cpu",), "CPU"),
    "triton": Backend(_triton_unavailable, ("cuda", "xpu"), "CUDA, ROCm and XPU"),
    "cuda": Backend(_cuda_unavailable, ("cuda",), "CUDA"),
}
PREFERENCE = {
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}
ENVIRONMENT_VARIABLE = "CLUE_FAST_BACKEND"


def available() -> dict[str, str | None]:
    """Every backend with None if it can run in this process, or else the reason why it cannot."""
    return {name: backend.unavailable_reason() for name, backend in BACKENDS.items()}


# The operators: one entry per operator and backend.


@dataclass(frozen=True)
class Implementation:
    """Where the launch functions of an operator are for one backend.

    Attributes:
        names: of the launch functions.
        find: gives one by its name.
        missing: names those that should be there and are not.
    """

    names: tuple[str, ...]
    find: Callable[[str], Launch]
    missing: Callable[[], list[str]] = list


IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {}


Preference = Callable[[str], tuple[str, ...] | None]
OWN_PREFERENCE: dict[str, Preference] = {}


def register(
    operator: str, backends: tuple[str, ...], reference: Mapping[str, Launch], preference: Preference | None = None
) -> None:
    """Makes an operator known with its backends; each file of this folder that launches does so once.

    Args:
        operator: also the name of its file here, in kernels/ and in csrc/.
        backends: those that implement it.
        reference: its definition, launch functions by name; the other backends have functions of these names.
        preference: gives the backends for a type of device, the first that can run first, or None where the operator
            keeps to PREFERENCE.
    """
    if preference is not None:
        OWN_PREFERENCE[operator] = preference
    names = tuple(reference)
    for backend in backends:
        IMPLEMENTATIONS[operator, backend] = {
            "reference": Implementation(names, reference.__getitem__),
            "triton": Implementation(names, lambda name: _of_module(f"clue_fast.kernels.{operator}", name)),
            "cpp": Implementation(names, _of_extension, lambda: _not_in_extension(names)),
            "cuda": Implementation(names, _of_extension, lambda: _not_in_extension(names)),
        }[backend]


def _of_module(module: str, name: str) -> Launch:
    function: Launch = getattr(importlib.import_module(module), name)
    return function


def _of_extension(name: str) -> Launch:
    function: Launch = getattr(torch.ops.clue_fast_cpp, name).default
    return function


def _not_in_extension(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(torch.ops.clue_fast_cpp, name)]


def operators() -> dict[str, tuple[str, ...]]:
    """Every operator with the backends that implement it."""
    found: dict[str, tuple[str, ...]] = {}
    for operator, backend in IMPLEMENTATIONS:
        found[operator] = (*found.get(operator, ()), backend)
    return found


RENAMED = {"sparse_adamw": "sparse_optimizer", "sparse_sgd": "sparse_optimizer"}
"""Operators of the release before, which are launch functions of one operator now."""


def __getattr__(name: str) -> Any:
    if name != "OPERATORS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn(f"{__name__}.OPERATORS is {__name__}.operators() now", stacklevel=2)
    return operators() | {old: operators()[new] for old, new in RENAMED.items()}


def _unsupported_reason(backend: str, operator: str, device: str) -> str | None:
    """Why a backend that can run here does not run this operator on tensors of a device type."""
    implementation = IMPLEMENTATIONS.get((operator, backend))
    if implementation is not None and (missing := implementation.missing()):
        return f"the C++ extension is from another version and lacks {missing[0]}; rebuild it"
    if BACKENDS[backend].runs_on(device):
        return None
    if backend == "triton":
        if device == "cpu" and interpreting():
            return None
        return f"triton does not run on {device} tensors (on CPU only in its interpreter, TRITON_INTERPRET=1)"
    return f"{backend} runs on {BACKENDS[backend].title} tensors, not on {device}"


# The choice.


@dataclass(frozen=True)
class Choice:
    """The backend an operator runs on, and why that one."""

    name: str
    reason: str


_warned = False


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
    if op in RENAMED:
        warn(f"the operator {op} is {RENAMED[op]} now", stacklevel=2)
        op = RENAMED[op]
    if (op, "reference") not in IMPLEMENTATIONS:
        raise UnknownNameError("operator", op, operators())
    forced, source = backend, "backend="
    if forced is None:
        forced, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if forced is not None and forced not in BACKENDS:
        raise UnknownNameError("backend", forced, BACKENDS)
    skipped = []
    if forced is not None:
        reason = BACKENDS[forced].unavailable_reason() or _unsupported_reason(forced, op, kind)
        if reason is not None:
            raise BackendError(f"backend {forced!r}, asked for by {source}, cannot run {op}: {reason}")
        if (op, forced) in IMPLEMENTATIONS:
            return Choice(forced, f"forced by {source}")
        if backend is not None:
            raise BackendError(f"{op} has no {forced} backend; choose one of: {', '.join(operators()[op])}")
        skipped.append(f"{forced} does not implement {op}")
    own = OWN_PREFERENCE[op](kind) if op in OWN_PREFERENCE else None
    for name in own or PREFERENCE.get(kind, ("reference",)):
        if (op, name) not in IMPLEMENTATIONS:
            continue
        reason = BACKENDS[name].unavailable_reason() or _unsupported_reason(name, op, kind)
        if reason is None:
            return Choice(name, "; ".join(skipped) or f"the {'choice' if own else 'fastest'} for {kind}")
        skipped.append(f"{name}: {reason}")
    raise AssertionError(f"{op} lacks a reference")


def launch(op: str, name: str, device: torch.device, backend: str | None) -> Launch:
    """The launch function `name` of an operator, on the backend that `choose` picks."""
    return _launch(op, name, device.type, backend or os.environ.get(ENVIRONMENT_VARIABLE) or None, backend is not None)


def launch_for(op: str, name: str, x: torch.Tensor, backend: str | None) -> Launch:
    """The launch function for activations x; float64 is for the reference alone."""
    return launch(op, name, x.device, "reference" if x.dtype == torch.float64 else backend)


@cache
def _launch(op: str, name: str, device: str, forced: str | None, explicit: bool) -> Launch:
    # `forced` is in the key so that a change of the environment variable is seen.
    choice = choose(op, device, forced if explicit else None)
    if choice.name == "reference" and device == "cpu" and forced is None:
        _warn_reference(choice.reason)
    return IMPLEMENTATIONS[op, choice.name].find(name)


def _warn_reference(reason: str) -> None:
    """Say once a process that the fast backend is missing."""
    global _warned
    if not _warned:
        _warned = True
        logger.warning("clue_fast runs on its slower reference backend: %s", reason)


# Torch's dispatcher: namespace `clue_fast`, on every device.

NAMESPACE = "clue_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Define an operator: what it computes on any device, and what it returns for tensors without data, or nothing."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake or _fake_nothing, lib=_library)


def define_autograd(name: str, run: Callable[..., Any]) -> None:
    """Give an operator its autograd by hand: `register_autograd` takes none that writes into an argument."""
    _library.impl(name, run, "Autograd")  # type: ignore[no-untyped-call]


def _fake_nothing(*_: Any) -> None:
    return None


def run(name: str, eager: Callable[..., Any], *arguments: Any) -> Any:
    """Runs the operator `clue_fast::NAME` under torch.compile, and `eager` with the same arguments otherwise.

    The dispatcher costs some 60 us per call, more than a small kernel.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.clue_fast, name)(*arguments)
    return eager(*arguments)
