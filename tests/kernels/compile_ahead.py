"""Compiles every Triton kernel ahead of time, with no GPU: what each takes in registers, stack, spills and vectors.

    python tests/kernels/compile_ahead.py [--json] [--counterexamples] [--only LAUNCH] TARGET ...
    python tests/kernels/compile_ahead.py --record          writes compiled.json, below which no kernel may fall

The launch functions themselves are called, on CPU tensors, with a driver that names the wanted target and with the
launch replaced by nothing. So what is compiled is what a launch on that target compiles: the same block shapes,
number of warps and divisibility hints. It must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from clue_fast.kernels import (
    channel_statistics,
    conflict_score,
    gated_activation,
    launch,
    sparse_linear,
    sparse_optimizer,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
IN_ALL_FORMS = ("sm_90", "gfx942")
"""Targets that every form of a kernel is compiled for; others, whose registers are as many, in the main one alone."""
TOKENS, CHANNELS = 1024, 1536
DTYPES = (torch.bfloat16, torch.float32)  # float16 is as wide as bfloat16
CRITERIA = tuple(conflict_score.READS)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2")

RECORD = Path(__file__).with_name("compiled.json")
IDENTITY = ("target", "kernel", "launch", "dtype", "groups", "activation")
"""What tells one row from another."""
MOST = ("registers", "stack", "spills", "narrow_loads")
LEAST = ("load_bits", "store_bits")
"""What is held to the record: no more of the ones, no less of the others."""


# What a compiled kernel takes of its target


def cubin_usage(report: str) -> dict[str, int]:
    """Registers, bytes of stack, of spills to local memory and of shared memory in a report of `cuobjdump -res-usage`.

    Spilled registers are mostly counted as stack; the kernels here keep nothing else on it.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    if found is None:
        raise ValueError(f"no resource usage in {report!r}")
    return dict(zip(("registers", "stack", "shared", "spills"), map(int, found.groups()), strict=True))


def amdgcn_usage(assembly: str) -> dict[str, int]:
    """Registers, bytes of stack (scratch), spilled registers and shared memory in the metadata of AMD assembly."""

    def field(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{name} in the metadata")
        return int(found.group(1))

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
    }


AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "byte": 8, "short": 16}


def access_bits(assembly: str, kind: str) -> list[int]:
    """Width of every global load or store, in PTX or AMD assembly."""
    nvidia, amd = {"load": ("ld", "load"), "store": ("st", "store")}[kind]
    found = re.findall(rf"\b{nvidia}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", assembly)
    widths = [int(count or 1) * int(bits) for count, bits in found]
    if kind == "load":  # into shared memory, past the registers
        copied = re.findall(r"\bcp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", assembly)
        widths += [8 * int(size, 0) for size in copied]
    for suffix in re.findall(rf"\b(?:global|buffer)_{amd}_(\w+)", assembly):
        widths += [bits for name, bits in AMD_BITS.items() if re.fullmatch(rf"[us]?{name}(_d16\w*)?", suffix)]
    return widths


def vectors(assembly: str) -> dict[str, int]:
    """The widest load and store in bits; number of loads of 64 bits and more, and of narrower ones."""
    loads, stores = access_bits(assembly, "load"), access_bits(assembly, "store")
    wide = sum(bits >= 64 for bits in loads)
    return {
        "load_bits": max(loads),
        "store_bits": max(stores),
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
    }


def usage(kernel: CompiledKernel) -> dict[str, int]:
    """All of the above for one compiled kernel."""
    if "amdgcn" in kernel.asm:
        return amdgcn_usage(kernel.asm["amdgcn"]) | vectors(kernel.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    return cubin_usage(report.stdout) | vectors(kernel.asm["ptx"])


# What is compiled


def compiled_by(call: Callable[[], object], target: GPUTarget) -> list[CompiledKernel]:
    """The kernels that `call` would launch on `target`."""
    kernels: list[CompiledKernel] = []
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: str(target),
            get_current_stream=lambda device: 0,
        )
    )
    launch.options.cache_clear()
    CompiledKernel.launch_metadata = lambda *_: None
    CompiledKernel.run = property(lambda kernel: lambda *_: kernels.append(kernel))
    call()
    return kernels


