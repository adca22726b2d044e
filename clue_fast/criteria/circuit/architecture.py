"""What writes to the residual stream of a model and what reads it, found by running it once on three tokens.

Nothing is known of classes or names: attention is what has heads, whose queries, keys, values and output are found as
``clue_fast.sites`` finds them; a norm is the module whose output is what attention reads; and a layer is only accepted
if what was found adds up to its output. A norm is then taken for what it is at one token: a scale, weights, and a
derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.errors import CircuitError
from clue_fast.sites import Site, Unmatched
from clue_fast.sites.attention import find_heads
from clue_fast.sites.layers import find_layers

PROJECTIONS = ("projection_query", "projection_key", "projection_value", "projection_output")
PROBE = 100.0  # so large that the epsilon of the norm does not count


@dataclass(frozen=True)
class Projection:
    """A reading projection of attention: ``rows[h]`` are the output features of head h of the module at ``path``.

    Attributes:
        path: of the linear module.
        rows: [heads, head width] int64; the heads are key/value heads for k and v.
    """

    path: str
    rows: Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Paths are those of modules in the model; None where there is no such module.

    Attributes:
        path: of the layer.
        heads, kv_heads, head_dim: of attention; query head h reads key/value head h // (heads // kv_heads).
        q, k, v: what attention reads with.
        output: the linear module that writes what the heads found.
        attention_norm, mlp_norm: between the residual stream and attention or MLP.
        attention_post_norm, mlp_post_norm: between their output and the residual stream.
        mlp_input, mlp_output: first and last module of the MLP; the same one if it has a module of its own.
        parallel: whether the MLP reads the stream before attention has written to it.
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    q: Projection
    k: Projection
    v: Projection
    output: str
    attention_norm: str | None
    attention_post_norm: str | None
    mlp_input: str
    mlp_output: str
    mlp_norm: str | None
    mlp_post_norm: str | None
    parallel: bool


@dataclass(frozen=True)
class Architecture:
    """The layers of a model and the module that reads the finished stream."""

    layers: tuple[Layer, ...]
    final: str
    width: int


Heads = Mapping[str, Mapping[str, Site] | Unmatched]
"""By path of an attention module: its sites by kind, those of ``PROJECTIONS``, or why there are none."""


@torch.no_grad()
def find_architecture(model: nn.Module, sites: Sequence[Site] = ()) -> Architecture:
    """Finds the writers and readers of a decoder.

    Args:
        model: runs a few times on a few tokens.
        sites: of the model; where the projections of all heads are among them, they are not searched again.

    Raises:
        CircuitError: the model is no decoder, or the output of a layer is not its input plus what attention and MLP
            wrote, as in models that scale the stream.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CircuitError(f"{type(model).__name__} has an encoder and a decoder; circuits are of decoders alone")
    heads = _heads(model, sites)
    blocks = _blocks(model, heads)
    tokens = torch.arange(3, device=next(model.parameters()).device)[None]
    with _traced(model) as traced:
        model(tokens, use_cache=False)
    layers = [_layer(model, path, heads, traced) for path in blocks]
    for before, after in pairwise(blocks):
        if not _equal(traced[before].output, traced[after].input):
            raise CircuitError(f"something changes the residual stream between {before} and {after}")
    last = traced[blocks[-1]].output
    readers = [
        path
        for path, trace in traced.items()
        if not any(path.startswith(f"{block}.") or path == block for block in blocks) and _equal(trace.input, last)
    ]
    if not readers:
        raise CircuitError(f"no module of {type(model).__name__} reads the output of its last layer {blocks[-1]}")
    return Architecture(tuple(layers), readers[0], last.shape[-1])


def _heads(model: nn.Module, sites: Sequence[Site]) -> Heads:
    known: dict[str, dict[str, Site]] = {}
    for site in sites:
        if site.kind in PROJECTIONS:
            known.setdefault(site.path, {})[site.kind] = site
    if known and all(own.keys() == set(PROJECTIONS) for own in known.values()):
        return known
    found = find_heads(model, ("projection",))
    return {
        path: {site.kind: site for site in own} if isinstance(own, list) else own for path, own in found.items() if own
    }


@dataclass
class _Trace:
    input: Tensor
    output: Tensor


