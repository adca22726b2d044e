"""What only the Triton kernels of sparse_linear have: runs of tokens, tiles, columns by index or gathered; launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clue_fast.kernels import sparse_linear as kernels
from clue_fast.ops import backend as backends

if backends.available()["triton"] is not None or torch.cuda.is_available():
    pytest.skip("these tests count the kernels' launches in Triton's interpreter", allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
GATHER, PRODUCT, FOLD = (f"sparse_linear_{name}_kernel" for name in ("gather", "bwd", "fold"))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a GPU in place of the interpreter's large ones, and memory that nobody wrote is NaN."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "LARGEST", kernels.Tile(64, 128, 32))
    monkeypatch.setattr(kernels, "LARGEST_FLOAT32", kernels.Tile(64, 64, 16))
    new_empty = Tensor.new_empty

    def poisoned(tensor: Tensor, *size: int, **options: Any) -> Tensor:
        made = new_empty(tensor, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and grid of every launch."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append((self.name, grid))
            return self.kernel[grid]

    for name in (GATHER, PRODUCT, FOLD):
        monkeypatch.setattr(kernels, name, Counted(name))
    return seen


def operands(tokens: int, features: int, others: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradient of the output [tokens, features] and x [tokens, others]."""
    return torch.randn(tokens, features).to(dtype), torch.randn(tokens, others).to(dtype)


def gradient(grad: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    rows = grad.shape[1] if index is None else len(index)
    out = torch.full((rows, x.shape[1]), torch.nan)
    kernels.sparse_linear_backward(grad, x, index, out)
    return out


def assert_right(out: Tensor, grad: Tensor, x: Tensor, index: Tensor | None) -> None:
    """Within the bound of a sum in float32 in any order (Higham 2002, section 4.2), of single products made exactly."""
    left = (grad if index is None else grad[:, index]).double()
    exact, magnitude = left.t() @ x.double(), left.abs().t() @ x.double().abs()
    roundings = grad.shape[0] + 1  # one for the product where it is not exact
    assert ((out.double() - exact).abs() <= roundings * 2.0**-24 * magnitude).all()


@DTYPES
@pytest.mark.parametrize("by_index", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 255, 300, 801])
def test_tiles_runs_and_tails(
    launches: list[tuple[str, tuple[int, ...]]], tokens: int, by_index: bool, dtype: torch.dtype
) -> None:
    """More than one tile either way, with tails; from 512 tokens on the few tiles are split into runs."""
    grad, x = operands(tokens, 90, 131, dtype)
    index = torch.randperm(90)[:70].sort().values if by_index else None
    assert_right(gradient(grad, x, index), grad, x, index)
    tiles = 2 * (3 if dtype == torch.float32 else 2)
    runs = max(1, tokens // kernels.SHORTEST_RUN)
    expected = [(PRODUCT, (tiles, runs))]
    if runs > 1:
        expected.append((FOLD, (1,)))
    assert launches == expected


@DTYPES
def test_a_single_row_and_column(dtype: torch.dtype) -> None:
    grad, x = operands(50, 7, 1, dtype)
    index = torch.tensor([5])
    assert_right(gradient(grad, x, index), grad, x, index)


@DTYPES
def test_many_input_features_gather_first(launches: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
    """With the same bits as by the index; below that nothing is gathered."""
    grad, x = operands(40, 60, 8 * 128 + 1, dtype)
    index = torch.randperm(60)[:20].sort().values
    wide = gradient(grad, x, index)
    assert [name for name, _ in launches] == [GATHER, PRODUCT]
    del launches[:]
    few = 8 * 64 if dtype == torch.float32 else 8 * 128
    narrow = gradient(grad, x[:, :few], index)
    assert [name for name, _ in launches] == [PRODUCT]
    assert torch.equal(wide[:, :few], narrow)
    assert_right(wide, grad, x, index)


def test_nothing_selected_launches_nothing(launches: list[tuple[str, tuple[int, ...]]]) -> None:
    grad, x = operands(40, 60, 9, torch.bfloat16)
    none = torch.empty(0, dtype=torch.int64)
    assert gradient(grad, x, none).shape == (0, 9)
    kernels.sparse_linear_gather(x, none, torch.empty(40, 0))
    kernels.sparse_linear_gather(x[:0], torch.tensor([3]), torch.empty(0, 1))
    assert launches == []


@DTYPES
def test_the_same_bits_again_and_transposed(dtype: torch.dtype) -> None:
    """Runs are added in one order; where the sums are written changes none of them."""
    grad, x = operands(1100, 30, 40, dtype)
    index = torch.arange(0, 30, 3)
    first, second = gradient(grad, x, index), gradient(grad, x, index)
    transposed = torch.full((40, 10), torch.nan)
    kernels.sparse_linear_backward(grad, x, index, transposed.t())
    assert torch.equal(first, second) and torch.equal(first, transposed.t())


def test_runs_are_added_from_the_first_to_the_last() -> None:
    """2^24 and then ones, a token each: in order every one is lost to rounding, the other way round none is."""
    tokens = 4 * kernels.SHORTEST_RUN
    for position, expected in ((0, 2.0**24), (tokens - 1, 2.0**24 + 3)):
        grad = torch.zeros(tokens, 1)
        grad[kernels.SHORTEST_RUN // 2 :: kernels.SHORTEST_RUN] = 1
        grad[position // kernels.SHORTEST_RUN * kernels.SHORTEST_RUN :][: kernels.SHORTEST_RUN] = 0
        grad[position] = 2.0**24
        out = gradient(grad, torch.ones(tokens, 1), torch.tensor([0]))
        assert abs(out.item() - expected) <= 1
        if position == 0:
            assert out.item() == expected


@pytest.mark.parametrize("tokens", [0, 1, 31, 256, 511, 512, 2048, 100_000])
@pytest.mark.parametrize("tiles", [1, 3, 255, 256, 1000])
def test_runs_hold_every_token_once(tokens: int, tiles: int) -> None:
    run = kernels.run_length(tokens, tiles, 32)
    assert run % 32 == 0 and run > 0
    runs = -(-tokens // run)
    assert runs * tiles < 2 * max(tiles, kernels.PROGRAMS)
    if tiles >= kernels.PROGRAMS or tokens < 2 * kernels.SHORTEST_RUN:
        assert runs <= 1
    elif tokens >= 100_000:
        assert runs * tiles >= kernels.PROGRAMS // 2


@DTYPES
def test_operands_of_two_dtypes(dtype: torch.dtype) -> None:
    grad, x = operands(40, 20, 24, dtype)
    x = x.to(torch.float32 if dtype != torch.float32 else torch.bfloat16)
    index = torch.arange(0, 20, 2)
    assert_right(gradient(grad, x, index), grad, x, index)


@DTYPES
@pytest.mark.parametrize(("tokens", "features", "count"), [(1, 1, 1), (70, 40, 11), (3, 900, 600)])
def test_gathers_exactly(dtype: torch.dtype, tokens: int, features: int, count: int) -> None:
    """NaN, infinities and subnormal numbers too; from rows that lie apart, into rows that do."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(width)
    x = torch.randint(limits.min, limits.max, (tokens, features + 3), dtype=width).view(dtype)[:, 1:-2]
    index = torch.randperm(features)[:count].sort().values
    whole = torch.full((tokens, count + 2), torch.nan).to(dtype)
    kernels.sparse_linear_gather(x, index, whole[:, 1:-1])
    assert torch.equal(whole[:, 1:-1].contiguous().view(width), x[:, index].view(width))
    assert whole[:, 0].isnan().all() and whole[:, -1].isnan().all()