def launches(dtype: torch.dtype, groups: int, activation: str) -> Iterator[partial[object]]:
    """Calls of every launch function with aligned inputs of this dtype."""
    gate, up, out, grad, grad_gate, grad_up = (torch.zeros(TOKENS, CHANNELS, dtype=dtype) for _ in range(6))
    group = torch.zeros(TOKENS, dtype=torch.int8)
    statistics = torch.zeros(groups, 5, CHANNELS, dtype=torch.float64)
    slopes = torch.zeros(groups, 3, CHANNELS, dtype=torch.float64)
    gradients = (grad, gate, up, grad_gate, grad_up, activation)

    if dtype == torch.float64:  # norms of heads
        yield partial(channel_statistics.channel_statistics, gate, group, statistics)
        yield partial(channel_statistics.channel_attribution, gate, grad, group, slopes)
        return
    yield partial(gated_activation.gated_activation, gate, up, out, activation)
    yield partial(gated_activation.gated_activation_record, gate, up, out, activation, group, statistics)
    for sums in ("moments", "magnitude"):
        yield partial(gated_activation.gated_activation_record, gate, up, out, activation, group, statistics, sums)
    yield partial(gated_activation.gated_activation_backward, *gradients)
    yield partial(gated_activation.gated_activation_backward_record, *gradients, group, slopes)
    yield partial(gated_activation.gated_activation_backward_record, *gradients, group, slopes, "magnitude")
    yield partial(channel_statistics.channel_statistics, gate, group, statistics)
    yield partial(channel_statistics.channel_attribution, gate, grad, group, slopes)
    if groups > 1:
        count, offsets = torch.ones(groups, 2, dtype=torch.int64), torch.tensor([0, 512, CHANNELS])
        for criterion in CRITERIA:
            score = torch.zeros(CHANNELS)
            yield partial(conflict_score.conflict_score, statistics, slopes, count, offsets, criterion, score)
            one_site, of_gradients = count[:, :1], conflict_score.READS[criterion][1]
            scoring = (criterion, one_site, slopes if of_gradients else None, score)
            yield partial(channel_statistics.channel_statistics, gate, group, statistics, *scoring)
            if of_gradients:
                scoring = (criterion, one_site, None, score)
                yield partial(channel_statistics.channel_attribution, gate, grad, group, slopes, *scoring)


def sparse_launches(dtype: torch.dtype) -> Iterator[partial[object]]:
    """Calls of the launch functions on a selected part of a weight of this dtype."""
    for part in ("rows", "columns"):
        for masters in ("masters", "stochastic"):
            yield partial(sparse_adamw, dtype, part, masters)
    yield partial(sparse_adamw, dtype, "rows", "stochastic", "captured")
    yield partial(sparse_sgd, dtype, "rows", "masters")
    for part in ("rows", "gathered rows", "columns"):
        yield partial(sparse_linear_backward, dtype, part)


def sparse_linear_backward(dtype: torch.dtype, part: str) -> None:
    """Gradient of a weight: of rows by their index, of so many features that they are gathered first, of columns."""
    features = {"gathered rows": 2048, "columns": 48}.get(part, 512)
    grad, x = torch.zeros(TOKENS, CHANNELS, dtype=dtype), torch.zeros(TOKENS, features, dtype=dtype)
    index = torch.arange(0, CHANNELS, 16) if part.endswith("rows") else None
    out = torch.zeros(CHANNELS if index is None else len(index), features)
    sparse_linear.sparse_linear_backward(grad, x, index, out)


def sparse_adamw(dtype: torch.dtype, part: str, masters: str, numbers: str = "") -> None:
    """One step on a sixteenth of the rows or columns of a weight; captured: with its numbers on the device."""
    sparse_optimizer.sparse_adamw(*sparse_step(dtype, part, masters, 2, numbers), 0.9, 0.999, 1e-8)


def sparse_sgd(dtype: torch.dtype, part: str, masters: str) -> None:
    """The same, with momentum."""
    sparse_optimizer.sparse_sgd(*sparse_step(dtype, part, masters, 1), 0.9)


def sparse_step(dtype: torch.dtype, part: str, masters: str, moments: int, numbers: str = "") -> tuple[Any, ...]:
    """What one step is given, up to the settings of its rule."""
    weight = torch.zeros(TOKENS, CHANNELS, dtype=dtype)
    dim = ("rows", "columns").index(part)
    index = torch.arange(0, weight.shape[dim], 16)
    value, grad, *kept = (weight.index_select(dim, index).float() for _ in range(2 + moments))
    place = "meta" if numbers == "captured" else "cpu"
    rates, whole = torch.ones(1, dtype=torch.float64, device=place), torch.ones(1, dtype=torch.int64, device=place)
    scale = torch.ones(1, device=place) if numbers == "captured" else None
    values, seed = ([value], None) if masters == "masters" else ([], whole)
    return values, [grad], *([m] for m in kept), [weight], [index], [dim], rates, rates, whole, seed, scale, scale


