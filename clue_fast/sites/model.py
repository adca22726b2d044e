"""What is done with models of any kind: unwrapped, in evaluation mode, given another class, told from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from clue_fast.sites.internals import WRAPPED, saved_tensors

M = TypeVar("M", bound=nn.Module)


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
