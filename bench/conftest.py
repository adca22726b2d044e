"""What the pytest-benchmark cases share: threads, and the machine beside the samples.

`pytest bench --benchmark-json FILE` keeps every sample with the machine it was taken on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine


def pytest_configure() -> None:
    machine.use_all_cores()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["clue_fast"] = machine.describe()


def pytest_report_header() -> list[str]:
    return [line for line in [machine.warning()] if line]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
