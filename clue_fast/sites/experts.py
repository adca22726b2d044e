"""Stacked experts: the gated MLPs of a mixture as three-dimensional parameters of one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.internals import EagerExperts, expert_gate, own_parameters, variant
from clue_fast.ops import ACTIVATIONS
from clue_fast.sites.mlp import Rows, Unmatched
from clue_fast.sites.site import ParamSlice, Site, layer_index
from clue_fast.sites.trace import sample

# A trace has few channels; multiples of four, since grouped matrix products want strides of 16 bytes.
HIDDEN, WIDTH, TOKENS = 16, 8, 24
LAYOUTS = ((Rows("", 0), Rows("", WIDTH)), (Rows("", 0, 2), Rows("", 1, 2)))


@dataclass(frozen=True)
class Stack:
    """The parameters of stacked experts.

    Attributes:
        gate_up, down: names of the parameters.
        gate_up_bias, down_bias: names of their biases, or None.
        transposed: whether the weights are [experts, inputs, outputs].
        experts, width: how many, and the channels of each.
    """

    gate_up: str
    down: str
    gate_up_bias: str | None
    down_bias: str | None
    transposed: bool
    experts: int
    width: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        names = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(name for name in names if name is not None)


def find_experts(module: nn.Module, path: str) -> list[Site] | Unmatched | None:
    """Returns one site for each expert stacked in a module, or why it is not understood, or None without a stack."""
    stacked = {name: p for name, p in own_parameters(module).items() if p.dim() == 3}
    if not any(_may_follow(second.shape, first.shape) for first in stacked.values() for second in stacked.values()):
        return None
    kind = type(module).__name__
    stack = find_stack(module)
    if stack is None:
        shapes = ", ".join(f"{name} {list(p.shape)}" for name, p in stacked.items())
        return Unmatched(path, kind, f"its stacked parameters are not gate and up in one, and down: {shapes}", "expert")
    try:
        found = _trace(module, stack)
    except Exception as error:
        return Unmatched(path, kind, f"its forward cannot be traced ({type(error).__name__}: {error})", "expert")
    if found is None:
        return Unmatched(path, kind, "its experts do not compute the weighted sum of down(gate(x) · up(x))", "expert")
    layout, activation = found
    return [_site(path, stack, layout, activation, index) for index in range(stack.experts)]


def _may_follow(second: Sequence[int], first: Sequence[int]) -> bool:
    """Whether stacked matrices of these shapes may lead back to where others come from, through fewer channels."""
    (_, *down), (_, *up) = second, first
    return any(
        width != hidden and rows in (width, 2 * width) and (columns, hidden) == (hidden, columns)
        for (hidden, width), (rows, columns) in ((down, up), (down[::-1], up[::-1]))
    )


def find_stack(module: nn.Module) -> Stack | None:
    """Returns the parameters of a module as stacked experts, by their shapes alone."""
    shapes = {name: tuple(p.shape) for name, p in own_parameters(module).items()}
    stacked = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    for gate_up, (experts, *first) in stacked.items():
        for down, (others, *second) in stacked.items():
            for transposed in (False, True):
                (packed, hidden), (out, width) = (first[::-1], second[::-1]) if transposed else (first, second)
                if gate_up == down or experts != others or packed != 2 * width or hidden != out:
                    continue
                flat = [name for name, shape in shapes.items() if len(shape) == 2]
                gate_up_bias = next((name for name in flat if shapes[name] == (experts, packed)), None)
                down_bias = next((n for n in flat if shapes[n] == (experts, hidden) and n != gate_up_bias), None)
                return Stack(gate_up, down, gate_up_bias, down_bias, transposed, experts, width)
    return None


@torch.no_grad()
def _trace(module: nn.Module, stack: Stack) -> tuple[tuple[Rows, Rows], str | None] | None:
    """Runs the module's forward with small weights, in float64; returns which rows are gate and up, and how they act.

    Raises what the forward raises.
    """

    def draw(seed: int, *shape: int) -> Tensor:
        return sample(*shape, seed=seed).double()

    experts = stack.experts
    gate_up, down = draw(0, experts, 2 * WIDTH, HIDDEN) / 8, draw(1, experts, HIDDEN, WIDTH)
    gate_up_bias, down_bias = draw(2, experts, 2 * WIDTH), draw(3, experts, HIDDEN)
    small = {stack.gate_up: gate_up, stack.down: down}
    if stack.transposed:
        small = {name: weight.transpose(1, 2).contiguous() for name, weight in small.items()}
    if stack.gate_up_bias:
        small[stack.gate_up_bias] = gate_up_bias
    if stack.down_bias:
        small[stack.down_bias] = down_bias
    small_module = variant(module, {name: nn.Parameter(value) for name, value in small.items()})
    if hasattr(module, "config"):
        small_module.__dict__["config"] = EagerExperts(module.config)
    x, weights = draw(4, TOKENS, HIDDEN), draw(5, TOKENS, 2)
    chosen = torch.arange(2 * TOKENS, device="cpu").reshape(TOKENS, 2) % experts
    found = type(small_module).forward(small_module, x, chosen, weights)

    z = torch.einsum("nd,nkfd->nkf", x, gate_up[chosen]) + (gate_up_bias[chosen] if stack.gate_up_bias else 0.0)

    def agrees(h: Tensor) -> bool:
        y = torch.einsum("nkf,nkdf->nkd", h, down[chosen]) + (down_bias[chosen] if stack.down_bias else 0.0)
        expected = (y * weights[..., None]).sum(1)
        return bool((found - expected).norm() < 1e-6 * expected.norm())

    for rows in LAYOUTS:
        for order in (rows, rows[::-1]):
            gate, up = (row.of(z, WIDTH) for row in order)
            for name, activation in ACTIVATIONS.items():
                if agrees(activation(gate) * up):
                    return (order[0], order[1]), name
    gate_function = expert_gate(small_module)
    if gate_function is not None and agrees(gate_function(z)):
        layout = next((rows for rows in LAYOUTS if _owns(gate_function, z, rows)), None)
        return None if layout is None else (layout, None)
    return None


def _owns(gate: Callable[[Tensor], Tensor], z: Tensor, rows: tuple[Rows, Rows]) -> bool:
    """Whether unit u of gate(z) depends on the u-th of each of these rows and on no others."""
    changed = z.clone()
    for row in rows:
        row.of(changed, WIDTH)[..., ::3] += 1.0
    differs = (gate(changed) != gate(z)).flatten(0, -2).any(0)
    return bool(differs[::3].all()) and int(differs.sum()) == len(differs[::3])


def _site(path: str, stack: Stack, layout: tuple[Rows, Rows], activation: str | None, index: int) -> Site:
    prefix = f"{path}." if path else ""
    rows_dim, width = int(stack.transposed), stack.width
    slices = []
    for row in layout:
        offset = width if row.offset == WIDTH else row.offset
        slices.append(ParamSlice(f"{prefix}{stack.gate_up}", rows_dim, offset, row.stride, expert_index=index))
        if stack.gate_up_bias is not None:
            slices.append(ParamSlice(f"{prefix}{stack.gate_up_bias}", 0, offset, row.stride, expert_index=index))
    slices.append(ParamSlice(f"{prefix}{stack.down}", 1 - rows_dim, expert_index=index))
    return Site(
        path=path,
        kind="expert",
        width=width,
        layer=layer_index(path),
        structure="experts",
        output=f"{prefix}{stack.down}",
        slices=tuple(slices),
        activation=activation,
        index=index,
    )
