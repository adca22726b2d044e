"""Private names of torch, transformers and accelerate that are relied on, each in one place.

None of them is promised to stay: where one goes, what is here has to be found anew, and nothing else. Those that
operators need are in ``clue_fast.ops.backend``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

WRAPPED = {"_orig_mod", "module"}
"""What torch.compile calls the model inside, and what DistributedDataParallel and DataParallel call it."""

OLD_FORWARD = "_old_forward"
"""Where accelerate keeps the forward of an instance that its own calls."""

NO_TORCH_FUNCTION = torch._C._disabled_torch_function_impl
"""``__torch_function__`` of a subclass of Tensor whose results are plain tensors."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a module itself, by name, without those of its children."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def variant(
    module: M,
    parameters: Mapping[str, Tensor | None] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    **attributes: Any,
) -> M:
    """Returns a shallow copy of a module in which some parameters, children or attributes are others."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = module._parameters | dict(parameters or {})
    other.__dict__["_modules"] = module._modules | dict(modules or {})
    other.__dict__.update(attributes)
    return other


def saved_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Returns what a checkpoint holds of a module itself, without its children."""
    if any(hasattr(parameter, "quant_state") for parameter in own_parameters(module).values()):
        # To save a layer of 4 bits rearranges its weight; its shape is known without.
        return {f"{prefix}{name}": parameter for name, parameter in own_parameters(module).items()}
    found: dict[str, Tensor] = {}
    module._save_to_state_dict(found, prefix, keep_vars=True)
    return found


def is_recomputing() -> bool:
    """Whether this runs inside of a backward pass, as a forward that gradient checkpointing repeats does."""
    return torch._C._current_graph_task_id() != -1


def is_replica(model: nn.Module) -> bool:
    """Whether a model is one of the copies that DataParallel makes for each pass."""
    return bool(getattr(model, "_is_replica", False))


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether stacked experts are split over devices by expert."""
    return bool(getattr(module, "_is_expert_parallel", False))


def expert_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns what stacked experts make of the rows of gate and up, where they have a method for it."""
    gate = getattr(module, "_apply_gate", None)
    return gate if callable(gate) else None


class EagerExperts:
    """A configuration that asks for the forward in which experts are defined, not for a faster one."""

    _experts_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
