"""MLPs: two or three projections with something elementwise in between.

Which channels of which projections make up a unit, which of them is the gate and which activation follows is read
off a trace (see ``clue_fast.sites.trace``), not off names; activations are known by what they compute. So is what is
no MLP: two projections in a row, as of an embedding of another width; two with other tokens, another network or another
argument in between, as in recurrent layers and gated attention; two whose output is not added to anything, as in
routers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clue_fast.deprecated import RenamedAttribute
from clue_fast.ops import ACTIVATIONS
from clue_fast.sites.projection import Projection, child_projections, projection_of
from clue_fast.sites.site import Site, layer_index
from clue_fast.sites.trace import Trace, required_arguments, sample, trace_with_stubs

POINTS = 256
LARGE = 2.0**20


@dataclass(frozen=True)
class Unmatched:
    """A module that has the shapes of a site, and why it is none that is known.

    Attributes:
        path, type: where it is, and its class.
        reason: why it is none.
        kind: of the sites that it looks like.
        traced: whether it was seen at work; otherwise nothing but its shapes speaks for it.
    """

    path: str
    type: str
    reason: str
    kind: str = "mlp"
    traced: bool = True
    rehearsed = RenamedAttribute("traced")

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
    reason, traced = None, False
    for down, guesses in _guesses(projections):
        try:
            trial = _Trial(module, projections, down)
            if trial.is_something_else():
                continue
            for rows in guesses:
                if trial.own_units(rows):
                    if trial.is_linear(rows):
                        break
                    return trial.site(path, rows)
            else:
                reason, traced = f"the input of {down} is no elementwise function of any other projection", True
        except Exception as error:
            reason = reason or f"its forward cannot be traced ({type(error).__name__}: {error})".replace("\n", " ")
    return None if reason is None else Unmatched(path, type(module).__name__, reason, traced=traced)


def is_added(parent: nn.Module, child: nn.Module, site: Site) -> bool:
    """Whether a module returns something linear in what the MLP that a child of it is returns, as far as can be seen.

    Otherwise the child computes a gate, or what a router chooses by.
    """
    name = next(name for name, module in parent.named_children() if module is child)
    path = site.output.removeprefix(f"{site.path}.")
    down = projection_of(child.get_submodule(path), path)
    assert down is not None
    arguments = [sample(1, 3, down.outputs, seed=0)] * required_arguments(parent)
    values = {other: sample(3, p.outputs, seed=1) for other, p in child_projections(parent, "").items()}
    values[name] = sample(3, down.outputs, seed=2)
    try:
        return _effect(lambda v: _first(trace_with_stubs(parent, arguments, v).output), values, {name}) != "nonlinear"
    except Exception:  # containers have no forward, and others take other arguments
        return True


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
    """Traces of a module, to decide whether ``down`` reads units made of certain channels."""

    def __init__(self, module: nn.Module, projections: Mapping[str, Projection], down: str) -> None:
        self.module, self.projections, self.down = module, projections, down
        self.width = projections[down].inputs
        tokens = max(3, -(-POINTS // self.width))
        self.arguments = [sample(1, tokens, projections[down].outputs, seed=0)] * required_arguments(module)
        self.values = {name: sample(tokens, p.outputs, seed=seed) for seed, (name, p) in enumerate(projections.items())}
        self.h = self.input_of_down(self.values)

    def run(self, values: Mapping[str, Tensor], **how: Any) -> Trace:
        return trace_with_stubs(self.module, self.arguments, values, **how)

    def input_of_down(self, values: Mapping[str, Tensor], **how: Any) -> Tensor:
        seen = trace_with_stubs(
            self.module, how.pop("arguments", self.arguments), values, until=self.down, **how
        ).inputs
        return seen.get(self.down, torch.empty(0, device="cpu"))

    def is_something_else(self) -> bool:
        """Whether ``down`` is not called, or reads anything but what other projections give for the same token, or
        the module does more with what it gives than to scale it and add it to something.
        """
        first = {name: torch.cat([-value[:1], value[1:]]) for name, value in self.values.items()}
        others = [sample(*x.shape, seed=7) for x in self.arguments]
        return (
            self.h.numel() == 0
            or not torch.equal(self.input_of_down(self.values, arguments=others), self.h)
            or not torch.equal(self.input_of_down(self.values, blocks=2.0), self.h)
            or not torch.equal(self.input_of_down(first)[1:], self.h[1:])
            or not self.is_output()
        )

    def is_output(self) -> bool:
        """Whether what the module returns is linear in what ``down`` gives, up to what is added."""
        return _effect(lambda values: _first(self.run(values).output), self.values, {self.down}) == "linear"

    def is_linear(self, rows: Sequence[Rows]) -> bool:
        """Whether the input of ``down`` is linear in these channels: two projections in a row, not an MLP."""
        learned = (list(child.parameters()) for child in self.module.children())
        if any(parameters and all(p.numel() == 1 for p in parameters) for parameters in learned):
            return False  # an activation with parameters of its own, which traces leave out
        return _effect(self.input_of_down, self.values, {row.name for row in rows}) == "linear"

    def own_units(self, rows: Sequence[Rows]) -> bool:
        """Whether unit u of the input of ``down`` depends on the u-th of each of these channels.

        And on no others, but for their mean and variance.
        """
        h = self.h
        if h.shape != (len(self.values[self.down]), self.width):
            return False
        if self.others_matter({row.name for row in rows}):
            return False
        chosen = sample(self.width, seed=1) > 0
        chosen[0] = True
        return all(
            self.stays_apart(changed, chosen)
            for changed in ([rows] if len(rows) == 1 else [rows, *((row,) for row in rows)])
        )

    def stays_apart(self, rows: Sequence[Rows], chosen: Tensor) -> bool:
        """Whether some of the units change with these channels of theirs, and the others do not.

        Or not more than by a normalization, which is told by keeping the channels' mean and variance.
        """
        for kept in (False, True):
            values = {name: value.clone() for name, value in self.values.items()}
            for row in rows:
                channels = row.of(values[row.name], self.width)
                before = channels[:, chosen]
                channels[:, chosen] = (
                    2 * before.mean(1, keepdim=True) - before if kept else sample(*before.shape, seed=99)
                )
            difference = (self.input_of_down(values) - self.h).abs().amax(0)
            differs = difference > (1e-4 if kept else 0.0)
            if not bool(differs[~chosen].any()) and float(differs[chosen].float().mean()) > (0.01 if kept else 0.25):
                return True
        return False

    def others_matter(self, names: set[str]) -> bool:
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
        return bool(changed) and not torch.equal(self.input_of_down(self.values | changed), self.h)

    def site(self, path: str, rows: Sequence[Rows]) -> Site:
        structure = "plain" if len(rows) == 1 else "packed" if rows[0].name == rows[1].name else "gated"
        activation, multipliers = None, (1.0, 1.0)
        if len(rows) == 2:
            for order in (rows, rows[::-1]):
                if found := self.gate(*order):
                    rows, (activation, multiplier) = order, found
                    factor = self.output_factor()
                    activation, multipliers = (
                        (None, multipliers) if factor is None else (activation, (multiplier, factor))
                    )
                    break
        projections = [(self.projections[row.name], row) for row in rows]
        return _site(path, structure, projections, self.projections[self.down], activation, multipliers)

    def gate(self, first: Rows, second: Rows) -> tuple[str, float] | None:
        """The activation and the multiplier for which the input of ``down`` is act(multiplier · first) · second."""
        gate, up = (row.of(self.values[row.name], self.width) for row in (first, second))
        if activation := identify_gate(self.h, gate, up):
            return activation, 1.0
        # Far to the right every activation is the identity or its square, so that what is left is the multiplier.
        large = {name: torch.full_like(value, LARGE, dtype=torch.float64) for name, value in self.values.items()}
        second.of(large[second.name], self.width).fill_(1.0)
        factor = float(self.input_of_down(large)[0, 0]) / LARGE
        for multiplier in (factor, math.sqrt(max(factor, 0.0) / LARGE)):
            if activation := identify_gate(self.h, gate * multiplier, up):
                return activation, multiplier
        return None

    def output_factor(self) -> float | None:
        """What the module multiplies that by which ``down`` gives, or None if it does more, but for one dropout before
        it.
        """
        large = {name: torch.full_like(value, LARGE, dtype=torch.float64) for name, value in self.values.items()}
        output = self.run(large).output
        if not isinstance(output, Tensor):
            return None
        factor = float(output.flatten()[0]) / LARGE
        expected = self.values[self.down] * factor
        runs = [self.run(self.values, **how) for how in ({}, {"training": True}, {"dropout": 2.0})]
        dropouts = sum(isinstance(child, nn.Dropout) for child in self.module.children())
        nothing_else = (
            all(_is(run.output, expected) for run in runs)
            and torch.equal(runs[1].inputs[self.down], self.h)
            and torch.equal(runs[2].inputs[self.down], self.h * 2.0**dropouts)
            and dropouts <= 1
        )
        return factor if nothing_else else None


def identify_gate(h: Tensor, gate: Tensor, up: Tensor) -> str | None:
    """Returns the name of the activation for which h = act(gate) · up, or None; all float32, in one shape."""
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(h, activation(gate) * up, rtol=1e-5, atol=1e-5):
            return name
    return None


def _is(output: Any, expected: Tensor) -> bool:
    return isinstance(output, Tensor) and torch.equal(output.reshape(-1, output.shape[-1]), expected)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def _effect(
    function: Callable[[Mapping[str, Tensor]], Tensor], values: Mapping[str, Tensor], names: Iterable[str]
) -> Literal["none", "linear", "nonlinear"]:
    """What a function makes of what some projections give: a constant, something linear up to a constant, or more."""
    changed = {name: sample(*values[name].shape, seed=99) for name in names}
    between = {name: (values[name] + value) / 2 for name, value in changed.items()}
    here, there, middle = (function({**values, **other}) for other in ({}, changed, between))
    if torch.equal(here, there):
        return "none"
    return "linear" if torch.allclose(middle, (here + there) / 2, rtol=1e-4, atol=1e-4) else "nonlinear"


def _site(
    path: str,
    structure: str,
    inputs: Sequence[tuple[Projection, Rows]],
    down: Projection,
    activation: str | None,
    multipliers: tuple[float, float] = (1.0, 1.0),
) -> Site:
    slices = [owned for projection, rows in inputs for owned in projection.rows(rows.offset, rows.stride)]
    return Site(
        path=path,
        kind="mlp",
        width=down.inputs,
        layer=layer_index(path),
        structure=structure,
        output=down.path,
        slices=(*slices, down.columns()),
        inputs=tuple(dict.fromkeys(projection.path for projection, _ in inputs)),
        activation=activation,
        multipliers=multipliers,
    )


def _is_elementwise(module: nn.Module, name: str, up: Projection) -> bool:
    """Whether a module returns an elementwise function, not a linear one, of what its only projection gives."""
    tokens = max(3, -(-POINTS // up.outputs))
    x, values = sample(1, tokens, up.inputs, seed=0), sample(tokens, up.outputs, seed=1)
    chosen = sample(up.outputs, seed=2) > 0
    chosen[0] = True
    changed = values.clone()
    changed[:, chosen] = sample(*changed[:, chosen].shape, seed=99)

    def given(v: Tensor) -> Tensor:
        output: Tensor = trace_with_stubs(module, [x], {name: v}).output
        return output.reshape(tokens, -1)

    before = given(values)
    differs = (before != given(changed)).any(0)
    if bool(differs[~chosen].any()) or not bool(differs[chosen].float().mean() > 0.25):
        return False
    return _effect(lambda v: given(v[name]), {name: values}, {name}) == "nonlinear"


def _reads_its_input(module: nn.Module, name: str, down: Projection) -> bool:
    """Whether the only projection of a module is given the module's own first argument."""
    x, residual = sample(1, 3, down.inputs, seed=0), sample(1, 3, down.outputs, seed=1)
    arguments = [x] + [residual] * (required_arguments(module) - 1)
    run = trace_with_stubs(module, arguments, {name: sample(3, down.outputs, seed=2)}, until=name)
    return name in run.inputs and torch.equal(run.inputs[name], x[0])
