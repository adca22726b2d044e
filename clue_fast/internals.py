"""What models of any kind are inside, and every private name of torch, transformers and accelerate that is relied on.

None of those names is promised to stay: where one goes, what is here has to be found anew, and nothing else
(``tests/test_architecture.py`` finds those that stand elsewhere). First models, then single modules and tensors, then
the classes that override a private method, at last what operators and the estimate of memory need, and the allocator.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

if TYPE_CHECKING:
    from transformers import Trainer

    _Module = nn.Module
    _Trainer = Trainer
else:
    _Module = _Trainer = object

M = TypeVar("M", bound=nn.Module)

WRAPPED = {"_orig_mod", "module"}
"""What torch.compile calls the model inside, and what DistributedDataParallel and DataParallel call it."""

OLD_FORWARD = "_old_forward"
"""Where accelerate keeps the forward of an instance that its own calls."""

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Where a layer of transformers keeps the function that runs its forward, once checkpointing is on."""

OUTPUT_DIR, SAVE_CHECKPOINT = "_get_output_dir", "_save_checkpoint"
"""Methods of a Trainer: where it writes, from a trial; and what writes a checkpoint, from the model and a trial."""

NO_TORCH_FUNCTION = torch._C._disabled_torch_function_impl
"""``__torch_function__`` of a subclass of Tensor whose results are plain tensors."""


# Models.


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside of torch.compile and DistributedDataParallel: paths and names are always of that."""
    while len(children := dict(model.named_children())) == 1 and children.keys() <= WRAPPED:
        (model,) = children.values()
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has wrapped a model, alone or inside of DistributedDataParallel."""
    return any("_orig_mod" in dict(one.named_children()) for one in (model, *model.children()))


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


def source_name(model: nn.Module) -> str:
    """Returns the folder or the name on the hub that a model was loaded from, or ""."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def is_replica(model: nn.Module) -> bool:
    """Whether a model is one of the copies that DataParallel makes for each pass."""
    return bool(getattr(model, "_is_replica", False))


# Modules and tensors.


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


def norms(tensors: list[Tensor], order: float = 2.0) -> Sequence[Tensor]:
    """Returns the norm of each tensor, all in one call."""
    return torch._foreach_norm(tensors, order)


def after_backward(callback: Callable[[], None]) -> None:
    """Has the backward pass that is under way call something at its end; call it from inside one."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another whose history autograd keeps."""
    return tensor._is_view()


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether anything is called when a parameter gets a gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def storage_of(tensor: Tensor) -> int:
    """Returns what tells the storage of a tensor from others, also where it holds no data."""
    return int(tensor.untyped_storage()._cdata)


# Methods to override.


class ModuleEvents(_Module):
    """A module that stands around how it is moved, saved and loaded; comes before the class of a layer."""

    def around_move(self, move: Callable[[], Any]) -> None:
        """Calls ``move``, which moves or casts all that the module holds."""
        move()

    def after_save(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Called with the state dict once the module's own entries, whose names begin with a prefix, are in it."""

    def after_load(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> None:
        """Called once the module has taken its own entries from a state dict; ``missing_keys`` may be changed."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        inner = super()._apply
        self.around_move(lambda: inner(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.after_save(destination, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *more)
        self.after_load(state_dict, prefix, missing_keys)


class TrainerEvents(_Trainer):
    """A ``transformers.Trainer`` that stands around where and how it saves, and has its own order of records."""

    def around_output_dir(self, inner: Callable[[Any], str], trial: Any) -> str:
        """Returns where to write, which ``inner`` says."""
        return inner(trial)

    def around_save(self, inner: Callable[[Any, Any], None], model: Any, trial: Any) -> None:
        """Calls ``inner``, which writes a checkpoint."""
        inner(model, trial)

    def train_sampler(self) -> Any:
        """Returns the sampler of the training set."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        return self.around_output_dir(super()._get_output_dir, trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.around_save(super()._save_checkpoint, model, trial)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler()


def output_dir(trainer: Trainer, trial: Any) -> str:
    """Returns where a trainer writes."""
    return str(getattr(trainer, OUTPUT_DIR)(trial))


# Operators.


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the forward of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_no_data(x: Tensor) -> bool:
    """Whether a tensor is a fake one, which no launch function can read."""
    return isinstance(x, FakeTensor)


def flop_formulas() -> dict[str, Callable[..., int]]:
    """Returns by the name of an operator its operations, as a function of its arguments and its result ``out_val``."""
    from torch.utils.flop_counter import flop_registry  # imports triton

    return {str(operator): formula for operator, formula in flop_registry.items()}


def below_autograd() -> AbstractContextManager[None]:
    """What is dispatched inside does not come back to the autograd of the operator that it is called from."""
    guard: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return guard


# The allocator.


GIVE_BACK = 30.0
"""Seconds between two times that free memory goes back on the way: the pass behind it takes half a second longer, since
its pages come anew."""

_given_back = 0.0


def give_back_memory(after: float = 0.0) -> None:
    """Gives the system what the C library keeps of memory that is free, which takes some milliseconds.

    That of Linux gives back the end of its heap alone, and what is behind a pass over a model is full of holes as large
    as its activations, into which those of the next one, of other shapes, do not fit.

    Args:
        after: seconds since the last time, before which nothing is done.
    """
    global _given_back
    if time.monotonic() < _given_back + after:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    _given_back = time.monotonic()
