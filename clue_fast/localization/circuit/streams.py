"""What every writer adds to the residual stream and what every reader would change of it, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clue_fast.errors import CircuitError
from clue_fast.localization.circuit.architecture import Layer, Projection
from clue_fast.localization.circuit.capture import LayerRun, Run
from clue_fast.localization.circuit.graph import Graph
from clue_fast.localization.circuit.norms import Norm
from clue_fast.localization.owned import matrix, output_bias


class Streams:
    """Expands a ``Run`` to the width of the model, for the tokens asked for.

    Args:
        model: whose weights are read.
        graph: of the model.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self._norms: dict[str, Norm] = {}

    @torch.no_grad()
    def written(self, run: Run, tokens: slice) -> Tensor:
        """What each writer adds to the stream, [writers, tokens, width] float32.

        A norm between attention and the stream acts on the sum of the heads; its scale is that of the run, so that
        what the heads add still sums to what attention adds.
        """
        parts = [_wide(run.stream[tokens])[None]]
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            heads = self._behind_norm(layer, own, tokens)(self._heads(layer, _wide(own.heads[tokens])))
            parts += [heads, _wide(own.mlp_added[tokens])[None]]
        return torch.cat(parts)

    @torch.no_grad()
    def changed(self, clean: Run, corrupted: Run, tokens: slice) -> Tensor:
        """``written`` by the clean run less that by the corrupted one."""
        parts = [(_wide(clean.stream[tokens]) - _wide(corrupted.stream[tokens]))[None]]
        for layer, one, other in zip(self.graph.architecture.layers, clean.layers, corrupted.layers, strict=True):
            found = [_wide(own.heads[tokens]) for own in (one, other)]
            if layer.attention_post_norm is None:
                heads = self._heads(layer, found[0] - found[1])
            else:
                first, second = (
                    self._behind_norm(layer, own, tokens)(self._heads(layer, z))
                    for own, z in zip((one, other), found, strict=True)
                )
                heads = first - second
            parts += [heads, (_wide(one.mlp_added[tokens]) - _wide(other.mlp_added[tokens]))[None]]
        return torch.cat(parts)

    def _heads(self, layer: Layer, found: Tensor) -> Tensor:
        """What the heads write before any norm, [heads, tokens, width], from [tokens, heads * head width]."""
        weight = _wide(matrix(self.model.get_submodule(layer.output)))
        weight = weight.reshape(len(weight), layer.heads, layer.head_dim).permute(1, 2, 0)
        return found.reshape(-1, layer.heads, layer.head_dim).transpose(0, 1) @ weight

    @torch.no_grad()
    def constant(self, run: Run, tokens: slice) -> Tensor:
        """What biases behind the heads add to the stream, [tokens, width] float32; no writer's."""
        total = torch.zeros_like(_wide(run.stream[tokens]))
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            bias = output_bias(self.model.get_submodule(layer.output))
            if bias is not None:
                total += self._behind_norm(layer, own, tokens)(_wide(bias).expand(1, len(total), -1))[0]
            if layer.attention_post_norm is not None:
                total += self._norm(layer.attention_post_norm, _wide(own.attention_written[tokens])).shift
        return total

    @torch.no_grad()
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

    def _through(self, projection: Projection, own: LayerRun, tokens: slice) -> Tensor:
        """Gradient with respect to the input of a projection, of each head alone, [heads, tokens, width]."""
        weight = matrix(self.model.get_submodule(projection.path))
        rows = projection.rows.to(weight.device)
        gradient = _wide(own.gradients[projection.path][tokens][:, rows])
        return gradient.transpose(0, 1) @ _wide(weight[rows])

    def _before_norm(self, norm: str | None, read: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to the input of a norm, given that with respect to its output."""
        if norm is None:
            return gradient
        return self._norm(norm, _wide(read)).before(_wide(read), gradient)

    def _behind_norm(self, layer: Layer, own: LayerRun, tokens: slice) -> Callable[[Tensor], Tensor]:
        """The linear map that a norm behind attention is at the scale it has in this run."""
        if layer.attention_post_norm is None:
            return lambda x: x
        whole = _wide(own.attention_written[tokens])
        norm = self._norm(layer.attention_post_norm, whole)
        return lambda x: norm.part(whole, x)

    def _norm(self, path: str, like: Tensor) -> Norm:
        if path not in self._norms:
            self._norms[path] = Norm.of(self.model.get_submodule(path), like)
        return self._norms[path]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
