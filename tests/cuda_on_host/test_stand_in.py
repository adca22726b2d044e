"""The stand-in itself: its kernels compute what CUDA's would, and each mistake in one is found and named."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_on_host.build import HERE, Build, translate
from tests.cuda_on_host.library import Library, library

KERNELS = HERE / "kernels.cu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels() -> Library:
    return library(Build((KERNELS,)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def run(kernels: Library, name: str, *arguments: Tensor | int, withheld: Tensor | None = None) -> None:
    """Calls a kernel with tensors, which are its memory, and sizes. Raises what it did wrong."""
    tensors = {f"tensor {i}": x for i, x in enumerate(arguments) if isinstance(x, Tensor) and x is not withheld}
    kernels.give(**tensors)
    given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    function = kernels.functions[name]
    function.restype = ctypes.c_char_p
    error = function(*given)
    if error is not None:
        raise RuntimeError(error.decode())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (5, 512), (70, 33), (2, 1030)])
def test_sums_by_shuffles_and_shared_memory(kernels: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, sums = torch.rand(shape).to(dtype), torch.full((shape[0],), torch.nan)
    run(kernels, f"sum_rows_{name_of(dtype)}", x, sums, *shape)
    assert torch.allclose(sums.double(), x.double().sum(1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (50, 23), (3, 100)])
def test_tiles_in_shared_memory(kernels: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, turned = torch.randint(-128, 128, shape).to(dtype), torch.zeros(shape[::-1], dtype=dtype)
    run(kernels, f"transpose_{name_of(dtype)}", x, turned, *shape)
    assert torch.equal(turned, x.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_and_what_lies_between(kernels: Library, dtype: torch.dtype) -> None:
    """As PyTorch converts them: all patterns, and the middles between neighbors, which go to the even one."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    exact = numbers[numbers.isfinite()].float().sort().values
    middles = (exact[1:].double() + exact[:-1].double()).div(2).float()
    beyond = torch.tensor([65519.0, 65520.0, 1e30, 3e38, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([exact, middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20), beyond])
    x = torch.cat([x, x[: -len(x) % 32]])
    y = torch.full_like(x, torch.nan)
    run(kernels, f"shift_{name_of(dtype)}", x, y, x.numel())
    own = x.to(dtype).float().view(-1, 32)
    left = torch.cat([own[:, :1], own[:, :-1]], 1)  # the first lane has no neighbor, and is added to itself
    assert torch.equal(y.nan_to_num(7.0), (own + left).flatten().nan_to_num(7.0))


@pytest.mark.parametrize("size", [1, 95, 96, 97, 500])
def test_atomics_and_votes(kernels: Library, size: int) -> None:
    x, counts, warps = torch.rand(size), torch.zeros(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(kernels, "count", x, counts, warps, size)
    assert torch.equal(counts, (x * 8).int().bincount(minlength=8).int())
    assert warps.item() == sum(bool((part >= 0.5).any()) for part in x.split(32))


def test_shuffles(kernels: Library) -> None:
    x, sums, running = torch.rand(32), torch.zeros(32), torch.zeros(32)
    run(kernels, "scan", x, sums, running)
    assert torch.allclose(sums, x.sum().expand(32))
    assert torch.allclose(running, x.cumsum(0) - x[0], atol=1e-6)


MISTAKES = {
    "sum_rows_no_barrier": "uninitialized: reads 4 bytes of shared memory that no thread of the block wrote",
    "sum_rows_nobody_wrote": "uninitialized: reads 4 bytes of shared memory",
    "sum_rows_divergent": "a barrier that not every thread of the block or the mask reaches",
    "sum_rows_misaligned": "misaligned: reads 16 bytes of tensor 0 at byte 4 of",
    "sum_rows_lane_left_out": "a lane calls a warp function with a mask that leaves it out|a lane takes the value",
    "sum_rows_too_many_threads": "invalid configuration argument",
    "transpose_no_barrier": "race: writes shared memory, which thread .* of block 0 read with no barrier|uninitialized",
    "transpose_same_address": r"race: .* tensor 1 at byte 0 of 3200, which thread .* of block 0",
    "transpose_same_in_blocks": r"race: writes tensor 1 at byte 80 of 3200, which thread .* of block 0 wrote",
    "shift_one_too_far": r"out of bounds: writes 4 bytes of tensor 1 at byte 400 of 400",
    "shift_one_too_early": r"out of bounds: reads 4 bytes of tensor 0 at byte -4 of 400",
    "shift_no_warp_barrier": "race: reads shared memory, which thread .* wrote with no barrier",
    "count_plain_and_atomic": "race: .* tensor 1 at byte 0 of 32, which thread .* wrote",
}
"""Kernels with a mistake, and what is said of it."""


def provoke(kernels: Library, name: str) -> None:
    if name.startswith("sum_rows"):
        run(kernels, name, torch.rand(4, 256), torch.zeros(4), 3, 256)
    elif name.startswith("transpose"):
        run(kernels, name, torch.rand(20, 40), torch.zeros(40, 20), 20, 40)
    elif name.startswith("shift"):
        run(kernels, name, torch.rand(101)[1:], torch.zeros(101)[1:], 100)
    else:
        run(kernels, name, torch.zeros(200), *(torch.zeros(n, dtype=torch.int32) for n in (8, 1)), 200)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(kernels: Library, name: str) -> None:
    with pytest.raises(RuntimeError, match=MISTAKES[name]):
        provoke(kernels, name)
    # What comes after it runs as if nothing had been.
    test_tiles_in_shared_memory(kernels, torch.float32, (50, 23))


def test_memory_that_a_launch_was_not_given(kernels: Library) -> None:
    x, y = torch.rand(100), torch.zeros(100)
    with pytest.raises(RuntimeError, match=r"shift_kernel.*, block 0, thread 0: out of bounds: reads 4 bytes of"):
        run(kernels, "shift_float16", x, y, 100, withheld=x)


def test_a_captured_launch_runs_when_it_is_replayed(kernels: Library) -> None:
    x, y = torch.ones(64), torch.zeros(64)
    with kernels.captured() as replay:
        run(kernels, "shift_float16", x, y, 64)
    assert not y.any()
    for number in (1.0, 2.0):
        x.fill_(number)
        replay()
        assert torch.equal(y, torch.full((64,), 2 * number))


def test_translation_keeps_the_lines() -> None:
    source = "__global__ void f(const __grid_constant__ Table<A, B> table,\n int n);\nf<A><<<1,\n 2>>>(t, 3);\n"
    header, line, *translated = translate(source, Path("f.cu"), "space").split("\n")
    assert line == '#line 1 "f.cu"' and header == '#include "cuda_runtime.h"'
    assert translated == [
        "__global__ void f(const Table<A, B>& table,",
        " int n);",
        '::cuda_on_host::launch("f<A>", {1,',
        " 2}, [](const auto&... given) { f<A>(given...); }, t, 3);",
        "",
    ]


@pytest.mark.slow
def test_it_is_cuda(tmp_path: Path) -> None:
    """What the stand-in takes, nvcc takes too."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-cubin", str(KERNELS), "-o", str(tmp_path / "kernels.cubin")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
