"""Runs the benchmarks as cases of pytest-benchmark, prints their ratios and keeps their raw samples.

    pytest bench                                     everything; some half an hour on a machine with nothing else to do
    pytest bench -k "sparse_adamw and rows"          some of it
    pytest bench --benchmark-json FILE               also writes bench/results, one file a benchmark

A case is a comparison: what pytest-benchmark times is one round, in which every way to do the work has its turn (see
`bench.interleaved`). Ratios, intervals and samples are in its extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import files, interleaved, machine

TABLES: list[str] = []
MULTIPLYING = ("bench_sparse_linear", "bench_columns_as_rows")
"""Benchmarks of operators that are matrix products, as all those of models are."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clue_fast benchmarks")
    group.addoption("--seconds", type=float, help="of sampling each comparison, instead of what it asks for")
    group.addoption("--processor-time", action="store_true", help="of one thread: for a machine that is busy")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors are")
    group.addoption("--results", type=Path, default=files.RESULTS, help="folder of the samples, bench/results")


def pytest_configure(config: pytest.Config) -> None:
    machine.keep_memory()
    machine.use_all_cores()
    machine.use_device(config.getoption("device"))
    if config.getoption("processor_time"):
        machine.use_processor_time()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["clue_fast"] = machine.describe()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    kept = [case["extra_info"] for case in output_json["benchmarks"]]
    files.save(
        config.getoption("results"), [entry for entry in kept if "entry" in entry]
    )  # a case that failed has none


def pytest_report_header() -> list[str]:
    return [line for line in [machine.warning()] if line]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for table in TABLES:
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _multiplied(request: pytest.FixtureRequest) -> None:
    """Products in 16 bits would take hours on a processor that has none of them."""
    given = getattr(request.node, "callspec", None)
    values = given.params.values() if given else ()
    narrow = any("float16" in str(getattr(value, "dtype", value)) for value in values)
    multiplies = request.node.path.parent.name == "model" or request.node.path.stem in MULTIPLYING
    if narrow and multiplies and not machine.multiplies_bfloat16():
        pytest.skip("this processor has no products of 16 bits")


@pytest.fixture
def keep(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Puts what a case found into its extra_info, and its table below the others."""

    def keep(entry: dict[str, Any], table: str, under: str, **about: Any) -> None:
        name = request.node.path.stem.removeprefix("bench_")
        benchmark.extra_info.update({"file": name, "under": under, "entry": entry} | about)
        TABLES.append(table)

    return keep


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float | None:
    """What --seconds says."""
    given: float | None = request.config.getoption("seconds")
    return given


@pytest.fixture
def compare(benchmark: Any, keep: Callable[..., None], seconds: float | None) -> Callable[..., None]:
    """Runs a comparison as one case of pytest-benchmark."""

    def compare(comparison: interleaved.Comparison) -> None:
        benchmark.group = comparison.title
        sampler = interleaved.Sampler(comparison.cases, comparison.seconds if seconds is None else seconds)
        benchmark.pedantic(sampler.round, rounds=sampler.rounds)
        if benchmark.enabled:  # with --benchmark-disable every case runs once, and there is nothing to compare
            result = interleaved.Result(comparison.title, sampler.samples, sampler.repeats, tuple(comparison.targets))
            keep(result.as_dict(), result.table(), "comparisons", ratios=result.ratios())

    return compare
