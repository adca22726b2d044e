"""What every writer adds to the residual stream and what every reader would change of it, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clue_fast.errors import CircuitError
from clue_fast.localization.circuit.architecture import Layer, Projection
from clue_fast.localization.circuit.capture import LayerRun, Run
from clue_fast.localization.circuit.graph import Graph
from clue_fast.localization.owned import matrix, output_bias


class Streams:
    """Expands a ``Run`` to the width of the model, for the tokens asked for.

    Args:
        model: whose weights are read.
        graph: of the model.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph = model, graph

    @torch.no_grad()
    def written(self, run: Run, tokens: slice) -> Tensor:
        """What each writer adds to the stream, [writers, tokens, width] float32.

        A norm between attention and the stream acts on the sum of the heads; its scale is that of the run, so that
        what the heads add still sums to what attention adds.
        """
        parts = [_wide(run.stream[tokens])[None]]
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            found = _wide(own.heads[tokens]).reshape(-1, layer.heads, layer.head_dim)
            weight = _wide(matrix(self.model.get_submodule(layer.output)))
            weight = weight.reshape(len(weight), layer.heads, layer.head_dim)
            heads = torch.einsum("thd,whd->htw", found, weight)
            parts += [self._behind_norm(layer, own, tokens)(heads), _wide(own.mlp_added[tokens])[None]]
        return torch.cat(parts)

    @torch.no_grad()
    def constant(self, run: Run, tokens: slice) -> Tensor:
        """What biases behind the heads add to the stream, [tokens, width] float32; no writer's."""
        total = torch.zeros_like(_wide(run.stream[tokens]))
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            bias = output_bias(self.model.get_submodule(layer.output))
            if bias is not None:
                total += self._behind_norm(layer, own, tokens)(_wide(bias).expand(1, len(total), -1))[0]
            if layer.attention_post_norm is not None:
                total += _shift(self.model.get_submodule(layer.attention_post_norm), total)
        return total

    def felt(self, run: Run, layer: int, tokens: slice) -> Tensor:
        """How the target changes with the stream as each reader of a layer reads it, [readers, tokens, width] float32.

        Args:
            run: with gradients.
            layer: index of the layer, or the number of layers for the final norm.
            tokens: which.
        """
        if layer == len(run.layers):
            if run.final_gradient is None:
                raise CircuitError("no gradient reached the final norm; run backward from the target")
            return _wide(run.final_gradient[tokens])[None]
        architecture, own = self.graph.architecture.layers[layer], run.layers[layer]
        projected = torch.cat(
            [self._through(projection, own, tokens) for projection in (architecture.q, architecture.k, architecture.v)]
        )
        attention = self._before_norm(architecture.attention_norm, own.attention_read[tokens], projected)
        mlp = _wide(own.gradients["mlp"][tokens])[None]
        return torch.cat([attention, self._before_norm(architecture.mlp_norm, own.mlp_read[tokens], mlp)])

    @torch.no_grad()
    def _through(self, projection: Projection, own: LayerRun, tokens: slice) -> Tensor:
        """Gradient with respect to the input of a projection, of each head alone, [heads, tokens, width]."""
        weight = matrix(self.model.get_submodule(projection.path))
        rows = projection.rows.to(weight.device)
        gradient = _wide(own.gradients[projection.path][tokens][:, rows])
        return torch.einsum("thd,hdw->htw", gradient, _wide(weight[rows]))

    def _before_norm(self, norm: str | None, read: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to the input of a norm, given that with respect to its output."""
        if norm is None:
            return gradient
        with torch.enable_grad():
            x = _wide(read).expand_as(gradient).clone().requires_grad_()
            y = _apply(self.model.get_submodule(norm), x)
            (before,) = torch.autograd.grad(y, x, gradient.to(y.dtype))
        return before

    def _behind_norm(self, layer: Layer, own: LayerRun, tokens: slice) -> Callable[[Tensor], Tensor]:
        """The linear map that a norm behind attention is at the scale it has in this run."""
        if layer.attention_post_norm is None:
            return lambda x: x
        norm = self.model.get_submodule(layer.attention_post_norm)
        return frozen_norm(norm, _wide(own.attention_written[tokens]))


@torch.no_grad()
def frozen_norm(norm: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The linear map of a norm at the scale that it has for x [tokens, width]: RMSNorm or LayerNorm, found by probing.

    Raises:
        CircuitError: the norm is neither.
    """
    y = _apply(norm, x)
    centered = bool(torch.allclose(_apply(norm, x + 1.0), y, rtol=1e-2, atol=1e-3))
    y = y - _shift(norm, x)

    def center(part: Tensor) -> Tensor:
        return part - part.mean(-1, keepdim=True) if centered else part

    weight = _weight(norm, x, centered)
    direction = weight * center(x)
    scale = (direction * y).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)
    if not torch.allclose(scale * direction, y, rtol=1e-2, atol=1e-3 * float(y.abs().max())):
        raise CircuitError(f"{type(norm).__name__} behind attention is neither an RMSNorm nor a LayerNorm")
    return lambda part: scale * weight * center(part)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _apply(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of x, with its weights in the precision of x."""
    weights = {name: weight.detach().to(x.dtype) for name, weight in norm.named_parameters()}
    normed: Tensor = torch.func.functional_call(norm, weights, (x,))
    return normed


def _shift(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm adds whatever it is given, [width]."""
    return _apply(norm, torch.zeros_like(like[:1]))[0]


def _weight(norm: nn.Module, like: Tensor, centered: bool) -> Tensor:
    """The weights of a norm, up to a factor that the scale takes up, [width]."""
    alternating = torch.ones_like(like[:1])
    if centered:
        alternating[:, ::2] = -1.0
    return (_apply(norm, alternating)[0] - _shift(norm, like)) / alternating[0]
