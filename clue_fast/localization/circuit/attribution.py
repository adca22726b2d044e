"""Edge attribution: the first-order effect on a target of patching each edge, in both directions, from a few passes.

An edge from writer u to reader v carries z_u, what u adds to the residual stream, into what v reads. Patching it
replaces z_u by its value in the other run, for v alone. To first order this changes the target by

    noising, from the clean run:        (z_u corrupted - z_u clean) · dL/d(read by v), at the clean run
    denoising, from the corrupted run:  (z_u clean - z_u corrupted) · dL/d(read by v), at the corrupted run

summed over tokens (attribution patching of edges: Syed, Rager & Conmy 2023, arXiv 2310.10348). Integrated over m steps
(EAP-IG: Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806), the gradient is averaged over runs whose embeddings lie
between both. Averaged evenly, both directions would be the same; each averages over the half of the path on its own
side, so that their mean is the score of EAP-IG with 2m steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.data import Collator, Example
from clue_fast.errors import CircuitError, NonFiniteError
from clue_fast.localization.circuit.capture import Capture, Run
from clue_fast.localization.circuit.graph import Graph
from clue_fast.localization.circuit.streams import Streams
from clue_fast.localization.targets import record_target

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


@dataclass(frozen=True)
class EdgeScores:
    """Effects of patching edges on the mean target of the records.

    Attributes:
        noising: [writers, readers] float64, change of the target of the clean run; 0 where there is no edge.
        denoising: the same of the corrupted run.
    """

    noising: Tensor
    denoising: Tensor


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
        target: a key of ``targets.TARGETS``; the mean over the answer tokens of each record counts.
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
            logits = self.model(batch[name], attention_mask=batch["attention_mask"], use_cache=False).logits
            if backward:
                torch.autograd.backward(record_target(logits, batch["labels"], self.target).sum())
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
            change = self.streams.changed(*pair, chunk).flatten(1)
            for run, product in zip(runs, products, strict=True):
                for layer in range(len(run.layers) + 1):
                    readers = self.graph.readers_at(layer)
                    # Of its own layer, only the MLP reads what the heads write.
                    before = self.graph.writers_until(layer)
                    felt = self.streams.felt(run, layer, chunk).flatten(1)
                    product[:before, readers] += (change[:before] @ felt.T).double().cpu()
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
