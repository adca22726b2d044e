from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels import compile_ahead

pytestmark = pytest.mark.timeout(1200)  # ptxas compiles for four targets, in minutes where the machine is busy

RECORD = compile_ahead.RECORD

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
KERNELS = {
    "gated_activation_fwd_kernel",
    "gated_activation_record_fwd_kernel",
    "gated_activation_bwd_kernel",
    "gated_activation_record_bwd_kernel",
    "channel_statistics_fwd_kernel",
    "channel_statistics_fold_kernel",
    "conflict_score_fwd_kernel",
    "sparse_linear_gather_kernel",
    "sparse_linear_bwd_kernel",
    "sparse_linear_fold_kernel",
    "sparse_optimizer_kernel",
    "sparse_optimizer_captured_kernel",
}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What compile_ahead.py prints, in a process of its own: this one may be set to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), "--json", *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(process.stdout)
    return rows


FRAME = {"channel_statistics_fold_kernel": 32}
"""Bytes of stack that ptxas may set aside without a spill, in a kernel that runs over sums and not over tokens."""


def spilling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["spills"] or row["stack"] > FRAME.get(row["kernel"], 0)]


def loading_value_by_value(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels over tokens and channels that load their data in less than 64 bits.

    The groups of the tokens are loaded narrowly, at most once a wide load, and the bounds of a run.
    """
    walking = [row for row in rows if row["kernel"].startswith(("gated_activation", "channel_statistics_fwd"))]
    assert walking
    return [row for row in walking if row["narrow_loads"] > row["wide_loads"] + 1]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What was compiled last."""
    content: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def kernels(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every kernel for every target, compiled in one process, in minutes; where nothing has changed, the record."""
    if record["sources"] == compile_ahead.sources():
        kept: list[dict[str, Any]] = record["kernels"]
        return kept
    return compiled(*TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "launch"), [("sm_80", "sparse_linear"), ("sm_100", "conflict_score"), ("gfx942", "sparse_linear")]
)
def test_what_is_recorded_is_what_is_compiled(target: str, launch: str, record: dict[str, Any]) -> None:
    """Of some kernels, since the same sources give the same kernels."""
    if record["sources"] != compile_ahead.sources():
        pytest.skip("the sources have changed, and everything is compiled anew")
    every = [row for row in record["kernels"] if row["target"] == target and row["launch"].startswith(launch)]
    assert compiled("--only", launch, target) == every != []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_wide_loads(target: str, kernels: list[dict[str, Any]]) -> None:
    rows = [row for row in kernels if row["target"] == target]
    assert {row["kernel"] for row in rows} == KERNELS
    assert not spilling(rows)
    assert not loading_value_by_value(rows)


@pytest.mark.slow
def test_no_kernel_is_worse_than_recorded(record: dict[str, Any], kernels: list[dict[str, Any]]) -> None:
    """Registers, stack, spills, narrow loads, width of vectors; `compile_ahead.py --record` accepts a change."""
    installed = version("triton")
    if record["triton"] != installed:
        pytest.skip(f"{RECORD.name} is of triton {record['triton']}, and {installed} compiles otherwise")
    assert not compile_ahead.worse(record["kernels"], kernels)


def test_what_is_worse_is_named(record: dict[str, Any]) -> None:
    recorded = record["kernels"]
    assert {row["target"] for row in recorded} == set(TARGETS)
    assert len({tuple(row[name] for name in compile_ahead.IDENTITY) for row in recorded}) == len(recorded)
    assert compile_ahead.worse(recorded, recorded) == []
    better = [row | {"registers": row["registers"] - 1, "load_bits": 256} for row in recorded]
    assert compile_ahead.worse(recorded, better) == []
    first = recorded[0]
    for name, change in (*((name, 1) for name in compile_ahead.MOST), *((name, -1) for name in compile_ahead.LEAST)):
        (line,) = compile_ahead.worse(recorded, [first | {name: first[name] + change}, *recorded[1:]])
        assert line.endswith(f": {name} {first[name]} -> {first[name] + change}") and first["kernel"] in line
    (line,) = compile_ahead.worse(recorded[1:], recorded)
    assert line.endswith("not in the record")


@pytest.mark.slow
def test_the_checks_can_fail() -> None:
    rows = compiled("--counterexamples", *TARGETS)
    assert [row["target"] for row in spilling(rows) if row["kernel"] == "spilling_kernel"] == TARGETS
    assert [row["target"] for row in loading_value_by_value(rows)] == TARGETS
