"""The graph of a transformer: writers, readers, and the edges between them through the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clue_fast.localization.circuit.architecture import Architecture

EMBEDDING, OUTPUT = "embed", "logits"


@dataclass(frozen=True)
class Writer:
    """A node that adds to the residual stream: the embedding, an attention head or an MLP.

    Attributes:
        name: of the node, ``embed``, ``a3.h7`` or ``m3``.
        layer: of it, -1 for the embedding.
        head: index of the head, or None.
        stage: place in the order of computation.
    """

    name: str
    layer: int
    head: int | None
    stage: int


@dataclass(frozen=True)
class Reader:
    """A place where the residual stream is read: by a projection of a head, an MLP, or the final norm.

    Attributes:
        name: of the node, ``a3.h7.q``, ``a3.g1.k`` (a key/value head, which several heads may share), ``m3`` or
            ``logits``.
        layer: of it, the number of layers for ``logits``.
        part: "q", "k", "v", "mlp" or "logits".
        head: index of the head or key/value head, or None.
        stage: place in the order of computation.
    """

    name: str
    layer: int
    part: str
    head: int | None
    stage: int


class Graph:
    """Writers, readers and edges of an architecture.

    Attributes:
        architecture: what it is the graph of.
        writers, readers: in the order of computation.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.writers = [Writer(EMBEDDING, -1, None, -1)]
        self.readers: list[Reader] = []
        for index, layer in enumerate(architecture.layers):
            stage = 4 * index
            for part, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
                letter = "h" if part == "q" else "g"
                self.readers += [
                    Reader(f"a{index}.{letter}{head}.{part}", index, part, head, stage) for head in range(heads)
                ]
            self.writers += [Writer(f"a{index}.h{head}", index, head, stage + 1) for head in range(layer.heads)]
            self.readers.append(Reader(f"m{index}", index, "mlp", None, stage if layer.parallel else stage + 2))
            self.writers.append(Writer(f"m{index}", index, None, stage + 1 if layer.parallel else stage + 3))
        layers = len(architecture.layers)
        self.readers.append(Reader(OUTPUT, layers, "logits", None, 4 * layers))

    @cached_property
    def valid(self) -> Tensor:
        """Which edges there are, [writers, readers] bool: a writer comes before what reads it."""
        writers = torch.tensor([writer.stage for writer in self.writers], device="cpu")
        readers = torch.tensor([reader.stage for reader in self.readers], device="cpu")
        return writers[:, None] < readers[None, :]

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """Index of a reader by its name."""
        return {reader.name: index for index, reader in enumerate(self.readers)}

    def readers_at(self, layer: int) -> slice:
        """The range of the readers of a layer; those of the output for the number of layers."""
        sizes = [own.heads + 2 * own.kv_heads + 1 for own in self.architecture.layers] + [1]
        start = sum(sizes[:layer])
        return slice(start, start + sizes[layer])

    def writers_until(self, layer: int) -> int:
        """How many writers there are up to the end of a layer."""
        return 1 + sum(own.heads + 1 for own in self.architecture.layers[: layer + 1])

    def readers_of(self, writer: Writer) -> list[int]:
        """Indices of the readers whose input makes up what a writer writes: q, k and v of a head, or the MLP."""
        if writer.layer < 0:
            return []
        if writer.head is None:
            return [self.reader_index[writer.name]]
        layer = self.architecture.layers[writer.layer]
        group = writer.head // (layer.heads // layer.kv_heads)
        names = f"a{writer.layer}.h{writer.head}.q", f"a{writer.layer}.g{group}.k", f"a{writer.layer}.g{group}.v"
        return [self.reader_index[name] for name in names]

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {int(self.valid.sum())} edges)"
