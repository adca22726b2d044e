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
class Twin:
    """An example and its corrupted twin, token for token.

    Attributes:
        input_ids: of the clean example.
        corrupted_ids: of its twin, as many.
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
    twins: Sequence[Twin],
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
        twins: the records.
        pad_token_id: fills up shorter records.
        target: a key of ``targets.TARGETS``; the mean over the answer tokens of each record counts.
        steps: runs a direction between clean and corrupted embeddings; 0 takes the gradient at the run itself.
        tokens_per_batch: most tokens in one forward pass, padding included.
        chunk_bytes: most memory for the outputs of all writers.
        progress: called with the number of records done.

    Raises:
        CircuitError: there are no records, or a corrupted twin never differs.
        NonFiniteError: an effect is NaN or infinite.
    """
    if not twins:
        raise CircuitError("edge attribution needs at least one record with a corrupted twin")
    device = next(model.parameters()).device
    totals = [torch.zeros(graph.valid.shape, dtype=torch.float64, device=device) for _ in range(2)]
    attribution = _Attribution(model, graph, target, chunk_bytes)
    for batch in _batches(twins, pad_token_id, tokens_per_batch, device):
        for weights, change, run in attribution.runs(batch, steps):
            products = attribution.products(change, run)
            for total, weight in zip(totals, weights, strict=True):
                if weight:
                    total += weight * products
        progress(len(batch["labels"]))
    noising, denoising = (torch.where(graph.valid, total.cpu() / len(twins), 0.0) for total in totals)
    if not bool(torch.isfinite(noising).all() and torch.isfinite(denoising).all()):
        raise NonFiniteError(
            "the effect of an edge is NaN or infinite; check the weights and the precision of the model"
        )
    return EdgeScores(noising, denoising)


class _Attribution:
    def __init__(self, model: nn.Module, graph: Graph, target: str, chunk_bytes: int) -> None:
        self.model, self.graph, self.target, self.chunk_bytes = model, graph, target, chunk_bytes
        self.capture = Capture(model, graph.architecture)
        self.streams = Streams(model, graph)

    def runs(self, batch: dict[str, Tensor], steps: int) -> Iterator[tuple[tuple[float, float], tuple[Run, Run], Run]]:
        """Yields the weight of a run in both directions, the clean and the corrupted run, and the run itself."""
        if steps == 0:
            clean = self.run(batch, "input_ids")
            corrupted = self.run(batch, "corrupted_ids")
            yield (-1.0, 0.0), (clean, corrupted), clean
            yield (0.0, 1.0), (clean, corrupted), corrupted
            return
        clean, corrupted = (self.run(batch, name, backward=False) for name in ("input_ids", "corrupted_ids"))
        shape = (*batch["input_ids"].shape, -1)
        for step in range(2 * steps):
            share = (step + 0.5) / (2 * steps)
            stream = (clean.stream + share * (corrupted.stream - clean.stream)).reshape(shape)
            between = self.run(batch, "input_ids", stream=stream)
            weights = (-1.0 / steps, 0.0) if step < steps else (0.0, 1.0 / steps)
            yield weights, (clean, corrupted), between

    def run(self, batch: dict[str, Tensor], name: str, *, stream: Tensor | None = None, backward: bool = True) -> Run:
        with torch.set_grad_enabled(backward), self.capture.record(stream):
            logits = self.model(batch[name], attention_mask=batch["attention_mask"], use_cache=False).logits
            if backward:
                torch.autograd.backward(record_target(logits, batch["labels"], self.target).sum())
        return self.capture.run()

    def products(self, pair: tuple[Run, Run], run: Run) -> Tensor:
        """(z clean - z corrupted) · gradient, [writers, readers] float64, summed over the tokens of a batch."""
        clean, corrupted = pair
        writers, width = len(self.graph.writers), self.graph.architecture.width
        per_chunk = max(1, self.chunk_bytes // (4 * writers * width))
        tokens = len(run.stream)
        products = torch.zeros(self.graph.valid.shape, dtype=torch.float64, device=run.stream.device)
        for start in range(0, tokens, per_chunk):
            chunk = slice(start, start + per_chunk)
            change = (self.streams.written(clean, chunk) - self.streams.written(corrupted, chunk)).flatten(1)
            before, first_reader = 1, 0
            for layer in range(len(run.layers) + 1):
                felt = self.streams.felt(run, layer, chunk).flatten(1)
                # Of its own layer, only the MLP reads what the heads write.
                before = 1 + sum(1 for writer in self.graph.writers[1:] if writer.layer <= layer)
                readers = slice(first_reader, first_reader + len(felt))
                products[:before, readers] += (change[:before] @ felt.T).double()
                first_reader = readers.stop
        return products


def _batches(
    twins: Sequence[Twin], pad_token_id: int, tokens_per_batch: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of ``input_ids``, ``corrupted_ids``, ``labels`` and ``attention_mask``."""
    order = sorted(twins, key=lambda twin: -len(twin.input_ids))
    collate = Collator(pad_token_id)
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // len(order[start].input_ids))
        chosen = order[start : start + size]
        clean: list[Example] = [{"input_ids": twin.input_ids, "labels": twin.labels} for twin in chosen]
        corrupted: list[Example] = [{"input_ids": twin.corrupted_ids, "labels": twin.labels} for twin in chosen]
        batch = collate(clean)
        batch["corrupted_ids"] = collate(corrupted)["input_ids"]
        yield {name: tensor.to(device) for name, tensor in batch.items()}
        start += size
