"""A benchmark as `pytest bench` runs it: a case of pytest-benchmark that leaves ratios and raw samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_case_leaves_its_ratios_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    target = tmp_path / "all.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/ops/bench_conflict_score.py"]
    command += ["-k", "ratio and 16", "--seconds", "0", "--results", str(tmp_path), "--benchmark-json", str(target)]
    # In a worker of pytest-xdist, which this process may be, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conflict_score / eager" in done.stdout and "at most 1.000" in done.stdout
    (case,) = json.loads(target.read_text())["benchmarks"]
    assert case["stats"]["rounds"] == 11
    ratio = case["extra_info"]["ratios"]["conflict_score / eager"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    (comparison,) = json.loads((tmp_path / "conflict_score.json").read_text())["comparisons"]
    assert comparison == case["extra_info"]["entry"]
    assert {name: len(samples) for name, samples in comparison["samples"].items()} == {
        "conflict_score": 11,
        "eager": 11,
    }
