"""Edge attribution: the first-order effect on a target of patching each edge, in both directions, from a few passes.

An edge from writer u to reader v carries z_u, what u adds to the residual stream, into what v reads. Patching it
replaces z_u by its value in the other run, for v alone. To first order this changes the target by

    noising, from the clean run:        (z_u corrupted - z_u clean) · dL/d(read by v), at the clean run
    denoising, from the corrupted run:  (z_u clean - z_u corrupted) · dL/d(read by v), at the corrupted run

summed over tokens (attribution patching of edges: Syed, Rager & Conmy 2023, arXiv 2310.10348). Integrated over m steps
(EAP-IG: Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806), the gradient is averaged over runs whose embeddings lie
between both. Averaged evenly, both directions would be the same; each averages over the half of the path on its own
side, so that their mean is the score of EAP-IG with 2m steps.

A run is kept compactly: of a head its output, [tokens, head width], and the gradients of its projections. What a
writer adds in the width of the model, and the gradient of what a reader reads, follow by products with weights, a few
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.criteria.circuit.architecture import Architecture, Layer, Norm, Projection
from clue_fast.criteria.circuit.graph import EdgeScores, Graph
from clue_fast.criteria.passes import target_of
from clue_fast.data import Collator, Example
from clue_fast.errors import CircuitError, NonFiniteError
from clue_fast.objectives.predictions import predict_in_one_pass
from clue_fast.ops.accumulators import wide
from clue_fast.sites.projection import output_bias, weight_matrix

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CorruptedExample:
    """An example and a corrupted one of as many tokens.

    Attributes:
        input_ids: of the clean example.
        corrupted_ids: of the corrupted example, as many.
        labels: the answer, -100 elsewhere; its target is what is differentiated in both runs.
    """

    input_ids: list[int]
    corrupted_ids: list[int]
    labels: list[int]


@dataclass
class LayerRun:
    """What one layer did, all [tokens, ...] with the tokens of all records in a row.

    Attributes:
        attention_read, mlp_read: residual stream where it is read, before any norm.
        heads: what the heads found, [tokens, heads * head width].
        attention_output, mlp_written: what was written before a post norm, if there is one.
        mlp_added: what the MLP added to the stream.
        gradients: of the target with respect to the outputs of projections, by path, and to the input of the MLP,
            by "mlp".
    """

    attention_read: Tensor
    mlp_read: Tensor
    heads: Tensor
    attention_output: Tensor
    mlp_added: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Run:
    """What a run left: ``stream`` into the first layer, a ``LayerRun`` each, and the stream that the final norm read.

    Attributes:
        stream: [tokens, width], what the embedding wrote.
        layers: one per layer.
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
                    attention_output=kept[f"{layer.path} attention"],
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
            handles.append(module(projection).register_forward_hook(self._keep_gradient(projection)))
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

    def _keep_gradient(self, name: str) -> Any:
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
    def writer_outputs(self, run: Run, tokens: slice) -> Tensor:
        """What each writer adds to the stream, [writers, tokens, width] float32.

        A norm between attention and the stream acts on the sum of the heads; its scale is that of the run, so that
        what the heads add still sums to what attention adds.
        """
        parts = [wide(run.stream[tokens])[None]]
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            heads = self._behind_norm(layer, own, tokens)(self._heads(layer, wide(own.heads[tokens])))
            parts += [heads, wide(own.mlp_added[tokens])[None]]
        return torch.cat(parts)

    @torch.no_grad()
    def delta(self, clean: Run, corrupted: Run, tokens: slice) -> Tensor:
        """``writer_outputs`` by the clean run less that by the corrupted one."""
        parts = [(wide(clean.stream[tokens]) - wide(corrupted.stream[tokens]))[None]]
        for layer, one, other in zip(self.graph.architecture.layers, clean.layers, corrupted.layers, strict=True):
            found = [wide(own.heads[tokens]) for own in (one, other)]
            if layer.attention_post_norm is None:
                heads = self._heads(layer, found[0] - found[1])
            else:
                first, second = (
                    self._behind_norm(layer, own, tokens)(self._heads(layer, z))
                    for own, z in zip((one, other), found, strict=True)
                )
                heads = first - second
            parts += [heads, (wide(one.mlp_added[tokens]) - wide(other.mlp_added[tokens]))[None]]
        return torch.cat(parts)

    def _heads(self, layer: Layer, found: Tensor) -> Tensor:
        """What the heads write before any norm, [heads, tokens, width], from [tokens, heads * head width]."""
        weight = wide(weight_matrix(self.model.get_submodule(layer.output)))
        weight = weight.reshape(len(weight), layer.heads, layer.head_dim).permute(1, 2, 0)
        return found.reshape(-1, layer.heads, layer.head_dim).transpose(0, 1) @ weight

    @torch.no_grad()
    def constant(self, run: Run, tokens: slice) -> Tensor:
        """What biases behind the heads add to the stream, [tokens, width] float32; no writer's."""
        total = torch.zeros_like(wide(run.stream[tokens]))
        for layer, own in zip(self.graph.architecture.layers, run.layers, strict=True):
            bias = output_bias(self.model.get_submodule(layer.output))
            if bias is not None:
                total += self._behind_norm(layer, own, tokens)(wide(bias).expand(1, len(total), -1))[0]
            if layer.attention_post_norm is not None:
                total += self._norm(layer.attention_post_norm, wide(own.attention_output[tokens])).shift
        return total

    @torch.no_grad()
    def reader_grads(self, run: Run, layer: int, tokens: slice) -> Tensor:
        """How the target changes with the stream as each reader of a layer reads it, [readers, tokens, width] float32.

        Args:
            run: with gradients.
            layer: index of the layer, or the number of layers for the final norm.
            tokens: which.
        """
        if layer == len(run.layers):
            if run.final_gradient is None:
                raise CircuitError("no gradient reached the final norm; run backward from the target")
            return wide(run.final_gradient[tokens])[None]
        architecture, own = self.graph.architecture.layers[layer], run.layers[layer]
        projected = torch.cat(
            [self._through(projection, own, tokens) for projection in (architecture.q, architecture.k, architecture.v)]
        )
        attention = self._before_norm(architecture.attention_norm, own.attention_read[tokens], projected)
        mlp = wide(own.gradients["mlp"][tokens])[None]
        return torch.cat([attention, self._before_norm(architecture.mlp_norm, own.mlp_read[tokens], mlp)])

    def _through(self, projection: Projection, own: LayerRun, tokens: slice) -> Tensor:
        """Gradient with respect to the input of a projection, of each head alone, [heads, tokens, width]."""
        weight = weight_matrix(self.model.get_submodule(projection.path))
        rows = projection.rows.to(weight.device)
        gradient = wide(own.gradients[projection.path][tokens][:, rows])
        return gradient.transpose(0, 1) @ wide(weight[rows])

    def _before_norm(self, norm: str | None, read: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to the input of a norm, given that with respect to its output."""
        if norm is None:
            return gradient
        return self._norm(norm, wide(read)).before(wide(read), gradient)

    def _behind_norm(self, layer: Layer, own: LayerRun, tokens: slice) -> Callable[[Tensor], Tensor]:
        """The linear map that a norm behind attention is at the scale it has in this run."""
        if layer.attention_post_norm is None:
            return lambda x: x
        whole = wide(own.attention_output[tokens])
        norm = self._norm(layer.attention_post_norm, whole)
        return lambda x: norm.part(whole, x)

    def _norm(self, path: str, like: Tensor) -> Norm:
        if path not in self._norms:
            self._norms[path] = Norm.of(self.model.get_submodule(path), like)
        return self._norms[path]


def edge_scores(
    model: nn.Module,
    graph: Graph,
    examples: Sequence[CorruptedExample],
    *,
    pad_token_id: int,
    target: str = "log_odds",
    steps: int = 0,
    tokens_per_batch: int = 512,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] = lambda records: None,
) -> EdgeScores:
    """Scores every edge in both directions.

    What is held at once is a few activations of the width of the model a token and layer, and the outputs of all
    writers for the few tokens that fit into ``chunk_bytes``. A record and direction costs one forward and backward
    pass, or, integrated, ``steps`` of them and one forward pass; beside it the products of writers and readers.

    Args:
        model: in evaluation mode, its weights without gradients.
        graph: of the model.
        examples: clean and corrupted.
        pad_token_id: fills up shorter records.
        target: a key of ``TARGETS``; the mean over the answer tokens of each record counts.
        steps: runs a direction between clean and corrupted embeddings; 0 takes the gradient at the run itself.
        tokens_per_batch: most tokens in one forward pass, padding included.
        chunk_bytes: most memory for the outputs of all writers.
        progress: called with the number of records done.

    Raises:
        CircuitError: there are no records, or a corrupted example never differs.
        NonFiniteError: an effect is NaN or infinite.
    """
    if not examples:
        raise CircuitError("edge attribution needs at least one record with a corrupted example")
    device = next(model.parameters()).device
    totals = [torch.zeros(graph.valid.shape, dtype=torch.float64, device="cpu") for _ in range(2)]
    attribution = _Attribution(model, graph, target, chunk_bytes)
    for batch in _batches(examples, pad_token_id, tokens_per_batch, device):
        for pair, runs in attribution.runs(batch, steps):
            products = attribution.products(pair, [run for _, run in runs])
            for (weights, _), product in zip(runs, products, strict=True):
                for total, weight in zip(totals, weights, strict=True):
                    total += weight * product
        progress(len(batch["labels"]))
    noising, denoising = (torch.where(graph.valid, total / len(examples), 0.0) for total in totals)
    if not bool(torch.isfinite(noising).all() and torch.isfinite(denoising).all()):
        raise NonFiniteError(
            "the effect of an edge is NaN or infinite; check the weights and the precision of the model"
        )
    return EdgeScores(noising, denoising)


Pair = tuple[Run, Run]
Weights = tuple[float, float]


class _Attribution:
    def __init__(self, model: nn.Module, graph: Graph, target: str, chunk_bytes: int) -> None:
        self.model, self.graph, self.target, self.chunk_bytes = model, graph, target, chunk_bytes
        self.capture = Capture(model, graph.architecture)
        self.streams = Streams(model, graph)

    def runs(self, batch: dict[str, Tensor], steps: int) -> Iterator[tuple[Pair, list[tuple[Weights, Run]]]]:
        """Yields the clean and the corrupted run, and runs with gradients and the weight of each in both directions."""
        if steps == 0:
            clean, corrupted = self.run(batch, "input_ids"), self.run(batch, "corrupted_ids")
            yield (clean, corrupted), [((-1.0, 0.0), clean), ((0.0, 1.0), corrupted)]
            return
        clean, corrupted = (self.run(batch, name, backward=False) for name in ("input_ids", "corrupted_ids"))
        shape = (*batch["input_ids"].shape, -1)
        for step in range(2 * steps):
            share = (step + 0.5) / (2 * steps)
            stream = (clean.stream + share * (corrupted.stream - clean.stream)).reshape(shape)
            between = self.run(batch, "input_ids", stream=stream)
            yield (clean, corrupted), [((-1.0 / steps, 0.0) if step < steps else (0.0, 1.0 / steps), between)]

    def run(self, batch: dict[str, Tensor], name: str, *, stream: Tensor | None = None, backward: bool = True) -> Run:
        with torch.set_grad_enabled(backward), self.capture.record(stream):
            inputs = {"input_ids": batch[name], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
            predictions = predict_in_one_pass(self.model, inputs)
            if backward:
                torch.autograd.backward(predictions.mean(target_of(predictions, self.target)).sum())
        return self.capture.run()

    @torch.no_grad()
    def products(self, pair: Pair, runs: Sequence[Run]) -> list[Tensor]:
        """(z clean - z corrupted) · gradient of each run, [writers, readers] float64, summed over the tokens."""
        writers, width = len(self.graph.writers), self.graph.architecture.width
        per_chunk = max(1, self.chunk_bytes // (4 * writers * width))
        tokens = len(pair[0].stream)
        products = [self.graph.valid.new_zeros(self.graph.valid.shape, dtype=torch.float64) for _ in runs]
        for start in range(0, tokens, per_chunk):
            chunk = slice(start, start + per_chunk)
            delta = self.streams.delta(*pair, chunk).flatten(1)
            for run, product in zip(runs, products, strict=True):
                for layer in range(len(run.layers) + 1):
                    readers = self.graph.readers_at(layer)
                    # Of its own layer, only the MLP reads what the heads write.
                    before = self.graph.writers_until(layer)
                    grads = self.streams.reader_grads(run, layer, chunk).flatten(1)
                    product[:before, readers] += (delta[:before] @ grads.T).double().cpu()
        return products


def _batches(
    examples: Sequence[CorruptedExample], pad_token_id: int, tokens_per_batch: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of ``input_ids``, ``corrupted_ids``, ``labels`` and ``attention_mask``."""
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    collate = Collator(pad_token_id)
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // len(order[start].input_ids))
        chosen = order[start : start + size]
        clean: list[Example] = [{"input_ids": own.input_ids, "labels": own.labels} for own in chosen]
        corrupted: list[Example] = [{"input_ids": own.corrupted_ids, "labels": own.labels} for own in chosen]
        batch = collate(clean)
        batch["corrupted_ids"] = collate(corrupted)["input_ids"]
        yield {name: tensor.to(device) for name, tensor in batch.items()}
        start += size
