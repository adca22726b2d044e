"""Weights rounded to integers of a few bits, for as long as a model is asked, and put back bit for bit.

What unlearning moved by less than a step of the grid comes back when the weights are rounded (Zhang et al. 2024,
"Catastrophic Failure of LLM Unlearning via Quantization", arXiv 2410.16454).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clue_fast.errors import DataError, SettingError
from clue_fast.internals import own_parameters
from clue_fast.sites.experts import find_stack
from clue_fast.sites.projection import projection_of


@torch.no_grad()
def rounded(weight: Tensor, bits: int, group: int | None = None, input_dim: int = -1) -> Tensor:
    """A weight on a symmetric grid of integers: scale · round(weight / scale), scale = max |weight| / (2^(bits-1) - 1).

    Round to nearest, ties to even, in float32, without calibration data and without a zero point.

    Args:
        weight: [..., inputs] of any floating dtype; not changed.
        bits: of the integers, at least 2: -7 to 7 with 4, -127 to 127 with 8.
        group: neighbouring inputs of one output channel that share a scale, the last group being what is left; None:
            one scale an output channel.
        input_dim: the dimension of the inputs.

    Returns:
        The rounded weight, in the shape and dtype of the weight.

    Raises:
        SettingError: bits or group are out of range.
    """
    if bits < 2 or (group is not None and group < 1):
        raise SettingError(f"{bits} bits in groups of {group}: at least 2 bits and groups of at least 1 are needed")
    rows = weight.movedim(input_dim, -1).float()
    parts = torch.split(rows, rows.shape[-1] if group is None else group, dim=-1)
    most = 2 ** (bits - 1) - 1
    found = []
    for part in parts:
        scale = part.abs().amax(-1, keepdim=True) / most
        found.append(torch.where(scale > 0, (part / scale).round().clamp(-most, most) * scale, part))
    return torch.cat(found, -1).movedim(-1, input_dim).to(weight.dtype).contiguous()


@contextmanager
def rounding(model: nn.Module, bits: int, group: int | None = None) -> Iterator[int]:
    """Rounds the weights of all linear layers and stacked experts, and yields how many numbers that were.

    Embeddings and the head, as is usual, norms and biases stay as they are. The weights themselves are set aside, not
    written to, so that they come back bit for bit.

    Raises:
        DataError: the model has no floating-point weight of a linear layer, such as one that is quantized already.
        SettingError: see ``rounded``.
    """
    weights = list(_weights(model))
    if not weights:
        raise DataError("the model has no linear layer with floating-point weights that could be rounded")
    aside = [(weight, weight.data) for weight, _ in weights]
    try:
        for weight, input_dim in weights:
            weight.data = rounded(weight.data, bits, group, input_dim)
        yield sum(weight.numel() for weight, _ in weights)
    finally:
        for weight, own in aside:
            weight.data = own


def _weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """The weights to round, each once, and the dimension that counts their inputs."""
    heads = (getattr(model, f"get_{kind}_embeddings", lambda: None)() for kind in ("input", "output"))
    seen = {id(head.weight) for head in heads if isinstance(head, nn.Module)}
    for module in model.modules():
        for weight, input_dim in _weights_of(module):
            if weight.is_floating_point() and id(weight) not in seen:
                seen.add(id(weight))
                yield weight, input_dim


def _weights_of(module: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    own = own_parameters(module).get("weight")
    if own is not None and own.dim() == 2 and (projection := projection_of(module, "")) is not None:
        yield own, 1 - projection.output_dim
    if (stack := find_stack(module)) is not None:
        for name in (stack.gate_up, stack.down):
            yield module.get_parameter(name), 1 if stack.transposed else 2
