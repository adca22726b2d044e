"""What models of any kind are inside, and every private name of torch, transformers and accelerate that is relied on.

None of those names is promised to stay: where one goes, what is here has to be found anew, and nothing else. Those that
operators need are in ``clue_fast.ops.backend``, which stands below.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

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


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside of torch.compile and DistributedDataParallel: paths and names are always of that."""
    while len(children := dict(model.named_children())) == 1 and children.keys() <= WRAPPED:
        (model,) = children.values()
    return model


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of the first weight that is loaded, or the CPU."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, such as without dropout; every module then has the mode that it had before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(mixin: type[M], original: type[nn.Module], name: str) -> type[M]:
    """Returns the subclass of a module's class with the methods of a mixin; the same one each time.

    Args:
        mixin: comes first.
        original: class of a library, which stays as it is.
        name: of the subclass.
    """
    if (mixin, original) not in _classes:
        about = f"{original.__name__} with the methods of {mixin.__name__}."
        attributes = {"__module__": mixin.__module__, "__doc__": about}
        _classes[mixin, original] = type(name, (mixin, original), attributes)
    return cast("type[M]", _classes[mixin, original])


def model_fingerprint(model: nn.Module) -> str:
    """Returns a short hash of what a model is: names and shapes of its weights, and a sample of its embedding.

    Unlearning trains neither, so a model keeps its fingerprint through it, while another architecture, or the same
    one with other weights, has another. The sample is rounded to bfloat16, so that loading in another precision
    does not matter.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    saved: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        saved |= saved_tensors(module, f"{path}." if path else "")
    for name, tensor in sorted(saved.items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
    embedding = _input_embedding(model)
    if embedding is not None and embedding.device.type != "meta":
        whole: Tensor = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding  # sharded, or not
        sample = whole.detach().reshape(-1)
        stride = max(1, sample.numel() // 4096)
        digest.update(sample[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _input_embedding(model: nn.Module) -> Tensor | None:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if callable(get_embeddings) else None
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) else None