def compile_all(target: str, only: str = "") -> Iterator[dict[str, Any]]:
    """One row for each kernel: its name, what it was compiled for, what it takes; of all launch functions or one."""
    dtypes, cases = DTYPES[:1], [(torch.bfloat16, 2, "silu")]
    if target in IN_ALL_FORMS:
        dtypes = DTYPES
        cases += [(torch.bfloat16, 1, activation) for activation in ACTIVATIONS]
        cases += [(dtype, 2, "silu") for dtype in (torch.float32, torch.float64)]
    made = [(case, call) for case in cases for call in launches(*case)]
    made += [((dtype, 0, ""), call) for dtype in dtypes for call in sparse_launches(dtype)]
    seen = set()
    for (dtype, groups, activation), call in made:
        if not call.func.__name__.startswith(only):
            continue
        for kernel in compiled_by(call, TARGETS[target]):
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                compiled_for = {"dtype": str(dtype)[6:], "groups": groups, "activation": activation}
                yield {"kernel": kernel.name, "launch": name_of(call)} | compiled_for | usage(kernel)


def name_of(call: partial[object]) -> str:
    """Of the launch function, with the sums or criterion that it is given, or the part and its masters."""
    words = [argument for argument in call.args if isinstance(argument, str) and argument not in ACTIVATIONS]
    return " ".join([call.func.__name__, *words])


# The record


def sources() -> str:
    """A digest of what decides what is compiled: the kernels with their launches, this script, and the compiler."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in (*sorted(Path(launch.__file__).parent.glob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def worse(recorded: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    """What has fallen below the record, and kernels that it does not know; one line each."""

    def by_identity(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {tuple(row[name] for name in IDENTITY): row for row in rows}

    before, found = by_identity(recorded), []
    for identity, row in by_identity(rows).items():
        title = ", ".join(map(str, identity))
        if identity not in before:
            found.append(f"{title}: not in the record")
            continue
        old = before[identity]
        found += [f"{title}: {name} {old[name]} -> {row[name]}" for name in MOST if row[name] > old[name]]
        found += [f"{title}: {name} {old[name]} -> {row[name]}" for name in LEAST if row[name] < old[name]]
    return found


def write_record(rows: list[dict[str, Any]]) -> None:
    """Replaces compiled.json, a line a kernel, with the version of Triton and the digest of what was compiled."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = f'"triton": "{triton.__version__}", "sources": "{sources()}"'
    RECORD.write_text(f'{{{head}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


@triton.jit
def spilling_kernel(x, BLOCK: tl.constexpr):
    """Needs more registers than there are: a whole block stays alive in one warp."""
    value = tl.load(x + tl.arange(0, BLOCK))
    total = tl.sum(value, 0)
    tl.store(x + tl.arange(0, BLOCK), tl.exp(value) / total)


def compile_counterexamples(target: str) -> Iterator[dict[str, Any]]:
    """A kernel that spills, and one with data that is not aligned, to show that both are seen."""
    registers = {"cuda": 256, "hip": 512}[TARGETS[target].backend]
    block = TARGETS[target].warp_size * registers
    misaligned = torch.zeros(TOKENS, CHANNELS + 1)[:, 1:]
    group = torch.zeros(TOKENS, dtype=torch.int8)
    statistics = torch.zeros(1, 5, CHANNELS, dtype=torch.float64)
    for call in (
        lambda: spilling_kernel[(1,)](torch.zeros(block), block, num_warps=1),
        lambda: channel_statistics.channel_statistics(misaligned, group, statistics),
    ):
        for kernel in compiled_by(call, TARGETS[target]):
            yield {"kernel": kernel.name} | usage(kernel)


def main() -> None:
    """Print a table, or JSON for the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--counterexamples", action="store_true", help="compile what must fail the checks instead")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}, of all targets")
    parser.add_argument("--only", default="", metavar="LAUNCH", help="compile what one launch function launches")
    parser.add_argument("targets", nargs="*", metavar="TARGET", default=list(TARGETS), help=", ".join(TARGETS))
    arguments = parser.parse_args()
    compile_target = compile_counterexamples if arguments.counterexamples else partial(compile_all, only=arguments.only)
    rows = [{"target": name} | row for name in arguments.targets for row in compile_target(name)]
    if arguments.record:
        write_record(rows)
        return
    if arguments.json:
        print(json.dumps(rows))
        return
    names = list(rows[0])
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in names]
    for line in [names, *([str(row[name]) for name in names] for row in rows)]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
