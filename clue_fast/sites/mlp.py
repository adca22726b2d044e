"""MLPs: two or three projections with something elementwise in between.

Which channels of which projections make up a unit, which of them is the gate and which activation follows is read
off a rehearsal (see ``clue_fast.sites.rehearsal``), not off names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.sites.activation import identify_gate
from clue_fast.sites.projection import Projection, child_projections
from clue_fast.sites.rehearsal import Rehearsal, rehearse, required_arguments, sample
from clue_fast.sites.site import Site, layer_index

POINTS = 256


@dataclass(frozen=True)
class Unmatched:
    """A module that has the shapes of a site, and why it is none that is known."""

    path: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.type}): {self.reason}"


@dataclass(frozen=True)
class Rows:
    """Outputs of a projection, one for each unit: ``offset + u * stride`` for unit u."""

    name: str
    offset: int = 0
    stride: int = 1

    def of(self, values: Tensor, width: int) -> Tensor:
        """Returns the units' channels of what the projection gives, a view [..., width]."""
        return values[..., self.offset : self.offset + width * self.stride : self.stride]


def find_mlp(module: nn.Module, path: str) -> Site | Unmatched | None:
    """Returns the MLP that the direct children of a module make up, or why they do not, or None without the shapes."""
    projections = child_projections(module, path)
    reason = None
    for down, guesses in _guesses(projections):
        try:
            trial = _Trial(module, projections, down)
            if trial.comes_first():
                continue
            for rows in guesses:
                if trial.own_units(rows):
                    return trial.site(path, rows)
            reason = reason or f"the input of {down} is no elementwise function of any other projection"
        except Exception as error:
            reason = reason or f"its forward cannot be rehearsed ({type(error).__name__}: {error})".replace("\n", " ")
    return None if reason is None else Unmatched(path, type(module).__name__, reason)


def find_split_mlp(module: nn.Module, path: str) -> Site | None:
    """Returns the plain MLP whose two projections lie in two neighboring children of a module, as in BERT."""
    single: list[tuple[nn.Module, str, Projection]] = []
    for name, child in module.named_children():
        projections = child_projections(child, f"{path}.{name}" if path else name)
        single += [(child, *item) for item in projections.items() if len(projections) == 1]
    for (first, up_name, up), (second, down_name, down) in permutations(single, 2):
        if (up.inputs, up.outputs) != (down.outputs, down.inputs) or up.inputs == up.outputs:
            continue
        try:
            if _is_elementwise(first, up_name, up) and _reads_its_input(second, down_name, down):
                return _site(path, "plain", [(up, Rows(up_name))], down, None)
        except Exception:  # modules of these shapes that take other arguments are something else
            continue
    return None


def _guesses(projections: Mapping[str, Projection]) -> Iterator[tuple[str, list[tuple[Rows, ...]]]]:
    """For every projection that may be the last of an MLP: what the units' channels of those before it may be."""
    for name, down in projections.items():
        fitting = {n: p.outputs for n, p in projections.items() if n != name and p.inputs == down.outputs}
        width = down.inputs
        equal = [n for n, outputs in fitting.items() if outputs == width]
        packed = [n for n, outputs in fitting.items() if outputs == 2 * width]
        guesses: list[tuple[Rows, ...]] = [(Rows(a), Rows(b)) for a, b in combinations(equal, 2)]
        guesses += [(Rows(n), Rows(n, width)) for n in packed] + [(Rows(n, 0, 2), Rows(n, 1, 2)) for n in packed]
        guesses += [(Rows(n),) for n in equal]
        if guesses:
            yield name, guesses


