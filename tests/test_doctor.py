"""doctor: what it says of backends and operators is what is so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import clue_fast
from clue_fast import ops
from clue_fast.cli import main
from clue_fast.env import diagnosis
from clue_fast.ops import backend as backends


def facts() -> dict[str, str]:
    """The lines of the diagnosis by their first word."""
    lines = [line.split(maxsplit=1) for line in diagnosis().splitlines() if line.startswith("  ")]
    return {name.rstrip(":"): rest for name, rest in lines}


def test_versions() -> None:
    assert diagnosis().startswith(f"clue_fast {clue_fast.__version__}, Python {platform.python_version()}")
    assert facts()["torch"] == torch.__version__


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("clue_fast.env.importlib.metadata.version", missing)
    assert facts()["datasets"] == facts()["peft"] == "not installed"


def test_every_backend_is_ready_or_has_a_reason() -> None:
    found = facts()
    for name, reason in ops.available().items():
        assert found[name] == ("ready" if reason is None else f"not used: {reason}")


def test_every_operator_has_its_backend() -> None:
    found = facts()
    for operator in backends.operators():
        assert found[operator].split(", ")[0] == f"cpu: {ops.choose(operator, 'cpu').name}"


@pytest.mark.skipif(ops.available()["cpp"] is not None, reason="no C++ extension")
def test_instruction_set() -> None:
    assert f"instruction_set {backends.extension().cpu_info()['instruction_set']}" in facts()["cpu"]


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_load_extension", lambda: (None, "the C++ extension is not built; do so"))
    monkeypatch.setattr(backends, "extension", lambda: None)
    assert facts()["cpp"] == "not used: the C++ extension is not built; do so"
    assert "no C++ extension" in facts()["cpu"]
    assert facts()["gated_activation"].startswith("cpu: reference")


def test_a_forced_backend_that_does_not_exist_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fpga")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "clue-fast: unknown backend 'fpga'; choose one of: cpp, cuda, reference, triton\n"
    )


def test_as_a_module() -> None:
    printed = subprocess.run([sys.executable, "-m", "clue_fast", "doctor"], capture_output=True, text=True, check=True)
    assert printed.stdout.startswith(f"clue_fast {clue_fast.__version__}")
    assert all(operator in printed.stdout for operator in backends.operators())
