"""One run of a model, forward and back, with what its writers wrote and what its readers felt, kept compactly.

What is kept of a head is what it found, [tokens, head width], and the gradient of its projections: everything in the
width of the model follows from it by a product with weights, a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.localization.circuit.architecture import Architecture, Layer


@dataclass
class LayerRun:
    """What one layer did, all [tokens, ...] with the tokens of all records in a row.

    Attributes:
        attention_read, mlp_read: residual stream where it is read, before any norm.
        heads: what the heads found, [tokens, heads * head width].
        attention_written, mlp_written: what was written before a post norm, if there is one.
        mlp_added: what the MLP added to the stream.
        gradients: of the target with respect to the outputs of projections, by path, and to the input of the MLP,
            by "mlp".
    """

    attention_read: Tensor
    mlp_read: Tensor
    heads: Tensor
    attention_written: Tensor
    mlp_added: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """What a run left: ``stream`` into the first layer, a ``LayerRun`` each, and the stream that the final norm read.

    Attributes:
        stream: [tokens, width], what the embedding wrote.
        layers: one a layer.
        final_read: [tokens, width].
        final_gradient: of the target with respect to it, once backward ran.
        leaf: the differentiable input of the first layer, in the shape of the model.
    """

    stream: Tensor
    layers: list[LayerRun]
    final_read: Tensor
    final_gradient: Tensor | None = None


class Capture:
    """Hooks a model for ``record``.

    Args:
        model: in evaluation mode; its weights need no gradients.
        architecture: of the model.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self._kept: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    @contextmanager
    def record(self, stream: Tensor | None = None) -> Iterator[Capture]:
        """Records the forward and backward pass inside the block; ask for ``run`` behind it.

        Args:
            stream: goes into the first layer instead of the embedding, [records, tokens, width].
        """
        self._kept.clear()
        self._gradients.clear()
        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for index, layer in enumerate(self.architecture.layers):
                handles += self._hooks(layer, stream if index == 0 else None, first=index == 0)
            final = self.model.get_submodule(self.architecture.final)
            handles.append(final.register_forward_pre_hook(self._alias("final"), with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> Run:
        """Returns what was recorded, and forgets it."""
        kept, gradients = self._kept, self._gradients
        layers = []
        for layer in self.architecture.layers:
            own = {path: gradients[path] for path in _projection_paths(layer) if path in gradients}
            if f"{layer.path} mlp" in gradients:
                own["mlp"] = gradients[f"{layer.path} mlp"]
            read = kept[f"{layer.path} in"]
            mlp_read = read if layer.parallel else kept[f"{layer.path} mlp_read"]
            layers.append(
                LayerRun(
                    attention_read=read,
                    mlp_read=mlp_read,
                    heads=kept[f"{layer.path} heads"],
                    attention_written=kept[f"{layer.path} attention"],
                    mlp_added=kept[f"{layer.path} mlp"],
                    gradients=own,
                )
            )
        run = Run(kept[f"{self.architecture.layers[0].path} in"], layers, kept["final"], gradients.get("final"))
        self._kept, self._gradients = {}, {}
        return run

    def _hooks(self, layer: Layer, stream: Tensor | None, *, first: bool) -> list[torch.utils.hooks.RemovableHandle]:
        module = self.model.get_submodule
        path = layer.path
        handles = [module(path).register_forward_pre_hook(self._enter(path, stream, first), with_kwargs=True)]
        for projection in _projection_paths(layer):
            handles.append(module(projection).register_forward_hook(self._feel(projection)))
        handles.append(module(layer.output).register_forward_pre_hook(self._keep_input(f"{path} heads")))
        handles.append(module(layer.output).register_forward_hook(self._keep_output(f"{path} attention")))
        if layer.mlp_norm is not None:
            handles.append(module(layer.mlp_norm).register_forward_pre_hook(self._keep_input(f"{path} mlp_read")))
        handles.append(
            module(layer.mlp_input).register_forward_pre_hook(
                self._alias(f"{path} mlp", None if layer.mlp_norm is not None else f"{path} mlp_read"),
                with_kwargs=True,
            )
        )
        added = layer.mlp_post_norm or layer.mlp_output
        handles.append(module(added).register_forward_hook(self._keep_output(f"{path} mlp")))
        return handles

    def _enter(self, path: str, stream: Tensor | None, first: bool) -> Any:
        """Keeps what enters a layer; the first one gets a leaf, so that gradients end there."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            entered = arguments[0] if arguments else keywords["hidden_states"]
            if first:
                entered = (entered if stream is None else stream.to(entered)).detach().requires_grad_()
            self._kept[f"{path} in"] = _rows(entered)
            return _replaced(arguments, keywords, entered) if first else None

        return hook

    def _alias(self, name: str, keep: str | None = "final") -> Any:
        """Gives a module an input of its own, and keeps the gradient with respect to it."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            entered = arguments[0] if arguments else keywords["hidden_states"]
            if keep is not None:
                self._kept[keep] = _rows(entered)
            if not entered.requires_grad:
                return None
            alias = entered.view_as(entered)
            alias.register_hook(self._store(name))
            return _replaced(arguments, keywords, alias)

        return hook

    def _feel(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(self._store(name))  # type: ignore[no-untyped-call]

        return hook

    def _store(self, name: str) -> Any:
        def store(grad: Tensor) -> None:
            self._gradients[name] = _rows(grad)

        return store

    def _keep_input(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._kept[name] = _rows(arguments[0])

        return hook

    def _keep_output(self, name: str) -> Any:
        # A copy: some models add to the output of a module in place.
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self._kept[name] = _rows(output[0] if isinstance(output, tuple) else output).clone()

        return hook


def _projection_paths(layer: Layer) -> list[str]:
    return list(dict.fromkeys(projection.path for projection in (layer.q, layer.k, layer.v)))


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _replaced(arguments: tuple[Any, ...], keywords: dict[str, Any], entered: Tensor) -> Any:
    if arguments:
        return (entered, *arguments[1:]), keywords
    return arguments, {**keywords, "hidden_states": entered}