class _Trial:
    """Rehearsals of a module, to decide whether ``down`` reads units made of certain channels."""

    def __init__(self, module: nn.Module, projections: Mapping[str, Projection], down: str) -> None:
        self.module, self.projections, self.down = module, projections, down
        self.width = projections[down].inputs
        tokens = max(3, -(-POINTS // self.width))
        self.arguments = [sample(1, tokens, projections[down].outputs, seed=0)] * required_arguments(module)
        self.values = {name: sample(tokens, p.outputs, seed=seed) for seed, (name, p) in enumerate(projections.items())}
        self.plain = self.run(self.values)

    def run(self, values: Mapping[str, Tensor], **how: Any) -> Rehearsal:
        return rehearse(self.module, self.arguments, values, **how)

    def comes_first(self) -> bool:
        """Whether ``down`` reads what the module itself was given, so that it is not the last of an MLP."""
        h = self.plain.inputs.get(self.down)
        return h is None or torch.equal(h, self.arguments[0].flatten(0, -2))

    def own_units(self, rows: Sequence[Rows]) -> bool:
        """Whether unit u of the input of ``down`` depends on the u-th of each of these channels, and on no others."""
        h = self.plain.inputs[self.down]
        if h.shape != (len(self.values[self.down]), self.width):
            return False
        if self.others_matter({row.name for row in rows}, h):
            return False
        chosen = sample(self.width, seed=1) > 0
        chosen[0] = True
        for changed in [rows] if len(rows) == 1 else [rows, *((row,) for row in rows)]:
            values = {name: value.clone() for name, value in self.values.items()}
            for row in changed:
                channels = row.of(values[row.name], self.width)
                channels[:, chosen] = sample(*channels[:, chosen].shape, seed=99)
            differs = (self.run(values).inputs[self.down] != h).any(0)
            if bool(differs[~chosen].any()) or not bool(differs[chosen].float().mean() > 0.25):
                return False
        return True

    def others_matter(self, names: set[str], h: Tensor) -> bool:
        """Whether another projection that could be part of the units has a say in the input of ``down``."""
        down = self.projections[self.down]
        others = [
            name
            for name, p in self.projections.items()
            if name not in names | {self.down}
            and p.inputs == down.outputs
            and p.outputs in (down.inputs, 2 * down.inputs)
        ]
        changed = {name: -self.values[name] for name in others}
        return bool(changed) and not torch.equal(self.run(self.values | changed).inputs[self.down], h)

    def site(self, path: str, rows: Sequence[Rows]) -> Site:
        structure = "plain" if len(rows) == 1 else "packed" if rows[0].name == rows[1].name else "gated"
        activation = None
        if len(rows) == 2:
            h = self.plain.inputs[self.down]
            for order in (rows, rows[::-1]):
                gate, up = (row.of(self.values[row.name], self.width) for row in order)
                if activation := identify_gate(h, gate, up):
                    rows = order
                    break
            if not self.nothing_else_happens():
                activation = None
        projections = [(self.projections[row.name], row) for row in rows]
        return _site(path, structure, projections, self.projections[self.down], activation)

    def nothing_else_happens(self) -> bool:
        """Whether the module returns what ``down`` gives, with at most a dropout layer before it."""
        h = self.plain.inputs[self.down]
        training, scaled = self.run(self.values, training=True), self.run(self.values, dropout=2.0)
        dropouts = sum(isinstance(child, nn.Dropout) for child in self.module.children())
        return (
            all(_is(run.output, self.values[self.down]) for run in (self.plain, training, scaled))
            and torch.equal(training.inputs[self.down], h)
            and torch.equal(scaled.inputs[self.down], h * 2.0**dropouts)
            and dropouts <= 1
        )


def _is(output: Any, expected: Tensor) -> bool:
    return isinstance(output, Tensor) and torch.equal(output.reshape(-1, output.shape[-1]), expected)


def _site(
    path: str, structure: str, inputs: Sequence[tuple[Projection, Rows]], down: Projection, activation: str | None
) -> Site:
    parts = [part for projection, rows in inputs for part in projection.rows(rows.offset, rows.stride)]
    return Site(
        path=path,
        kind="mlp",
        width=down.inputs,
        layer=layer_index(path),
        structure=structure,
        output=down.path,
        parts=(*parts, down.columns()),
        inputs=tuple(dict.fromkeys(projection.path for projection, _ in inputs)),
        activation=activation,
    )


def _is_elementwise(module: nn.Module, name: str, up: Projection) -> bool:
    """Whether a module returns an elementwise function of what its only projection gives."""
    tokens = max(3, -(-POINTS // up.outputs))
    x, values = sample(1, tokens, up.inputs, seed=0), sample(tokens, up.outputs, seed=1)
    chosen = sample(up.outputs, seed=2) > 0
    chosen[0] = True
    changed = values.clone()
    changed[:, chosen] = sample(*changed[:, chosen].shape, seed=99)
    before, after = (rehearse(module, [x], {name: v}).output.reshape(tokens, -1) for v in (values, changed))
    differs = (before != after).any(0)
    return not bool(differs[~chosen].any()) and bool(differs[chosen].float().mean() > 0.25)


def _reads_its_input(module: nn.Module, name: str, down: Projection) -> bool:
    """Whether the only projection of a module is given the module's own first argument."""
    x, residual = sample(1, 3, down.inputs, seed=0), sample(1, 3, down.outputs, seed=1)
    arguments = [x] + [residual] * (required_arguments(module) - 1)
    run = rehearse(module, arguments, {name: sample(3, down.outputs, seed=2)})
    return name in run.inputs and torch.equal(run.inputs[name], x[0])