@contextmanager
def _traced(model: nn.Module) -> Iterator[dict[str, _Trace]]:
    """Copies the first input and output of every module while the model runs."""
    traced: dict[str, _Trace] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            entered = next((x for x in (*arguments, *keywords.values()) if _is_stream(x)), None)
            left = next((x for x in (output if isinstance(output, tuple) else (output,)) if _is_stream(x)), None)
            if entered is not None and left is not None and path in inputs:
                traced[path] = _Trace(inputs.pop(path), left.clone())

        return keep

    inputs: dict[str, Tensor] = {}

    def pre_hook(path: str) -> Callable[..., None]:
        # Before the module runs, since some modules write into their input.
        def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            entered = next((x for x in (*arguments, *keywords.values()) if _is_stream(x)), None)
            if entered is not None:
                inputs[path] = entered.clone()

        return keep

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(pre_hook(path), with_kwargs=True))
        handles.append(module.register_forward_hook(hook(path), with_kwargs=True))
    try:
        yield traced
    finally:
        for handle in handles:
            handle.remove()


def _is_stream(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2


def _blocks(model: nn.Module, heads: Heads) -> list[str]:
    """Paths of the decoder layers."""
    found = find_layers(model)
    measured = [path for path, own in heads.items() if not isinstance(own, Unmatched)]
    if not any(found.number_of(path) == 0 for path in measured):
        why = "".join(f"; {own}" for own in list(heads.values())[:1] if isinstance(own, Unmatched))
        raise CircuitError(f"{type(model).__name__} has no list of layers with attention whose heads are known{why}")
    return [f"{found.path}.{index}" for index in range(len(found.modules))]


_NOT_FOUND = "?"


def _layer(model: nn.Module, path: str, heads: Heads, traced: dict[str, _Trace]) -> Layer:
    block = model.get_submodule(path)
    inside = next((own for own in heads if own.startswith(f"{path}.")), None)
    if inside is None:
        raise CircuitError(f"{path} ({type(block).__name__}) has no attention whose heads are known")
    found = heads[inside]
    if isinstance(found, Unmatched):
        raise CircuitError(f"{found.path} ({found.type}): {found.reason}")
    q, k, v = (_projection(found[kind]) for kind in PROJECTIONS[:3])
    if len(k.rows) != len(v.rows):
        raise CircuitError(f"{inside} has {len(k.rows)} heads of keys and {len(v.rows)} of values")
    output = found["projection_output"].output
    entered, left = traced[path].input, traced[path].output

    norm = _norm_before(path, inside, traced[q.path].input, entered, traced)
    post, attention_added = _post_norm(path, inside, traced[output].output, traced)
    mlp_input, mlp_output = _mlp(block, path, inside, traced)
    mlp_read = traced[mlp_input].input
    mlp_post, mlp_added = _post_norm(path, mlp_output, traced[mlp_output].output, traced)
    middle = entered + attention_added.reshape(entered.shape)
    parallel = False
    mlp_norm = _norm_before(path, inside, mlp_read, middle, traced, required=False)
    if mlp_norm is _NOT_FOUND:
        parallel, mlp_norm = True, _norm_before(path, inside, mlp_read, entered, traced)
    total = middle + mlp_added.reshape(entered.shape)
    if not _close(total, left):
        raise CircuitError(
            f"the output of {path} ({type(block).__name__}) is not its input plus what {inside} and {mlp_output} "
            "write; its residual stream cannot be taken apart"
        )
    number, size = q.rows.shape
    return Layer(
        path, number, len(k.rows), size, q, k, v, output, norm, post, mlp_input, mlp_output, mlp_norm, mlp_post,
        parallel,
    )  # fmt: skip


def _norm_before(
    layer: str, attention: str, read: Tensor, stream: Tensor, traced: dict[str, _Trace], *, required: bool = True
) -> str | None:
    """The module between the stream and what is read, None if the stream itself is read, or ``_NOT_FOUND``."""
    for path, trace in traced.items():
        inside = path.startswith(f"{layer}.") and not f"{path}.".startswith(f"{attention}.")
        if inside and _equal(trace.output, read) and _close(trace.input, stream) and not _equal(read, trace.input):
            return path
    if _close(read, stream):
        return None
    if required:
        raise CircuitError(f"what attention or MLP of {layer} read is neither the residual stream nor its norm")
    return _NOT_FOUND


def _post_norm(layer: str, writer: str, written: Tensor, traced: dict[str, _Trace]) -> tuple[str | None, Tensor]:
    """The module that what was written passes before it is added to the stream, and its output."""
    for path, trace in traced.items():
        inside = path.startswith(f"{layer}.") and not f"{path}.".startswith(f"{writer}.")
        changed = trace.output.shape[-1] == written.shape[-1] and not _equal(trace.output, written)
        if inside and changed and _equal(trace.input, written):
            return path, trace.output
    return None, written


def _mlp(block: nn.Module, path: str, attention: str, traced: dict[str, _Trace]) -> tuple[str, str]:
    """First and last module of the MLP: a child of the layer with weights in two dimensions, or two linear ones."""
    children = [
        f"{path}.{name}"
        for name, child in block.named_children()
        if not f"{attention}.".startswith(f"{path}.{name}.")
        and any(parameter.dim() >= 2 for parameter in child.parameters())
        and f"{path}.{name}" in traced
    ]
    width = traced[path].output.shape[-1]
    first = [child for child in children if traced[child].input.shape[-1] == width]
    last = [child for child in children if traced[child].output.shape[-1] == width]
    if len(first) != 1 or len(last) != 1:
        raise CircuitError(f"{path} has {len(children)} modules that may be its MLP: {', '.join(children) or 'none'}")
    return first[0], last[0]


def _projection(site: Site) -> Projection:
    return Projection(site.output, site.given_channels().reshape(site.width, site.channels))


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values, in whatever shape."""
    return x.shape[-1] == y.shape[-1] and torch.equal(x.flatten(), y.flatten())


def _close(x: Tensor, y: Tensor) -> bool:
    """Whether two sums agree up to the rounding of their precision."""
    if x.numel() != y.numel():
        return False
    tolerance = 16 * torch.finfo(x.dtype).eps
    x, y = x.flatten().double(), y.flatten().double()
    return bool((x - y).norm() <= tolerance * y.norm())


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm y = scale(x) · weight · center(x) + shift, where scale is 1 / rms(center(x)).

    Attributes:
        weight, shift: [width].
        centered: whether the mean is subtracted, as LayerNorm does.
    """

    weight: Tensor
    shift: Tensor
    centered: bool
    module: nn.Module

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, like: Tensor) -> Norm:
        """Finds out what a module computes by trying it.

        Args:
            module: the norm.
            like: [tokens, width], of the precision and device to compute in; what the norm is tried on.

        Raises:
            CircuitError: it is neither an RMSNorm nor a LayerNorm.
        """
        shift = _apply(module, torch.zeros_like(like[:1]))[0]
        y = _apply(module, like)
        centered = bool(torch.allclose(_apply(module, like + 1.0), y, rtol=1e-2, atol=1e-3))
        signs = torch.ones_like(like[:1])
        signs[:, ::2] = -1.0 if centered else 1.0
        norm = cls((_apply(module, PROBE * signs)[0] - shift) / signs[0], shift, centered, module)
        error = float((norm.scale(like) * norm.weight * norm.center(like) + shift - y).norm())
        if error > 1e-2 * float(y.norm()):
            raise CircuitError(f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm")
        return norm

    def center(self, x: Tensor) -> Tensor:
        """Returns x [..., width], without its mean if that is subtracted."""
        return x - x.mean(-1, keepdim=True) if self.centered else x

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """The scale at x [tokens, width], [tokens, 1]: what the module makes of it, compared with what it got."""
        y = _apply(self.module, x) - self.shift
        direction = self.weight * self.center(x)
        return (direction * y).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)

    def part(self, x: Tensor, part: Tensor) -> Tensor:
        """What a part [..., tokens, width] of x [tokens, width] contributes to the norm of x, at the scale of x."""
        return self.scale(x) * self.weight * self.center(part)

    def before(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to x [tokens, width], from that with respect to its norm [..., tokens, width].

        d y / d x = scale · weight · (1 - scale² c cᵀ / width) · center, with c = center(x).
        """
        scale, centered = self.scale(x), self.center(x)
        weighted = gradient * (scale * self.weight)
        along = torch.einsum("...tw,tw->...t", weighted, centered)[..., None] * scale.square() / x.shape[-1]
        return self.center(torch.addcmul(weighted, along, centered, value=-1.0))


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    """The norm of x, with its weights in the precision of x."""
    weights = {name: weight.detach().to(x.dtype) for name, weight in module.named_parameters()}
    normed: Tensor = torch.func.functional_call(module, weights, (x,))
    return normed
